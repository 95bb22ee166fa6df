// fp32 products of a frozen layer by loops of our own, with an adapter's work in them.
#pragma once

#include <optional>

#include "kernels/linear_f32.h"
#include "matrix.h"

namespace pyfused {

// Rows from which they are faster than the vendor's product and the passes that they save: of a forward whose results
// would be scaled, and of other calls, which save less.
inline constexpr int64_t kF32ScaledRows = 128, kF32Rows = 512;

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
