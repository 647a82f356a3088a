# Finds the installed wheel of torch and defines the imported target `torch_wheel`.
#
# Why not find_package(Torch): the wheel's own config file fails without a CUDA toolkit, enables the CUDA language by
# itself and picks GPU architectures that the installed nvcc may not know. All that is needed is three libraries and two
# include folders. find_spec avoids the two seconds of `import torch`.
find_package(Python3 COMPONENTS Interpreter REQUIRED)
execute_process(
  COMMAND ${Python3_EXECUTABLE} -c
    "import importlib.util as u, os, sys; s = u.find_spec('torch'); sys.exit('torch is not installed for ' + sys.executable) if s is None else print(os.path.dirname(s.origin))"
  OUTPUT_VARIABLE TORCH_DIR OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
file(STRINGS ${TORCH_DIR}/version.py _version_line REGEX "^__version__ *=")
string(REGEX MATCH "[0-9]+\\.[0-9]+\\.[0-9]+" TORCH_VERSION "${_version_line}")
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "libxlstm needs torch 2.11 or newer; ${TORCH_DIR} holds ${TORCH_VERSION}. pip install -U torch")
endif()
set(TORCH_LIB_DIR ${TORCH_DIR}/lib)

add_library(torch_wheel INTERFACE)
target_include_directories(torch_wheel SYSTEM INTERFACE
  ${TORCH_DIR}/include ${TORCH_DIR}/include/torch/csrc/api/include)
target_link_libraries(torch_wheel INTERFACE
  ${TORCH_LIB_DIR}/libtorch.so ${TORCH_LIB_DIR}/libtorch_cpu.so ${TORCH_LIB_DIR}/libc10.so)
# libtorch.so pulls in libtorch_cuda.so where the wheel has it: its registrations must not be dropped as "unused".
target_link_options(torch_wheel INTERFACE -Wl,--no-as-needed)
message(STATUS "torch ${TORCH_VERSION} in ${TORCH_DIR}")
