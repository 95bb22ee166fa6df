// Products of a frozen layer by loops of our own on vectors, with an adapter's work in them: in fp32 for many rows, and
// in 16 bits on CPUs without AVX-512, for which vendors have no kernels.
#pragma once

#include <optional>

#include "kernels/linear_vectors.h"
#include "matrix.h"

namespace pyfused {

// The call that makes out [M, N] = a [M, K] b [K, N] + bias [N], which may be null, without anything else that a caller
// may set in it. Nothing where the vendor's product is to be used: on other dtypes and levels, for fewer rows, for
// matrices without unit stride (in 16 bits a may have any).
std::optional<LinearProduct> linear_product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias,
                                            ProductFor purpose);
// Whether there may be one, as far as it can be said without matrices.
bool has_linear_product(Dtype dtype, int64_t rows, ProductFor purpose);
// Columns of dY up to which LoRA's dX is made so.
int64_t max_product_depth(Dtype dtype);
// Rows of a part for its dots.
int64_t product_part_rows(const LinearProduct& call);
// All of it, on all threads.
void multiply(const LinearProduct& call);

// out = a b + bias, or out += a b: ours, or the vendor's.
void product_out(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias, ProductFor purpose);
void product_add(const Tensor& out, const Tensor& a, const Tensor& b, ProductFor purpose);
// The same for memory as matrices, with a bias [1, columns].
void product_out(const View& out, const View& a, const View& b, const View* bias = nullptr);

}  // namespace pyfused
