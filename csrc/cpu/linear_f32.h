// fp32 products of a frozen layer by loops of our own, with an adapter's work in them.
#pragma once

#include <optional>

#include "kernels/linear_f32.h"
#include "matrix.h"

namespace pyfused {

// What LinearF32Kernels says of them: scaled_rows, min_rows and max_depth; no call is served where there are none.
int64_t f32_scaled_rows();
int64_t f32_rows();
int64_t f32_max_depth();

// The call that makes out [M, N] = a [M, K] b [K, N] + bias [N], which may be null, without anything else that a caller
// may set in it. Nothing where the vendor's product is to be used: on other dtypes and levels, for fewer rows, for
// matrices without unit stride.
std::optional<F32Product> f32_product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias,
                                      int64_t min_rows);
// Rows of a part for its dots.
int64_t f32_part_rows();
// All of it, on all threads.
void multiply(const F32Product& call);

}  // namespace pyfused
