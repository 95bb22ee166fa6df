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

#include <algorithm>
#include <iterator>

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

// A module's own attributes, as its __dict__ has them; null where there is none.
struct State {
  pybind11::object dict;

  explicit State(pybind11::handle module)
      : dict(pybind11::reinterpret_steal<pybind11::object>(PyObject_GenericGetDict(module.ptr(), nullptr))) {
    if (!dict) throw pybind11::error_already_set();
  }
  PyObject* operator[](PyObject* name) const { return PyDict_GetItemWithError(dict.ptr(), name); }

  // One of its parameters, None among them.
  PyObject* parameter(PyObject* name) const {
    static PyObject* const key = PyUnicode_InternFromString("_parameters");
    PyObject* const parameters = (*this)[key];
    return parameters == nullptr || !PyDict_Check(parameters) ? nullptr : PyDict_GetItemWithError(parameters, name);
  }
  bool has_only_forward() const {
    static PyObject* const hooks[] = {
        PyUnicode_InternFromString("_forward_pre_hooks"), PyUnicode_InternFromString("_forward_hooks"),
        PyUnicode_InternFromString("_backward_pre_hooks"), PyUnicode_InternFromString("_backward_hooks")};
    static PyObject* const forward = PyUnicode_InternFromString("forward");
    for (PyObject* const name : hooks) {
      PyObject* const registered = (*this)[name];
      const int any = registered == nullptr ? 1 : PyObject_IsTrue(registered);
      if (any < 0) throw pybind11::error_already_set();
      if (any != 0) return false;
    }
    return (*this)[forward] == nullptr;
  }
};

// The same in pyfused/nn/base.py says why; a layer asks for each of its modules in each call.
bool has_only_forward(const pybind11::args& modules) {
  return std::all_of(modules.begin(), modules.end(),
                     [](const pybind11::handle module) { return State(module).has_only_forward(); });
}

bool is_strided(PyObject* tensor) {
  return tensor != nullptr && THPVariable_CheckExact(tensor) && THPVariable_Unpack(tensor).layout() == at::kStrided;
}

// torch.nn's types as they are when pyfused is imported, which is what its Python compares with, too: layers of whoever
// puts others in their place later are not plain. Never given back: Python may be gone when this library goes.
PyObject *linear_type, *dropout_type;

void find_layer_types() {
  const auto layers = pybind11::module_::import("torch.nn");
  linear_type = pybind11::object(layers.attr("Linear")).release().ptr();
  dropout_type = pybind11::object(layers.attr("Dropout")).release().ptr();
}

// LoraLinear._first_arguments for the usual layer; None where Python has to look.
pybind11::object lora_arguments(const pybind11::handle x, const pybind11::handle base, const pybind11::handle a,
                                const pybind11::handle b, const pybind11::handle dropout,
                                const pybind11::handle scale) {
  static PyObject* const weight = PyUnicode_InternFromString("weight");
  static PyObject* const bias = PyUnicode_InternFromString("bias");
  static PyObject* const p = PyUnicode_InternFromString("p");
  static PyObject* const training = PyUnicode_InternFromString("training");
  const auto is_a = [](const pybind11::handle object, PyObject* type) {
    return reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type;
  };
  if (!is_a(base, linear_type) || !is_a(a, linear_type) || !is_a(b, linear_type) || !is_a(dropout, dropout_type) ||
      !PyFloat_CheckExact(scale.ptr()) || !THPVariable_Check(x.ptr())) {
    return pybind11::none();
  }
  const State of_base(base), of_a(a), of_b(b), of_dropout(dropout);
  for (const State* each : {&of_base, &of_a, &of_b, &of_dropout}) {
    if (!each->has_only_forward()) return pybind11::none();
  }
  PyObject* const found[] = {of_base.parameter(weight),
                             of_base.parameter(bias),
                             of_a.parameter(weight),
                             of_b.parameter(weight),
                             scale.ptr(),
                             of_dropout[p],
                             of_dropout[training]};
  if (std::find(std::begin(found), std::end(found), nullptr) != std::end(found) || !is_strided(found[0]) ||
      (found[1] != Py_None && !is_strided(found[1])) ||
      THPVariable_Unpack(found[0]).scalar_type() != THPVariable_Unpack(x.ptr()).scalar_type()) {
    return pybind11::none();
  }
  return pybind11::reinterpret_steal<pybind11::object>(
      PyTuple_Pack(7, found[0], found[1], found[2], found[3], found[4], found[5], found[6]));
}

void call_cpu_kernels(bool by_address) {
  const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("pyfused::_cpu_kernels", "").typed<int64_t()>();
  cpu_kernels = by_address ? *reinterpret_cast<const CpuKernels*>(op.call()) : CpuKernels{};
}

}  // namespace
}  // namespace pyfused

PYBIND11_MODULE(_autograd, m) {
  pyfused::find_layer_types();
  m.doc() = "Ops of pyfused with their gradients in C++, for the torch of this build.";
  m.def("is_plain_call", &pyfused::is_plain_call,
        "tensors or None, the first a tensor on the CPU -> whether Python has nothing to see or to do for a call with "
        "them: no tensor subclass, mode, transform, forward-mode differentiation or autocast");
  m.def("has_only_forward", &pyfused::has_only_forward,
        "modules -> whether calling each of them runs its class's forward and nothing else");
  m.def("lora_arguments", &pyfused::lora_arguments,
        "x, then of a layer the base, A, B, dropout and scale -> what lora_linear takes between x and the seed, in a "
        "tuple; None where anything is out of the ordinary");
  m.def("call_cpu_kernels", &pyfused::call_cpu_kernels,
        "bool: whether a raw op's kernel for the CPU is called by address where the dispatcher would only add to its "
        "cost");
  m.def(
      "draw_seed",
      [](const pyfused::Tensor& x, const std::optional<at::Generator>& generator) {
        return pyfused::draw_seed(x, generator);
      },
      "x, generator or None -> what draw_seed of pyfused/ops/common.py says");
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
