// ia3_linear and ia3_scale with their gradients.
#include <ATen/ops/linear.h>

#include "node.h"
#include "ops.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> raw_linear_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                              const Tensor& scale, bool input_side, bool keep_base) {
  static const RawOp<decltype(raw_linear_forward)> op("pyfused::_ia3_linear_forward");
  return op.by_address(&CpuKernels::ia3_linear_forward, x, weight, bias, scale, input_side, keep_base);
}

std::tuple<Tensor, Tensor> raw_linear_backward(const Tensor& grad_y, const Optional& saved, const Optional& weight,
                                               const Optional& bias, const Tensor& scale, bool input_side,
                                               int64_t needs) {
  static const RawOp<decltype(raw_linear_backward)> op("pyfused::_ia3_linear_backward");
  return op.by_address(&CpuKernels::ia3_linear_backward, grad_y, saved, weight, bias, scale, input_side, needs);
}

Tensor raw_scale_forward(const Tensor& x, const Tensor& scale, int64_t dim) {
  static const RawOp<decltype(raw_scale_forward)> op("pyfused::_ia3_scale_forward");
  return op.by_address(&CpuKernels::ia3_scale_forward, x, scale, dim);
}

std::tuple<Tensor, Tensor> raw_scale_backward(const Tensor& grad_y, const Optional& x, const Tensor& scale, int64_t dim,
                                              int64_t needs) {
  static const RawOp<decltype(raw_scale_backward)> op("pyfused::_ia3_scale_backward");
  return op.by_address(&CpuKernels::ia3_scale_backward, grad_y, x, scale, dim, needs);
}

// A view without a gradient, as a gradient's node has its arguments and results.
Tensor view(const Tensor& tensor, at::IntArrayRef sizes) {
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return tensor.view(sizes);
}
Tensor flat(const Tensor& scale, bool flatten) { return flatten ? view(scale, -1) : scale; }

class Ia3LinearBackward final : public GradientNode {
 public:
  Ia3LinearBackward(bool input_side, bool flatten)
      : GradientNode("Ia3LinearBackward", "ia3_linear", "pyfused.reference.ia3.ia3_linear"),
        input_side_(input_side),
        flatten_(flatten) {}

 protected:
  tensor_list gradients(tensor_list grads) override {
    const int64_t needs = needed(0, kIa3NeedX) | needed(1, kIa3NeedScale);
    const Tensor scale = *saved(kScale);
    auto [grad_x, grad_scale] = raw_linear_backward(grad_of(grads), saved(kScaled), saved(kWeight), saved(kBias),
                                                    flat(scale, flatten_), input_side_, needs);
    if (needs & kIa3NeedScale && flatten_) grad_scale = view(grad_scale, scale.sizes());
    return {when(needs & kIa3NeedX, grad_x), when(needs & kIa3NeedScale, grad_scale)};
  }
  void collect_options(CompiledNodeArgs& args) const override {
    args.collect(input_side_);
    args.collect(flatten_);
  }

 private:
  enum Saved { kScaled, kWeight, kBias, kScale };
  bool input_side_, flatten_;
};

class Ia3ScaleBackward final : public GradientNode {
 public:
  explicit Ia3ScaleBackward(int64_t dim)
      : GradientNode("Ia3ScaleBackward", "ia3_scale", "pyfused.reference.ia3.ia3_scale"), dim_(dim) {}

 protected:
  tensor_list gradients(tensor_list grads) override {
    const int64_t needs = needed(0, kIa3NeedX) | needed(1, kIa3NeedScale);
    auto [grad_x, grad_scale] = raw_scale_backward(grad_of(grads), saved(kX), *saved(kScale), dim_, needs);
    return {when(needs & kIa3NeedX, grad_x), when(needs & kIa3NeedScale, grad_scale)};
  }
  void collect_options(CompiledNodeArgs& args) const override { args.collect(dim_); }

 private:
  enum Saved { kX, kScale };
  int64_t dim_;
};

}  // namespace

Tensor ia3_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& scale, bool input_side,
                  bool flatten) {
  if (any_needs_gradient(weight, bias)) {
    const Tensor vector = flatten ? scale.view(-1) : scale;
    return input_side ? at::linear(ia3_scale(x, vector, x.dim() - 1), weight, bias)
                      : ia3_scale(at::linear(x, weight, bias), vector, x.dim() - 1);
  }
  const auto forward = [&](bool keep_base) {
    return raw_linear_forward(x, weight, bias, flat(scale, flatten), input_side, keep_base);
  };
  if (!any_needs_gradient(x, scale)) return std::get<0>(forward(false));
  const auto node = make_node<Ia3LinearBackward>(input_side, flatten);
  node->connect(x, scale);
  const bool need_scale = scale.requires_grad(), need_base = need_scale && !input_side;
  const auto [y, base] = forward(need_base);
  node->save(when(need_scale, input_side ? x : base), when(x.requires_grad() || input_side, weight),
             when(need_base, bias), scale);
  torch::autograd::set_history(y, node);
  return y;
}

Tensor ia3_scale(const Tensor& x, const Tensor& scale, int64_t dim) {
  if (!any_needs_gradient(x, scale)) return raw_scale_forward(x, scale, dim);
  const auto node = make_node<Ia3ScaleBackward>(dim);
  node->connect(x, scale);
  const Tensor y = raw_scale_forward(x, scale, dim);
  node->save(when(scale.requires_grad(), x), scale);
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace pyfused
