# The installed wheel of torch, that of Python3_EXECUTABLE, for the project and for the package file that it installs. Sets
# TORCH_VERSION ("missing": there is none), TORCH_MINOR (2.15), TORCH_CUDA_MAJOR (empty: without CUDA), TORCH_DIR and
# TORCH_LIB_DIR, and defines the imported targets `torch_wheel` and, with CUDA, `torch_cuda_wheel`: libraries of torch and
# the CUDA runtime that torch itself loads.
#
# Why not find_package(Torch): the wheel's own config file fails without a CUDA toolkit, enables the CUDA language by
# itself and picks GPU architectures that the installed nvcc may not know. All that is needed is a few libraries and two
# include folders. find_spec avoids the two seconds of `import torch`.
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c "import importlib.util as u; s = u.find_spec('torch'); print(s and s.origin or '')"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
set(TORCH_VERSION missing)
set(TORCH_MINOR missing)
set(TORCH_CUDA_MAJOR "")
if(NOT _torch)
  return()
endif()
get_filename_component(TORCH_DIR ${_torch} DIRECTORY)
set(TORCH_LIB_DIR ${TORCH_DIR}/lib)
file(STRINGS ${TORCH_DIR}/version.py _line REGEX "^__version__ *=")
string(REGEX MATCH "([0-9]+\\.[0-9]+)\\.[0-9]+" TORCH_VERSION "${_line}")
set(TORCH_MINOR ${CMAKE_MATCH_1})
file(STRINGS ${TORCH_DIR}/version.py _line REGEX "^cuda.*=")
if(_line MATCHES "'([0-9]+)\\.[0-9]+'" AND EXISTS ${TORCH_LIB_DIR}/libc10_cuda.so)
  set(TORCH_CUDA_MAJOR ${CMAKE_MATCH_1})
endif()
if(TARGET torch_wheel)
  return()
endif()

add_library(torch_wheel INTERFACE IMPORTED GLOBAL)
target_include_directories(torch_wheel SYSTEM INTERFACE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
# The BLAS that the CPU kernels call is inside libtorch_cpu.so on x86-64 and a library beside it on aarch64.
file(GLOB _blas ${TORCH_LIB_DIR}/libnvpl_blas_lp64_*.so.* ${TORCH_LIB_DIR}/libopenblas*.so*)
target_link_libraries(torch_wheel INTERFACE
  ${TORCH_LIB_DIR}/libtorch.so ${TORCH_LIB_DIR}/libtorch_cpu.so ${TORCH_LIB_DIR}/libc10.so ${_blas})
# libtorch.so pulls in libtorch_cuda.so where the wheel has it: its registrations must not be dropped as "unused". The C++
# library comes first: libtorch.so of torch 2.11 has std::filesystem::remove_all, too, and that one calls a null pointer.
target_link_options(torch_wheel INTERFACE -Wl,--no-as-needed -lstdc++)

if(TORCH_CUDA_MAJOR)
  add_library(torch_cuda_wheel INTERFACE IMPORTED GLOBAL)
  target_link_libraries(torch_cuda_wheel INTERFACE ${TORCH_LIB_DIR}/libtorch_cuda.so ${TORCH_LIB_DIR}/libc10_cuda.so)
  # The runtime of torch's own packages where it has them: the toolkit's may be older than torch can bear.
  find_file(XLSTM_CUDART libcudart.so.${TORCH_CUDA_MAJOR} NO_DEFAULT_PATH PATHS
    ${TORCH_DIR}/../nvidia/cu${TORCH_CUDA_MAJOR}/lib ${TORCH_DIR}/../nvidia/cuda_runtime/lib ${TORCH_LIB_DIR})
  if(XLSTM_CUDART)
    target_link_libraries(torch_cuda_wheel INTERFACE ${XLSTM_CUDART})
  endif()
endif()
