# _ops_cuda from csrc/cuda/*.cu and *.cpp, by PYFUSED_CUDA; csrc/cuda/cutlass/*.cu, by PYFUSED_CUTLASS.
set(PYFUSED_CUDA_VERSION "")
set(PYFUSED_CUDA_ARCHITECTURES "")
set(PYFUSED_CUTLASS_VERSION "")

# A torch without CUDA has no use for it; ON builds it all the same, for whoever checks that it compiles.
if(PYFUSED_CUDA STREQUAL "OFF" OR (PYFUSED_CUDA STREQUAL "AUTO" AND NOT PYFUSED_TORCH_CUDA))
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(PYFUSED_CUDA STREQUAL "ON")
    message(FATAL_ERROR "PYFUSED_CUDA=ON needs nvcc: install the CUDA toolkit and put nvcc on PATH or name it in CUDACXX.")
  endif()
  message(WARNING "pyfused is built without its CUDA kernels, although this torch has CUDA: there is no nvcc.")
  return()
endif()

# An A100 or anything of its generation, an H100 or H200 with its own instructions, and code that later GPUs compile.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 90-virtual)
endif()
enable_language(CUDA)
if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12)
  message(FATAL_ERROR "pyfused's CUDA kernels need nvcc from 12 on (C++20), got ${CMAKE_CUDA_COMPILER_VERSION}; "
                      "name another one in CUDACXX, or build with PYFUSED_CUDA=OFF.")
endif()
set(PYFUSED_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
list(JOIN CMAKE_CUDA_ARCHITECTURES "," PYFUSED_CUDA_ARCHITECTURES)

# The kernels see no torch header: objects of their own, which stay when another torch is built against.
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/cuda/*.cu)
add_library(pyfused_cuda_kernels OBJECT ${cuda_kernels})
set_target_properties(pyfused_cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
                                                      CUDA_VISIBILITY_PRESET hidden)
target_include_directories(pyfused_cuda_kernels PRIVATE csrc)
# ptxas says where registers do not suffice; with CMAKE_COMPILE_WARNING_AS_ERROR that is an error, like any warning.
target_compile_options(pyfused_cuda_kernels PRIVATE -Xcompiler=-Wall,-Wextra -Xptxas=-warn-spills,-warn-lmem-usage)

include(cmake/Cutlass.cmake)  # sets PYFUSED_CUTLASS_VERSION; PYFUSED_CUTLASS_OBJECTS, empty where there are none

file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cpp)
add_library(_ops_cuda MODULE ${cuda_sources} $<TARGET_OBJECTS:pyfused_cuda_kernels> ${PYFUSED_CUTLASS_OBJECTS})
set_target_properties(_ops_cuda PROPERTIES PREFIX "" LINKER_LANGUAGE CUDA)
target_include_directories(_ops_cuda PRIVATE csrc)
target_include_directories(_ops_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(_ops_cuda PRIVATE torch_stable_cuda pyfused_warnings)
# The CUDA runtime is linked in, whatever version of it torch brings, and nobody else's calls go to this copy.
target_link_options(_ops_cuda PRIVATE -Wl,--exclude-libs,ALL)
if(PYFUSED_TORCH_CUDA)
  target_link_options(_ops_cuda PRIVATE -Wl,--no-undefined -Wl,--allow-shlib-undefined)
endif()
