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
};

}  // namespace pyfused
