// lora_linear with its gradient.
#include "ops.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> raw_lora_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                            const Tensor& a, const Tensor& b, const Optional& scale_vector,
                                            double scale, double dropout_p, const Optional& seed, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_forward)> op("pyfused::_lora_linear_forward");
  return op(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
}

using LoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
LoraGradients raw_lora_backward(const Tensor& grad_y, const Optional& x, const Optional& weight, const Tensor& a,
                                const Tensor& b, const Optional& s, const Optional& scale_vector, double scale,
                                double dropout_p, const Optional& seed, int64_t needs, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_backward)> op("pyfused::_lora_backward");
  return op(grad_y, x, weight, a, b, s, scale_vector, scale, dropout_p, seed, needs, allow_tf32);
}

// What a call has beside the tensors that may get a gradient.
struct LoraFrozen {
  const Tensor& weight;
  const Optional& seed;
  double scale, dropout_p;
  bool allow_tf32;
};

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b, const Optional& bias,
                        const Optional& scale_vector, const LoraFrozen& call) {
    auto [y, s] = raw_lora_forward(x, call.weight, bias, a, b, scale_vector, call.scale, call.dropout_p, call.seed,
                                   call.allow_tf32);
    const bool need_s = b.requires_grad() || needs_gradient(scale_vector);
    ctx->save_for_backward({when(a.requires_grad(), x), when(x.requires_grad(), call.weight), a, b, when(need_s, s),
                            tensor_or_none(scale_vector), tensor_or_none(call.seed)});
    ctx->saved_data["scale"] = call.scale;
    ctx->saved_data["dropout_p"] = call.dropout_p;
    ctx->saved_data["allow_tf32"] = call.allow_tf32;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    refuse_double_backward("lora_linear", "pyfused.reference.lora.lora_linear");
    const tensor_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    Asked asked(ctx);
    const bool need_x = asked.next(), need_a = asked.next(), need_b = asked.next();
    const bool need_bias = asked.next(data["bias"].toBool()), need_scale = asked.next(saved[5].defined());
    const int64_t needs =
        need_x * kNeedX | need_a * kNeedA | need_b * kNeedB | need_scale * kNeedScale | need_bias * kNeedBias;
    auto [grad_x, grad_a, grad_b, grad_scale, grad_bias] = raw_lora_backward(
        grads[0], optional(saved[0]), optional(saved[1]), saved[2], saved[3], optional(saved[4]), optional(saved[5]),
        data["scale"].toDouble(), data["dropout_p"].toDouble(), optional(saved[6]), needs, data["allow_tf32"].toBool());
    return {when(need_x, grad_x),       when(need_a, grad_a),         when(need_b, grad_b),
            when(need_bias, grad_bias), when(need_scale, grad_scale), Tensor()};
  }
};

}  // namespace

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a, const Tensor& b,
                   const Optional& scale_vector, double scale, double dropout_p, const Optional& seed,
                   bool allow_tf32) {
  if (any_needs_gradient(x, a, b, bias, scale_vector)) {
    return LoraLinear::apply(x, a, b, bias, scale_vector, LoraFrozen{weight, seed, scale, dropout_p, allow_tf32});
  }
  return std::get<0>(raw_lora_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32));
}

}  // namespace pyfused
