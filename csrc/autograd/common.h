// What the ops of _autograd share.
//
// The stable ABI has no autograd, so these files use torch's other headers, and the module fits no torch but the one it
// was built with. Each op does what the autograd.Function of pyfused/ops/<op>.py does, with the same raw ops and the
// same arguments, and without Python between the dispatcher and autograd's engine.
#pragma once

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/DistributionsHelper.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/randint.h>
#include <ATen/record_function.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>

#include <algorithm>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/cpu_kernels.h"
#include "common/needs.h"

namespace pyfused {

using at::Tensor;
using Optional = std::optional<Tensor>;

// Tensors as _ops has them, and back.
inline torch::stable::Tensor to_stable(const Tensor& tensor) {
  return torch::stable::Tensor(torch::aot_inductor::new_tensor_handle(Tensor(tensor)));
}
inline std::optional<torch::stable::Tensor> to_stable(const Optional& tensor) {
  return tensor.has_value() ? std::optional(to_stable(*tensor)) : std::nullopt;
}
template <class T>
  requires(!std::is_arithmetic_v<T>)
auto to_stable(const std::vector<T>& list) {
  std::vector<decltype(to_stable(list[0]))> stable;
  stable.reserve(list.size());
  for (const T& each : list) stable.push_back(to_stable(each));
  return stable;
}
template <class Other>
const Other& to_stable(const Other& value) {
  return value;
}
inline Tensor from_stable(torch::stable::Tensor&& tensor) {  // whose handle nobody else has
  return std::move(*torch::aot_inductor::tensor_handle_to_tensor_pointer(tensor.get()));
}
inline std::vector<Tensor> from_stable(std::vector<torch::stable::Tensor>&& list) {
  std::vector<Tensor> tensors;
  tensors.reserve(list.size());
  for (torch::stable::Tensor& each : list) tensors.push_back(from_stable(std::move(each)));
  return tensors;
}
template <class... Results>
auto from_stable(std::tuple<Results...> results) {
  return std::apply([](auto&... each) { return std::make_tuple(from_stable(std::move(each))...); }, results);
}

// Lists as the dispatcher has them.
template <class Argument>
struct Dispatched {
  using Type = Argument;
};
template <class T>
struct Dispatched<const std::vector<T>&> {
  using Type = at::ArrayRef<T>;
};
template <>
struct Dispatched<const std::vector<Optional>&> {
  using Type = const c10::List<Optional>&;
};
inline c10::List<Optional> dispatched(const std::vector<Optional>& list) { return c10::List<Optional>(list); }
template <class Other>
const Other& dispatched(const Other& value) {
  return value;
}

// Keys that the dispatcher would find in arguments.
struct KeysOf : c10::detail::MultiDispatchKeySet {
  using MultiDispatchKeySet::operator();
  template <class T>
  void operator()(const std::vector<T>& list) {
    for (const T& each : list) (*this)(each);
  }
};

// Whether the dispatcher would call the kernel for the CPU, and nobody would see it do so.
template <class... Arguments>
bool goes_to_cpu(const Arguments&... arguments) {
  constexpr c10::DispatchKeySet all(c10::DispatchKeySet::FULL), fallthrough(c10::DispatchKey::BackendSelect);
  KeysOf keys;
  (keys(arguments), ...);
  return c10::impl::computeDispatchKeySet(keys.ts, all - fallthrough).highestPriorityTypeId() ==
             c10::DispatchKey::CPU &&
         !at::hasCallbacks();
}

// An op of schema.cpp, past the keys of autograd: what is called here has its gradient here.
template <class Signature>
struct RawOp;
template <class Result, class... Arguments>
struct RawOp<Result(Arguments...)> {
  using Dispatch = Result(typename Dispatched<Arguments>::Type...);
  c10::TypedOperatorHandle<Dispatch> handle;

  explicit RawOp(const char* name)
      : handle(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Dispatch>()) {}
  Result operator()(Arguments... arguments) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    return handle.call(dispatched(arguments)...);
  }
  // The same, for an op whose kernel is among CpuKernels.
  template <class Kernel>
  Result by_address(Kernel CpuKernels::* kernel, Arguments... arguments) const {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Kernel on_cpu = cpu_kernels.*kernel;
    if (on_cpu == nullptr || !goes_to_cpu(arguments...)) return handle.call(dispatched(arguments)...);
    return from_stable(on_cpu(to_stable(arguments)...));
  }
};

// Saved tensors and gradients that there are not: undefined for autograd, None for an op.
inline Optional optional(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }
inline Tensor when(bool condition, const Tensor& tensor) { return condition ? tensor : Tensor(); }
inline Optional when(bool condition, const Optional& tensor) { return condition ? tensor : std::nullopt; }

inline bool needs_gradient(const Tensor& tensor) { return tensor.requires_grad(); }
inline bool needs_gradient(const Optional& tensor) { return tensor.has_value() && tensor->requires_grad(); }
inline bool needs_gradient(const std::vector<Optional>& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Optional& tensor) { return needs_gradient(tensor); });
}
// Whether a call has to be recorded.
template <class... Tensors>
bool any_needs_gradient(const Tensors&... tensors) {
  return at::GradMode::is_enabled() && (needs_gradient(tensors) || ...);
}

// Whether a LoRA forward is asked for dropout's mask, which the gradients of x and a read.
inline bool may_keep_mask(const Tensor& x, const Optional& a, double dropout_p) {
  return cpu_kernels.keeps_masks && dropout_p > 0.0 && x.is_cpu() && x.scalar_type() == at::kBFloat16 &&
         (needs_gradient(x) || needs_gradient(a));
}

// A seed for dropout from torch's generator of x's device, or from another one, as draw_seed of pyfused/ops/common.py
// draws it. On the CPU, where nobody would see torch's op, it is what its kernel does with each number, without the way
// there: a fifth of a small call.
inline Tensor draw_seed(const Tensor& x, const std::optional<at::Generator>& generator = std::nullopt) {
  constexpr int64_t low = std::numeric_limits<int64_t>::min(), high = std::numeric_limits<int64_t>::max();
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!goes_to_cpu(x)) return at::randint(low, high, {1}, generator, at::device(x.device()).dtype(at::kLong));
  auto* from = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  at::uniform_int_from_to_distribution<int64_t> draw(static_cast<uint64_t>(high) - static_cast<uint64_t>(low), low);
  const Tensor seed(at::detail::empty_cpu({1}, at::kLong));
  const std::lock_guard lock(from->mutex_);
  *seed.mutable_data_ptr<int64_t>() = draw(from);
  return seed;
}
// The seed of a call that may have been given one.
inline Optional seed_for(const Tensor& x, double dropout_p, const Optional& given) {
  return given.has_value() || dropout_p <= 0.0 ? given : draw_seed(x);
}

// See refuse_double_backward in pyfused/ops/common.py.
inline void refuse_double_backward(const char* op, const char* reference) {
  TORCH_CHECK(!at::GradMode::is_enabled(), op,
              ": backward with create_graph=True is not supported (the op has no second derivative); ", reference,
              " has one");
}

}  // namespace pyfused
