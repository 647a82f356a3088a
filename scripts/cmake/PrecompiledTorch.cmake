# Torch's headers take ten seconds per file to parse: they are precompiled once for all libraries and programs alike.
# -DCMAKE_DISABLE_PRECOMPILE_HEADERS=ON builds without, which finds a file that leaves out an #include of its own.
#
# xlstm_precompile_torch(<target>...)   targets that link torch_wheel and xlstm_options and have no flags of their own
file(CONFIGURE OUTPUT ${PROJECT_BINARY_DIR}/precompiled_torch.cpp CONTENT "")  # a target wants a source
add_library(xlstm_precompiled_torch OBJECT EXCLUDE_FROM_ALL ${PROJECT_BINARY_DIR}/precompiled_torch.cpp)
target_link_libraries(xlstm_precompiled_torch PRIVATE xlstm_options torch_wheel)
target_precompile_headers(xlstm_precompiled_torch PRIVATE
  <torch/csrc/autograd/custom_function.h> <torch/library.h> <torch/nn/module.h>)

function(xlstm_precompile_torch)
  foreach(target ${ARGN})
    target_precompile_headers(${target} REUSE_FROM xlstm_precompiled_torch)
  endforeach()
endfunction()
