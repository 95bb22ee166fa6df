// What the ops of _autograd share.
//
// The stable ABI has no autograd, so these files use torch's other headers, and the module fits no torch but the one it
// was built with. Each op does what the autograd.Function of pyfused/ops/<op>.py does, with the same raw ops and the
// same arguments, and without Python between the dispatcher and autograd's engine.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <optional>
#include <tuple>
#include <vector>

#include "common/cpu_kernels.h"
#include "common/needs.h"

namespace pyfused {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

// Tensors as _ops has them, and back.
inline torch::stable::Tensor to_stable(const Tensor& tensor) {
  return torch::stable::Tensor(torch::aot_inductor::new_tensor_handle(Tensor(tensor)));
}
inline std::optional<torch::stable::Tensor> to_stable(const Optional& tensor) {
  return tensor.has_value() ? std::optional(to_stable(*tensor)) : std::nullopt;
}
template <class Other>
Other to_stable(Other value) {
  return value;
}
inline Tensor from_stable(torch::stable::Tensor&& tensor) {  // whose handle nobody else has
  return std::move(*torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor.get()));
}
template <class... Tensors>
auto from_stable(std::tuple<Tensors...> tensors) {
  return std::apply([](auto&... each) { return std::make_tuple(from_stable(std::move(each))...); }, tensors);
}

// Whether the dispatcher would call the kernel for the CPU, and nobody would see it do so.
template <class... Arguments>
bool goes_to_cpu(const Arguments&... arguments) {
  constexpr c10::DispatchKeySet all(c10::DispatchKeySet::FULL), fallthrough(c10::DispatchKey::BackendSelect);
  const c10::DispatchKeySet keys =
      c10::impl::computeDispatchKeySet(c10::detail::multi_dispatch_key_set(arguments...), all - fallthrough);
  return keys.highestPriorityTypeId() == c10::DispatchKey::CPU && !at::hasCallbacks();
}

// An op of schema.cpp, past the keys of autograd: what is called here has its gradient here.
template <class Signature>
struct RawOp;
template <class Result, class... Arguments>
struct RawOp<Result(Arguments...)> {
  c10::TypedOperatorHandle<Result(Arguments...)> handle;

  explicit RawOp(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Result(Arguments...)>()) {}
  Result operator()(Arguments... arguments) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(arguments...);
  }
  // The same, for an op whose kernel is among CpuKernels.
  template <class Kernel>
  Result by_address(Kernel CpuKernels::* kernel, Arguments... arguments) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Kernel on_cpu = cpu_kernels.*kernel;
    if (on_cpu == nullptr || !goes_to_cpu(arguments...)) return handle.call(arguments...);
    return from_stable(on_cpu(to_stable(arguments)...));
  }
};

// Saved tensors and gradients that there are not: undefined for autograd, None for an op.
inline Tensor tensor_or_none(const Optional& tensor) { return tensor.value_or(Tensor()); }
inline Optional optional(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }
inline Tensor when(bool condition, const Tensor& tensor) { return condition ? tensor : Tensor(); }
inline Tensor when(bool condition, const Optional& tensor) { return condition ? tensor_or_none(tensor) : Tensor(); }

inline bool needs_gradient(const Tensor& tensor) { return tensor.requires_grad(); }
inline bool needs_gradient(const Optional& tensor) { return tensor.has_value() && tensor->requires_grad(); }
// Whether a call has to be recorded.
template <class... Tensors>
bool any_needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

// Which tensors of a forward this backward is asked for, one after another in the order of the forward's arguments.
class Asked {
 public:
  explicit Asked(AutogradContext* context) : context_(context) {}
  // `given`: the forward had this tensor; autograd counts those that there were.
  bool next(bool given = true) { return given && context_->needs_input_grad(index_++); }

 private:
  AutogradContext* context_;
  size_t index_ = 0;
};

// See refuse_double_backward in pyfused/ops/common.py.
inline void refuse_double_backward(const char* op, const char* reference) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op,
              ": backward with create_graph=True is not supported (the op has no second derivative); ", reference,
              " has one");
}

}  // namespace pyfused
