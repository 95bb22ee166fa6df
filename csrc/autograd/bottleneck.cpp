// bottleneck with its gradient.
#include "node.h"
#include "ops.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> raw_bottleneck_forward(const Tensor& x, const Optional& residual, const Tensor& w_down,
                                                  const Optional& b_down, const Tensor& w_up, const Optional& b_up,
                                                  const Optional& scale_vector, int64_t activation, double scale,
                                                  double dropout_p, const Optional& seed, bool allow_tf32) {
  static const RawOp<decltype(raw_bottleneck_forward)> op("pyfused::_bottleneck_forward");
  return op.by_address(&CpuKernels::bottleneck_forward, x, residual, w_down, b_down, w_up, b_up, scale_vector,
                       activation, scale, dropout_p, seed, allow_tf32);
}

using BottleneckGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
BottleneckGradients raw_bottleneck_backward(const Tensor& grad_y, const Optional& x, const Tensor& w_down,
                                            const Tensor& w_up, const Optional& b_down, const Optional& b_up,
                                            const Tensor& z, const Optional& scale_vector, int64_t activation,
                                            double scale, double dropout_p, const Optional& seed, int64_t needs,
                                            bool allow_tf32) {
  static const RawOp<decltype(raw_bottleneck_backward)> op("pyfused::_bottleneck_backward");
  return op.by_address(&CpuKernels::bottleneck_backward, grad_y, x, w_down, w_up, b_down, b_up, z, scale_vector,
                       activation, scale, dropout_p, seed, needs, allow_tf32);
}

class BottleneckBackward final : public GradientNode {
 public:
  BottleneckBackward(int64_t activation, double scale, double dropout_p, bool residual_is_x, bool allow_tf32)
      : GradientNode("BottleneckBackward", "bottleneck", "pyfused.reference.bottleneck.bottleneck"),
        activation_(activation),
        scale_(scale),
        dropout_p_(dropout_p),
        residual_is_x_(residual_is_x),
        allow_tf32_(allow_tf32) {}

 protected:
  tensor_list gradients(tensor_list grads) override {
    const bool need_residual = needed(1, 1);
    const Tensor grad_y = grad_of(grads);
    int64_t needs = needed(0, kBottleneckNeedX) | needed(2, kBottleneckNeedDown) | needed(3, kBottleneckNeedDownBias) |
                    needed(4, kBottleneckNeedUp) | needed(5, kBottleneckNeedUpBias) | needed(6, kBottleneckNeedScale);
    BottleneckGradients found;
    if (needs != 0) {
      if (needs & kBottleneckNeedX && residual_is_x_) needs |= kBottleneckResidualIsX;
      found = raw_bottleneck_backward(grad_y, saved(kX), *saved(kDown), *saved(kUp), saved(kDownBias), saved(kUpBias),
                                      *saved(kZ), saved(kVector), activation_, scale_, dropout_p_, saved(kSeed), needs,
                                      allow_tf32_);
    }
    const auto& [grad_x, grad_down, grad_down_bias, grad_up, grad_up_bias, grad_scale] = found;
    return {when(needs & kBottleneckNeedX, grad_x),        when(need_residual, grad_y),
            when(needs & kBottleneckNeedDown, grad_down),  when(needs & kBottleneckNeedDownBias, grad_down_bias),
            when(needs & kBottleneckNeedUp, grad_up),      when(needs & kBottleneckNeedUpBias, grad_up_bias),
            when(needs & kBottleneckNeedScale, grad_scale)};
  }
  void collect_options(CompiledNodeArgs& args) const override {
    args.collect(activation_);
    args.collect(scale_);
    args.collect(dropout_p_);
    args.collect(residual_is_x_);
    args.collect(allow_tf32_);
  }

 private:
  enum Saved { kX, kDown, kDownBias, kUp, kUpBias, kZ, kVector, kSeed };
  int64_t activation_;
  double scale_, dropout_p_;
  bool residual_is_x_, allow_tf32_;
};

}  // namespace

Tensor bottleneck(const Tensor& x, const Optional& residual, const Tensor& w_down, const Optional& b_down,
                  const Tensor& w_up, const Optional& b_up, const Optional& scale_vector, int64_t activation,
                  double scale, double dropout_p, const Optional& given_seed, bool residual_is_x, bool allow_tf32) {
  const Optional seed = seed_for(x, dropout_p, given_seed);
  const auto forward = [&] {
    return raw_bottleneck_forward(x, residual_is_x ? Optional(x) : residual, w_down, b_down, w_up, b_up, scale_vector,
                                  activation, scale, dropout_p, seed, allow_tf32);
  };
  if (!any_needs_gradient(x, residual, w_down, b_down, w_up, b_up, scale_vector)) return std::get<0>(forward());
  const auto node = make_node<BottleneckBackward>(activation, scale, dropout_p, residual_is_x, allow_tf32);
  node->connect(x, residual, w_down, b_down, w_up, b_up, scale_vector);
  const auto [y, z] = forward();
  node->save(when(w_down.requires_grad(), x), w_down, b_down, w_up, b_up, z, scale_vector, seed);
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace pyfused
