// LoRA on one projection on CUDA: the ops.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "lora_passes.h"

namespace pyfused {
namespace {

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b,
                                               const std::optional<Tensor>& scale_vector, double scale,
                                               double dropout_p, const std::optional<Tensor>& seed, bool allow_tf32) {
  const char* op = "lora_linear";
  const DeviceScope scope(gpu_of(x, op, "x"));
  const Lora lora(op, x, "x", a, b, scale_vector, scale, dropout_p, seed, allow_tf32, scope);
  lora.check_x(x);
  lora.check_base(x, weight, bias);
  Tensor y = empty_rows(x, lora.N, lora.device);
  Tensor s = lora.sums({lora.M, lora.R});
  if (lora.is_empty()) {
    const Tensor out = as_matrix(y, lora.M, lora.N), transposed = torch::stable::transpose(weight, 0, 1);
    matmul_out(out, as_matrix(x, lora.M, lora.K), transposed, or_null(bias));
    return {y, torch::stable::zero_(s)};
  }
  const LoraForward call{lora, nullptr, &weight, or_null(bias), y, s};
  lora_forward({&call, 1}, x);
  return {y, s};
}

std::tuple<Tensor, Tensor> lora_delta_forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                              const std::optional<Tensor>& scale_vector, double scale, double dropout_p,
                                              const std::optional<Tensor>& seed, bool allow_tf32) {
  const char* op = "lora_delta";
  const DeviceScope scope(gpu_of(x, op, "x"));
  const Lora lora(op, x, "x", a, b, scale_vector, scale, dropout_p, seed, allow_tf32, scope);
  lora.check_x(x);
  lora.check_y(x, y);
  Tensor s = lora.sums({lora.M, lora.R});
  Tensor out = empty_rows(y, lora.N, lora.device);
  if (lora.is_empty()) return {torch::stable::copy_(out, y), torch::stable::zero_(s)};
  const LoraForward call{lora, &y, nullptr, nullptr, out, s};
  lora_forward({&call, 1}, x);
  return {out, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_backward_op(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector, double scale,
    double dropout_p, const std::optional<Tensor>& seed, int64_t needs, bool allow_tf32) {
  const char* op = "lora_backward";
  const DeviceScope scope(gpu_of(grad_y, op, "grad_y"));
  const Lora lora(op, grad_y, "grad_y", a, b, scale_vector, scale, dropout_p, seed, allow_tf32, scope);
  lora.check_grad_y(grad_y);
  const bool need_scale = (needs & kNeedScale) && scale_vector.has_value();
  if (weight.has_value()) lora.check_base(grad_y, *weight, std::nullopt);
  lora.check_saved(grad_y, x, needs & kNeedA, s, needs & kNeedB || need_scale);

  LoraGradients grad(lora, grad_y, a, b, scale_vector, needs);
  if (lora.is_empty()) {
    grad.set_empty(lora, grad_y, needs & kNeedBias);
    return grad.tuple();
  }
  const Matrix dy(grad_y);
  const LoraBackward call{lora, grad_y, dy, s, needs, grad};
  std::vector<BaseProduct> products;
  if (weight.has_value()) products.push_back({as_matrix(dy.tensor, lora.M, lora.N), *weight});
  lora_backward({&call, 1}, products, x, needs & kNeedX ? &grad.x : nullptr);
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_lora_linear_forward", TORCH_BOX(&pyfused::lora_linear_forward));
  m.impl("_lora_delta_forward", TORCH_BOX(&pyfused::lora_delta_forward));
  m.impl("_lora_backward", TORCH_BOX(&pyfused::lora_backward_op));
}
