// The frozen layer on CPU.
#pragma once

#include "kernels/linear_amx.h"
#include "matrix.h"

namespace pyfused {

// Rows up to which a call has no pass over y worth saving: linear_out is given the bias then.
inline constexpr int64_t kFewRows = 64;

// out [M, N] = x [M, K] weight [N, K]^T + bias [N], which may be null: by the vendor's GEMM, or in tiles of our own for
// bf16 on a machine with AMX. The vendor's copies the weight before it multiplies, in each call.
void linear_out(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias);

#if defined(PYFUSED_HAVE_AMX)
// Whether it is in tiles.
bool linear_in_tiles(const Tensor& x, const Tensor& weight, const Tensor* bias);
// The call as far as tensors say it, its x still to be packed.
LinearRows linear_rows(const Tensor& out, const Tensor& weight, const Tensor* bias, const Scratch& x_tiles);
// All of it, on all threads.
void multiply_in_tiles(const LinearRows& call);
#endif

}  // namespace pyfused
