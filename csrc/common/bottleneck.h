// A bottleneck call's arguments: what every device checks before it touches memory, and the gradients of a backward.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "activation.h"
#include "needs.h"
#include "philox.h"
#include "tensor.h"

namespace pyfused {

// What a backward asks for, from its `needs`.
struct BottleneckNeeds {
  bool x, down, down_bias, up, up_bias, scale, residual_is_x;
  bool dz, up_product, sums;  // of g, what drops left of dy

  BottleneckNeeds(int64_t bits, const std::optional<Tensor>& b_down, const std::optional<Tensor>& b_up,
                  const std::optional<Tensor>& scale_vector)
      : x(bits & kBottleneckNeedX),
        down(bits & kBottleneckNeedDown),
        down_bias((bits & kBottleneckNeedDownBias) && b_down.has_value()),
        up(bits & kBottleneckNeedUp),
        up_bias((bits & kBottleneckNeedUpBias) && b_up.has_value()),
        scale((bits & kBottleneckNeedScale) && scale_vector.has_value()),
        residual_is_x(bits & kBottleneckResidualIsX),
        dz(x || down || down_bias),
        up_product(up || scale),
        sums(up_bias || (scale && b_up.has_value())) {}
};

// M rows, D width, H bottleneck. product is the type of the matrix products and of z: that of x where both weights have
// it, else the accumulation type.
struct BottleneckArguments {
  const char* op;
  Device device;
  Dtype dtype, accumulator, product;
  int64_t M, D, H;
  Activation activation;
  double factor;
  uint32_t threshold;  // of dropout, see philox.h
  double dropout_scale;

  // rows is x or grad_y: it has the dtype and, in its leading dimensions, the rows.
  BottleneckArguments(const char* op, const Device& device, const Tensor& rows, const char* name, const Tensor& w_down,
                      const std::optional<Tensor>& b_down, const Tensor& w_up, const std::optional<Tensor>& b_up,
                      const std::optional<Tensor>& scale_vector, int64_t activation, double factor, double dropout_p,
                      const std::optional<Tensor>& seed)
      : op(op),
        device(device),
        dtype(dtype_of(rows, op, name)),
        accumulator(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        activation(static_cast<Activation>(activation)),
        factor(factor) {
    check_device(rows, device, op, name);
    check_adapter(w_down, "w_down");
    check_adapter(w_up, "w_up");
    const auto sizes = rows.sizes(), down = w_down.sizes();
    PF_CHECK(sizes.size() >= 1, op, name, "have at least one dimension", "a scalar");
    PF_CHECK(down.size() == 2 && down[0] >= 1, op, "w_down", "have shape [H, D] with H >= 1", shape_of(w_down));
    M = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) M *= sizes[i];
    H = down[0];
    D = down[1];
    PF_CHECK(sizes[sizes.size() - 1] == D, op, name, "have w_down's " + std::to_string(D) + " columns", shape_of(rows));
    check_shape(w_up, {D, H}, op, "w_up");
    check_vector(b_down, H, "b_down");
    check_vector(b_up, D, "b_up");
    if (scale_vector.has_value()) check_vector(scale_vector, scale_vector->numel() == 1 ? 1 : D, "scale_vector");
    PF_CHECK(activation >= 0 && activation < kActivations, op, "activation", "be a number of activation.h", activation);
    PF_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p", "be in [0, 1)", dropout_p);
    threshold = drop_threshold(dropout_p);
    dropout_scale = keep_scale(threshold);
    if (threshold != 0) {
      PF_CHECK(seed.has_value(), op, "seed", "be an int64 tensor with one element where dropout_p > 0", "None");
      check_seed(*seed, device, op);
    }
    const bool one_dtype = dtype_of(w_down, op, "w_down") == dtype && dtype_of(w_up, op, "w_up") == dtype;
    product = one_dtype ? dtype : accumulator;
  }

  // A tensor of x's dtype and shape.
  void check_like(const Tensor& rows, const Tensor& tensor, const char* argument) const {
    check_device(tensor, device, op, argument);
    PF_CHECK(tensor.scalar_type() == rows.scalar_type(), op, argument, "have x's dtype", "another dtype");
    const auto sizes = rows.sizes(), got = tensor.sizes();
    PF_CHECK(std::equal(sizes.begin(), sizes.end(), got.begin(), got.end()), op, argument, "have x's shape",
             shape_of(tensor));
  }
  // What a backward is given.
  void check_backward(const BottleneckNeeds& needs, const Tensor& grad_y, const std::optional<Tensor>& x,
                      const Tensor& z) const {
    if (needs.down) {
      PF_CHECK(x.has_value(), op, "x", "be given for w_down's gradient", "None");
      check_like(grad_y, *x, "x");
    }
    check_device(z, device, op, "z");
    check_shape(z, {M, H}, op, "z");
    PF_CHECK(z.scalar_type() == scalar_type(product) && z.is_contiguous(), op, "z",
             "be contiguous in the products' type", "another layout or dtype");
  }

  bool is_empty() const { return M == 0 || D == 0; }

 private:
  void check_adapter(const Tensor& tensor, const char* argument) const {
    check_device(tensor, device, op, argument);
    PF_CHECK(dtype_of(tensor, op, argument) != Dtype::kFloat64 || dtype == Dtype::kFloat64, op, argument,
             "not be float64 where x is not", "float64");
  }
  void check_vector(const std::optional<Tensor>& vector, int64_t size, const char* argument) const {
    if (!vector.has_value()) return;
    check_adapter(*vector, argument);
    check_shape(*vector, {size}, op, argument);
  }
};

// The gradients of one backward; what was not asked for is an empty tensor.
struct BottleneckGradients {
  Tensor x, w_down, b_down, w_up, b_up, scale;

  BottleneckGradients(const BottleneckArguments& call, const Tensor& grad_y, const Tensor& of_w_down,
                      const std::optional<Tensor>& of_b_down, const Tensor& of_w_up,
                      const std::optional<Tensor>& of_b_up, const std::optional<Tensor>& of_scale,
                      const BottleneckNeeds& needs)
      : x(needs.x ? empty_rows(grad_y, call.D, call.device) : none(grad_y, call)),
        w_down(like(of_w_down, grad_y, needs.down, call)),
        b_down(like(of_b_down, grad_y, needs.down_bias, call)),
        w_up(like(of_w_up, grad_y, needs.up, call)),
        b_up(like(of_b_up, grad_y, needs.up_bias, call)),
        scale(like(of_scale, grad_y, needs.scale, call)) {}

  void set_zero() {
    for (Tensor* grad : {&x, &w_down, &b_down, &w_up, &b_up, &scale}) torch::stable::zero_(*grad);
  }
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {x, w_down, b_down, w_up, b_up, scale};
  }

 private:
  static Tensor none(const Tensor& like, const BottleneckArguments& call) {
    return empty({0}, like.scalar_type(), call.device);
  }
  static Tensor like(const std::optional<Tensor>& of, const Tensor& otherwise, bool need,
                     const BottleneckArguments& call) {
    if (!of.has_value()) return none(otherwise, call);
    if (!need) return none(*of, call);
    const auto sizes = of->sizes();
    return empty(sizes.data(), sizes.size() - 1, sizes[sizes.size() - 1], of->scalar_type(), call.device);
  }
};

}  // namespace pyfused
