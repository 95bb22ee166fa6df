// lora_linear with its gradient.
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <type_traits>

#include "ops.h"

namespace pyfused {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;

std::tuple<Tensor, Tensor> raw_lora_forward(const Tensor& x, const Tensor& weight, const Optional& bias,
                                            const Tensor& a, const Tensor& b, const Optional& scale_vector,
                                            double scale, double dropout_p, const Optional& seed, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_forward)> op("pyfused::_lora_linear_forward");
  return op.by_address(&CpuKernels::lora_linear_forward, x, weight, bias, a, b, scale_vector, scale, dropout_p, seed,
                       allow_tf32);
}

using LoraGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
LoraGradients raw_lora_backward(const Tensor& grad_y, const Optional& x, const Optional& weight, const Tensor& a,
                                const Tensor& b, const Optional& s, const Optional& scale_vector, double scale,
                                double dropout_p, const Optional& seed, int64_t needs, bool allow_tf32) {
  static const RawOp<decltype(raw_lora_backward)> op("pyfused::_lora_backward");
  return op.by_address(&CpuKernels::lora_backward, grad_y, x, weight, a, b, s, scale_vector, scale, dropout_p, seed,
                       needs, allow_tf32);
}

// The gradient, as torch's own ops have theirs: torch::autograd::Function would keep what is not a tensor in a map by
// name, and what it knows of its arguments in lists.
class LoraLinearBackward : public Node {
 public:
  std::string name() const override { return "LoraLinearBackward"; }

  // The edges of apply's results.
  void connect(const Tensor& x, const Tensor& a, const Tensor& b, const Optional& bias, const Optional& scale_vector) {
    set_next_edges(torch::autograd::collect_next_edges(x, a, b, bias, scale_vector));
  }

  void save(const Tensor& x, const Tensor& weight, const Tensor& a, const Tensor& b, const Tensor& s,
            const Optional& scale_vector, const Optional& seed, double scale, double dropout_p, bool allow_tf32) {
    const bool need_s = b.requires_grad() || needs_gradient(scale_vector);
    size_t place = 0;
    for (const Tensor& tensor : {when(a.requires_grad(), x), when(x.requires_grad(), weight), a, b, when(need_s, s),
                                 tensor_or_none(scale_vector), tensor_or_none(seed)}) {
      saved_[place++] = SavedVariable(tensor, /*is_output=*/false);
    }
    scale_ = scale;
    dropout_p_ = dropout_p;
    allow_tf32_ = allow_tf32;
  }

  tensor_list apply(tensor_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    refuse_double_backward("lora_linear", "pyfused.reference.lora.lora_linear");
    const auto needed = [this](size_t edge, int64_t bit) { return task_should_compute_output(edge) ? bit : 0; };
    const int64_t needs =
        needed(0, kNeedX) | needed(1, kNeedA) | needed(2, kNeedB) | needed(3, kNeedBias) | needed(4, kNeedScale);
    const auto saved = [this](Saved place) { return optional(saved_[place].unpack()); };
    const Tensor grad_y = grads[0].defined() ? grads[0] : input_metadata(0).zeros_like();
    auto [grad_x, grad_a, grad_b, grad_scale, grad_bias] =
        raw_lora_backward(grad_y, saved(kX), saved(kWeight), *saved(kA), *saved(kB), saved(kS), saved(kVector), scale_,
                          dropout_p_, saved(kSeed), needs, allow_tf32_);
    return {when(needs & kNeedX, grad_x), when(needs & kNeedA, grad_a), when(needs & kNeedB, grad_b),
            when(needs & kNeedBias, grad_bias), when(needs & kNeedScale, grad_scale)};
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) variable.reset_data();
  }

  // Compiled autograd traces the raw op in apply.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& variable : saved_) args.collect(variable, /*is_output=*/false);
    args.collect(scale_);
    args.collect(dropout_p_);
    args.collect(allow_tf32_);
  }
  tensor_list apply_with_saved(const tensor_list& grads, torch::dynamo::autograd::SwapSavedVariables& swap) override {
    for (SavedVariable& variable : saved_) swap.before(variable);
    tensor_list results = apply(tensor_list(grads));
    for (SavedVariable& variable : saved_) swap.after(variable);
    return results;
  }

 private:
  enum Saved { kX, kWeight, kA, kB, kS, kVector, kSeed, kSavedCount };
  SavedVariable saved_[kSavedCount];
  double scale_, dropout_p_;
  bool allow_tf32_;
};

// Nodes count their references in torch 2.13; in 2.11 a shared_ptr does.
template <class T>
auto make_node() {
  if constexpr (std::is_base_of_v<std::enable_shared_from_this<Node>, Node>) {
    return std::shared_ptr<T>(new T, [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>();
  }
}

}  // namespace

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a, const Tensor& b,
                   const Optional& scale_vector, double scale, double dropout_p, const Optional& seed,
                   bool allow_tf32) {
  if (!any_needs_gradient(x, a, b, bias, scale_vector)) {
    return std::get<0>(raw_lora_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32));
  }
  const auto node = make_node<LoraLinearBackward>();
  node->connect(x, a, b, bias, scale_vector);
  const auto [y, s] = raw_lora_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
  node->save(x, weight, a, b, s, scale_vector, seed, scale, dropout_p, allow_tf32);
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace pyfused
