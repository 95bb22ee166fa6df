// What IA3 does on every device: arguments checked before memory is touched, and which products and passes run in what
// order. A device's own Ia3 has the passes.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "needs.h"
#include "tensor.h"

namespace pyfused {

struct Ia3Arguments {
  const char* op;
  Device device;
  Dtype dtype, accumulator;
  int64_t M;        // rows: the product of the activation's leading dimensions
  int64_t columns;  // its last dimension
  int64_t C;        // elements of scale

  // activation has the dtype: x, or grad_y.
  Ia3Arguments(const char* op, const Device& device, const Tensor& activation, const char* name, const Tensor& scale)
      : op(op),
        device(device),
        dtype(dtype_of(activation, op, name)),
        accumulator(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32) {
    check_device(activation, device, op, name);
    check_device(scale, device, op, "scale");
    const auto sizes = activation.sizes();
    PF_CHECK(sizes.size() >= 1, op, name, "have at least one dimension", "a scalar");
    PF_CHECK(scale.dim() == 1, op, "scale", "have one dimension", shape_of(scale));
    PF_CHECK(dtype_of(scale, op, "scale") != Dtype::kFloat64 || dtype == Dtype::kFloat64, op, "scale",
             "not be float64 where x is not", "float64");
    C = scale.size(0);
    M = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) M *= sizes[i];
    columns = sizes[sizes.size() - 1];
  }

  // What a forward is given; returns N.
  int64_t check_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& scale,
                        bool input_side) const {
    PF_CHECK(weight.dim() == 2, op, "weight", "have shape [N, K]", shape_of(weight));
    const int64_t N = weight.size(0);
    check_linear(x, weight, bias, N, columns, device, op);
    check_shape(scale, {input_side ? columns : N}, op, "scale");
    return N;
  }

  // What the forward saved, [M, width] like the activation it goes with.
  void check_saved(const Tensor& like, const std::optional<Tensor>& saved, int64_t width) const {
    PF_CHECK(saved.has_value(), op, "saved", "be given for scale's gradient", "None");
    check_device(*saved, device, op, "saved");
    PF_CHECK(saved->scalar_type() == like.scalar_type(), op, "saved", "have grad_y's dtype", "another dtype");
    PF_CHECK(saved->dim() >= 1 && saved->size(saved->dim() - 1) == width && saved->numel() == M * width, op, "saved",
             "have " + std::to_string(M) + " rows of " + std::to_string(width), shape_of(*saved));
  }

  // What a backward is given; the bias is the forward's, on the output side.
  void check_backward(const Tensor& grad_y, const std::optional<Tensor>& saved, const std::optional<Tensor>& weight,
                      const std::optional<Tensor>& bias, const Tensor& scale, bool input_side, int64_t needs) const {
    if ((needs & kIa3NeedX) || input_side) {
      PF_CHECK(weight.has_value() && weight->dim() == 2, op, "weight", "be given as [N, K]", "something else");
      check_linear(grad_y, *weight, std::nullopt, columns, weight->size(1), device, op);
    }
    check_shape(scale, {input_side ? weight->size(1) : columns}, op, "scale");
    if (needs & kIa3NeedScale) check_saved(grad_y, saved, C);
    if (input_side || !bias.has_value()) return;
    check_device(*bias, device, op, "bias");
    check_shape(*bias, {columns}, op, "bias");
    PF_CHECK(bias->scalar_type() == grad_y.scalar_type(), op, "bias", "have grad_y's dtype", "another dtype");
  }

  // The bias is added by the scale's pass in fp32 and fp64, where the vendor's GEMM would first copy it into every row
  // of the output, and by the GEMM in 16 bits, before its one rounding.
  bool adds_bias(const std::optional<Tensor>& bias) const { return bias.has_value() && dtype == accumulator; }

  Tensor none(const Tensor& like) const { return empty({0}, like.scalar_type(), device); }
  Tensor grad_scale(const Tensor& scale, bool needed) const {
    return needed ? empty({C}, scale.scalar_type(), device) : none(scale);
  }
};

// Sizes of a tensor around the dimension that is scaled: outer x C x inner.
struct Ia3Around {
  int64_t dim, outer = 1, inner = 1;
  bool is_last;

  Ia3Around(const Ia3Arguments& ia3, const Tensor& x, int64_t dim) : dim(dim), is_last(dim == x.dim() - 1) {
    PF_CHECK(dim >= 0 && dim < x.dim(), ia3.op, "dim", "be a dimension of x", dim);
    PF_CHECK(x.size(dim) == ia3.C, ia3.op, "scale", "have x's size " + std::to_string(x.size(dim)), ia3.C);
    for (int64_t i = 0; i < dim; ++i) outer *= x.size(i);
    for (int64_t i = dim + 1; i < x.dim(); ++i) inner *= x.size(i);
  }
  void check_saved(const Ia3Arguments& ia3, const Tensor& grad_y, const std::optional<Tensor>& x) const {
    ia3.check_saved(grad_y, x, ia3.columns);
    PF_CHECK(x->dim() == grad_y.dim() && x->size(dim) == ia3.C, ia3.op, "saved", "have grad_y's shape", shape_of(*x));
  }
};

// The ops. Ia3 is a device's: made of (op, activation, name, scale), with shift(bias), the bias that its passes add;
// scale_columns, scale_columns_backward, scale_rows and scale_rows_backward, the passes; linear(out, x, weight, bias)
// and product(out, dy, weight), the frozen layer's products, of matrices; and those that make a product and the pass
// over it in one where they return true: scaled_product, y = (x weight^T + bias) * scale, with what the passes would
// find before the scale in base where it is given; factored_product, y = (x * scale) weight^T + bias;
// factored_backward, dx = (dy * scale) weight; and product_backward, dx = (dy weight) * scale and scale's gradient.

template <class Ia3>
std::tuple<Tensor, Tensor> ia3_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Tensor& scale, bool input_side, bool keep_base) {
  const Ia3 ia3("ia3_linear", x, "x", scale);
  const int64_t M = ia3.M, K = ia3.columns, N = ia3.check_forward(x, weight, bias, scale, input_side);
  Tensor y = empty_rows(x, N, ia3.device);
  if (input_side) {
    if (ia3.factored_product(y, x, weight, bias)) return {y, ia3.none(x)};
    // Into the smaller operand. A GEMM costs its M N K in any case, and either product rounds once.
    const bool fold = N < M / 2;
    const Tensor scaled = empty({fold ? N : M, K}, x.scalar_type(), ia3.device);
    ia3.scale_columns(Matrix(fold ? weight : x), fold ? N : M, scaled);
    ia3.linear(as_matrix(y, M, N), fold ? as_matrix(x, M, K) : scaled, fold ? scaled : weight, bias);
    return {y, ia3.none(x)};
  }
  const Tensor base = keep_base ? empty_rows(x, N, ia3.device) : y;
  if (ia3.scaled_product(y, keep_base ? &base : nullptr, x, weight, bias)) return {y, keep_base ? base : ia3.none(x)};
  ia3.linear(as_matrix(base, M, N), as_matrix(x, M, K), weight, ia3.adds_bias(bias) ? std::nullopt : bias);
  ia3.scale_columns(Matrix(base), M, y, ia3.shift(bias));
  return {y, keep_base ? base : ia3.none(x)};
}

template <class Ia3>
std::tuple<Tensor, Tensor> ia3_linear_backward(const Tensor& grad_y, const std::optional<Tensor>& saved,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               const Tensor& scale, bool input_side, int64_t needs) {
  const Ia3 ia3("ia3_backward", grad_y, "grad_y", scale);
  const int64_t M = ia3.M, N = ia3.columns;
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  ia3.check_backward(grad_y, saved, weight, bias, scale, input_side, needs);
  const int64_t K = weight.has_value() ? weight->size(1) : 0;
  Tensor grad_x = need_x ? empty_rows(grad_y, K, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = ia3.grad_scale(scale, need_scale);
  const Tensor* sums = need_scale ? &grad_scale : nullptr;
  if (input_side) {
    const Tensor gradient = need_x ? grad_x : empty({M, K}, grad_y.scalar_type(), ia3.device);
    if (ia3.product_backward(gradient, grad_y, *weight, saved, sums)) return {grad_x, grad_scale};
    ia3.product(as_matrix(gradient, M, K), as_matrix(grad_y, M, N), *weight);
    ia3.scale_columns_backward(Matrix(gradient), saved, need_x ? &gradient : nullptr, sums);
    return {grad_x, grad_scale};
  }
  if (need_x && ia3.factored_backward(grad_x, grad_y, *weight)) {
    if (need_scale) ia3.scale_columns_backward(Matrix(grad_y), saved, nullptr, sums, ia3.shift(bias));
    return {grad_x, grad_scale};
  }
  const Tensor scaled = need_x ? empty({M, N}, grad_y.scalar_type(), ia3.device) : grad_x;
  ia3.scale_columns_backward(Matrix(grad_y), saved, need_x ? &scaled : nullptr, sums, ia3.shift(bias));
  if (need_x) ia3.product(as_matrix(grad_x, M, K), scaled, *weight);
  return {grad_x, grad_scale};
}

template <class Ia3>
Tensor ia3_scale_forward(const Tensor& x, const Tensor& scale, int64_t dim) {
  const Ia3 ia3("ia3_scale", x, "x", scale);
  const Ia3Around around(ia3, x, dim);
  Tensor y = empty_rows(x, ia3.columns, ia3.device);
  if (around.is_last) {
    ia3.scale_columns(Matrix(x), ia3.M, y);
  } else {
    ia3.scale_rows(torch::stable::contiguous(x), around, y);
  }
  return y;
}

template <class Ia3>
std::tuple<Tensor, Tensor> ia3_scale_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& scale,
                                              int64_t dim, int64_t needs) {
  const Ia3 ia3("ia3_scale_backward", grad_y, "grad_y", scale);
  const Ia3Around around(ia3, grad_y, dim);
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  if (need_scale) around.check_saved(ia3, grad_y, x);
  Tensor grad_x = need_x ? empty_rows(grad_y, ia3.columns, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = ia3.grad_scale(scale, need_scale);
  const Tensor *out = need_x ? &grad_x : nullptr, *sums = need_scale ? &grad_scale : nullptr;
  if (around.is_last) {
    ia3.scale_columns_backward(Matrix(grad_y), x, out, sums);
  } else if (around.outer * ia3.C * around.inner == 0) {
    if (need_scale) torch::stable::zero_(grad_scale);
  } else {
    ia3.scale_rows_backward(torch::stable::contiguous(grad_y), x, around, out, sums);
  }
  return {grad_x, grad_scale};
}

}  // namespace pyfused
