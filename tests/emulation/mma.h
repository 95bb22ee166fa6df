// What tensor-core instructions and movmatrix compute from what the 32 lanes of a warp bring, without the fibers: most
// of an emulated kernel's time goes here, so mma.cpp is compiled with every optimization and no sanitizer.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pyfused::emulation {

template <class T>
struct MmaOperands {
  T* d;
  const uint32_t* a;
  const uint32_t* b;
};

struct Fp64Operands {
  double* d;
  double a, b;
};

// Of each lane: MmaOperands<float>, for fp64 Fp64Operands, for movmatrix its register.
template <class T>
void compute_m16n8k16(void* const* operands);
extern template void compute_m16n8k16<__nv_bfloat16>(void* const* operands);
extern template void compute_m16n8k16<__half>(void* const* operands);
void compute_m16n8k8_tf32(void* const* operands);
void compute_m8n8k4_f64(void* const* operands);
void compute_movmatrix(void* const* operands);

}  // namespace pyfused::emulation
