// A LoRA call's arguments: what every device checks before it touches memory, and the gradients of a backward.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "needs.h"
#include "philox.h"
#include "tensor.h"

namespace pyfused {

struct LoraArguments {
  const char* op;
  Device device;
  Dtype dtype, accumulator;
  int64_t M, K, N, R;
  uint32_t threshold;  // of dropout, see philox.h
  double dropout_scale;
  bool has_mask = false;  // in place of the seed
  double factor;

  // activation is x or grad_y: it has the dtype and, in its leading dimensions, the rows. takes_mask: in place of the
  // seed there may be the mask that a forward left.
  LoraArguments(const char* op, const Device& device, const Tensor& activation, const char* name, const Tensor& a,
                const Tensor& b, const std::optional<Tensor>& scale_vector, double factor, double dropout_p,
                const std::optional<Tensor>& seed, bool takes_mask = false)
      : op(op),
        device(device),
        dtype(dtype_of(activation, op, name)),
        accumulator(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        factor(factor) {
    check_device(activation, device, op, name);
    check_adapter(a, "a");
    check_adapter(b, "b");
    const auto sizes = activation.sizes(), a_sizes = a.sizes(), b_sizes = b.sizes();
    PF_CHECK(sizes.size() >= 1, op, name, "have at least one dimension", "a scalar");
    PF_CHECK(a_sizes.size() == 2 && a_sizes[0] >= 1, op, "a", "have shape [R, K] with R >= 1", shape_of(a));
    PF_CHECK(b_sizes.size() == 2, op, "b", "have shape [N, R]", shape_of(b));
    M = 1;
    for (size_t i = 0; i + 1 < sizes.size(); ++i) M *= sizes[i];
    R = a_sizes[0];
    K = a_sizes[1];
    N = b_sizes[0];
    PF_CHECK(b_sizes[1] == R, op, "b", "have a's rank " + std::to_string(R) + " as columns", shape_of(b));
    PF_CHECK(dropout_p >= 0.0 && dropout_p < 1.0, op, "dropout_p", "be in [0, 1)", dropout_p);
    threshold = drop_threshold(dropout_p);
    dropout_scale = keep_scale(threshold);
    if (threshold != 0) {
      PF_CHECK(seed.has_value(), op, "seed", "be an int64 tensor with one element where dropout_p > 0", "None");
      has_mask = takes_mask && seed->scalar_type() == ScalarType::Int;
      if (has_mask) {
        check_device(*seed, device, op, "seed");
        check_shape(*seed, {M, mask_words()}, op, "seed");
        PF_CHECK(seed->is_contiguous(), op, "seed", "be contiguous where it is a mask", "another layout");
      } else {
        check_seed(*seed, device, op);
      }
    }
    if (scale_vector.has_value()) {
      check_adapter(*scale_vector, "scale_vector");
      check_shape(*scale_vector, {R}, op, "scale_vector");
    }
  }

  void check_x(const Tensor& x) const {
    const int64_t columns = x.size(x.dim() - 1);
    PF_CHECK(columns == K, op, "a", "have x's " + std::to_string(columns) + " columns", K);
  }
  void check_base(const Tensor& like, const Tensor& weight, const std::optional<Tensor>& bias) const {
    check_linear(like, weight, bias, N, K, device, op);
  }
  void check_y(const Tensor& x, const Tensor& y) const {
    check_device(y, device, op, "y");
    PF_CHECK(y.scalar_type() == x.scalar_type(), op, "y", "have x's dtype", "another dtype");
    bool same = y.dim() == x.dim() && y.size(y.dim() - 1) == N;
    for (int64_t i = 0; same && i < y.dim() - 1; ++i) same = y.size(i) == x.size(i);
    PF_CHECK(same, op, "y", "have x's leading dimensions and N columns", shape_of(y));
  }
  void check_grad_y(const Tensor& grad_y) const {
    PF_CHECK(grad_y.size(grad_y.dim() - 1) == N, op, "grad_y", "have N = " + std::to_string(N) + " columns",
             shape_of(grad_y));
  }
  // What the forward saved.
  void check_saved(const Tensor& grad_y, const std::optional<Tensor>& x, bool need_x, const std::optional<Tensor>& s,
                   bool need_s) const {
    if (need_x) {
      PF_CHECK(x.has_value(), op, "x", "be given for a's gradient", "None");
      check_device(*x, device, op, "x");
      PF_CHECK(x->scalar_type() == grad_y.scalar_type(), op, "x", "have grad_y's dtype", "another dtype");
      PF_CHECK(x->dim() >= 1 && x->size(x->dim() - 1) == K && x->numel() == M * K, op, "x",
               "have grad_y's leading dimensions and a's columns", shape_of(*x));
    }
    if (need_s) {
      PF_CHECK(s.has_value(), op, "s", "be given for the gradients of b and scale_vector", "None");
      check_device(*s, device, op, "s");
      check_shape(*s, {M, R}, op, "s");
      PF_CHECK(s->scalar_type() == accumulator_type() && s->is_contiguous(), op, "s",
               "be contiguous in the accumulation type", "another layout or dtype");
    }
  }

  bool is_empty() const { return M == 0 || K == 0 || N == 0; }
  // Of a row of dropout's mask, a bit an element.
  int64_t mask_words() const { return round_up(K, philox::kBlockColumns) / 32; }
  ScalarType accumulator_type() const {
    return accumulator == Dtype::kFloat64 ? ScalarType::Double : ScalarType::Float;
  }

 private:
  void check_adapter(const Tensor& tensor, const char* argument) const {
    check_device(tensor, device, op, argument);
    PF_CHECK(dtype_of(tensor, op, argument) != Dtype::kFloat64 || dtype == Dtype::kFloat64, op, argument,
             "not be float64 where x is not", "float64");
  }
};

// The gradients of one backward; what was not asked for is an empty tensor.
struct LoraGradients {
  Tensor x, a, b, scale, bias;

  LoraGradients(const LoraArguments& lora, const Tensor& grad_y, const Tensor& of_a, const Tensor& of_b,
                const std::optional<Tensor>& scale_vector, int64_t needs)
      : x(needs & kNeedX ? empty_rows(grad_y, lora.K, lora.device) : none(grad_y, lora)),
        a(needs & kNeedA ? empty({lora.R, lora.K}, of_a.scalar_type(), lora.device) : none(of_a, lora)),
        b(needs & kNeedB ? empty({lora.N, lora.R}, of_b.scalar_type(), lora.device) : none(of_b, lora)),
        scale(needs & kNeedScale && scale_vector.has_value()
                  ? empty({lora.R}, scale_vector->scalar_type(), lora.device)
                  : none(scale_vector.has_value() ? *scale_vector : grad_y, lora)),
        bias(needs & kNeedBias ? empty({lora.N}, grad_y.scalar_type(), lora.device) : none(grad_y, lora)) {}

  // Of a call without elements: zeros; where K alone is 0 the bias still sees grad_y.
  void set_empty(const LoraArguments& lora, const Tensor& grad_y, bool need_bias) {
    for (Tensor* grad : {&x, &a, &b, &scale, &bias}) torch::stable::zero_(*grad);
    if (need_bias && lora.M > 0 && lora.N > 0) bias = sum_rows(grad_y, lora.M, lora.N);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const { return {x, a, b, scale, bias}; }

  static Tensor sum_rows(const Tensor& matrix, int64_t rows, int64_t columns) {
    const int64_t first = 0;
    const torch::headeronly::IntHeaderOnlyArrayRef dims(&first, 1);
    // With the dtype named, autocast leaves it alone.
    return torch::stable::sum(torch::stable::reshape(matrix, {rows, columns}), dims, false, matrix.scalar_type());
  }

 private:
  static Tensor none(const Tensor& like, const LoraArguments& lora) {
    return empty({0}, like.scalar_type(), lora.device);
  }
};

}  // namespace pyfused
