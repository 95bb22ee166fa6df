// pyfused._autograd: ops with their gradients in C++, half the cost of a small call. With any other torch than that of
// the build, and where Python has to see the call (torch.compile, tensor subclasses), pyfused/ops/<op>.py takes its
// autograd.Function; both call the same raw ops, but that a forward here may leave dropout's mask to the backward.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

namespace pyfused {
namespace {

// Between products whose weights fill the caches each Python function of a call is read from memory, at 2 to 5 us: what
// takes_native_autograd, has_native and autocasts of pyfused/ops/common.py ask is asked here at once.
bool is_plain_call(const pybind11::args& tensors) {
  if (at::impl::torch_function_mode_enabled() ||
      c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode) ||
      torch::autograd::ForwardADLevel::try_get_by_idx(0) != nullptr || at::autocast::is_autocast_enabled(at::kCPU)) {
    return false;
  }
  for (const pybind11::handle tensor : tensors) {
    if (!tensor.is_none() && !THPVariable_CheckExact(tensor.ptr())) return false;
  }
  return !tensors.empty() && !tensors[0].is_none() && THPVariable_Unpack(tensors[0].ptr()).is_cpu();
}

// The same in pyfused/nn/base.py says why; a layer asks for each of its modules in each call.
bool has_only_forward(const pybind11::args& modules) {
  static PyObject* const hooks[] = {
      PyUnicode_InternFromString("_forward_pre_hooks"), PyUnicode_InternFromString("_forward_hooks"),
      PyUnicode_InternFromString("_backward_pre_hooks"), PyUnicode_InternFromString("_backward_hooks")};
  static PyObject* const forward = PyUnicode_InternFromString("forward");
  for (const pybind11::handle module : modules) {
    const auto state = pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module.ptr(), nullptr));
    if (!state) throw pybind11::error_already_set();
    for (PyObject* const name : hooks) {
      PyObject* const registered = PyDict_GetItemWithError(state.ptr(), name);
      if (registered == nullptr || PyObject_IsTrue(registered) != 0) return false;
    }
    if (PyDict_GetItemWithError(state.ptr(), forward) != nullptr) return false;
  }
  return true;
}

void call_cpu_kernels(bool by_address) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pyfused::_cpu_kernels", "").typed<int64_t()>();
  cpu_kernels = by_address ? *reinterpret_cast<const CpuKernels*>(op.call()) : CpuKernels{};
}

}  // namespace
}  // namespace pyfused

PYBIND11_MODULE(_autograd, m) {
  m.doc() = "Ops of pyfused with their gradients in C++, for the torch of this build.";
  m.def("is_plain_call", &pyfused::is_plain_call,
        "tensors or None, the first a tensor on the CPU -> whether Python has nothing to see or to do for a call with "
        "them: no tensor subclass, mode, transform, forward-mode differentiation or autocast");
  m.def("has_only_forward", &pyfused::has_only_forward,
        "modules -> whether calling each of them runs its class's forward and nothing else");
  m.def("call_cpu_kernels", &pyfused::call_cpu_kernels,
        "bool: whether a raw op's kernel for the CPU is called by address where the dispatcher would only add to its "
        "cost");
  m.def("lora_linear", torch::wrap_pybind_function_no_gil(&pyfused::lora_linear),
        "x, weight, bias or None, a, b, scale_vector or None, scale, dropout_p, seed or None, allow_tf32 -> y");
  m.def(
      "lora_linear_shared", torch::wrap_pybind_function_no_gil(&pyfused::lora_linear_shared),
      "x, then lists of one length: weights, biases, a, b, scale_vectors (tensors or None), scales, dropout_ps, seeds; "
      "allow_tf32 -> list of y");
  m.def("bottleneck", torch::wrap_pybind_function_no_gil(&pyfused::bottleneck),
        "x, residual or None, w_down, b_down or None, w_up, b_up or None, scale_vector or None, activation, scale, "
        "dropout_p, seed or None, residual_is_x, allow_tf32 -> y");
  m.def("ia3_linear", torch::wrap_pybind_function_no_gil(&pyfused::ia3_linear),
        "x, weight, bias or None, scale, input_side, flatten -> y");
  m.def("multi_lora_", torch::wrap_pybind_function_no_gil(&pyfused::multi_lora_),
        "list of y, x, list of tables, index, segments or None");
  m.def("ia3_scale", torch::wrap_pybind_function_no_gil(&pyfused::ia3_scale), "x, scale, dim -> y");
}
