# _ops_cuda from csrc/cuda/*.cu and *.cpp, by PYFUSED_CUDA.
set(PYFUSED_CUDA_VERSION "")
set(PYFUSED_CUDA_ARCHITECTURES "")

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu csrc/cuda/*.cpp)
if(PYFUSED_CUDA STREQUAL "ON" AND NOT cuda_sources)
  message(FATAL_ERROR "PYFUSED_CUDA=ON, but this version of pyfused has no CUDA sources; use AUTO or OFF.")
endif()
if(PYFUSED_CUDA STREQUAL "OFF" OR NOT cuda_sources)
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PYFUSED_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PYFUSED_CUDA=ON needs nvcc: install the CUDA toolkit and put nvcc on PATH or name it in CUDACXX.")
  endif()
  return()
endif()

# An A100 or anything of its generation, an H100 or H200 with its own instructions, and code that later GPUs compile.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
enable_language(CUDA)
set(PYFUSED_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN CMAKE_CUDA_ARCHITECTURES "," PYFUSED_CUDA_ARCHITECTURES)

add_library(_ops_cuda MODULE ${cuda_sources})
set_target_properties(_ops_cuda PROPERTIES PREFIX "" CUDA_STANDARD 20 CUDA_VISIBILITY_PRESET hidden)
target_include_directories(_ops_cuda PRIVATE csrc ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(_ops_cuda PRIVATE torch_stable_cuda pyfused_warnings)
