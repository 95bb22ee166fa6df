// bottleneck with its gradient.
#include "ops.h"

namespace pyfused {
namespace {

// What a call has beside the tensors that may get a gradient.
struct BottleneckOptions {
  const Optional& seed;
  int64_t activation;
  double scale, dropout_p;
  bool residual_is_x, allow_tf32;
};

std::tuple<Tensor, Tensor> raw_bottleneck_forward(const Tensor& x, const Optional& residual, const Tensor& w_down,
                                                  const Optional& b_down, const Tensor& w_up, const Optional& b_up,
                                                  const Optional& scale_vector, const BottleneckOptions& call) {
  static const RawOp<std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Tensor&, const Optional&,
                                                const Tensor&, const Optional&, const Optional&, int64_t, double,
                                                double, const Optional&, bool)>
      op("pyfused::_bottleneck_forward");
  return op(x, call.residual_is_x ? Optional(x) : residual, w_down, b_down, w_up, b_up, scale_vector, call.activation,
            call.scale, call.dropout_p, call.seed, call.allow_tf32);
}

using BottleneckGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
BottleneckGradients raw_bottleneck_backward(const Tensor& grad_y, const Optional& x, const Tensor& w_down,
                                            const Tensor& w_up, const Optional& b_down, const Optional& b_up,
                                            const Tensor& z, const Optional& scale_vector, int64_t activation,
                                            double scale, double dropout_p, const Optional& seed, int64_t needs,
                                            bool allow_tf32) {
  static const RawOp<decltype(raw_bottleneck_backward)> op("pyfused::_bottleneck_backward");
  return op(grad_y, x, w_down, w_up, b_down, b_up, z, scale_vector, activation, scale, dropout_p, seed, needs,
            allow_tf32);
}

struct Bottleneck : torch::autograd::Function<Bottleneck> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Optional& residual, const Tensor& w_down,
                        const Optional& b_down, const Tensor& w_up, const Optional& b_up, const Optional& scale_vector,
                        const BottleneckOptions& call) {
    auto [y, z] = raw_bottleneck_forward(x, residual, w_down, b_down, w_up, b_up, scale_vector, call);
    ctx->save_for_backward({when(w_down.requires_grad(), x), w_down, tensor_or_none(b_down), w_up, tensor_or_none(b_up),
                            z, tensor_or_none(scale_vector), tensor_or_none(call.seed)});
    auto& data = ctx->saved_data;
    data["residual"] = residual.has_value();
    data["residual_is_x"] = call.residual_is_x;
    data["activation"] = call.activation;
    data["scale"] = call.scale;
    data["dropout_p"] = call.dropout_p;
    data["allow_tf32"] = call.allow_tf32;
    return y;
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    refuse_double_backward("bottleneck", "pyfused.reference.bottleneck.bottleneck");
    const tensor_list saved = ctx->get_saved_variables();
    const Optional x = optional(saved[0]), b_down = optional(saved[2]), b_up = optional(saved[4]),
                   scale_vector = optional(saved[6]);
    auto& data = ctx->saved_data;
    Asked asked(ctx);
    const bool need_x = asked.next(), need_residual = asked.next(data["residual"].toBool());
    const bool need_down = asked.next(), need_down_bias = asked.next(b_down.has_value());
    const bool need_up = asked.next(), need_up_bias = asked.next(b_up.has_value());
    const bool need_scale = asked.next(scale_vector.has_value());
    int64_t needs = need_x * kBottleneckNeedX | need_down * kBottleneckNeedDown |
                    need_down_bias * kBottleneckNeedDownBias | need_up * kBottleneckNeedUp |
                    need_up_bias * kBottleneckNeedUpBias | need_scale * kBottleneckNeedScale;
    BottleneckGradients found;
    if (needs != 0) {
      if (need_x && data["residual_is_x"].toBool()) needs |= kBottleneckResidualIsX;
      found =
          raw_bottleneck_backward(grads[0], x, saved[1], saved[3], b_down, b_up, saved[5], scale_vector,
                                  data["activation"].toInt(), data["scale"].toDouble(), data["dropout_p"].toDouble(),
                                  optional(saved[7]), needs, data["allow_tf32"].toBool());
    }
    const auto& [grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_scale] = found;
    return {when(need_x, grad_x),         when(need_residual, grads[0]),
            when(need_down, grad_down),   when(need_down_bias, grad_down_bias),
            when(need_up, grad_up),       when(need_up_bias, grad_up_bias),
            when(need_scale, grad_scale), Tensor()};
  }
};

}  // namespace

Tensor bottleneck(const Tensor& x, const Optional& residual, const Tensor& w_down, const Optional& b_down,
                  const Tensor& w_up, const Optional& b_up, const Optional& scale_vector, int64_t activation,
                  double scale, double dropout_p, const Optional& seed, bool residual_is_x, bool allow_tf32) {
  const BottleneckOptions call{seed, activation, scale, dropout_p, residual_is_x, allow_tf32};
  if (any_needs_gradient(x, residual, w_down, b_down, w_up, b_up, scale_vector)) {
    return Bottleneck::apply(x, residual, w_down, b_down, w_up, b_up, scale_vector, call);
  }
  return std::get<0>(raw_bottleneck_forward(x, residual, w_down, b_down, w_up, b_up, scale_vector, call));
}

}  // namespace pyfused
