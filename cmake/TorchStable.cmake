# torch_stable: PyTorch's stable ABI as an INTERFACE target, from the folder of the torch package (PYFUSED_TORCH_DIR).
#
# find_package(Torch) is not used: with a CUDA build of torch it demands the CUDA toolkit even for CPU sources, and it
# rewrites the architecture flags.
set(PYFUSED_TORCH_DIR "" CACHE PATH "Folder of the torch package, the one that holds include/ and lib/")
if(NOT EXISTS "${PYFUSED_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "PYFUSED_TORCH_DIR must be the folder of a torch package from 2.11 on, got "
                      "'${PYFUSED_TORCH_DIR}'. setup.py passes it.")
endif()

add_library(torch_stable INTERFACE)
target_include_directories(torch_stable SYSTEM INTERFACE "${PYFUSED_TORCH_DIR}/include")
target_link_libraries(torch_stable INTERFACE "${PYFUSED_TORCH_DIR}/lib/libtorch_cpu.so")
# The oldest torch whose stable ABI is used: the library runs with that one and every later one.
target_compile_definitions(torch_stable INTERFACE TORCH_TARGET_VERSION=0x020b000000000000)

# torch_full: the headers that the stable ABI leaves out, for a library that fits this torch alone.
add_library(torch_full INTERFACE)
target_include_directories(torch_full SYSTEM INTERFACE "${PYFUSED_TORCH_DIR}/include")
target_link_libraries(
  torch_full INTERFACE "${PYFUSED_TORCH_DIR}/lib/libtorch_python.so" "${PYFUSED_TORCH_DIR}/lib/libtorch_cpu.so"
                       "${PYFUSED_TORCH_DIR}/lib/libc10.so")

# torch_stable_cuda: the CUDA side of the stable ABI, which lives in libtorch_cuda. A torch built for the CPU lacks that
# library; an empty one of the same name then stands in at link time, so that what is built also serves a torch with CUDA.
add_library(torch_stable_cuda INTERFACE)
target_link_libraries(torch_stable_cuda INTERFACE torch_stable)
target_compile_definitions(torch_stable_cuda INTERFACE USE_CUDA)
if(EXISTS "${PYFUSED_TORCH_DIR}/lib/libtorch_cuda.so")
  target_link_libraries(torch_stable_cuda INTERFACE "${PYFUSED_TORCH_DIR}/lib/libtorch_cuda.so")
else()
  file(WRITE "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp" "int pyfused_torch_cuda_stub;\n")
  add_library(torch_cuda_stub SHARED EXCLUDE_FROM_ALL "${CMAKE_CURRENT_BINARY_DIR}/torch_cuda_stub.cpp")
  set_target_properties(torch_cuda_stub PROPERTIES OUTPUT_NAME torch_cuda LIBRARY_OUTPUT_DIRECTORY stub)
  target_link_libraries(torch_stable_cuda INTERFACE -Wl,--no-as-needed torch_cuda_stub)
endif()
