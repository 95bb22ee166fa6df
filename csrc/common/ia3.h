// An IA3 call's arguments: what every device checks before it touches memory.
#pragma once

#include <optional>
#include <string>

#include "tensor.h"

namespace pyfused {

// Bits of `needs`; pyfused/ops/ia3.py has the same.
enum Ia3Needs : int64_t { kIa3NeedX = 1, kIa3NeedScale = 2 };

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

}  // namespace pyfused
