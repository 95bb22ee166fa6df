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

// out [M, K] = dy [M, N] weight [N, K], likewise.
void linear_backward_out(const Tensor& out, const Tensor& dy, const Tensor& weight);

#if defined(PYFUSED_HAVE_AMX)
// Whether linear_out takes many rows at a time, with the weight packed by panels; likewise for the backward.
bool linear_in_panels(const Tensor& x, const Tensor& weight, const Tensor* bias);
bool linear_backward_in_panels(int64_t rows, const Tensor& weight);
// The calls as far as tensors say them; x and dy with unit stride along their rows.
LinearPanels linear_panels(const Tensor& out, const Matrix& x, const Tensor& weight, const Tensor* bias);
LinearPanels linear_backward_panels(const Tensor& out, const Matrix& dy, const Tensor& weight);
// All of such a call, on all threads.
void multiply_panels(const LinearPanels& call);

// Whether linear_out is in tiles in which the weight lies as it is.
bool linear_in_tiles(const Tensor& x, const Tensor& weight, const Tensor* bias);
// The call as far as tensors say it, its x still to be packed.
LinearRows linear_rows(const Tensor& out, const Tensor& weight, const Tensor* bias, const Scratch& x_tiles);
// All of it, on all threads.
void multiply_in_tiles(const LinearRows& call);
#endif

}  // namespace pyfused
