// IA3 on CPU: checks, allocation, the vendor's GEMM for the base product, and how the loops of kernels/ia3.cpp are
// spread over threads. Work is cut by shape alone, never by the number of threads, so results do not depend on it.
//
// The base product runs as one GEMM over all rows: in panels of rows, with the scale applied while a panel is in cache,
// it was measured slower by more than the whole pass costs. In fp32 and fp64 the bias is added by the scale's pass: the
// vendor's GEMM would first copy it into every row of the output. 16-bit GEMMs add it before their one rounding.
#include "kernels/ia3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "../common/ia3.h"
#include "levels.h"
#include "matrix.h"

namespace pyfused {
namespace {

const Ia3Kernels& kernels_for(Dtype dtype) { PF_RETURN_AT_LEVEL(ia3_kernels(dtype)) }

// A call with its vector, widened.
struct Ia3 : Ia3Arguments {
  const Ia3Kernels& kernels;
  Scratch factors;

  Ia3(const char* op, const Tensor& activation, const char* name, const Tensor& scale)
      : Ia3Arguments(op, Device::cpu(), activation, name, scale),
        kernels(kernels_for(dtype)),
        factors(1, padded(), accumulator_size()) {
    kernels.pack[static_cast<int>(dtype_of(scale, op, "scale"))](scale.const_data_ptr(), 0, scale.stride(0), 1, C,
                                                                 factors.at(0), padded());
  }

  int64_t accumulator_size() const { return accumulator == Dtype::kFloat64 ? 8 : 4; }
  int64_t padded() const { return round_up(C, kPackedColumns); }

  // The bias [C] where it is this op's to add, and not the GEMM's.
  std::optional<Scratch> shift(const std::optional<Tensor>& bias) const {
    if (!bias.has_value() || dtype != accumulator) return std::nullopt;
    Scratch widened(1, padded(), accumulator_size());
    kernels.pack[static_cast<int>(dtype)](bias->const_data_ptr(), 0, bias->stride(0), 1, C, widened.at(0), padded());
    return widened;
  }

  // out [rows, C] = (source + shift) * scale; out may be source's own memory.
  void scale_columns(const Matrix& source, int64_t rows, const Tensor& out,
                     const std::optional<Scratch>& shift = std::nullopt) const {
    if (rows == 0 || C == 0) return;
    const void* from = source.tensor.const_data_ptr();
    void* to = out.mutable_data_ptr();
    const RowRanges ranges = RowRanges::independent(rows);
    parallel(ranges.count, rows * C, [&](int64_t range) {
      kernels.scale_columns(from, source.ld, to, C, ranges.begin(range), ranges.end(range), C, factors.at(0),
                            shift.has_value() ? shift->at(0) : nullptr);
    });
  }

  // out = dy * scale, grad_scale [C] = sum over rows of dy * (z + shift), in one pass; each where it is given. out may
  // be dy's own memory.
  void scale_columns_backward(const Matrix& dy, const Matrix* z, const Tensor* out, const Tensor* grad_scale,
                              const std::optional<Scratch>& shift = std::nullopt) const {
    if (M == 0 || C == 0) {
      if (grad_scale != nullptr) {
        Tensor zeros = *grad_scale;  // the same memory
        torch::stable::zero_(zeros);
      }
      return;
    }
    const void* from = dy.tensor.const_data_ptr();
    const void* scaled = z == nullptr ? nullptr : z->tensor.const_data_ptr();
    void* to = out == nullptr ? nullptr : out->mutable_data_ptr();
    const RowRanges ranges = RowRanges::summed(M, 1);
    const Scratch parts(grad_scale == nullptr ? 0 : ranges.count, padded(), accumulator_size());
    parallel(ranges.count, M * C, [&](int64_t range) {
      kernels.scale_columns_backward(from, dy.ld, scaled, z == nullptr ? 0 : z->ld, to, C, ranges.begin(range),
                                     ranges.end(range), C, factors.at(0), shift.has_value() ? shift->at(0) : nullptr,
                                     grad_scale == nullptr ? nullptr : parts.at(range * padded()));
    });
    if (grad_scale != nullptr) sum_parts(parts, ranges.count, padded(), *grad_scale);
  }

  // grad_scale = the sum of its parts, rounded once.
  void sum_parts(const Scratch& parts, int64_t count, int64_t stride, const Tensor& grad_scale) const {
    kernels.unpack[static_cast<int>(dtype_of(grad_scale, op, "scale"))](parts.at(0), count, stride, stride, 1, 0, C,
                                                                        nullptr, grad_scale.mutable_data_ptr(), C, 1);
  }

  Tensor none(const Tensor& like) const { return empty({0}, like.scalar_type(), device); }
};

std::tuple<Tensor, Tensor> linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                          const Tensor& scale, bool input_side, bool keep_base) {
  const Ia3 ia3("ia3_linear", x, "x", scale);
  const int64_t M = ia3.M, K = ia3.columns;
  PF_CHECK(weight.dim() == 2, ia3.op, "weight", "have shape [N, K]", shape_of(weight));
  const int64_t N = weight.size(0);
  check_linear(x, weight, bias, N, K, ia3.device, ia3.op);
  check_shape(scale, {input_side ? K : N}, ia3.op, "scale");
  Tensor y = empty_rows(x, N, ia3.device);
  if (input_side) {
    // Into the smaller operand. A GEMM costs its M N K in any case, and either product rounds once.
    const bool fold = N < M / 2;
    const Tensor& source = fold ? weight : x;
    const Tensor scaled = empty({fold ? N : M, K}, x.scalar_type(), ia3.device);
    ia3.scale_columns(Matrix(source), fold ? N : M, scaled);
    matmul_out(as_matrix(y, M, N), fold ? as_matrix(x, M, K) : scaled,
               torch::stable::transpose(fold ? scaled : weight, 0, 1), bias.has_value() ? &*bias : nullptr);
    return {y, ia3.none(x)};
  }
  const Tensor base = keep_base ? empty_rows(x, N, ia3.device) : y;
  const std::optional<Scratch> shift = ia3.shift(bias);
  matmul_out(as_matrix(base, M, N), as_matrix(x, M, K), torch::stable::transpose(weight, 0, 1),
             shift.has_value() || !bias.has_value() ? nullptr : &*bias);
  ia3.scale_columns(Matrix(base), M, y, shift);
  return {y, keep_base ? base : ia3.none(x)};
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& grad_y, const std::optional<Tensor>& saved,
                                           const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                           const Tensor& scale, bool input_side, int64_t needs) {
  const Ia3 ia3("ia3_backward", grad_y, "grad_y", scale);
  const int64_t M = ia3.M, N = ia3.columns;
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  ia3.check_backward(grad_y, saved, weight, bias, scale, input_side, needs);
  const int64_t K = weight.has_value() ? weight->size(1) : 0;
  Tensor grad_x = need_x ? empty_rows(grad_y, K, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = need_scale ? empty({ia3.C}, scale.scalar_type(), ia3.device) : ia3.none(scale);
  const std::optional<Matrix> z = need_scale ? std::optional<Matrix>(*saved) : std::nullopt;
  const Matrix* z_or_null = z.has_value() ? &*z : nullptr;
  const Tensor* sums_or_null = need_scale ? &grad_scale : nullptr;
  if (input_side) {
    const Tensor gradient = need_x ? grad_x : empty({M, K}, grad_y.scalar_type(), ia3.device);
    matmul_out(as_matrix(gradient, M, K), as_matrix(grad_y, M, N), *weight, nullptr);
    ia3.scale_columns_backward(Matrix(gradient), z_or_null, need_x ? &gradient : nullptr, sums_or_null);
    return {grad_x, grad_scale};
  }
  const Tensor scaled = need_x ? empty({M, N}, grad_y.scalar_type(), ia3.device) : grad_x;
  ia3.scale_columns_backward(Matrix(grad_y), z_or_null, need_x ? &scaled : nullptr, sums_or_null, ia3.shift(bias));
  if (need_x) matmul_out(as_matrix(grad_x, M, K), scaled, *weight, nullptr);
  return {grad_x, grad_scale};
}

Tensor like(const Tensor& x, const Device& device) { return empty_rows(x, x.size(x.dim() - 1), device); }

Tensor scale_forward(const Tensor& x, const Tensor& scale, int64_t dim) {
  const Ia3 ia3("ia3_scale", x, "x", scale);
  const Ia3Around around(ia3, x, dim);
  Tensor y = like(x, ia3.device);
  if (around.is_last) {
    ia3.scale_columns(Matrix(x), ia3.M, y);
    return y;
  }
  const Tensor rows = torch::stable::contiguous(x);
  const int64_t count = around.outer * ia3.C, step = divide_up(std::max<int64_t>(count, 1), kMaxRanges);
  const void* from = rows.const_data_ptr();
  void* to = y.mutable_data_ptr();
  parallel(divide_up(count, step), count * around.inner, [&](int64_t range) {
    ia3.kernels.scale_rows(from, to, range * step, std::min((range + 1) * step, count), around.inner, ia3.C,
                           ia3.factors.at(0));
  });
  return y;
}

std::tuple<Tensor, Tensor> scale_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& scale,
                                          int64_t dim, int64_t needs) {
  const Ia3 ia3("ia3_scale_backward", grad_y, "grad_y", scale);
  const Ia3Around around(ia3, grad_y, dim);
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  if (need_scale) around.check_saved(ia3, grad_y, x);
  Tensor grad_x = need_x ? like(grad_y, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = need_scale ? empty({ia3.C}, scale.scalar_type(), ia3.device) : ia3.none(scale);
  if (around.is_last) {
    const std::optional<Matrix> z = need_scale ? std::optional<Matrix>(*x) : std::nullopt;
    ia3.scale_columns_backward(Matrix(grad_y), z.has_value() ? &*z : nullptr, need_x ? &grad_x : nullptr,
                               need_scale ? &grad_scale : nullptr);
    return {grad_x, grad_scale};
  }
  const int64_t count = around.outer * ia3.C, step = divide_up(std::max<int64_t>(count, 1), kMaxRanges);
  if (count == 0 || around.inner == 0) {
    if (need_scale) torch::stable::zero_(grad_scale);
    return {grad_x, grad_scale};
  }
  const Tensor dy = torch::stable::contiguous(grad_y);
  const std::optional<Tensor> z = need_scale ? std::optional<Tensor>(torch::stable::contiguous(*x)) : std::nullopt;
  const Scratch dots(need_scale ? count : 0, 1, ia3.accumulator_size());
  parallel(divide_up(count, step), count * around.inner, [&](int64_t range) {
    ia3.kernels.scale_rows_backward(dy.const_data_ptr(), need_scale ? z->const_data_ptr() : nullptr,
                                    need_x ? grad_x.mutable_data_ptr() : nullptr, range * step,
                                    std::min((range + 1) * step, count), around.inner, ia3.C, ia3.factors.at(0),
                                    need_scale ? dots.at(0) : nullptr);
  });
  if (need_scale) ia3.sum_parts(dots, around.outer, ia3.C, grad_scale);
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_ia3_linear_forward", TORCH_BOX(&pyfused::linear_forward));
  m.impl("_ia3_linear_backward", TORCH_BOX(&pyfused::linear_backward));
  m.impl("_ia3_scale_forward", TORCH_BOX(&pyfused::scale_forward));
  m.impl("_ia3_scale_backward", TORCH_BOX(&pyfused::scale_backward));
}
