#include "lora_concat.h"

namespace pyfused {
namespace {

// A matrix of the data's type with rows that can be copied 16 bytes at a time.
Tensor with_aligned_rows(const Lora& lora, int64_t rows, int64_t columns) {
  Tensor wide = empty({rows, round_up(columns, 16 / size_of(lora.dtype))}, scalar_type(lora.dtype), lora.device);
  return torch::stable::narrow(wide, 1, 0, columns);
}

// The matrix itself where it is one, or a copy.
Matrix aligned_rows(const Lora& lora, const Matrix& matrix) {
  const int64_t per_copy = 16 / size_of(lora.dtype);
  const auto address = reinterpret_cast<uintptr_t>(matrix.tensor.const_data_ptr());
  if (address % 16 == 0 && matrix.ld % per_copy == 0) return matrix;
  Tensor copy = with_aligned_rows(lora, matrix.tensor.size(0), matrix.tensor.size(1));
  return Matrix(torch::stable::copy_(copy, matrix.tensor));
}

}  // namespace

RoundedSum::RoundedSum(const Lora& lora, PartSum of) : matrix(with_aligned_rows(lora, lora.M, lora.R)), sum(of) {
  sum.out = matrix.tensor.mutable_data_ptr();
  sum.out_dtype = lora.dtype;
  sum.out_columns = lora.R;
  sum.out_ld = matrix.ld;
  sum.unscaled = nullptr;
}

Matrix scaled_s(const Lora& lora, const Tensor& parts, int64_t part_count, const Tensor& s) {
  RoundedSum rounded(lora, sum_of(lora, parts, part_count, lora.M * lora.R, s));
  rounded.sum.factor = lora.factor;
  rounded.sum.vector = lora.vector;
  if (part_count > 1) rounded.sum.unscaled = s.mutable_data_ptr();
  launch_sums({&rounded.sum, 1}, false, lora.scope.stream());
  return rounded.matrix;
}

void concat(const Lora& lora, const Matrix& x, const Tensor& weight, const Matrix& s, const Matrix& c, bool backward,
            const Tensor* bias, const Tensor& out) {
  const Matrix aligned = aligned_rows(lora, c);
  LoraConcat call{};
  call.type = lora.dtype;
  call.m = lora.M;
  call.n = backward ? lora.K : lora.N;
  call.k = backward ? lora.N : lora.K;
  call.r = lora.rank();
  call.x = rows_of(x);
  call.s = rows_of(s);
  call.w = {weight.const_data_ptr(), weight.stride(0)};
  call.c = rows_of(aligned);
  call.transposed = backward;
  if (backward) call.dropout = lora.dropout;
  if (bias != nullptr) call.bias = bias->const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.ld_out = call.n;
  call.capability = lora.scope.capability();
  call.multiprocessors = lora.scope.multiprocessors();
  launch_lora_concat(call, lora.scope.stream());
}

}  // namespace pyfused
