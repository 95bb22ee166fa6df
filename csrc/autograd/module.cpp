// pyfused._autograd: ops with their gradients in C++, half the cost of a small call. With any other torch than that of
// the build, and where Python has to see the call (torch.compile, tensor subclasses), pyfused/ops/<op>.py takes its
// autograd.Function; both call the same raw ops.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "ops.h"

PYBIND11_MODULE(_autograd, m) {
  m.doc() = "Ops of pyfused with their gradients in C++, for the torch of this build.";
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
        "x, weight, bias or None, scale, input_side -> y");
  m.def("multi_lora_", torch::wrap_pybind_function_no_gil(&pyfused::multi_lora_),
        "list of y, x, list of tables, index, segments or None");
  m.def("ia3_scale", torch::wrap_pybind_function_no_gil(&pyfused::ia3_scale), "x, scale, dim -> y");
}
