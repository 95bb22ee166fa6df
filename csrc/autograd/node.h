// What the gradients' nodes share.
//
// They are nodes like those of torch's own ops: torch::autograd::Function would keep what is not a tensor in a map by
// name, and what it knows of its arguments in lists.
#pragma once

#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>

#include "common.h"

namespace pyfused {

using torch::autograd::tensor_list;
using torch::dynamo::autograd::CompiledNodeArgs;
using torch::dynamo::autograd::SwapSavedVariables;

// An op's node says what gradients are computed from and how. A forward makes it, connects it, saves in it and gives
// its results to torch::autograd::set_history.
class GradientNode : public torch::autograd::Node {
 public:
  // op, reference: see refuse_double_backward.
  GradientNode(const char* name, const char* op, const char* reference) : name_(name), op_(op), reference_(reference) {}

  // Where their numbers are many: of connected and of saved tensors.
  void reserve(size_t connected, size_t saved) {
    next_edges_.reserve(connected);
    saved_.reserve(saved);
  }
  // What gradients go to, in the order in which gradients() gives them.
  template <class... Tensors>
  void connect(const Tensors&... tensors) {
    (add_next_edge(edge_of(tensors)), ...);
  }

  // What saved() finds, in its order.
  template <class... Tensors>
  void save(const Tensors&... tensors) {
    (saved_.emplace_back(tensors, /*is_output=*/false), ...);
  }

  std::string name() const final { return name_; }

  tensor_list apply(tensor_list&& grads) final {
    const std::lock_guard<std::mutex> lock(mutex_);
    refuse_double_backward(op_, reference_);
    TORCH_CHECK(!released_, torch::autograd::ERR_BACKWARD_TWICE);
    return gradients(std::move(grads));
  }

  void release_variables() final {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved_) variable.reset_data();
    released_ = true;
  }

  // Compiled autograd traces the raw op in gradients().
  void compiled_args(CompiledNodeArgs& args) const final {
    for (const SavedVariable& variable : saved_) args.collect(variable, /*is_output=*/false);
    args.collect(released_);
    collect_options(args);
  }
  tensor_list apply_with_saved(const tensor_list& grads, SwapSavedVariables& swap) final {
    for (SavedVariable& variable : saved_) swap.before(variable);
    tensor_list results = apply(tensor_list(grads));
    for (SavedVariable& variable : saved_) swap.after(variable);
    return results;
  }

 protected:
  // One for each connected tensor, undefined where it was not asked for. `grads`: of the results, see grad_of.
  virtual tensor_list gradients(tensor_list grads) = 0;
  // What gradients() looks at and is no tensor.
  virtual void collect_options(CompiledNodeArgs& args) const = 0;

  Optional saved(size_t place) const { return optional(saved_[place].unpack()); }
  // `bit` where this backward is asked for the gradient of the tensor that was connected at `edge`, else 0.
  int64_t needed(size_t edge, int64_t bit) const { return task_should_compute_output(edge) ? bit : 0; }
  // Of the only result; nothing may have been computed from it that has a gradient.
  Tensor grad_of(const tensor_list& grads) const {
    return grads[0].defined() ? grads[0] : input_metadata(0).zeros_like();
  }

 private:
  using SavedVariable = torch::autograd::SavedVariable;
  using Edge = torch::autograd::Edge;

  static Edge edge_of(const Tensor& tensor) { return torch::autograd::impl::gradient_edge(tensor); }
  static Edge edge_of(const Optional& tensor) { return tensor.has_value() ? edge_of(*tensor) : Edge(); }

  const char *name_, *op_, *reference_;
  c10::SmallVector<SavedVariable, 8> saved_;
  bool released_ = false;  // which saved_ does not tell where nothing was saved
};

// Nodes count their references in torch 2.13; in 2.11 a shared_ptr does.
template <class T, class... Arguments>
auto make_node(const Arguments&... arguments) {
  using torch::autograd::Node;
  if constexpr (std::is_base_of_v<std::enable_shared_from_this<Node>, Node>) {
    return std::shared_ptr<T>(new T(arguments...), [](T* node) { deleteNode(node); });
  } else {
    return c10::make_intrusive<T>(arguments...);
  }
}

}  // namespace pyfused
