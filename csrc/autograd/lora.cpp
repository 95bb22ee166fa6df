// lora_linear with its gradient.
#include "node.h"
#include "ops.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> raw_lora_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                            const Tensor& a, const Tensor& b, const Optional& scale_vector,
                                            double scale, double dropout_p, const Optional& seed, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_forward)> op("pyfused::_lora_linear_forward");
  return op.by_address(&CpuKernels::lora_linear_forward, x, weight, bias, a, b, scale_vector, scale, dropout_p, seed,
                       allow_tf32);
}

// Dropout's mask as well.
std::tuple<Tensor, Tensor, Tensor> raw_lora_forward_with_mask(const Tensor& x, const Tensor& weight,
                                                              const Optional& bias, const Tensor& a, const Tensor& b,
                                                              const Optional& scale_vector, double scale,
                                                              double dropout_p, const Optional& seed) {
  static const RawOp<decltype(raw_lora_forward_with_mask)> op("pyfused::_lora_linear_forward_with_mask");
  return op.by_address(&CpuKernels::lora_linear_forward_with_mask, x, weight, bias, a, b, scale_vector, scale,
                       dropout_p, seed);
}

using LoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
LoraGradients raw_lora_backward(const Tensor& grad_y, const Optional& x, const Optional& weight, const Tensor& a,
                                const Tensor& b, const Optional& s, const Optional& scale_vector, double scale,
                                double dropout_p, const Optional& seed, int64_t needs, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_backward)> op("pyfused::_lora_backward");
  return op.by_address(&CpuKernels::lora_backward, grad_y, x, weight, a, b, s, scale_vector, scale, dropout_p, seed,
                       needs, allow_tf32);
}

class LoraLinearBackward final : public GradientNode {
 public:
  LoraLinearBackward(double scale, double dropout_p, bool allow_tf32)
      : GradientNode("LoraLinearBackward", "lora_linear", "pyfused.reference.lora.lora_linear"),
        scale_(scale),
        dropout_p_(dropout_p),
        allow_tf32_(allow_tf32) {}

 protected:
  tensor_list gradients(tensor_list grads) override {
    const int64_t needs =
        needed(0, kNeedX) | needed(1, kNeedA) | needed(2, kNeedB) | needed(3, kNeedBias) | needed(4, kNeedScale);
    auto [grad_x, grad_a, grad_b, grad_scale, grad_bias] =
        raw_lora_backward(grad_of(grads), saved(kX), saved(kWeight), *saved(kA), *saved(kB), saved(kS), saved(kVector),
                          scale_, dropout_p_, saved(kSeedOrMask), needs, allow_tf32_);
    return {when(needs & kNeedX, grad_x), when(needs & kNeedA, grad_a), when(needs & kNeedB, grad_b),
            when(needs & kNeedBias, grad_bias), when(needs & kNeedScale, grad_scale)};
  }
  void collect_options(CompiledNodeArgs& args) const override {
    args.collect(scale_);
    args.collect(dropout_p_);
    args.collect(allow_tf32_);
  }

 private:
  enum Saved { kX, kWeight, kA, kB, kS, kVector, kSeedOrMask };
  double scale_, dropout_p_;
  bool allow_tf32_;
};

}  // namespace

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a, const Tensor& b,
                   const Optional& scale_vector, double scale, double dropout_p, const Optional& given_seed,
                   bool allow_tf32) {
  const Optional seed = seed_for(x, dropout_p, given_seed);
  if (!any_needs_gradient(x, a, b, bias, scale_vector)) {
    return std::get<0>(raw_lora_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32));
  }
  const auto node = make_node<LoraLinearBackward>(scale, dropout_p, allow_tf32);
  node->connect(x, a, b, bias, scale_vector);
  Tensor y, s;
  Optional seed_or_mask = seed;
  if (may_keep_mask(x, a, dropout_p)) {
    Tensor mask;
    std::tie(y, s, mask) = raw_lora_forward_with_mask(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed);
    if (mask.numel() > 0) seed_or_mask = mask;
  } else {
    std::tie(y, s) = raw_lora_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
  }
  node->save(when(a.requires_grad(), x), when(x.requires_grad(), weight), a, b,
             when(b.requires_grad() || needs_gradient(scale_vector), s), scale_vector, seed_or_mask);
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace pyfused
