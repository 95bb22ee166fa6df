// IA3 on CPU: how the loops of kernels/ia3.cpp are spread over threads; which run when is in common/ia3.h. Results
// do not depend on the number of threads.
//
// The vendor's base product runs as one GEMM over all rows: in panels of rows, with the scale applied while a panel is
// in cache, it was measured slower by more than the whole pass costs.
#include "kernels/ia3.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "../common/cpu_kernels.h"
#include "../common/ia3.h"
#include "levels.h"
#include "linear.h"
#include "linear_vectors.h"
#include "matrix.h"

namespace pyfused {
namespace {

// Multiply-adds that take as long as an element of a pass, which is bound by memory.
constexpr int64_t kPassWork = 4;
// Rows up to which the parts of scale's gradient that a product leaves are few enough to be added up in fp32.
constexpr int64_t kMaxDotRows = 8192;

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

  void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) const {
    linear_out(out, x, weight, or_null(bias));
  }
  void product(const Tensor& out, const Tensor& dy, const Tensor& weight) const {
    linear_backward_out(out, dy, weight);
  }

  // In products of our own the scale is applied as results leave the sums.
  bool scaled_product(const Tensor& y, const Tensor* base, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias) const {
    const Tensor x_rows = as_matrix(x, M, columns);
    if (auto call =
            linear_product(as_matrix(y, M, C), x_rows, transposed(weight), or_null(bias), ProductFor::kScaled)) {
      call->scale = static_cast<const float*>(factors.at(0));
      if (base != nullptr) call->unscaled = base->mutable_data_ptr();
      multiply(*call);
      return true;
    }
#if defined(PYFUSED_HAVE_AMX)
    if (linear_in_panels(x_rows, weight, or_null(bias))) {
      const Matrix rows(x);
      LinearPanels call = linear_panels(base == nullptr ? y : *base, rows, weight, or_null(bias));
      if (base == nullptr) call.out = nullptr;
      call.scale = static_cast<const float*>(factors.at(0));
      call.scaled = y.mutable_data_ptr();
      multiply_panels(call);
      return true;
    }
#endif
    return false;
  }

  // The scale goes into the copy of the weight that the product reads.
  bool factored_product(const Tensor& y, const Tensor& x, const Tensor& weight,
                        const std::optional<Tensor>& bias) const {
    if (!has_linear_product(dtype, M, ProductFor::kScaled)) return false;
    return multiply_factored(linear_product(as_matrix(y, M, weight.size(0)), as_matrix(x, M, C), transposed(weight),
                                            or_null(bias), ProductFor::kScaled));
  }
  bool factored_backward(const Tensor& dx, const Tensor& dy, const Tensor& weight) const {
    if (!has_linear_product(dtype, M, ProductFor::kBackward)) return false;
    return multiply_factored(
        linear_product(as_matrix(dx, M, weight.size(1)), as_matrix(dy, M, C), weight, nullptr, ProductFor::kBackward));
  }

  // The scale and its gradient, which is the sums of the product times z, as results leave the sums.
  bool product_backward(const Tensor& dx, const Tensor& dy, const Tensor& weight, const std::optional<Tensor>& z,
                        const Tensor* grad_scale) const {
    if (!has_linear_product(dtype, M, ProductFor::kBackward) || M > kMaxDotRows) return false;
    const Tensor dy_rows = as_matrix(dy, M, weight.size(0));
    std::optional<LinearProduct> call =
        linear_product(as_matrix(dx, M, C), dy_rows, weight, nullptr, ProductFor::kBackward);
    if (!call.has_value()) return false;
    call->scale = static_cast<const float*>(factors.at(0));
    if (grad_scale == nullptr) {
      multiply(*call);
      return true;
    }
    const Matrix other(*z);
    call->part_rows = product_part_rows(*call);
    const int64_t parts = divide_up(call->M, call->part_rows);
    const Scratch dots(parts, C, Dtype::kFloat32);
    std::memset(dots.at(0), 0, static_cast<size_t>(parts * C) * sizeof(float));
    call->other = other.tensor.const_data_ptr();
    call->ld_other = other.ld;
    call->dots = static_cast<float*>(dots.at(0));
    multiply(*call);
    sum_parts(dots, parts, C, *grad_scale);
    return true;
  }

  // The bias [C] where the passes add it.
  std::optional<Scratch> shift(const std::optional<Tensor>& bias) const {
    if (!adds_bias(bias)) return std::nullopt;
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
    parallel(ranges.count, rows * C * kPassWork, [&](int64_t range) {
      kernels.scale_columns(from, source.ld, to, C, ranges.begin(range), ranges.end(range), C, factors.at(0),
                            shift.has_value() ? shift->at(0) : nullptr);
    });
  }

  // out = dy * scale, grad_scale [C] = sum over rows of dy * (z + shift), in one pass; each where it is given. out may
  // be dy's own memory.
  void scale_columns_backward(const Matrix& dy, const std::optional<Tensor>& z, const Tensor* out,
                              const Tensor* grad_scale, const std::optional<Scratch>& shift = std::nullopt) const {
    if (M == 0 || C == 0) {
      if (grad_scale != nullptr) {
        Tensor zeros = *grad_scale;  // the same memory
        torch::stable::zero_(zeros);
      }
      return;
    }
    const void* from = dy.tensor.const_data_ptr();
    const std::optional<Matrix> scaled = grad_scale == nullptr ? std::nullopt : std::optional<Matrix>(*z);
    void* to = out == nullptr ? nullptr : out->mutable_data_ptr();
    const RowRanges ranges = RowRanges::summed(M, 1);
    const Scratch parts(grad_scale == nullptr ? 0 : ranges.count, padded(), accumulator_size());
    parallel(ranges.count, M * C * kPassWork, [&](int64_t range) {
      kernels.scale_columns_backward(from, dy.ld, scaled.has_value() ? scaled->tensor.const_data_ptr() : nullptr,
                                     scaled.has_value() ? scaled->ld : 0, to, C, ranges.begin(range), ranges.end(range),
                                     C, factors.at(0), shift.has_value() ? shift->at(0) : nullptr,
                                     grad_scale == nullptr ? nullptr : parts.at(range * padded()));
    });
    if (grad_scale != nullptr) sum_parts(parts, ranges.count, padded(), *grad_scale);
  }

  // y = x * scale, x [outer, C, inner].
  void scale_rows(const Tensor& x, const Ia3Around& around, const Tensor& y) const {
    const void* from = x.const_data_ptr();
    void* to = y.mutable_data_ptr();
    for_rows(around, [&](int64_t begin, int64_t end) {
      kernels.scale_rows(from, to, begin, end, around.inner, C, factors.at(0));
    });
  }

  // Likewise out = dy * scale and grad_scale = the sums of dy * z; each where it is given.
  void scale_rows_backward(const Tensor& dy, const std::optional<Tensor>& z, const Ia3Around& around, const Tensor* out,
                           const Tensor* grad_scale) const {
    const Scratch dots(grad_scale == nullptr ? 0 : around.outer * C, 1, accumulator_size());
    const Tensor scaled = grad_scale == nullptr ? dy : torch::stable::contiguous(*z);
    const void *from = dy.const_data_ptr(), *from_z = grad_scale == nullptr ? nullptr : scaled.const_data_ptr();
    void* to = out == nullptr ? nullptr : out->mutable_data_ptr();
    for_rows(around, [&](int64_t begin, int64_t end) {
      kernels.scale_rows_backward(from, from_z, to, begin, end, around.inner, C, factors.at(0),
                                  grad_scale == nullptr ? nullptr : dots.at(0));
    });
    if (grad_scale != nullptr) sum_parts(dots, around.outer, C, *grad_scale);
  }

 private:
  bool multiply_factored(std::optional<LinearProduct> call) const {
    if (!call.has_value()) return false;
    call->factor = static_cast<const float*>(factors.at(0));
    multiply(*call);
    return true;
  }

  // run(begin, end) for ranges of the outer x C rows.
  template <class F>
  void for_rows(const Ia3Around& around, const F& run) const {
    const int64_t count = around.outer * C, step = divide_up(std::max<int64_t>(count, 1), kMaxRanges);
    parallel(divide_up(count, step), count * around.inner * kPassWork,
             [&](int64_t range) { run(range * step, std::min((range + 1) * step, count)); });
  }

  // grad_scale = the sum of its parts, rounded once.
  void sum_parts(const Scratch& parts, int64_t count, int64_t stride, const Tensor& grad_scale) const {
    kernels.unpack[static_cast<int>(dtype_of(grad_scale, op, "scale"))](parts.at(0), count, stride, stride, 1, 0, C,
                                                                        nullptr, grad_scale.mutable_data_ptr(), C, 1);
  }
};

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_ia3_linear_forward", TORCH_BOX(&pyfused::ia3_linear_forward<pyfused::Ia3>));
  m.impl("_ia3_linear_backward", TORCH_BOX(&pyfused::ia3_linear_backward<pyfused::Ia3>));
  m.impl("_ia3_scale_forward", TORCH_BOX(&pyfused::ia3_scale_forward<pyfused::Ia3>));
  m.impl("_ia3_scale_backward", TORCH_BOX(&pyfused::ia3_scale_backward<pyfused::Ia3>));
  pyfused::cpu_kernels.ia3_linear_forward = &pyfused::ia3_linear_forward<pyfused::Ia3>;
  pyfused::cpu_kernels.ia3_linear_backward = &pyfused::ia3_linear_backward<pyfused::Ia3>;
  pyfused::cpu_kernels.ia3_scale_forward = &pyfused::ia3_scale_forward<pyfused::Ia3>;
  pyfused::cpu_kernels.ia3_scale_backward = &pyfused::ia3_scale_backward<pyfused::Ia3>;
}
