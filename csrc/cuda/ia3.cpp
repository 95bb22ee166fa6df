// IA3 on CUDA: the passes by the kernels of ia3.h; which run when is in common/ia3.h. Nothing here waits for the GPU.
#include "ia3.h"

#include <torch/csrc/stable/library.h>

#include <optional>

#include "../common/ia3.h"
#include "ia3_path.h"
#include "sums.h"
#include "tensor.h"

namespace pyfused {
namespace {

struct Ia3 : Ia3Arguments {
  DeviceScope scope;
  Tensor vector;

  Ia3(const char* op, const Tensor& activation, const char* name, const Tensor& scale)
      : Ia3Arguments(op, gpu_of(activation, op, name), activation, name, scale),
        scope(device),
        vector(torch::stable::contiguous(scale)) {}

  void linear(const Tensor& out, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) const {
    matmul_out(out, x, transposed(weight), or_null(bias));
  }
  void product(const Tensor& out, const Tensor& dy, const Tensor& weight) const {
    matmul_out(out, dy, weight, nullptr);
  }

  bool factored_product(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&) const {
    return false;
  }
  bool factored_backward(const Tensor&, const Tensor&, const Tensor&) const { return false; }
  bool product_backward(const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&,
                        const Tensor*) const {
    return false;
  }

  // y = (x weight^T + bias) * scale, and base the same without scale where it is given.
  bool scaled_product(const Tensor& y, const Tensor* base, const Tensor& x, const Tensor& weight,
                      const std::optional<Tensor>& bias) const {
    const bool fits = size_of(dtype) == 2 && M > 0 && C > 0 && columns > 0 && weight.stride(1) == 1;
    if (choose_ia3_path(fits) == Ia3Path::kPass) return false;
    const Matrix rows(x), of_weight(weight);
    Ia3Linear call{};
    call.dtype = dtype;
    call.m = M;
    call.n = C;
    call.k = columns;
    call.x = {rows.tensor.const_data_ptr(), rows.ld};
    call.w = {of_weight.tensor.const_data_ptr(), of_weight.ld};
    const Tensor shift = bias.has_value() ? torch::stable::contiguous(*bias) : none(x);
    if (bias.has_value()) call.bias = shift.const_data_ptr();
    call.scale = factors();
    call.out = y.mutable_data_ptr();
    if (base != nullptr) call.base = base->mutable_data_ptr();
    call.capability = scope.capability();
    call.multiprocessors = scope.multiprocessors();
    launch_ia3_linear(call, scope.stream());
    return true;
  }

  // The bias [C] where the passes add it.
  std::optional<Tensor> shift(const std::optional<Tensor>& bias) const {
    if (!adds_bias(bias)) return std::nullopt;
    return torch::stable::contiguous(*bias);
  }

  // out [rows, C] = (source + shift) * scale; out may be source's own memory.
  void scale_columns(const Matrix& source, int64_t rows, const Tensor& out,
                     const std::optional<Tensor>& shift = std::nullopt) const {
    Ia3Columns call = columns_call(source, rows, shift);
    call.out = out.mutable_data_ptr();
    launch_ia3_columns(call, scope.stream());
  }

  // out = dy * scale, grad_scale [C] = sum over rows of dy * (z + shift), in one pass; each where it is given. out may
  // be dy's own memory.
  void scale_columns_backward(const Matrix& dy, const std::optional<Tensor>& z, const Tensor* out,
                              const Tensor* grad_scale, const std::optional<Tensor>& shift = std::nullopt) const {
    if (grad_scale == nullptr) {
      if (out != nullptr) scale_columns(dy, M, *out);
      return;
    }
    if (M == 0 || C == 0) {
      Tensor zeros = *grad_scale;  // the same memory
      torch::stable::zero_(zeros);
      return;
    }
    Ia3Columns call = columns_call(dy, M, shift);
    const Matrix scaled(*z);
    const int64_t ranges = divide_up(M, call.range_rows);
    const Tensor parts = sums(ranges, C);
    call.z = {scaled.tensor.const_data_ptr(), scaled.ld};
    call.out = out == nullptr ? nullptr : out->mutable_data_ptr();
    call.parts = parts.mutable_data_ptr();
    launch_ia3_columns(call, scope.stream());
    add_parts(parts, ranges, *grad_scale);
  }

  // y = x * scale, x [outer, C, inner].
  void scale_rows(const Tensor& x, const Ia3Around& around, const Tensor& y) const {
    Ia3Rows call = rows_call(x, around);
    call.out = y.mutable_data_ptr();
    launch_ia3_rows(call, scope.stream());
  }

  // Likewise out = dy * scale and grad_scale = the sums of dy * z; each where it is given.
  void scale_rows_backward(const Tensor& dy, const std::optional<Tensor>& z, const Ia3Around& around, const Tensor* out,
                           const Tensor* grad_scale) const {
    Ia3Rows call = rows_call(dy, around);
    if (out != nullptr) call.out = out->mutable_data_ptr();
    if (grad_scale == nullptr) return launch_ia3_rows(call, scope.stream());
    const int64_t parts_per_channel = divide_up(around.inner, call.run_columns) * around.outer;
    const Tensor parts = sums(parts_per_channel, C);
    const Tensor scaled = torch::stable::contiguous(*z);
    call.z = scaled.const_data_ptr();
    call.parts = parts.mutable_data_ptr();
    launch_ia3_rows(call, scope.stream());
    add_parts(parts, parts_per_channel, *grad_scale);
  }

 private:
  ConstVector factors() const { return {vector.const_data_ptr(), dtype_of(vector, op, "scale")}; }
  Tensor sums(int64_t rows, int64_t columns) const { return empty({rows, columns}, scalar_type(accumulator), device); }

  // grad_scale = the sum of its parts [count, C], rounded once.
  void add_parts(const Tensor& parts, int64_t count, const Tensor& grad_scale) const {
    const PartSum sum = sum_of(parts, count, C, grad_scale, op);
    launch_sums({&sum, 1}, accumulator == Dtype::kFloat64, scope.stream());
  }

  Ia3Rows rows_call(const Tensor& source, const Ia3Around& around) const {
    Ia3Rows call{};
    call.dtype = dtype;
    call.rows = around.outer * C;
    call.columns = around.inner;
    call.period = C;
    call.run_columns = ia3_run_columns(around.inner);
    call.source = source.const_data_ptr();
    call.scale = factors();
    return call;
  }

  Ia3Columns columns_call(const Matrix& source, int64_t rows, const std::optional<Tensor>& shift) const {
    Ia3Columns call{};
    call.dtype = dtype;
    call.rows = rows;
    call.columns = C;
    call.source = {source.tensor.const_data_ptr(), source.ld};
    call.scale = factors();
    if (shift.has_value()) call.shift = {shift->const_data_ptr(), dtype};
    call.range_rows = ia3_range_rows(dtype, rows, C, scope.multiprocessors());
    return call;
  }
};

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_ia3_linear_forward", TORCH_BOX(&pyfused::ia3_linear_forward<pyfused::Ia3>));
  m.impl("_ia3_linear_backward", TORCH_BOX(&pyfused::ia3_linear_backward<pyfused::Ia3>));
  m.impl("_ia3_scale_forward", TORCH_BOX(&pyfused::ia3_scale_forward<pyfused::Ia3>));
  m.impl("_ia3_scale_backward", TORCH_BOX(&pyfused::ia3_scale_backward<pyfused::Ia3>));
}
