// LoRA on CPU: checks, allocation, the vendor's GEMM for the base product, and how the loops of kernels/lora.cpp are
// spread over threads.
#include "lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "isa.h"

namespace pyfused {

const LoraKernels& lora_kernels_for(Dtype dtype) {
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

void shrink(std::span<const Shrink> calls, const Matrix& x) {
  const void* from = x.tensor.const_data_ptr();
  std::vector<Operand> packed;
  int64_t ranks = 0;
  for (const Shrink& call : calls) {
    packed.push_back(call.lora.pack_a(call.a));
    ranks += call.lora.R;
  }
  const auto [M, K] = std::pair(calls[0].lora.M, calls[0].lora.K);
  const int64_t step = round_up(std::max<int64_t>(divide_up(M, 2 * kMaxTasks), 4), 4);
  parallel(divide_up(M, step), M * K * ranks, [&](int64_t task) {
    for (size_t i = 0; i < calls.size(); ++i) {
      const Lora& lora = calls[i].lora;
      lora.kernels.shrink(from, x.ld, task * step, std::min((task + 1) * step, M), K, lora.R, packed[i].data,
                          packed[i].ld, lora.dropout, calls[i].s);
    }
  });
  for (const Shrink& call : calls) {
    if (call.lora.dropout.threshold == 0) continue;
    // the kept elements' factor is the same for all: it is cheaper on M x R than on M x K
    call.lora.with_accumulator([&](auto factor) {
      using Acc = decltype(factor);
      factor = static_cast<Acc>(call.lora.dropout_scale);
      Acc* values = static_cast<Acc*>(call.s);
      for (int64_t i = 0; i < M * call.lora.R; ++i) values[i] *= factor;
    });
  }
}

// Rows up to which b is read as it is.
constexpr int64_t kDecodeRows = 4;

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

namespace {

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

}  // namespace

std::optional<Scratch> backward_dy(const Lora& lora, const Tensor& grad_y, const Tensor& b,
                                   const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector,
                                   int64_t needs, LoraGradients& grad) {
  const auto [M, N, R] = std::tuple(lora.M, lora.N, lora.R);
  const bool need_ds = needs & (kNeedX | kNeedA), need_b = needs & kNeedB, need_bias = needs & kNeedBias;
  const bool need_scale = (needs & kNeedScale) && scale_vector.has_value();
  const bool need_u = need_ds || need_scale;
  const Matrix dy(grad_y);
  const Operand bt = lora.pack_bt(b);
  const Grid grid(M, N, R);
  Scratch u(need_u ? grid.column_tasks : 0, M * R, lora.accumulator);
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
  if (!need_u) return std::nullopt;

  // u = dy b, then ds = u * scale with the kept elements' factor for both of its uses
  const auto sum_u = lora.kernels.unpack[static_cast<int>(lora.accumulator)];
  parallel(divide_up(M * R, kTaskColumns), grid.column_tasks * M * R, [&](int64_t task) {
    sum_u(u.at(0), grid.column_tasks, M * R, M * R, 1, task * kTaskColumns, std::min((task + 1) * kTaskColumns, M * R),
          nullptr, u.at(0), M * R, 1);
  });
  if (need_scale) {
    const std::vector<double> sums = scale_gradient(lora, s->const_data_ptr(), u.at(0));
    lora_kernels_for(Dtype::kFloat64)
        .unpack[static_cast<int>(dtype_of(grad.scale, lora.op, "scale_vector"))](sums.data(), 1, R, R, 1, 0, R, nullptr,
                                                                                 grad.scale.mutable_data_ptr(), R, 1);
  }
  if (!need_ds) return std::nullopt;
  lora.scale_rows(u.at(0), u.at(0), lora.dropout_scale);
  return u;
}

namespace {

// Calls whose tiles are cut alike.
void backward_x_on_grid(std::span<const BackwardX> calls, const Grid& grid, const std::optional<Matrix>& x, void* dx,
                        bool accumulate) {
  const auto [M, K, R] = std::tuple(calls[0].lora.M, calls[0].lora.K, calls[0].lora.R);
  std::vector<Operand> packed;
  std::vector<Scratch> parts;
  for (const BackwardX& call : calls) {
    packed.push_back(call.lora.pack_a(call.a));
    parts.emplace_back(call.grad_a != nullptr ? grid.row_tasks : 0, call.lora.R * call.lora.ld_a(),
                       call.lora.accumulator);
  }
  parallel(grid.tasks(), M * K * R * static_cast<int64_t>(calls.size()), [&](int64_t task) {
    const int64_t row_task = task / grid.column_tasks, column_task = task % grid.column_tasks;
    for (size_t i = 0; i < calls.size(); ++i) {  // all on one tile while it is in the cache
      const Lora& lora = calls[i].lora;
      const bool need_a = calls[i].grad_a != nullptr;
      lora.kernels.backward_x(need_a ? x->tensor.const_data_ptr() : nullptr, need_a ? x->ld : 0, dx, K,
                              accumulate || i > 0, grid.tile(row_task, column_task), lora.R, packed[i].data,
                              packed[i].ld, calls[i].ds, lora.dropout,
                              need_a ? parts[i].at(row_task * lora.R * lora.ld_a()) : nullptr, lora.ld_a());
    }
  });
  for (size_t i = 0; i < calls.size(); ++i) {
    if (calls[i].grad_a == nullptr) continue;
    unpack(calls[i].lora, parts[i], grid.row_tasks, calls[i].lora.R, K, false, nullptr, *calls[i].grad_a, "a");
  }
}

}  // namespace

void backward_x(std::span<const BackwardX> calls, const std::optional<Tensor>& x, Tensor* grad_x, bool accumulate) {
  bool need_a = false;
  for (const BackwardX& call : calls) need_a = need_a || call.grad_a != nullptr;
  const std::optional<Matrix> rows = need_a ? std::optional<Matrix>(*x) : std::nullopt;
  void* dx = grad_x != nullptr ? grad_x->mutable_data_ptr() : nullptr;
  // The cut depends on the rank, and the order of a's sums on the cut: neighbours of one cut go together.
  for (size_t begin = 0; begin < calls.size();) {
    const Grid grid(calls[begin].lora.M, calls[begin].lora.K, calls[begin].lora.R);
    size_t end = begin + 1;
    while (end < calls.size() && Grid(grid.rows, grid.columns, calls[end].lora.R) == grid) ++end;
    backward_x_on_grid(calls.subspan(begin, end - begin), grid, rows, dx, accumulate || begin > 0);
    begin = end;
  }
}

namespace {

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
  const Shrink calls[] = {{lora, a, s.mutable_data_ptr()}};
  shrink(calls, Matrix(x));
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
  const Shrink calls[] = {{lora, a, s.mutable_data_ptr()}};
  shrink(calls, Matrix(x));
  expand(lora, Matrix(y), out, s.const_data_ptr(), b);
  return {out, s};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector, double scale,
    double dropout_p, const std::optional<Tensor>& seed, int64_t needs, bool /*allow_tf32*/) {
  const Lora lora("lora_backward", grad_y, "grad_y", a, b, scale_vector, scale, dropout_p, seed);
  lora.check_grad_y(grad_y);
  if (weight.has_value()) lora.check_base(grad_y, *weight, std::nullopt);
  lora.check_saved(grad_y, x, needs & kNeedA, s, (needs & kNeedB) || (needs & kNeedScale && scale_vector.has_value()));
  LoraGradients grad(lora, grad_y, a, b, scale_vector, needs);
  if (lora.is_empty()) {
    grad.set_empty(lora, grad_y, needs & kNeedBias);
    return grad.tuple();
  }
  const std::optional<Scratch> ds = backward_dy(lora, grad_y, b, s, scale_vector, needs, grad);
  if (!ds.has_value()) return grad.tuple();
  const bool need_x = needs & kNeedX;
  if (need_x && weight.has_value()) {
    matmul_out(as_matrix(grad.x, lora.M, lora.K), as_matrix(grad_y, lora.M, lora.N), *weight, std::nullopt);
  }
  const BackwardX calls[] = {{lora, a, ds->at(0), needs & kNeedA ? &grad.a : nullptr}};
  backward_x(calls, x, need_x ? &grad.x : nullptr, weight.has_value());
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_linear_forward", TORCH_BOX(&pyfused::lora_linear_forward));
  m.impl("_lora_delta_forward", TORCH_BOX(&pyfused::lora_delta_forward));
  m.impl("_lora_backward", TORCH_BOX(&pyfused::lora_backward));
}
