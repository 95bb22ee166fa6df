// LoRA on several projections of one x on CUDA: what lora.cpp does for one, in common passes over x and dX.
#include "../common/lora_shared.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "lora_passes.h"

namespace pyfused {
namespace {

std::tuple<Tensors, Tensors> lora_linear_shared_forward(const Tensor& x, const Tensors& weights,
                                                        const OptionalTensors& biases, const OptionalTensors& a,
                                                        const OptionalTensors& b, const OptionalTensors& scale_vectors,
                                                        const std::vector<double>& scales,
                                                        const std::vector<double>& dropout_ps,
                                                        const OptionalTensors& seeds, bool allow_tf32) {
  const char* op = "lora_linear_shared";
  const size_t count = weights.size();
  const DeviceScope scope(gpu_of(x, op, "x"));
  const SharedAdapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  const auto loras = checked_forward<Lora>(op, scope.device, x, weights, biases, adapters, allow_tf32, scope);
  const int64_t M = rows_of(x), K = x.size(x.dim() - 1);
  Tensors y, s;
  for (size_t i = 0; i < count; ++i) {
    y.push_back(empty_rows(x, weights[i].size(0), scope.device));
    s.push_back(loras[i].has_value() ? loras[i]->sums({M, loras[i]->R}) : empty({0}, x.scalar_type(), scope.device));
  }

  std::vector<LoraForward> calls;
  for (size_t i = 0; i < count; ++i) {
    const Tensor* bias = or_null(biases[i]);
    if (loras[i].has_value() && !loras[i]->is_empty()) {
      calls.push_back({*loras[i], nullptr, &weights[i], bias, y[i], s[i]});
      continue;
    }
    if (loras[i].has_value()) torch::stable::zero_(s[i]);
    matmul_out(as_matrix(y[i], M, weights[i].size(0)), as_matrix(x, M, K), torch::stable::transpose(weights[i], 0, 1),
               bias);
  }
  if (!calls.empty()) lora_forward(calls, x);
  return {y, s};
}

std::tuple<Tensor, Tensors> lora_linear_shared_backward(
    const Tensors& grad_y, const std::optional<Tensor>& x, const OptionalTensors& weights, const OptionalTensors& a,
    const OptionalTensors& b, const OptionalTensors& s, const OptionalTensors& scale_vectors,
    const std::vector<double>& scales, const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
    const std::vector<int64_t>& needs, bool allow_tf32) {
  const char* op = "lora_linear_shared_backward";
  const size_t count = grad_y.size();
  PF_CHECK(count > 0, op, "grad_y", "have at least one entry", count);
  const DeviceScope scope(gpu_of(grad_y[0], op, "grad_y"));
  const SharedAdapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  const auto loras =
      checked_backward<Lora>(op, scope.device, grad_y, x, weights, adapters, s, needs, allow_tf32, scope);
  const bool need_x = needs[0] & kNeedX;
  const int64_t M = rows_of(grad_y[0]), K = need_x ? weights[0]->size(1) : 0;

  Tensor grad_x = need_x ? empty_rows(grad_y[0], K, scope.device) : empty({0}, grad_y[0].scalar_type(), scope.device);
  std::vector<Matrix> dy;
  for (const Tensor& grad : grad_y) dy.emplace_back(grad);
  std::vector<std::optional<LoraGradients>> gradients(count);
  std::vector<LoraBackward> calls;
  std::vector<BaseProduct> products;
  // Last to first: the order in which autograd comes to separate layers.
  for (size_t i = count; i-- > 0;) {
    const int64_t N = grad_y[i].size(grad_y[i].dim() - 1);
    if (need_x && M > 0 && N > 0 && K > 0) products.push_back({as_matrix(dy[i].tensor, M, N), *weights[i]});
    if (!loras[i].has_value()) continue;
    LoraGradients& grad =
        gradients[i].emplace(*loras[i], grad_y[i], *a[i], *b[i], scale_vectors[i], needs[i] & ~kNeedX);
    if (loras[i]->is_empty()) {
      grad.set_empty(*loras[i], grad_y[i], needs[i] & kNeedBias);
    } else {
      calls.push_back({*loras[i], grad_y[i], dy[i], s[i], needs[i], grad});
    }
  }
  if (!calls.empty()) {
    lora_backward(calls, products, x, need_x ? &grad_x : nullptr);
  } else if (products.empty()) {
    torch::stable::zero_(grad_x);
  } else {
    add_products(products, as_matrix(grad_x, M, K), false);
  }
  return {grad_x, shared_gradients(gradients, grad_y, needs, scope.device)};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_lora_linear_shared_forward", TORCH_BOX(&pyfused::lora_linear_shared_forward));
  m.impl("_lora_linear_shared_backward", TORCH_BOX(&pyfused::lora_linear_shared_backward));
}
