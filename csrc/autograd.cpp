// pyfused._autograd: lora_linear with its gradient, in C++. What pyfused/ops/lora.py's autograd.Function does, without
// Python between the dispatcher and autograd's engine: half the cost of a small call.
//
// The stable ABI has no autograd, so this file uses torch's other headers, and the module fits no torch but the one it
// was built with. With any other torch, and where Python has to see the call (torch.compile, tensor subclasses), the
// Function is used; both call the same raw ops with the same arguments.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/utils/pybind.h>

#include <optional>
#include <tuple>

#include "common/lora_needs.h"

namespace pyfused {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::tensor_list;

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
};

std::tuple<Tensor, Tensor> raw_forward(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a,
                                       const Tensor& b, const Optional& scale_vector, double scale, double dropout_p,
                                       const Optional& seed, bool allow_tf32) {
  static const RawOp<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                                                const Tensor&, const Optional&, double, double, const Optional&, bool)>
      op("pyfused::_lora_linear_forward");
  return op(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
Gradients raw_backward(const Tensor& grad_y, const Optional& x, const Optional& weight, const Tensor& a,
                       const Tensor& b, const Optional& s, const Optional& scale_vector, double scale, double dropout_p,
                       const Optional& seed, int64_t needs, bool allow_tf32) {
  static const RawOp<Gradients(const Tensor&, const Optional&, const Optional&, const Tensor&, const Tensor&,
                               const Optional&, const Optional&, double, double, const Optional&, int64_t, bool)>
      op("pyfused::_lora_backward");
  return op(grad_y, x, weight, a, b, s, scale_vector, scale, dropout_p, seed, needs, allow_tf32);
}

// What a call has beside the tensors that may get a gradient.
struct Frozen {
  const Tensor& weight;
  const Optional& seed;
  double scale, dropout_p;
  bool allow_tf32;
};

Tensor tensor_or_none(const Optional& tensor) { return tensor.value_or(Tensor()); }
Optional optional(const Tensor& tensor) { return tensor.defined() ? Optional(tensor) : std::nullopt; }
bool needs_gradient(const Optional& tensor) { return tensor.has_value() && tensor->requires_grad(); }

struct LoraLinear : torch::autograd::Function<LoraLinear> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& a, const Tensor& b, const Optional& bias,
                        const Optional& scale_vector, const Frozen& call) {
    auto [y, s] =
        raw_forward(x, call.weight, bias, a, b, scale_vector, call.scale, call.dropout_p, call.seed, call.allow_tf32);
    const bool need_s = b.requires_grad() || needs_gradient(scale_vector);
    ctx->save_for_backward({a.requires_grad() ? x : Tensor(), x.requires_grad() ? call.weight : Tensor(), a, b,
                            need_s ? s : Tensor(), tensor_or_none(scale_vector), tensor_or_none(call.seed)});
    ctx->saved_data["scale"] = call.scale;
    ctx->saved_data["dropout_p"] = call.dropout_p;
    ctx->saved_data["allow_tf32"] = call.allow_tf32;
    ctx->saved_data["bias"] = bias.has_value();
    return y;
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grads) {
    // See refuse_double_backward in pyfused/ops/common.py.
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "lora_linear: backward with create_graph=True is not supported (the op has no second derivative); "
                "pyfused.reference.lora.lora_linear has one");
    const tensor_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    // autograd counts the tensors that there are
    const bool has_bias = data["bias"].toBool(), has_vector = saved[5].defined();
    const bool need_x = ctx->needs_input_grad(0), need_a = ctx->needs_input_grad(1), need_b = ctx->needs_input_grad(2),
               need_bias = has_bias && ctx->needs_input_grad(3),
               need_scale = has_vector && ctx->needs_input_grad(has_bias ? 4 : 3);
    const int64_t needs =
        need_x * kNeedX | need_a * kNeedA | need_b * kNeedB | need_scale * kNeedScale | need_bias * kNeedBias;
    auto [grad_x, grad_a, grad_b, grad_scale, grad_bias] = raw_backward(
        grads[0], optional(saved[0]), optional(saved[1]), saved[2], saved[3], optional(saved[4]), optional(saved[5]),
        data["scale"].toDouble(), data["dropout_p"].toDouble(), optional(saved[6]), needs, data["allow_tf32"].toBool());
    const auto asked = [](bool need, const Tensor& grad) { return need ? grad : Tensor(); };
    return {asked(need_x, grad_x),       asked(need_a, grad_a),         asked(need_b, grad_b),
            asked(need_bias, grad_bias), asked(need_scale, grad_scale), Tensor()};
  }
};

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a, const Tensor& b,
                   const Optional& scale_vector, double scale, double dropout_p, const Optional& seed,
                   bool allow_tf32) {
  if (at::GradMode::is_enabled() && (x.requires_grad() || a.requires_grad() || b.requires_grad() ||
                                     needs_gradient(bias) || needs_gradient(scale_vector))) {
    return LoraLinear::apply(x, a, b, bias, scale_vector, Frozen{weight, seed, scale, dropout_p, allow_tf32});
  }
  return std::get<0>(raw_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, allow_tf32));
}

}  // namespace
}  // namespace pyfused

PYBIND11_MODULE(_autograd, m) {
  m.doc() = "Ops of pyfused with their gradients in C++, for the torch of this build.";
  m.def("lora_linear", torch::wrap_pybind_function_no_gil(&pyfused::lora_linear),
        "x, weight, bias or None, a, b, scale_vector or None, scale, dropout_p, seed or None, allow_tf32 -> y");
}
