// LoRA on CPU: checks, allocation, the vendor's GEMM for the base product, and how the loops of kernels/lora.cpp are
// spread over threads. Work is cut by shape alone, never by the number of threads, so results do not depend on it.
#include "kernels/lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/lora.h"
#include "isa.h"
#include "matrix.h"

namespace pyfused {
namespace {

const LoraKernels& kernels_for(Dtype dtype) {
  switch (cpu_capability()) {
#if defined(PYFUSED_HAVE_AVX512_BF16)
    case Capability::AVX512_BF16:
      return AVX512_BF16::lora_kernels(dtype);
#endif
#if defined(PYFUSED_HAVE_AVX512)
    case Capability::AVX512:
      return AVX512::lora_kernels(dtype);
#endif
#if defined(PYFUSED_HAVE_AVX2)
    case Capability::AVX2:
      return AVX2::lora_kernels(dtype);
#endif
    default:
      return DEFAULT::lora_kernels(dtype);
  }
}

// A call with its small operands.
struct Lora : LoraArguments {
  const LoraKernels& kernels;
  Dropout dropout;
  std::vector<double> scale;  // per rank, factor included; empty where the scale is the factor alone

  Lora(const char* op, const Tensor& activation, const char* name, const Tensor& a, const Tensor& b,
       const std::optional<Tensor>& scale_vector, double factor, double dropout_p, const std::optional<Tensor>& seed)
      : LoraArguments(op, Device::cpu(), activation, name, a, b, scale_vector, factor, dropout_p, seed),
        kernels(kernels_for(dtype)),
        dropout{0, threshold} {
    if (threshold != 0) std::memcpy(&dropout.seed, seed->const_data_ptr(), sizeof dropout.seed);
    if (scale_vector.has_value()) read_scale(*scale_vector);
  }

  int64_t ld_a() const { return round_up(K, kPackedColumns); }
  int64_t ld_bt() const { return round_up(N, kPackedColumns); }

  // a as [R, ld] and b transposed as [R, ld], in the accumulation type.
  Operand pack_a(const Tensor& a) const {
    if (K % kPackedColumns == 0 && a.stride(1) == 1 && dtype_of(a, op, "a") == accumulator) {
      return {std::nullopt, a.const_data_ptr(), a.stride(0)};
    }
    return pack(a, R, K, a.stride(0), a.stride(1));
  }
  Operand pack_bt(const Tensor& b) const { return pack(b, R, N, b.stride(1), b.stride(0)); }

  // Factor per rank.
  std::vector<double> factors() const {
    return scale.empty() ? std::vector<double>(static_cast<size_t>(R), factor) : scale;
  }

  // destination[m][r] = source[m][r] * scale[r] * extra; may be the same memory.
  void scale_rows(const void* source, void* destination, double extra) const {
    with_accumulator([&](auto zero) {
      using Acc = decltype(zero);
      const Acc* from = static_cast<const Acc*>(source);
      Acc* to = static_cast<Acc*>(destination);
      if (scale.empty()) {
        const Acc uniform = static_cast<Acc>(factor * extra);
        for (int64_t i = 0; i < M * R; ++i) to[i] = from[i] * uniform;
        return;
      }
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t r = 0; r < R; ++r) to[m * R + r] = from[m * R + r] * static_cast<Acc>(scale[r] * extra);
      }
    });
  }

  template <class F>
  void with_accumulator(const F& run) const {
    accumulator == Dtype::kFloat64 ? run(0.0) : run(0.0f);
  }

 private:
  void read_scale(const Tensor& vector) {
    const int64_t padded = round_up(R, kPackedColumns);
    scale.resize(static_cast<size_t>(padded));
    kernels_for(Dtype::kFloat64)
        .pack[static_cast<int>(dtype_of(vector, op, "scale_vector"))](vector.const_data_ptr(), 0, vector.stride(0), 1,
                                                                      R, scale.data(), padded);
    scale.resize(static_cast<size_t>(R));
    for (double& value : scale) value *= factor;
  }

  Operand pack(const Tensor& source, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) const {
    const int64_t ld = round_up(columns, kPackedColumns);
    Scratch packed(rows, ld, accumulator);
    void* to = packed.at(0);
    kernels.pack[static_cast<int>(dtype_of(source, op, "adapter"))](source.const_data_ptr(), row_stride, column_stride,
                                                                    rows, columns, to, ld);
    return {std::move(packed), to, ld};
  }
};

// s = drop(x) a^T
void shrink(const Lora& lora, const Matrix& x, const Tensor& a, void* s) {
  const void* from = x.tensor.const_data_ptr();
  const Operand packed = lora.pack_a(a);
  const int64_t step = round_up(std::max<int64_t>(divide_up(lora.M, 2 * kMaxTasks), 4), 4);
  parallel(divide_up(lora.M, step), lora.M * lora.K * lora.R, [&](int64_t task) {
    lora.kernels.shrink(from, x.ld, task * step, std::min((task + 1) * step, lora.M), lora.K, lora.R, packed.data,
                        packed.ld, lora.dropout, s);
  });
  if (lora.dropout.threshold == 0) return;
  // the kept elements' factor is the same for all: it is cheaper on M x R than on M x K
  lora.with_accumulator([&](auto factor) {
    using Acc = decltype(factor);
    factor = static_cast<Acc>(lora.dropout_scale);
    Acc* values = static_cast<Acc*>(s);
    for (int64_t i = 0; i < lora.M * lora.R; ++i) values[i] *= factor;
  });
}

// Rows up to which b is read as it is.
constexpr int64_t kDecodeRows = 4;

// out = y + (s * scale) b^T; out may be y.
void expand(const Lora& lora, const Matrix& y, const Tensor& out, const void* s, const Tensor& b) {
  const void* from = y.tensor.const_data_ptr();
  void* to = out.mutable_data_ptr();
  const Scratch scaled(lora.M, lora.R, lora.accumulator);
  lora.scale_rows(s, scaled.at(0), 1.0);
  if (lora.M <= kDecodeRows && dtype_of(b, lora.op, "b") == lora.accumulator) {
    // the path is chosen by shape and dtype alone, so that b's strides do not change the order of the sum
    const Tensor rows = b.stride(1) == 1 ? b : torch::stable::contiguous(b);
    if (lora.kernels.decode_expand(from, y.ld, to, lora.N, lora.M, lora.N, lora.R, scaled.at(0), rows.const_data_ptr(),
                                   rows.stride(0))) {
      return;
    }
  }
  const Operand bt = lora.pack_bt(b);
  const Grid grid(lora.M, lora.N, 0);
  parallel(grid.tasks(), lora.M * lora.N * lora.R, [&](int64_t task) {
    lora.kernels.expand(from, y.ld, to, lora.N, grid.tile(task / grid.column_tasks, task % grid.column_tasks), lora.R,
                        scaled.at(0), bt.data, bt.ld);
  });
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b,
                                               const std::optional<Tensor>& scale_vector, double scale,
                                               double dropout_p, const std::optional<Tensor>& seed,
                                               bool /*allow_tf32*/) {
  const Lora lora("lora_linear", x, "x", a, b, scale_vector, scale, dropout_p, seed);
  lora.check_x(x);
  lora.check_base(x, weight, bias);
  Tensor y = empty_rows(x, lora.N, lora.device);
  Tensor s = empty({lora.M, lora.R}, lora.accumulator_type(), lora.device);
  matmul_out(as_matrix(y, lora.M, lora.N), as_matrix(x, lora.M, lora.K), torch::stable::transpose(weight, 0, 1), bias);
  if (lora.is_empty()) return {y, torch::stable::zero_(s)};
  shrink(lora, Matrix(x), a, s.mutable_data_ptr());
  expand(lora, Matrix(y), y, s.const_data_ptr(), b);
  return {y, s};
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
  shrink(lora, Matrix(x), a, s.mutable_data_ptr());
  expand(lora, Matrix(y), out, s.const_data_ptr(), b);
  return {out, s};
}

// The gradient of a packed operand: the sum of its parts, rounded once to its dtype.
// columns columns of [R, ld] parts become out [R, columns], or [columns, R] where transposed.
void unpack(const Lora& lora, const Scratch& parts, int64_t part_count, int64_t rows, int64_t columns, bool transposed,
            const double* scale, const Tensor& out, const char* argument) {
  const int64_t ld = round_up(columns, kPackedColumns);
  const auto finish = lora.kernels.unpack[static_cast<int>(dtype_of(out, lora.op, argument))];
  void* to = out.mutable_data_ptr();
  parallel(divide_up(columns, kTaskColumns), part_count * rows * columns, [&](int64_t task) {
    finish(parts.at(0), part_count, rows * ld, ld, rows, task * kTaskColumns,
           std::min((task + 1) * kTaskColumns, columns), scale, to, transposed ? 1 : columns, transposed ? rows : 1);
  });
}

// sum_m s[m][r] u[m][r] per rank, times the factor that is not part of the vector.
std::vector<double> scale_gradient(const Lora& lora, const void* s_, const void* u_) {
  std::vector<double> sums(static_cast<size_t>(lora.R), 0.0);
  lora.with_accumulator([&](auto zero) {
    const auto* s = static_cast<const decltype(zero)*>(s_);
    const auto* u = static_cast<const decltype(zero)*>(u_);
    for (int64_t m = 0; m < lora.M; ++m) {
      for (int64_t r = 0; r < lora.R; ++r) sums[r] += static_cast<double>(s[m * lora.R + r]) * u[m * lora.R + r];
    }
  });
  for (double& value : sums) value *= lora.factor;
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector, double scale,
    double dropout_p, const std::optional<Tensor>& seed, int64_t needs, bool /*allow_tf32*/) {
  const Lora lora("lora_backward", grad_y, "grad_y", a, b, scale_vector, scale, dropout_p, seed);
  const auto [M, K, N, R] = std::tuple(lora.M, lora.K, lora.N, lora.R);
  lora.check_grad_y(grad_y);
  const bool need_x = needs & kNeedX, need_a = needs & kNeedA, need_b = needs & kNeedB;
  const bool need_scale = (needs & kNeedScale) && scale_vector.has_value(), need_bias = needs & kNeedBias;
  const bool need_u = need_x || need_a || need_scale;
  if (weight.has_value()) lora.check_base(grad_y, *weight, std::nullopt);
  lora.check_saved(grad_y, x, need_a, s, need_b || need_scale);

  LoraGradients grad(lora, grad_y, a, b, scale_vector, needs);
  if (lora.is_empty()) {
    grad.set_empty(lora, grad_y, need_bias);
    return grad.tuple();
  }

  const Matrix dy(grad_y);
  const Operand bt = lora.pack_bt(b);
  const Grid grid(M, N, R);
  const Scratch u(need_u ? grid.column_tasks : 0, M * R, lora.accumulator);
  const Scratch dbt(need_b ? grid.row_tasks : 0, R * lora.ld_bt(), lora.accumulator);
  const Scratch dbias(need_bias ? grid.row_tasks : 0, lora.ld_bt(), lora.accumulator);
  parallel(grid.tasks(), M * N * R, [&](int64_t task) {
    const int64_t row_task = task / grid.column_tasks, column_task = task % grid.column_tasks;
    lora.kernels.backward_dy(dy.tensor.const_data_ptr(), dy.ld, grid.tile(row_task, column_task), R, bt.data, bt.ld,
                             need_b ? s->const_data_ptr() : nullptr, need_u ? u.at(column_task * M * R) : nullptr,
                             need_b ? dbt.at(row_task * R * lora.ld_bt()) : nullptr, lora.ld_bt(),
                             need_bias ? dbias.at(row_task * lora.ld_bt()) : nullptr);
  });
  if (need_b) unpack(lora, dbt, grid.row_tasks, R, N, true, lora.factors().data(), grad.b, "b");
  if (need_bias) unpack(lora, dbias, grid.row_tasks, 1, N, false, nullptr, grad.bias, "bias");
  if (!need_u) return grad.tuple();

  // u = dy b, then ds = u * scale with the kept elements' factor for both of its uses
  const auto sum_u = lora.kernels.unpack[static_cast<int>(lora.accumulator)];
  parallel(divide_up(M * R, kTaskColumns), grid.column_tasks * M * R, [&](int64_t task) {
    sum_u(u.at(0), grid.column_tasks, M * R, M * R, 1, task * kTaskColumns, std::min((task + 1) * kTaskColumns, M * R),
          nullptr, u.at(0), M * R, 1);
  });
  if (need_scale) {
    const std::vector<double> sums = scale_gradient(lora, s->const_data_ptr(), u.at(0));
    kernels_for(Dtype::kFloat64)
        .unpack[static_cast<int>(dtype_of(grad.scale, lora.op, "scale_vector"))](sums.data(), 1, R, R, 1, 0, R, nullptr,
                                                                                 grad.scale.mutable_data_ptr(), R, 1);
  }
  if (!need_x && !need_a) return grad.tuple();
  lora.scale_rows(u.at(0), u.at(0), lora.dropout_scale);

  if (need_x && weight.has_value()) {
    matmul_out(as_matrix(grad.x, M, K), as_matrix(dy.tensor, M, N), *weight, std::nullopt);
  }
  const std::optional<Matrix> rows = need_a ? std::optional<Matrix>(*x) : std::nullopt;
  const void* x_data = need_a ? rows->tensor.const_data_ptr() : nullptr;
  const int64_t ld_x = need_a ? rows->ld : 0;
  const Operand packed_a = lora.pack_a(a);
  const Grid grid_x(M, K, R);
  const Scratch da(need_a ? grid_x.row_tasks : 0, R * lora.ld_a(), lora.accumulator);
  void* dx = need_x ? grad.x.mutable_data_ptr() : nullptr;
  parallel(grid_x.tasks(), M * K * R, [&](int64_t task) {
    const int64_t row_task = task / grid_x.column_tasks, column_task = task % grid_x.column_tasks;
    lora.kernels.backward_x(x_data, ld_x, dx, K, weight.has_value(), grid_x.tile(row_task, column_task), R,
                            packed_a.data, packed_a.ld, u.at(0), lora.dropout,
                            need_a ? da.at(row_task * R * lora.ld_a()) : nullptr, lora.ld_a());
  });
  if (need_a) unpack(lora, da, grid_x.row_tasks, R, K, false, nullptr, grad.a, "a");
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_linear_forward", TORCH_BOX(&pyfused::lora_linear_forward));
  m.impl("_lora_delta_forward", TORCH_BOX(&pyfused::lora_delta_forward));
  m.impl("_lora_backward", TORCH_BOX(&pyfused::lora_backward));
}
