# csrc/cuda/cutlass/*.cu, for sm_90a alone, where CUTLASS's headers are: PyPI's nvidia-cutlass has them, setup.py finds it.
set(PYFUSED_CUTLASS AUTO CACHE STRING "Kernels from CUTLASS: AUTO (where its headers are and sm_90a is built), ON or OFF")
set_property(CACHE PYFUSED_CUTLASS PROPERTY STRINGS AUTO ON OFF)
set(PYFUSED_CUTLASS_DIR "" CACHE PATH "Folder of CUTLASS's headers, the one that holds cutlass/ and cute/")
set(PYFUSED_CUTLASS_OBJECTS "")
if(NOT PYFUSED_CUTLASS MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "PYFUSED_CUTLASS must be AUTO, ON or OFF, got '${PYFUSED_CUTLASS}'.")
endif()
if(PYFUSED_CUTLASS STREQUAL "OFF")
  return()
endif()

set(version_file "${PYFUSED_CUTLASS_DIR}/cutlass/version.h")
if(NOT PYFUSED_CUTLASS_DIR OR NOT EXISTS "${version_file}")
  if(PYFUSED_CUTLASS STREQUAL "ON")
    message(FATAL_ERROR "PYFUSED_CUTLASS=ON needs CUTLASS's headers: pip install --no-deps nvidia-cutlass, or name their "
                        "folder in CMAKE_ARGS=-DPYFUSED_CUTLASS_DIR=..., got '${PYFUSED_CUTLASS_DIR}'.")
  endif()
  return()
endif()
if(NOT "90a-real" IN_LIST CMAKE_CUDA_ARCHITECTURES AND NOT "90a" IN_LIST CMAKE_CUDA_ARCHITECTURES)
  if(PYFUSED_CUTLASS STREQUAL "ON")
    message(FATAL_ERROR "PYFUSED_CUTLASS=ON needs 90a-real in CMAKE_CUDA_ARCHITECTURES, got '${CMAKE_CUDA_ARCHITECTURES}'.")
  endif()
  return()
endif()
file(STRINGS "${version_file}" parts REGEX "#define CUTLASS_(MAJOR|MINOR|PATCH) ")
string(REGEX MATCHALL "[0-9]+" parts "${parts}")
list(JOIN parts "." PYFUSED_CUTLASS_VERSION)

file(GLOB cutlass_kernels CONFIGURE_DEPENDS csrc/cuda/cutlass/*.cu)
add_library(pyfused_cutlass_kernels OBJECT ${cutlass_kernels})
set_target_properties(
  pyfused_cutlass_kernels
  PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF CUDA_VISIBILITY_PRESET hidden
             CUDA_ARCHITECTURES 90a-real)
target_include_directories(pyfused_cutlass_kernels PRIVATE csrc)
target_include_directories(pyfused_cutlass_kernels SYSTEM PRIVATE "${PYFUSED_CUTLASS_DIR}")
get_target_property(options pyfused_cuda_kernels COMPILE_OPTIONS)
target_compile_options(pyfused_cutlass_kernels PRIVATE ${options} --expt-relaxed-constexpr)
set_source_files_properties(csrc/cuda/lora_concat.cu csrc/cuda/ia3_linear.cu
                            PROPERTIES COMPILE_DEFINITIONS PYFUSED_CUTLASS)
set(PYFUSED_CUTLASS_OBJECTS $<TARGET_OBJECTS:pyfused_cutlass_kernels>)
