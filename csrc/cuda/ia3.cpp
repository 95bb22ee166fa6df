// IA3 on CUDA: checks, allocation, the vendor's GEMM for the base product, and which kernels of ia3.h run in what
// order. As on the CPU, the scale's pass adds the bias in fp32 and fp64, and the GEMM does in 16 bits, before its one
// rounding. Nothing here waits for the GPU.
#include "ia3.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "../common/ia3.h"
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

  ConstVector factors() const { return {vector.const_data_ptr(), dtype_of(vector, op, "scale")}; }
  Tensor sums(int64_t rows, int64_t columns) const { return empty({rows, columns}, scalar_type(accumulator), device); }
  Tensor none(const Tensor& like) const { return empty({0}, like.scalar_type(), device); }

  // The bias [C] where it is this op's to add, and not the GEMM's.
  std::optional<Tensor> shift(const std::optional<Tensor>& bias) const {
    if (!bias.has_value() || dtype != accumulator) return std::nullopt;
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
    if (M == 0 || C == 0) return set_zero(*grad_scale);
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

  Ia3Rows rows_call(const Tensor& source, int64_t outer, int64_t inner) const {
    Ia3Rows call{};
    call.dtype = dtype;
    call.rows = outer * C;
    call.columns = inner;
    call.period = C;
    call.run_columns = ia3_run_columns(inner);
    call.source = source.const_data_ptr();
    call.scale = factors();
    return call;
  }

  // grad_scale = the sum of its parts [count, C], rounded once.
  void add_parts(const Tensor& parts, int64_t count, const Tensor& grad_scale) const {
    PartSum sum{};
    sum.parts = parts.const_data_ptr();
    sum.part_count = count;
    sum.part_stride = sum.count = C;
    sum.out = grad_scale.mutable_data_ptr();
    sum.out_dtype = dtype_of(grad_scale, op, "scale");
    sum.factor = 1.0;
    launch_sums(&sum, 1, accumulator == Dtype::kFloat64, scope.stream());
  }

  static void set_zero(Tensor tensor) { torch::stable::zero_(tensor); }

 private:
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

std::tuple<Tensor, Tensor> ia3_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                              const Tensor& scale, bool input_side, bool keep_base) {
  const Ia3 ia3("ia3_linear", x, "x", scale);
  const int64_t M = ia3.M, K = ia3.columns;
  PF_CHECK(weight.dim() == 2, ia3.op, "weight", "have shape [N, K]", shape_of(weight));
  const int64_t N = weight.size(0);
  check_linear(x, weight, bias, N, K, ia3.device, ia3.op);
  check_shape(scale, {input_side ? K : N}, ia3.op, "scale");
  Tensor y = empty_rows(x, N, ia3.device);
  if (input_side) {
    const bool fold = N < M / 2;  // into the smaller operand, as on the CPU
    const Tensor scaled = empty({fold ? N : M, K}, x.scalar_type(), ia3.device);
    ia3.scale_columns(Matrix(fold ? weight : x), fold ? N : M, scaled);
    matmul_out(as_matrix(y, M, N), fold ? as_matrix(x, M, K) : scaled,
               torch::stable::transpose(fold ? scaled : weight, 0, 1), bias);
    return {y, ia3.none(x)};
  }
  const Tensor base = keep_base ? empty_rows(x, N, ia3.device) : y;
  const std::optional<Tensor> shift = ia3.shift(bias);
  matmul_out(as_matrix(base, M, N), as_matrix(x, M, K), torch::stable::transpose(weight, 0, 1),
             shift.has_value() ? std::nullopt : bias);
  ia3.scale_columns(Matrix(base), M, y, shift);
  return {y, keep_base ? base : ia3.none(x)};
}

std::tuple<Tensor, Tensor> ia3_linear_backward(const Tensor& grad_y, const std::optional<Tensor>& saved,
                                               const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
                                               const Tensor& scale, bool input_side, int64_t needs) {
  const Ia3 ia3("ia3_backward", grad_y, "grad_y", scale);
  const int64_t M = ia3.M, N = ia3.columns;
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  ia3.check_backward(grad_y, saved, weight, bias, scale, input_side, needs);
  const int64_t K = weight.has_value() ? weight->size(1) : 0;
  Tensor grad_x = need_x ? empty_rows(grad_y, K, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = need_scale ? empty({ia3.C}, scale.scalar_type(), ia3.device) : ia3.none(scale);
  const Tensor* sums = need_scale ? &grad_scale : nullptr;
  if (input_side) {
    const Tensor gradient = need_x ? grad_x : empty({M, K}, grad_y.scalar_type(), ia3.device);
    matmul_out(as_matrix(gradient, M, K), as_matrix(grad_y, M, N), *weight, std::nullopt);
    ia3.scale_columns_backward(Matrix(gradient), saved, need_x ? &gradient : nullptr, sums);
    return {grad_x, grad_scale};
  }
  const Tensor scaled = need_x ? empty({M, N}, grad_y.scalar_type(), ia3.device) : grad_x;
  ia3.scale_columns_backward(Matrix(grad_y), saved, need_x ? &scaled : nullptr, sums, ia3.shift(bias));
  if (need_x) matmul_out(as_matrix(grad_x, M, K), scaled, *weight, std::nullopt);
  return {grad_x, grad_scale};
}

Tensor ia3_scale_forward(const Tensor& x, const Tensor& scale, int64_t dim) {
  const Ia3 ia3("ia3_scale", x, "x", scale);
  const Ia3Around around(ia3, x, dim);
  Tensor y = empty_rows(x, ia3.columns, ia3.device);
  if (around.is_last) {
    ia3.scale_columns(Matrix(x), ia3.M, y);
    return y;
  }
  const Tensor rows = torch::stable::contiguous(x);
  Ia3Rows call = ia3.rows_call(rows, around.outer, around.inner);
  call.out = y.mutable_data_ptr();
  launch_ia3_rows(call, ia3.scope.stream());
  return y;
}

std::tuple<Tensor, Tensor> ia3_scale_backward(const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& scale,
                                              int64_t dim, int64_t needs) {
  const Ia3 ia3("ia3_scale_backward", grad_y, "grad_y", scale);
  const Ia3Around around(ia3, grad_y, dim);
  const bool need_x = needs & kIa3NeedX, need_scale = needs & kIa3NeedScale;
  if (need_scale) around.check_saved(ia3, grad_y, x);
  Tensor grad_x = need_x ? empty_rows(grad_y, ia3.columns, ia3.device) : ia3.none(grad_y);
  Tensor grad_scale = need_scale ? empty({ia3.C}, scale.scalar_type(), ia3.device) : ia3.none(scale);
  if (around.is_last) {
    ia3.scale_columns_backward(Matrix(grad_y), x, need_x ? &grad_x : nullptr, need_scale ? &grad_scale : nullptr);
    return {grad_x, grad_scale};
  }
  const Tensor dy = torch::stable::contiguous(grad_y);
  Ia3Rows call = ia3.rows_call(dy, around.outer, around.inner);
  call.out = need_x ? grad_x.mutable_data_ptr() : nullptr;
  if (!need_scale) {
    launch_ia3_rows(call, ia3.scope.stream());
    return {grad_x, grad_scale};
  }
  if (call.rows == 0 || call.columns == 0) {
    torch::stable::zero_(grad_scale);
    return {grad_x, grad_scale};
  }
  const Tensor z = torch::stable::contiguous(*x);
  const int64_t parts_per_channel = divide_up(around.inner, call.run_columns) * around.outer;
  const Tensor parts = ia3.sums(parts_per_channel, ia3.C);
  call.z = z.const_data_ptr();
  call.parts = parts.mutable_data_ptr();
  launch_ia3_rows(call, ia3.scope.stream());
  ia3.add_parts(parts, parts_per_channel, grad_scale);
  return {grad_x, grad_scale};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_ia3_linear_forward", TORCH_BOX(&pyfused::ia3_linear_forward));
  m.impl("_ia3_linear_backward", TORCH_BOX(&pyfused::ia3_linear_backward));
  m.impl("_ia3_scale_forward", TORCH_BOX(&pyfused::ia3_scale_forward));
  m.impl("_ia3_scale_backward", TORCH_BOX(&pyfused::ia3_scale_backward));
}
