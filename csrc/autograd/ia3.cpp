// ia3_linear and ia3_scale with their gradients.
#include <ATen/ops/linear.h>

#include "ops.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> raw_linear_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                              const Tensor& scale, bool input_side, bool keep_base) {
  static const RawOp<decltype(raw_linear_forward)> op("pyfused::_ia3_linear_forward");
  return op(x, weight, bias, scale, input_side, keep_base);
}

std::tuple<Tensor, Tensor> raw_linear_backward(const Tensor& grad_y, const Optional& saved, const Optional& weight,
                                               const Optional& bias, const Tensor& scale, bool input_side,
                                               int64_t needs) {
  static const RawOp<decltype(raw_linear_backward)> op("pyfused::_ia3_linear_backward");
  return op(grad_y, saved, weight, bias, scale, input_side, needs);
}

Tensor raw_scale_forward(const Tensor& x, const Tensor& scale, int64_t dim) {
  static const RawOp<decltype(raw_scale_forward)> op("pyfused::_ia3_scale_forward");
  return op(x, scale, dim);
}

std::tuple<Tensor, Tensor> raw_scale_backward(const Tensor& grad_y, const Optional& x, const Tensor& scale, int64_t dim,
                                              int64_t needs) {
  static const RawOp<decltype(raw_scale_backward)> op("pyfused::_ia3_scale_backward");
  return op(grad_y, x, scale, dim, needs);
}

struct Ia3Frozen {
  const Tensor& weight;
  const Optional& bias;
  bool input_side, flatten;
};

Tensor flat(const Tensor& scale, bool flatten) { return flatten ? scale.view(-1) : scale; }

struct Ia3Linear : torch::autograd::Function<Ia3Linear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, const Ia3Frozen& layer) {
    const bool input_side = layer.input_side, need_scale = scale.requires_grad();
    auto [y, base] = raw_linear_forward(x, layer.weight, layer.bias, flat(scale, layer.flatten), input_side,
                                        need_scale && !input_side);
    ctx->save_for_backward({when(need_scale, input_side ? x : base),
                            when(x.requires_grad() || input_side, layer.weight),
                            when(need_scale && !input_side, layer.bias), scale});
    ctx->saved_data["input_side"] = input_side;
    ctx->saved_data["flatten"] = layer.flatten;
    return y;
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    refuse_double_backward("ia3_linear", "pyfused.reference.ia3.ia3_linear");
    const tensor_list saved = ctx->get_saved_variables();
    Asked asked(ctx);
    const bool need_x = asked.next(), need_scale = asked.next();
    const Tensor& scale = saved[3];
    auto [grad_x, grad_scale] =
        raw_linear_backward(grads[0], optional(saved[0]), optional(saved[1]), optional(saved[2]),
                            flat(scale, ctx->saved_data["flatten"].toBool()), ctx->saved_data["input_side"].toBool(),
                            need_x * kIa3NeedX | need_scale * kIa3NeedScale);
    return {when(need_x, grad_x), need_scale ? grad_scale.view(scale.sizes()) : Tensor(), Tensor()};
  }
};

struct Ia3Scale : torch::autograd::Function<Ia3Scale> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& scale, int64_t dim) {
    ctx->save_for_backward({when(scale.requires_grad(), x), scale});
    ctx->saved_data["dim"] = dim;
    return raw_scale_forward(x, scale, dim);
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    refuse_double_backward("ia3_scale", "pyfused.reference.ia3.ia3_scale");
    const tensor_list saved = ctx->get_saved_variables();
    Asked asked(ctx);
    const bool need_x = asked.next(), need_scale = asked.next();
    auto [grad_x, grad_scale] =
        raw_scale_backward(grads[0], optional(saved[0]), saved[1], ctx->saved_data["dim"].toInt(),
                           need_x * kIa3NeedX | need_scale * kIa3NeedScale);
    return {when(need_x, grad_x), when(need_scale, grad_scale), Tensor()};
  }
};

}  // namespace

Tensor ia3_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& scale, bool input_side,
                  bool flatten) {
  if (any_needs_gradient(weight, bias)) {
    const Tensor vector = flat(scale, flatten);
    return input_side ? at::linear(ia3_scale(x, vector, x.dim() - 1), weight, bias)
                      : ia3_scale(at::linear(x, weight, bias), vector, x.dim() - 1);
  }
  if (any_needs_gradient(x, scale)) return Ia3Linear::apply(x, scale, Ia3Frozen{weight, bias, input_side, flatten});
  return std::get<0>(raw_linear_forward(x, weight, bias, flat(scale, flatten), input_side, false));
}

Tensor ia3_scale(const Tensor& x, const Tensor& scale, int64_t dim) {
  if (any_needs_gradient(x, scale)) return Ia3Scale::apply(x, scale, dim);
  return raw_scale_forward(x, scale, dim);
}

}  // namespace pyfused
