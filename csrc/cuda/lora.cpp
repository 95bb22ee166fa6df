// LoRA on CUDA: checks, allocation, the vendor's GEMM for the base product, and which kernels of lora.h run in what
// order. Nothing here waits for the GPU; memory comes from torch, so all of it can be captured in a CUDA graph.
#include "lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

#include "lora_call.h"
#include "sums.h"

namespace pyfused {
namespace {

// s, or its parts over K that lora_expand adds up.
struct Parts {
  Tensor tensor;
  int64_t count;
};

Parts shrink(const Lora& lora, const Matrix& x, const Tensor& s) {
  LoraShrink call{};
  call.types = lora.types;
  call.m = lora.M;
  call.k = lora.K;
  call.r = static_cast<int>(lora.R);
  call.adapters = 1;
  call.x = lora.rows(x);
  call.a[0] = lora.rows(lora.a);
  call.dropout[0] = lora.dropout;
  call.factor = lora.dropout_scale;
  call.splits = lora_shrink_splits(call.m, call.k, call.r, lora.scope.multiprocessors());
  const Parts parts{call.splits == 1 ? s : lora.sums({call.splits, lora.M, lora.R}), call.splits};
  call.parts[0] = parts.tensor.mutable_data_ptr();
  launch_lora_shrink(call, lora.scope.stream());
  return parts;
}

PartSum sum_of(const Lora& lora, const Tensor& parts, int64_t part_count, int64_t count, const Tensor& out) {
  PartSum sum{};
  sum.parts = parts.const_data_ptr();
  sum.part_count = part_count;
  sum.part_stride = count;
  sum.count = count;
  sum.vector_run = 1;
  sum.vector_size = lora.R;
  sum.out = out.mutable_data_ptr();
  sum.out_dtype = dtype_of(out, lora.op, "gradient");
  sum.factor = 1.0;
  return sum;
}

// out = source + bias + (scale s) b^T
void expand(const Lora& lora, const Parts& parts, const Tensor& s, const Matrix* source, const Tensor* bias,
            const Tensor& out) {
  LoraExpand call{};
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.N;
  call.r = static_cast<int>(lora.R);
  call.parts = parts.tensor.const_data_ptr();
  call.part_count = parts.count;
  call.part_stride = lora.M * lora.R;
  call.s = parts.count > 1 ? s.mutable_data_ptr() : nullptr;
  call.factor = lora.factor;
  call.vector = lora.vector;
  call.c = lora.b.tensor.const_data_ptr();
  call.c_column_stride = lora.b.ld;
  call.c_rank_stride = 1;
  if (source != nullptr) call.source = lora.rows(*source);
  if (bias != nullptr) call.bias = bias->const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.ld_out = lora.N;
  launch_lora_expand(call, lora.scope.stream());
}

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

// A copy of a sum of s or ds in the data's type, with aligned rows: an operand.
struct RoundedSum {
  Matrix matrix;
  PartSum sum;

  RoundedSum(const Lora& lora, PartSum of) : matrix(with_aligned_rows(lora, lora.M, lora.R)), sum(of) {
    sum.out = matrix.tensor.mutable_data_ptr();
    sum.out_dtype = lora.dtype;
    sum.out_columns = lora.R;
    sum.out_ld = matrix.ld;
    sum.unscaled = nullptr;
  }
};

// scale s in the data's type, and s where it was in parts
Matrix scaled_s(const Lora& lora, const Parts& parts, const Tensor& s) {
  RoundedSum rounded(lora, sum_of(lora, parts.tensor, parts.count, lora.M * lora.R, s));
  rounded.sum.factor = lora.factor;
  rounded.sum.vector = lora.vector;
  if (parts.count > 1) rounded.sum.unscaled = s.mutable_data_ptr();
  launch_sums(&rounded.sum, 1, false, lora.scope.stream());
  return rounded.matrix;
}

// out = bias + drop(s c^T) + x w^T, one product; in the backward with transposed matrices
void concat(const Lora& lora, const Matrix& x, const Tensor& weight, const Matrix& s, const Matrix& c, bool backward,
            const Tensor* bias, const Tensor& out) {
  const Matrix aligned = aligned_rows(lora, c);
  LoraConcat call{};
  call.type = lora.dtype;
  call.m = lora.M;
  call.n = backward ? lora.K : lora.N;
  call.k = backward ? lora.N : lora.K;
  call.r = static_cast<int>(lora.R);
  call.x = lora.rows(x);
  call.s = lora.rows(s);
  call.w = {weight.const_data_ptr(), weight.stride(0)};
  call.c = lora.rows(aligned);
  call.transposed = backward;
  if (backward) call.dropout = lora.dropout;
  if (bias != nullptr) call.bias = bias->const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.ld_out = call.n;
  call.capability = lora.scope.capability();
  call.multiprocessors = lora.scope.multiprocessors();
  launch_lora_concat(call, lora.scope.stream());
}

bool decodes(const Lora& lora) {
  return lora.threshold == 0 && lora_decode_fits(lora.types, lora.M, lora.K, lora.N, static_cast<int>(lora.R));
}

void decode(const Lora& lora, const Matrix& x, const Matrix& source, const Tensor& out, const Tensor& s) {
  LoraDecode call{};
  call.types = lora.types;
  call.m = lora.M;
  call.k = lora.K;
  call.n = lora.N;
  call.r = static_cast<int>(lora.R);
  call.x = lora.rows(x);
  call.a = lora.rows(lora.a);
  call.b = lora.b.tensor.const_data_ptr();
  call.b_row_stride = lora.b.ld;
  call.factor = lora.factor;
  call.vector = lora.vector;
  call.s = s.mutable_data_ptr();
  call.source = lora.rows(source);
  call.out = out.mutable_data_ptr();
  call.ld_out = lora.N;
  launch_lora_decode(call, lora.scope.stream());
}

std::tuple<Tensor, Tensor> lora_linear_forward(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                                               const Tensor& a, const Tensor& b,
                                               const std::optional<Tensor>& scale_vector, double scale,
                                               double dropout_p, const std::optional<Tensor>& seed, bool allow_tf32) {
  const Lora lora("lora_linear", x, "x", a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
  lora.check_x(x);
  lora.check_base(x, weight, bias);
  Tensor y = empty_rows(x, lora.N, lora.device);
  Tensor s = lora.sums({lora.M, lora.R});
  const Tensor out = as_matrix(y, lora.M, lora.N), transposed = torch::stable::transpose(weight, 0, 1);
  if (lora.is_empty()) {
    matmul_out(out, as_matrix(x, lora.M, lora.K), transposed, bias);
    return {y, torch::stable::zero_(s)};
  }
  const Matrix rows(x);
  const Tensor input = as_matrix(rows.tensor, lora.M, lora.K);
  if (decodes(lora)) {
    matmul_out(out, input, transposed, bias);
    decode(lora, rows, Matrix(y), y, s);
    return {y, s};
  }
  const LoraUpdate update = lora.update(lora.K, weight);
  if (update == LoraUpdate::kAfter) {
    matmul_out(out, input, transposed, bias);
    const Matrix source(y);
    expand(lora, shrink(lora, rows, s), s, &source, nullptr, y);
    return {y, s};
  }
  const std::optional<Tensor> vector = bias.has_value() ? std::optional(torch::stable::contiguous(*bias)) : bias;
  const Tensor* bias_vector = vector.has_value() ? &*vector : nullptr;
  const Parts parts = shrink(lora, rows, s);
  if (update == LoraUpdate::kBefore) {
    expand(lora, parts, s, nullptr, bias_vector, y);
    matmul_out(out, input, transposed, out);
  } else {
    concat(lora, rows, weight, scaled_s(lora, parts, s), lora.b, false, bias_vector, y);
  }
  return {y, s};
}

std::tuple<Tensor, Tensor> lora_delta_forward(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                              const std::optional<Tensor>& scale_vector, double scale, double dropout_p,
                                              const std::optional<Tensor>& seed, bool allow_tf32) {
  const Lora lora("lora_delta", x, "x", a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
  lora.check_x(x);
  lora.check_y(x, y);
  Tensor s = lora.sums({lora.M, lora.R});
  Tensor out = empty_rows(y, lora.N, lora.device);
  if (lora.is_empty()) return {torch::stable::copy_(out, y), torch::stable::zero_(s)};
  const Matrix rows(x), source(y);
  if (decodes(lora)) {
    decode(lora, rows, source, out, s);
  } else {
    expand(lora, shrink(lora, rows, s), s, &source, nullptr, out);
  }
  return {out, s};
}

// Partial sums of a pass over dy or x, and how many.
struct Reduced {
  std::optional<Tensor> rows, columns;
  int64_t row_parts = 0, column_parts = 0;
};

// dy against b and s (both or one of them).
Reduced reduce_dy(const Lora& lora, const Matrix& dy, const Tensor* s, bool need_u) {
  LoraReduce call{};
  Reduced reduced;
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.N;
  call.r = static_cast<int>(lora.R);
  call.x = lora.rows(dy);
  const bool fused = need_u && s != nullptr && lora.R <= kMaxFusedRank;
  if (need_u && !fused) {  // u = dy b is a skinny product like the forward's
    LoraShrink skinny{};
    const Tensor bt = empty({lora.R, lora.N}, scalar_type(lora.types.adapter), lora.device);
    const Tensor b = lora.b.tensor;
    Tensor target = bt;
    torch::stable::copy_(target, torch::stable::transpose(b, 0, 1));
    skinny.types = lora.types;
    skinny.m = lora.M;
    skinny.k = lora.N;
    skinny.r = call.r;
    skinny.adapters = 1;
    skinny.x = call.x;
    skinny.a[0] = {bt.const_data_ptr(), lora.N};
    skinny.factor = 1.0;
    skinny.splits = lora_shrink_splits(lora.M, lora.N, call.r, lora.scope.multiprocessors());
    reduced.row_parts = skinny.splits;
    reduced.rows = lora.sums({skinny.splits, lora.M, lora.R});
    skinny.parts[0] = reduced.rows->mutable_data_ptr();
    launch_lora_shrink(skinny, lora.scope.stream());
  }
  if (s == nullptr) return reduced;
  call.s = s->const_data_ptr();
  if (fused) {
    reduced.row_parts = divide_up(lora.N, lora_slab_columns(call.types, call.r));
    reduced.rows = lora.sums({reduced.row_parts, lora.M, lora.R});
    call.rows_parts = reduced.rows->mutable_data_ptr();
    call.c = lora.b.tensor.const_data_ptr();
    call.c_column_stride = lora.b.ld;
    call.c_rank_stride = 1;
  }
  call.range_rows = lora_range_rows(call.types, call.m, call.n, call.r, fused, lora.scope.multiprocessors());
  reduced.column_parts = divide_up(lora.M, call.range_rows);
  reduced.columns = lora.sums({reduced.column_parts, lora.N, lora.R});
  call.columns_parts = reduced.columns->mutable_data_ptr();
  call.column_stride = lora.R;
  call.rank_stride = 1;
  launch_lora_reduce(call, lora.scope.stream());
  return reduced;
}

// da = ds^T drop(x)
void reduce_x(const Lora& lora, const Matrix& x, const Tensor& ds, const Tensor& grad_a) {
  LoraReduce call{};
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.K;
  call.r = static_cast<int>(lora.R);
  call.x = lora.rows(x);
  call.s = ds.const_data_ptr();
  call.dropout = lora.dropout;
  call.range_rows = lora_range_rows(call.types, call.m, call.n, call.r, false, lora.scope.multiprocessors());
  const int64_t parts = divide_up(lora.M, call.range_rows);
  const Tensor sums = lora.sums({parts, lora.R, lora.K});
  call.columns_parts = sums.mutable_data_ptr();
  call.column_stride = 1;
  call.rank_stride = lora.K;
  launch_lora_reduce(call, lora.scope.stream());
  const PartSum sum = sum_of(lora, sums, parts, lora.R * lora.K, grad_a);
  launch_sums(&sum, 1, lora.is_double(), lora.scope.stream());
}

// dx = dy w + drop(ds a); without w the second alone
void gradient_of_x(const Lora& lora, const Matrix& dy, const std::optional<Tensor>& weight, const Tensor& ds,
                   const Tensor& grad_x) {
  LoraExpand call{};
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.K;
  call.r = static_cast<int>(lora.R);
  call.parts = ds.const_data_ptr();
  call.part_count = 1;
  call.factor = 1.0;
  call.c = lora.a.tensor.const_data_ptr();
  call.c_column_stride = 1;
  call.c_rank_stride = lora.a.ld;
  call.dropout = lora.dropout;
  call.out = grad_x.mutable_data_ptr();
  call.ld_out = lora.K;
  const Tensor out = as_matrix(grad_x, lora.M, lora.K);  // one object, or a product on top of itself would copy it
  const auto base = [&](const std::optional<Tensor>& self) {
    matmul_out(out, as_matrix(dy.tensor, lora.M, lora.N), *weight, self);
  };
  const bool before = weight.has_value() && lora.update(lora.N, *weight) == LoraUpdate::kBefore;
  if (weight.has_value() && !before) {
    base(std::nullopt);
    call.source = {call.out, lora.K};
  }
  launch_lora_expand(call, lora.scope.stream());
  if (before) base(out);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> lora_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const std::optional<Tensor>& weight, const Tensor& a,
    const Tensor& b, const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector, double scale,
    double dropout_p, const std::optional<Tensor>& seed, int64_t needs, bool allow_tf32) {
  const Lora lora("lora_backward", grad_y, "grad_y", a, b, scale_vector, scale, dropout_p, seed, allow_tf32);
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
  const cudaStream_t stream = lora.scope.stream();
  const Matrix dy(grad_y);
  if (need_bias) grad.bias = LoraGradients::sum_rows(grad_y, lora.M, lora.N);
  if (!need_u && !need_b) return grad.tuple();

  const bool in_one = need_x && weight.has_value() && lora.update(lora.N, *weight) == LoraUpdate::kConcat;
  const Reduced reduced = reduce_dy(lora, dy, need_b ? &*s : nullptr, need_u);
  PartSum sums[kMaxSums];
  int count = 0;
  std::optional<RoundedSum> rounded;
  std::optional<Tensor> ds, u;
  if (need_u) {
    ds = lora.sums({lora.M, lora.R});
    PartSum& sum = sums[count++] = sum_of(lora, *reduced.rows, reduced.row_parts, lora.M * lora.R, *ds);
    sum.factor = lora.factor * lora.dropout_scale;  // the kept elements' factor, for both of its uses
    sum.vector = lora.vector;
    if (need_scale) {
      u = lora.sums({lora.M, lora.R});
      sum.unscaled = u->mutable_data_ptr();
    }
    if (in_one) sums[count++] = rounded.emplace(lora, sum).sum;
  }
  if (need_b) {
    PartSum& sum = sums[count++] = sum_of(lora, *reduced.columns, reduced.column_parts, lora.N * lora.R, grad.b);
    sum.factor = lora.factor;
    sum.vector = lora.vector;
  }
  launch_sums(sums, count, lora.is_double(), stream);
  if (need_scale) {
    launch_lora_scale_gradient(s->const_data_ptr(), u->const_data_ptr(), lora.M, static_cast<int>(lora.R), lora.factor,
                               grad.scale.mutable_data_ptr(), lora.vector.dtype, lora.is_double(), stream);
  }
  if (in_one) {
    concat(lora, dy, *weight, rounded->matrix, lora.a, true, nullptr, grad.x);
  } else if (need_x) {
    gradient_of_x(lora, dy, weight, *ds, grad.x);
  }
  if (need_a) reduce_x(lora, Matrix(*x), *ds, grad.a);
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_lora_linear_forward", TORCH_BOX(&pyfused::lora_linear_forward));
  m.impl("_lora_delta_forward", TORCH_BOX(&pyfused::lora_delta_forward));
  m.impl("_lora_backward", TORCH_BOX(&pyfused::lora_backward));
}
