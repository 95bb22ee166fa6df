// What kernels need of their compiler and GPU: launches, shared memory, tensor-core and copy instructions. The only
// file that knows whether nvcc or the emulation compiles them: with PYFUSED_EMULATE_CUDA, tests/emulation runs them on
// the CPU.
#pragma once

#include <cstdint>

#if defined(PYFUSED_EMULATE_CUDA)

#include "cuda_emu.h"

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#undef NDEBUG  // PF_REQUIRE holds in every build
#include <cassert>
#include <stdexcept>
#include <string>
#include <type_traits>

// What a kernel finds in its arguments that would lead it astray ends the process's work on this GPU, as torch's own
// indexing does; the host cannot know without waiting.
#define PF_REQUIRE(condition, message) assert((condition) && message)

// PF_LAUNCH(grid, block, shared_bytes, stream, kernel, arguments...) runs a kernel; a template-id with a comma goes in
// parentheses. A launch that CUDA refuses is a std::runtime_error with the kernel's name and CUDA's sentence.
#define PF_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  ::pyfused::launch_kernel(#kernel, grid, block, shared_bytes, stream, kernel, __VA_ARGS__)

// T* name: the dynamic shared memory of the block, on 128 bytes.
#define PF_DYN_SMEM(T, name)                                               \
  extern __shared__ __align__(128) unsigned char pyfused_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(pyfused_dynamic_shared)

namespace pyfused {

inline void check_launch(const char* kernel, cudaError_t error) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // or the runtime keeps it, and the next to ask, as CUTLASS does, takes it for its own
  throw std::runtime_error("pyfused: launching " + std::string(kernel) + ": " + cudaGetErrorString(error));
}

template <class... Parameters>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  if (shared_bytes > 48 * 1024) {  // more than every kernel may have unasked
    check_launch(name, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                            static_cast<int>(shared_bytes)));
  }
  void* addresses[] = {&arguments...};
  check_launch(name, cudaLaunchKernel(kernel, grid, block, addresses, shared_bytes, stream));
}

// d += a b on 16 x 16 by 16 x 8 tiles of bf16 or fp16, summed in fp32.
template <class T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

// d += a b on 16 x 8 by 8 x 8 tiles of TF32, summed in fp32. The low 13 bits of a and b are not looked at.
__device__ __forceinline__ void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += a b on 8 x 4 by 4 x 8 tiles of fp64.
__device__ __forceinline__ void mma_m8n8k4_f64(double (&d)[2], double a, double b) {
  asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
               : "+d"(d[0]), "+d"(d[1])
               : "d"(a), "d"(b));
}

// Bits of the nearest number with 10 mantissa bits, ties away from zero; the low 13 bits are zero.
__device__ __forceinline__ uint32_t to_tf32(float value) {
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits & 0xffffe000u;
}

// An 8 x 8 matrix of 16-bit numbers transposed: lane 4 i + j holds columns 2 j and 2 j + 1 of row i, before and after.
__device__ __forceinline__ uint32_t movmatrix(uint32_t pair) {
  uint32_t out;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(pair));
  return out;
}

// Starts a copy of the first `bytes` (0 to 16) bytes at `global` to 16 bytes of shared memory, the rest zeros; both
// addresses are multiples of 16.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, int bytes) {
  const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
}

// Starts to bring what lies at `global` to the L2 cache, 32 bytes or more.
__device__ __forceinline__ void prefetch_l2(const void* global) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(global));
}

// Makes a group of the copies that this thread has started since the last group.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the newest N groups of this thread are still under way.
template <int N>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

}  // namespace pyfused

#endif  // PYFUSED_EMULATE_CUDA
