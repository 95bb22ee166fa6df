// LoRA on one projection on CPU: the ops.
#include "lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "../common/cpu_kernels.h"
#include "linear_vectors.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const Tensor& a, const Tensor& b, const std::optional<Tensor>& scale_vector,
                                          double scale, double dropout_p, const std::optional<Tensor>& seed,
                                          std::optional<Tensor>* mask) {
  const Lora lora("lora_linear", x, "x", a, b, scale_vector, scale, dropout_p, seed);
  lora.check_x(x);
  lora.check_base(x, weight, bias);
  Tensor y = empty_rows(x, lora.N, lora.device);
  Tensor s = empty({lora.M, lora.R}, lora.accumulator_type(), lora.device);
  if (mask != nullptr) mask->emplace(lora.empty_mask());
  if (lora.is_empty()) {
    matmul_out(as_matrix(y, lora.M, lora.N), as_matrix(x, lora.M, lora.K), torch::stable::transpose(weight, 0, 1),
               or_null(bias));
    return {y, torch::stable::zero_(s)};
  }
  const LoraForward calls[] = {
      {lora, a, b, nullptr, &weight, or_null(bias), y, s, mask != nullptr ? &**mask : nullptr}};
  lora_forward(calls, x);
  return {y, s};
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b,
                                               const std::optional<Tensor>& scale_vector, double scale,
                                               double dropout_p, const std::optional<Tensor>& seed,
                                               bool /*allow_tf32*/) {
  return linear_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_forward_with_mask(
    const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& a, const Tensor& b,
    const std::optional<Tensor>& scale_vector, double scale, double dropout_p, const std::optional<Tensor>& seed) {
  std::optional<Tensor> mask;
  const auto [y, s] = linear_forward(x, weight, bias, a, b, scale_vector, scale, dropout_p, seed, &mask);
  return {y, s, *mask};
}

std::tuple<Tensor, Tensor> lora_delta_forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                              const std::optional<Tensor>& scale_vector, double scale, double dropout_p,
                                              const std::optional<Tensor>& seed, bool /*allow_tf32*/) {
  const Lora lora("lora_delta", x, "x", a, b, scale_vector, scale, dropout_p, seed);
  lora.check_x(x);
  lora.check_y(x, y);
  Tensor s = empty({lora.M, lora.R}, lora.accumulator_type(), lora.device);
  Tensor out = empty_rows(y, lora.N, lora.device);
  if (lora.is_empty()) return {torch::stable::copy_(out, y), torch::stable::zero_(s)};
  const LoraForward calls[] = {{lora, a, b, &y, nullptr, nullptr, out, s}};
  lora_forward(calls, x);
  return {out, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_backward_op(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector, double scale,
    double dropout_p, const std::optional<Tensor>& seed, int64_t needs, bool /*allow_tf32*/) {
  const Lora lora("lora_backward", grad_y, "grad_y", a, b, scale_vector, scale, dropout_p, seed, /*takes_mask=*/true);
  lora.check_grad_y(grad_y);
  if (weight.has_value()) lora.check_base(grad_y, *weight, std::nullopt);
  lora.check_saved(grad_y, x, needs & kNeedA, s, needs & kNeedB || (needs & kNeedScale && scale_vector.has_value()));

  LoraGradients gradients(lora, grad_y, a, b, scale_vector, needs);
  if (lora.is_empty()) {
    gradients.set_empty(lora, grad_y, needs & kNeedBias);
    return gradients.tuple();
  }
  const bool need_x = needs & kNeedX;
  LoraBackward calls[] = {{lora, grad_y, a, b, s, scale_vector, needs, gradients, or_null(weight)}};
  const Tensor* grad_x = need_x ? &gradients.x : nullptr;
  if (!need_x || !weight.has_value()) {
    lora_backward(calls, x, grad_x, false);
    return gradients.tuple();
  }
  if (lora_backward_in_products(calls, x, gradients.x)) return gradients.tuple();
  const Tensor dx = as_matrix(gradients.x, lora.M, lora.K), dy = as_matrix(grad_y, lora.M, lora.N);
  if (lora.base_first()) product_out(dx, dy, *weight, nullptr, ProductFor::kPlainBackward);
  lora_backward(calls, x, grad_x, lora.base_first());
  if (!lora.base_first()) matmul_add(dx, dy, *weight);
  return gradients.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_linear_forward", TORCH_BOX(&pyfused::lora_linear_forward));
  m.impl("_lora_linear_forward_with_mask", TORCH_BOX(&pyfused::lora_linear_forward_with_mask));
  m.impl("_lora_delta_forward", TORCH_BOX(&pyfused::lora_delta_forward));
  m.impl("_lora_backward", TORCH_BOX(&pyfused::lora_backward_op));
  pyfused::cpu_kernels.lora_linear_forward = &pyfused::lora_linear_forward;
  pyfused::cpu_kernels.lora_linear_forward_with_mask = &pyfused::lora_linear_forward_with_mask;
  pyfused::cpu_kernels.lora_backward = &pyfused::lora_backward_op;
}
