# The libraries for C++ projects: as targets libxlstm::... for those that add this folder, and installed, with the same
# names, for find_package(libxlstm). The plain install is what setup.py packs, so this one has a component of its own:
#   cmake --install build --component cpp --prefix PREFIX
set(_models xlstm_options xlstm_ops xlstm_nn xlstm_models)
set(_inference xlstm_core xlstm_data xlstm_config xlstm_inference)
set(_parts models)
if(XLSTM_BUILD_TRAIN)
  list(APPEND _parts inference)
endif()
foreach(part ${_parts})
  foreach(target ${_${part}})
    add_library(libxlstm::${target} ALIAS ${target})
  endforeach()
endforeach()
if(NOT PROJECT_IS_TOP_LEVEL)
  return()
endif()
if(NOT yaml-cpp_FOUND)  # fetched and linked from the build tree: another project would not find it
  list(REMOVE_ITEM _parts inference)
endif()

set(_cpp COMPONENT cpp EXCLUDE_FROM_ALL)
set(_package lib/cmake/libxlstm)
foreach(part ${_parts})
  install(TARGETS ${_${part}} EXPORT libxlstm-${part} DESTINATION lib ${_cpp})
  install(EXPORT libxlstm-${part} NAMESPACE libxlstm:: DESTINATION ${_package} ${_cpp})
endforeach()
include(CMakePackageConfigHelpers)
set(_written ${PROJECT_BINARY_DIR}/package)
configure_file(${CMAKE_CURRENT_LIST_DIR}/libxlstm-config.cmake.in ${_written}/libxlstm-config.cmake @ONLY)
write_basic_package_version_file(${_written}/libxlstm-config-version.cmake COMPATIBILITY SameMinorVersion)
install(FILES ${_written}/libxlstm-config.cmake ${_written}/libxlstm-config-version.cmake
  ${CMAKE_CURRENT_LIST_DIR}/TorchWheel.cmake DESTINATION ${_package} ${_cpp})

# Headers keep their paths in a folder of their own: csrc/ and train/ are no names for PREFIX/include.
set(_include include/libxlstm)
set(_folders nn models)
if("inference" IN_LIST _parts)
  list(APPEND _folders core data config)
  get_target_property(_sources xlstm_inference SOURCES)  # the other headers of train/ are the trainer's
  foreach(source ${_sources})
    string(REPLACE .cpp .h header train/${source})
    install(FILES ${header} DESTINATION ${_include}/train ${_cpp} OPTIONAL)
  endforeach()
endif()
foreach(folder ${_folders})
  install(DIRECTORY csrc/${folder} DESTINATION ${_include}/csrc ${_cpp} FILES_MATCHING PATTERN "*.h")
endforeach()
foreach(name block_linear causal_conv1d gated_linear_attention gated_scan linear_cross_entropy mlstm norm selective_scan
    slstm wkv)
  install(FILES csrc/ops/${name}.h DESTINATION ${_include}/csrc/ops ${_cpp})
endforeach()
