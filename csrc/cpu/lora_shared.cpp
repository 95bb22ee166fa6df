// LoRA on several projections of one x (query, key and value; gate and up) on CPU: one pass over x in the forward, and
// in the backward one pass over x and one dX, to which the base products add in place. Everything else is what lora.cpp
// does for one projection, so results and the adapters' gradients have the same bits.
#include "../common/lora_shared.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu_kernels.h"
#include "linear_vectors.h"
#include "lora.h"

namespace pyfused {
namespace {

std::tuple<Tensors, Tensors> shared_forward(const Tensor& x, const Tensors& weights, const OptionalTensors& biases,
                                            const OptionalTensors& a, const OptionalTensors& b,
                                            const OptionalTensors& scale_vectors, const std::vector<double>& scales,
                                            const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
                                            Tensors* masks) {
  const char* op = "lora_linear_shared";
  const size_t count = weights.size();
  const Device cpu = Device::cpu();
  const SharedAdapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  const auto loras = checked_forward<Lora>(op, cpu, x, weights, biases, adapters);
  const int64_t M = rows_of(x), K = x.size(x.dim() - 1);
  Tensors y, s;
  for (size_t i = 0; i < count; ++i) {
    y.push_back(empty_rows(x, weights[i].size(0), cpu));
    s.push_back(loras[i].has_value() ? empty({M, loras[i]->R}, loras[i]->accumulator_type(), cpu)
                                     : empty({0}, x.scalar_type(), cpu));
    if (masks == nullptr) continue;
    masks->push_back(loras[i].has_value() ? loras[i]->empty_mask() : empty({0, 0}, ScalarType::Int, cpu));
  }

  std::vector<LoraForward> calls;
  const Tensor rows = as_matrix(x, M, K);
  for (size_t i = 0; i < count; ++i) {
    const Tensor* bias = or_null(biases[i]);
    if (loras[i].has_value() && !loras[i]->is_empty()) {
      const Tensor* mask = masks != nullptr ? &(*masks)[i] : nullptr;
      calls.push_back({*loras[i], *a[i], *b[i], nullptr, &weights[i], bias, y[i], s[i], mask});
      continue;
    }
    if (loras[i].has_value()) torch::stable::zero_(s[i]);
    // the vendor's, whose bits a base layer has that is called alone
    matmul_out(as_matrix(y[i], M, weights[i].size(0)), rows, transposed(weights[i]), bias);
  }
  if (!calls.empty()) lora_forward(calls, x);
  return {y, s};
}

std::tuple<Tensors, Tensors> lora_linear_shared_forward(const Tensor& x, const Tensors& weights,
                                                        const OptionalTensors& biases, const OptionalTensors& a,
                                                        const OptionalTensors& b, const OptionalTensors& scale_vectors,
                                                        const std::vector<double>& scales,
                                                        const std::vector<double>& dropout_ps,
                                                        const OptionalTensors& seeds, bool /*allow_tf32*/) {
  return shared_forward(x, weights, biases, a, b, scale_vectors, scales, dropout_ps, seeds, nullptr);
}

std::tuple<Tensors, Tensors, Tensors> lora_linear_shared_forward_with_masks(
    const Tensor& x, const Tensors& weights, const OptionalTensors& biases, const OptionalTensors& a,
    const OptionalTensors& b, const OptionalTensors& scale_vectors, const std::vector<double>& scales,
    const std::vector<double>& dropout_ps, const OptionalTensors& seeds) {
  Tensors masks;
  auto [y, s] = shared_forward(x, weights, biases, a, b, scale_vectors, scales, dropout_ps, seeds, &masks);
  return {std::move(y), std::move(s), std::move(masks)};
}

std::tuple<Tensor, Tensors> lora_linear_shared_backward(
    const Tensors& grad_y, const std::optional<Tensor>& x, const OptionalTensors& weights, const OptionalTensors& a,
    const OptionalTensors& b, const OptionalTensors& s, const OptionalTensors& scale_vectors,
    const std::vector<double>& scales, const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
    const std::vector<int64_t>& needs, bool /*allow_tf32*/) {
  const char* op = "lora_linear_shared_backward";
  const size_t count = grad_y.size();
  const SharedAdapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  const auto loras =
      checked_backward<Lora>(op, Device::cpu(), grad_y, x, weights, adapters, s, needs, /*takes_mask=*/true);
  const bool need_x = needs[0] & kNeedX;
  const int64_t M = rows_of(grad_y[0]), K = need_x ? weights[0]->size(1) : 0;

  const ScalarType type = grad_y[0].scalar_type();
  Tensor grad_x = need_x ? empty_rows(grad_y[0], K, Device::cpu()) : empty({0}, type, Device::cpu());
  std::vector<std::optional<LoraGradients>> gradients(count);
  std::vector<LoraBackward> calls;
  // Last to first: the order in which autograd comes to separate layers.
  for (size_t i = count; i-- > 0;) {
    if (!loras[i].has_value()) continue;
    const Tensor& dy = grad_y[i];
    LoraGradients& grad = gradients[i].emplace(*loras[i], dy, *a[i], *b[i], scale_vectors[i], needs[i] & ~kNeedX);
    if (loras[i]->is_empty()) {
      grad.set_empty(*loras[i], dy, needs[i] & kNeedBias);
    } else {
      calls.push_back({*loras[i], dy, *a[i], *b[i], s[i], scale_vectors[i], needs[i], grad, or_null(weights[i])});
    }
  }
  bool written = !need_x;
  const auto add_base_products = [&] {
    for (size_t i = count; i-- > 0;) {
      const int64_t N = grad_y[i].size(grad_y[i].dim() - 1);
      if (!need_x || M == 0 || N == 0 || K == 0) continue;
      const Tensor out = as_matrix(grad_x, M, K), dy = as_matrix(grad_y[i], M, N);
      written ? product_add(out, dy, *weights[i], ProductFor::kPlainBackward)
              : product_out(out, dy, *weights[i], nullptr, ProductFor::kPlainBackward);
      written = true;
    }
  };
  if (need_x && calls.size() == count && lora_backward_in_products(calls, x, grad_x)) {
    return {grad_x, shared_gradients(gradients, grad_y, needs, Device::cpu())};
  }
  const bool base_first = calls.empty() || calls[0].lora.base_first();
  if (base_first) add_base_products();
  if (!calls.empty()) {
    lora_backward(calls, x, need_x ? &grad_x : nullptr, base_first);
    written = true;
  }
  if (!base_first) add_base_products();
  if (!written) torch::stable::zero_(grad_x);

  return {grad_x, shared_gradients(gradients, grad_y, needs, Device::cpu())};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_linear_shared_forward", TORCH_BOX(&pyfused::lora_linear_shared_forward));
  m.impl("_lora_linear_shared_forward_with_masks", TORCH_BOX(&pyfused::lora_linear_shared_forward_with_masks));
  m.impl("_lora_linear_shared_backward", TORCH_BOX(&pyfused::lora_linear_shared_backward));
  pyfused::cpu_kernels.lora_linear_shared_forward = &pyfused::lora_linear_shared_forward;
  pyfused::cpu_kernels.lora_linear_shared_forward_with_masks = &pyfused::lora_linear_shared_forward_with_masks;
  pyfused::cpu_kernels.lora_linear_shared_backward = &pyfused::lora_linear_shared_backward;
}
