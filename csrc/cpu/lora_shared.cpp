// LoRA on several projections of one x (query, key and value; gate and up) on CPU: one pass over x in the forward, and
// in the backward one pass over x and one dX, to which the base products add in place. Everything else is what lora.cpp
// does for one projection, so results and the adapters' gradients have the same bits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "lora.h"

namespace pyfused {
namespace {

using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

void check_count(size_t got, size_t count, const char* op, const char* argument) {
  PF_CHECK(got == count, op, argument, "have " + std::to_string(count) + " entries, one for each projection", got);
}

// What the adapters of a call are made of; lists of one length.
struct Adapters {
  const OptionalTensors &a, &b, &scale_vectors;
  const std::vector<double>&scales, &dropout_ps;
  const OptionalTensors& seeds;

  void check(size_t count, const char* op) const {
    PF_CHECK(count > 0, op, "weights", "have at least one entry", count);
    check_count(a.size(), count, op, "a");
    check_count(b.size(), count, op, "b");
    check_count(scale_vectors.size(), count, op, "scale_vectors");
    check_count(scales.size(), count, op, "scales");
    check_count(dropout_ps.size(), count, op, "dropout_ps");
    check_count(seeds.size(), count, op, "seeds");
    for (size_t i = 0; i < count; ++i) {
      PF_CHECK(a[i].has_value() == b[i].has_value(), op, "b", "be given where a is, and only there", "one of the two");
    }
  }

  std::optional<Lora> at(size_t i, const char* op, const Tensor& activation, const char* name) const {
    if (!a[i].has_value()) return std::nullopt;
    return std::optional<Lora>(std::in_place, op, activation, name, *a[i], *b[i], scale_vectors[i], scales[i],
                               dropout_ps[i], seeds[i]);
  }
};

int64_t rows_of(const Tensor& activation, const char* op, const char* name) {
  const auto sizes = activation.sizes();
  PF_CHECK(sizes.size() >= 1, op, name, "have at least one dimension", "a scalar");
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  return rows;
}

// A projection without an adapter: what LoraArguments checks of the base.
void check_base(const char* op, const Tensor& like, const Tensor& weight, int64_t N, int64_t K,
                const std::optional<Tensor>& bias) {
  const Device cpu = Device::cpu();
  for (const Tensor* tensor : {&weight, bias.has_value() ? &*bias : nullptr}) {
    if (tensor == nullptr) continue;
    const char* name = tensor == &weight ? "weight" : "bias";
    check_device(*tensor, cpu, op, name);
    PF_CHECK(tensor->scalar_type() == like.scalar_type(), op, name, "have x's dtype", "another dtype");
  }
  check_shape(weight, {N, K}, op, "weight");
  if (bias.has_value()) check_shape(*bias, {N}, op, "bias");
}

std::tuple<Tensors, Tensors> lora_linear_shared_forward(const Tensor& x, const Tensors& weights,
                                                        const OptionalTensors& biases, const OptionalTensors& a,
                                                        const OptionalTensors& b, const OptionalTensors& scale_vectors,
                                                        const std::vector<double>& scales,
                                                        const std::vector<double>& dropout_ps,
                                                        const OptionalTensors& seeds) {
  const char* op = "lora_linear_shared";
  const size_t count = weights.size();
  const Adapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  adapters.check(count, op);
  check_count(biases.size(), count, op, "biases");
  check_device(x, Device::cpu(), op, "x");
  dtype_of(x, op, "x");
  const int64_t M = rows_of(x, op, "x"), K = x.size(x.dim() - 1);

  std::vector<std::optional<Lora>> loras;
  Tensors y, s;
  for (size_t i = 0; i < count; ++i) {
    const std::optional<Lora>& lora = loras.emplace_back(adapters.at(i, op, x, "x"));
    if (lora.has_value()) {
      lora->check_x(x);
      lora->check_base(x, weights[i], biases[i]);
    } else {
      PF_CHECK(weights[i].dim() == 2, op, "weight", "have shape [N, K]", shape_of(weights[i]));
      check_base(op, x, weights[i], weights[i].size(0), K, biases[i]);
    }
    y.push_back(empty_rows(x, weights[i].size(0), Device::cpu()));
    s.push_back(lora.has_value() ? empty({M, lora->R}, lora->accumulator_type(), lora->device)
                                 : empty({0}, x.scalar_type(), Device::cpu()));
  }

  std::vector<LoraForward> calls;
  const Tensor rows = as_matrix(x, M, K);
  for (size_t i = 0; i < count; ++i) {
    const Tensor* bias = biases[i].has_value() ? &*biases[i] : nullptr;
    if (loras[i].has_value() && !loras[i]->is_empty()) {
      calls.push_back({*loras[i], *a[i], *b[i], nullptr, &weights[i], bias, y[i], s[i]});
      continue;
    }
    if (loras[i].has_value()) torch::stable::zero_(s[i]);
    matmul_out(as_matrix(y[i], M, weights[i].size(0)), rows, torch::stable::transpose(weights[i], 0, 1), bias);
  }
  if (!calls.empty()) lora_forward(calls, x);
  return {y, s};
}

std::tuple<Tensor, Tensors> lora_linear_shared_backward(
    const Tensors& grad_y, const std::optional<Tensor>& x, const OptionalTensors& weights, const OptionalTensors& a,
    const OptionalTensors& b, const OptionalTensors& s, const OptionalTensors& scale_vectors,
    const std::vector<double>& scales, const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
    const std::vector<int64_t>& needs) {
  const char* op = "lora_linear_shared_backward";
  const size_t count = grad_y.size();
  const Adapters adapters{a, b, scale_vectors, scales, dropout_ps, seeds};
  adapters.check(count, op);
  check_count(weights.size(), count, op, "weights");
  check_count(s.size(), count, op, "s");
  check_count(needs.size(), count, op, "needs");
  const bool need_x = needs[0] & kNeedX;
  for (const int64_t bits : needs) {
    PF_CHECK(static_cast<bool>(bits & kNeedX) == need_x, op, "needs", "ask for x's gradient everywhere or nowhere",
             bits);
  }
  const int64_t M = rows_of(grad_y[0], op, "grad_y");
  int64_t K = 0;
  if (need_x) {
    PF_CHECK(weights[0].has_value() && weights[0]->dim() == 2, op, "weights", "be given, [N, K], for x's gradient",
             "another");
    K = weights[0]->size(1);
  }

  // Arguments first: nothing is computed where one of them is no good.
  std::vector<std::optional<Lora>> loras;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& dy = grad_y[i];
    check_device(dy, Device::cpu(), op, "grad_y");
    dtype_of(dy, op, "grad_y");
    PF_CHECK(dy.scalar_type() == grad_y[0].scalar_type(), op, "grad_y", "have one dtype", "several");
    PF_CHECK(rows_of(dy, op, "grad_y") == M, op, "grad_y", "have " + std::to_string(M) + " rows", shape_of(dy));
    const int64_t N = dy.size(dy.dim() - 1);
    const std::optional<Lora>& lora = loras.emplace_back(adapters.at(i, op, dy, "grad_y"));
    if (need_x) {
      PF_CHECK(weights[i].has_value(), op, "weights", "be given for x's gradient", "None");
      check_base(op, dy, *weights[i], N, K, std::nullopt);
    }
    if (!lora.has_value()) continue;
    lora->check_grad_y(dy);
    if (need_x) PF_CHECK(lora->K == K, op, "a", "have " + std::to_string(K) + " columns", lora->K);
    const bool need_scale = needs[i] & kNeedScale && scale_vectors[i].has_value();
    lora->check_saved(dy, x, needs[i] & kNeedA, s[i], needs[i] & kNeedB || need_scale);
  }

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
      calls.push_back({*loras[i], dy, *a[i], *b[i], s[i], scale_vectors[i], needs[i], grad});
    }
  }
  bool written = !need_x;
  const auto add_base_products = [&] {
    for (size_t i = count; i-- > 0;) {
      const int64_t N = grad_y[i].size(grad_y[i].dim() - 1);
      if (!need_x || M == 0 || N == 0 || K == 0) continue;
      const Tensor out = as_matrix(grad_x, M, K), dy = as_matrix(grad_y[i], M, N);
      written ? matmul_add(out, dy, *weights[i]) : matmul_out(out, dy, *weights[i], nullptr);
      written = true;
    }
  };
  const bool base_first = calls.empty() || calls[0].lora.base_first();
  if (base_first) add_base_products();
  if (!calls.empty()) {
    lora_backward(calls, x, need_x ? &grad_x : nullptr, base_first);
    written = true;
  }
  if (!base_first) add_base_products();
  if (!written) torch::stable::zero_(grad_x);

  Tensors grads;
  for (size_t i = 0; i < count; ++i) {
    if (gradients[i].has_value()) {
      const LoraGradients& grad = *gradients[i];
      grads.insert(grads.end(), {grad.a, grad.b, grad.scale, grad.bias});
      continue;
    }
    for (int j = 0; j < 3; ++j) grads.push_back(empty({0}, type, Device::cpu()));
    const Tensor& dy = grad_y[i];
    grads.push_back(needs[i] & kNeedBias ? LoraGradients::sum_rows(dy, M, dy.size(dy.dim() - 1))
                                         : empty({0}, type, Device::cpu()));
  }
  return {grad_x, grads};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_linear_shared_forward", TORCH_BOX(&pyfused::lora_linear_shared_forward));
  m.impl("_lora_linear_shared_backward", TORCH_BOX(&pyfused::lora_linear_shared_backward));
}
