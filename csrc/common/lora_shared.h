// Arguments of LoRA on several projections of one x: what every device checks before it touches memory, and the order
// of the gradients. Lists have one entry for each projection; a and b are none where it has no adapter.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "lora.h"

namespace pyfused {

inline void check_count(size_t got, size_t count, const char* op, const char* argument) {
  PF_CHECK(got == count, op, argument, "have " + std::to_string(count) + " entries, one for each projection", got);
}

// What the adapters of a call are made of.
struct SharedAdapters {
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

  // Projection i's call on some device: what LoraArguments takes, then what that device's Lora takes besides.
  template <class Lora, class... Others>
  std::optional<Lora> at(size_t i, const char* op, const Tensor& activation, const char* name,
                         const Others&... others) const {
    if (!a[i].has_value()) return std::nullopt;
    return std::optional<Lora>(std::in_place, op, activation, name, *a[i], *b[i], scale_vectors[i], scales[i],
                               dropout_ps[i], seeds[i], others...);
  }
};

// The forward's calls, one for each projection.
template <class Lora, class... Others>
std::vector<std::optional<Lora>> checked_forward(const char* op, const Device& device, const Tensor& x,
                                                 const Tensors& weights, const OptionalTensors& biases,
                                                 const SharedAdapters& adapters, const Others&... others) {
  const size_t count = weights.size();
  adapters.check(count, op);
  check_count(biases.size(), count, op, "biases");
  check_device(x, device, op, "x");
  dtype_of(x, op, "x");
  PF_CHECK(x.dim() >= 1, op, "x", "have at least one dimension", "a scalar");
  std::vector<std::optional<Lora>> loras;
  for (size_t i = 0; i < count; ++i) {
    const std::optional<Lora>& lora = loras.emplace_back(adapters.template at<Lora>(i, op, x, "x", others...));
    if (lora.has_value()) {
      lora->check_x(x);
      lora->check_base(x, weights[i], biases[i]);
    } else {
      PF_CHECK(weights[i].dim() == 2, op, "weight", "have shape [N, K]", shape_of(weights[i]));
      check_linear(x, weights[i], biases[i], weights[i].size(0), x.size(x.dim() - 1), device, op);
    }
  }
  return loras;
}

// The backward's, likewise.
template <class Lora, class... Others>
std::vector<std::optional<Lora>> checked_backward(const char* op, const Device& device, const Tensors& grad_y,
                                                  const std::optional<Tensor>& x, const OptionalTensors& weights,
                                                  const SharedAdapters& adapters, const OptionalTensors& s,
                                                  const std::vector<int64_t>& needs, const Others&... others) {
  const size_t count = grad_y.size();
  adapters.check(count, op);
  check_count(weights.size(), count, op, "weights");
  check_count(s.size(), count, op, "s");
  check_count(needs.size(), count, op, "needs");
  const bool need_x = needs[0] & kNeedX;
  for (const int64_t bits : needs) {
    PF_CHECK(static_cast<bool>(bits & kNeedX) == need_x, op, "needs", "ask for x's gradient everywhere or nowhere",
             bits);
  }
  const int64_t M = rows_of(grad_y[0]);
  int64_t K = 0;
  if (need_x) {
    PF_CHECK(weights[0].has_value() && weights[0]->dim() == 2, op, "weights", "be given, [N, K], for x's gradient",
             "another");
    K = weights[0]->size(1);
  }
  std::vector<std::optional<Lora>> loras;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& dy = grad_y[i];
    check_device(dy, device, op, "grad_y");
    dtype_of(dy, op, "grad_y");
    PF_CHECK(dy.dim() >= 1, op, "grad_y", "have at least one dimension", "a scalar");
    PF_CHECK(dy.scalar_type() == grad_y[0].scalar_type(), op, "grad_y", "have one dtype", "several");
    PF_CHECK(rows_of(dy) == M, op, "grad_y", "have " + std::to_string(M) + " rows", shape_of(dy));
    const std::optional<Lora>& lora = loras.emplace_back(adapters.template at<Lora>(i, op, dy, "grad_y", others...));
    if (need_x) {
      PF_CHECK(weights[i].has_value(), op, "weights", "be given for x's gradient", "None");
      check_linear(dy, *weights[i], std::nullopt, dy.size(dy.dim() - 1), K, device, op);
    }
    if (!lora.has_value()) continue;
    lora->check_grad_y(dy);
    if (need_x) PF_CHECK(lora->K == K, op, "a", "have " + std::to_string(K) + " columns", lora->K);
    const bool need_scale = needs[i] & kNeedScale && adapters.scale_vectors[i].has_value();
    lora->check_saved(dy, x, needs[i] & kNeedA, s[i], needs[i] & kNeedB || need_scale);
  }
  return loras;
}

// What a backward returns besides x's gradient: four of each projection; without an adapter only the bias has one.
inline Tensors shared_gradients(const std::vector<std::optional<LoraGradients>>& gradients, const Tensors& grad_y,
                                const std::vector<int64_t>& needs, const Device& device) {
  Tensors grads;
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (gradients[i].has_value()) {
      const LoraGradients& grad = *gradients[i];
      grads.insert(grads.end(), {grad.a, grad.b, grad.scale, grad.bias});
      continue;
    }
    const Tensor& dy = grad_y[i];
    for (int j = 0; j < 3; ++j) grads.push_back(empty({0}, dy.scalar_type(), device));
    grads.push_back(needs[i] & kNeedBias
                        ? LoraGradients::sum_rows(dy, dy.numel() / std::max<int64_t>(dy.size(dy.dim() - 1), 1),
                                                  dy.size(dy.dim() - 1))
                        : empty({0}, dy.scalar_type(), device));
  }
  return grads;
}

}  // namespace pyfused
