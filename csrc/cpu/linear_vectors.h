// Products of a frozen layer by loops of our own on vectors, with an adapter's work in them: in fp32 for many rows, and
// in 16 bits on CPUs without AVX-512, for which vendors have no kernels.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "kernels/linear_vectors.h"
#include "matrix.h"

namespace pyfused {

// The call that makes out [M, N] = a [M, K] b [K, N] + bias [N], which may be null, without anything else that a caller
// may set in it. Nothing where the vendor's product is to be used: on other dtypes and levels, for fewer rows, for
// matrices without unit stride (in 16 bits a may have any).
std::optional<LinearProduct> linear_product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias,
                                            ProductFor purpose);
// The same for memory as matrices, for whoever knows that there are loops of ours. a may have any strides, b has rows
// or columns of unit stride.
LinearProduct own_product(const View& out, const View& a, const View& b);
// Whether there may be one, as far as it can be said without matrices; size is the smaller one of K and N.
bool has_linear_product(Dtype dtype, int64_t rows, ProductFor purpose, int64_t size = INT64_MAX);
// Columns of dY up to which LoRA's dX is made so.
int64_t max_product_depth(Dtype dtype);
// Rows of a part for its dots.
int64_t product_part_rows(const LinearProduct& call);
// All of it, on all threads, and in the caller's.
void multiply(const LinearProduct& call);
void multiply_here(const LinearProduct& call);

// out = a b + bias, or out += a b: ours, or the vendor's.
void product_out(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias, ProductFor purpose);
void product_add(const Tensor& out, const Tensor& a, const Tensor& b, ProductFor purpose);

// A bottleneck's products out = a b by ranges of rows, for one b [K, N]. Where they are ours, b is copied into panels
// once for all of them.
class RowProducts {
 public:
  // b, and how many rows there are in all.
  RowProducts(const View& b, int64_t rows);

  // Copies what is ours, on all threads; before any product.
  static void pack(std::initializer_list<const RowProducts*> products);

  bool ours() const { return call_.has_value(); }
  // out = a b + bias [1, N], which may be null and has unit stride, within a task.
  void multiply(const View& out, const View& a, const View* bias = nullptr) const;
  // The call that makes out = a b where it is ours, without anything else that a caller may set in it.
  LinearProduct product(const View& out, const View& a) const;

 private:
  View b_;
  std::optional<LinearProduct> call_;
  std::optional<Scratch> panels_;
};

}  // namespace pyfused
