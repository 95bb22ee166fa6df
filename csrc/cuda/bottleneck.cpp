// The bottleneck adapter on CUDA: checks, allocation, the vendor's GEMMs, and which kernels of bottleneck.h run in what
// order. Nothing here waits for the GPU; learned scales are read there.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "bottleneck_call.h"
#include "lora.h"

namespace pyfused {
namespace {

ConstRows rows_of(const Matrix& matrix) { return {matrix.tensor.const_data_ptr(), matrix.ld}; }

// h = activation(z)
Tensor activate(const Bottleneck& call, const Tensor& z) {
  const Tensor h = call.memory(call.M, call.H, call.product);
  BottleneckMiddle middle{};
  middle.dtype = call.product;
  middle.activation = call.activation;
  middle.rows = call.M;
  middle.columns = call.H;
  middle.z = z.const_data_ptr();
  middle.h_scale = call.one();
  middle.h = h.mutable_data_ptr();
  middle.range_rows = call.range_rows(call.H);
  launch_bottleneck_middle(middle, call.scope.stream());
  return h;
}

BottleneckFused fused_call(const Bottleneck& call, const Matrix& x, const Matrix& w1, const Matrix& w2) {
  BottleneckFused fused{};
  fused.types = call.types;
  fused.activation = call.activation;
  fused.rows = call.M;
  fused.width = call.D;
  fused.hidden = static_cast<int>(call.H);
  fused.x = rows_of(x);
  fused.w1 = rows_of(w1);
  fused.w2 = rows_of(w2);
  fused.shared_bytes = call.scope.shared_bytes();
  return fused;
}

std::tuple<Tensor, Tensor> bottleneck_forward(const Tensor& x, const std::optional<Tensor>& residual,
                                              const Tensor& w_down, const std::optional<Tensor>& b_down,
                                              const Tensor& w_up, const std::optional<Tensor>& b_up,
                                              const std::optional<Tensor>& scale_vector, int64_t activation,
                                              double scale, double dropout_p, const std::optional<Tensor>& seed,
                                              bool allow_tf32) {
  const Bottleneck call("bottleneck", x, "x", w_down, b_down, w_up, b_up, scale_vector, activation, scale, dropout_p,
                        seed, allow_tf32);
  if (residual.has_value()) call.check_like(x, *residual, "residual");
  const auto [M, D, H] = std::tuple(call.M, call.D, call.H);
  Tensor y = empty_rows(x, D, call.device);
  Tensor z = call.memory(M, H, call.product);
  if (call.is_empty()) return {y, torch::stable::zero_(z)};

  const std::optional<Matrix> added = residual.has_value() ? std::optional<Matrix>(*residual) : std::nullopt;
  const std::optional<Tensor> bias = call.down_bias(b_down);
  if (call.fused()) {
    const Matrix rows(x), down(call.in_type(w_down, call.product)), up(call.in_type(w_up, call.product));
    BottleneckFused fused = fused_call(call, rows, down, up);
    if (bias.has_value()) fused.down_bias = bias->const_data_ptr();
    fused.z = z.mutable_data_ptr();
    fused.scale = call.scale();
    fused.bias = call.vector(call.b_up);
    if (added.has_value()) fused.residual = rows_of(*added);
    fused.out_dropout = call.dropout;
    fused.out = y.mutable_data_ptr();
    launch_bottleneck_fused(fused, call.scope.stream());
    return {y, z};
  }
  matmul_out(z, call.matrix_in_type(x, call.product),
             torch::stable::transpose(call.in_type(w_down, call.product), 0, 1), or_null(bias));
  const Tensor u = call.wide() ? call.memory(M, D, call.product) : as_matrix(y, M, D);
  matmul_out(u, activate(call, z), torch::stable::transpose(call.in_type(w_up, call.product), 0, 1), nullptr);
  BottleneckColumns finish{};
  finish.source = call.product;
  finish.target = call.dtype;
  finish.rows = M;
  finish.columns = D;
  finish.u = {u.const_data_ptr(), D};
  if (added.has_value()) finish.residual = rows_of(*added);
  finish.scale = call.scale();
  finish.bias = call.vector(call.b_up);
  finish.dropout = call.dropout;
  finish.out = y.mutable_data_ptr();
  finish.range_rows = call.range_rows(D);
  launch_bottleneck_columns(finish, call.scope.stream());
  return {y, z};
}

// The gradients of w_up, b_up and scale from the products' parts: raw, parts [count, D, H] of g^T h in the sums' type,
// and sums [count, D] of g.
struct UpParts {
  std::optional<Tensor> raw, sums;
  int64_t raw_count = 1, sum_count = 1;
};
void finish_up(const Bottleneck& call, const BottleneckNeeds& needs, const Tensor& w_up, const UpParts& parts,
               const BottleneckGradients& grad) {
  const int64_t D = call.D, H = call.H;
  std::optional<Tensor> sums, raw = parts.raw;
  if (needs.sums) {
    sums = call.memory(1, D, call.accumulator);
    const Tensor unused = call.memory(1, D, call.accumulator);
    PartSum sum = sum_of(*parts.sums, parts.sum_count, D, needs.up_bias ? grad.b_up : unused, call.op);
    call.scale_by(sum, call.scale_vector, 1);
    sum.unscaled = sums->mutable_data_ptr();
    call.launch(sum);
  }
  if (raw.has_value() && (needs.up || parts.raw_count > 1)) {
    const Tensor unused = needs.up ? grad.w_up : call.memory(D, H, call.accumulator);
    PartSum sum = sum_of(*parts.raw, parts.raw_count, D * H, unused, call.op);
    call.scale_by(sum, call.scale_vector, H);
    if (needs.scale && parts.raw_count > 1) {
      raw = call.memory(D, H, call.accumulator);
      sum.unscaled = raw->mutable_data_ptr();
    }
    call.launch(sum);
  }
  if (!needs.scale) return;
  const Tensor w = torch::stable::contiguous(w_up), dots = call.memory(1, D, Dtype::kFloat64);
  BottleneckScaleGradient gradient{};
  gradient.width = D;
  gradient.hidden = H;
  gradient.w = w.const_data_ptr();
  gradient.weight = dtype_of(w, call.op, "w_up");
  gradient.bias = call.vector(call.b_up);
  gradient.raw = raw->const_data_ptr();
  gradient.sums = sums.has_value() ? sums->const_data_ptr() : nullptr;
  gradient.dots = dots.mutable_data_ptr();
  gradient.factor = call.factor * call.dropout_scale;
  gradient.size = call.has_channels() ? D : 1;
  gradient.out = grad.scale.mutable_data_ptr();
  gradient.out_dtype = dtype_of(grad.scale, call.op, "scale");
  launch_bottleneck_scale_gradient(gradient, call.is_double(), call.scope.stream());
}

// By the vendor's products, g = keep dy in memory where dropout or a wider product asks for it.
void backward_by_passes(const Bottleneck& call, const BottleneckNeeds& needs, const Tensor& grad_y,
                        const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up, const Tensor& z,
                        BottleneckGradients& grad) {
  const auto [M, D, H] = std::tuple(call.M, call.D, call.H);
  const cudaStream_t stream = call.scope.stream();
  const Matrix dy(grad_y);
  const bool keep_g = (call.threshold != 0 || call.wide()) && (needs.dz || needs.up_product);
  const Tensor g = keep_g ? call.memory(M, D, call.product) : as_matrix(dy.tensor, M, D);
  UpParts parts;
  if (keep_g || needs.sums) {
    BottleneckColumns mask{};
    mask.source = call.dtype;
    mask.target = keep_g ? call.product : call.dtype;
    mask.rows = M;
    mask.columns = D;
    mask.u = rows_of(dy);
    mask.scale = call.one();
    mask.dropout = call.dropout;
    mask.range_rows = call.range_rows(D);
    if (keep_g) mask.out = g.mutable_data_ptr();
    if (needs.sums) {
      parts.sum_count = divide_up(M, mask.range_rows);
      parts.sums = call.memory(parts.sum_count, D, call.accumulator);
      mask.parts = parts.sums->mutable_data_ptr();
    }
    launch_bottleneck_columns(mask, stream);
  }

  // The scale goes into h where nothing else is asked of the product g^T h, which then is the gradient.
  const bool direct = !call.scale_vector.has_value() && dtype_of(w_up, call.op, "w_up") == call.product;
  const Tensor h = call.memory(needs.up_product ? M : 0, H, call.product);
  const Tensor dz = call.memory(needs.dz ? M : 0, H, call.product);
  if (needs.dz) matmul_out(dz, g, call.scaled_rows(w_up), nullptr);
  if (needs.dz || needs.up_product) {
    BottleneckMiddle middle{};
    middle.dtype = call.product;
    middle.activation = call.activation;
    middle.rows = M;
    middle.columns = H;
    middle.z = z.const_data_ptr();
    middle.h_scale = direct ? call.uniform_scale() : call.one();
    middle.dz_scale = call.uniform_scale();
    if (needs.up_product) middle.h = h.mutable_data_ptr();
    if (needs.dz) middle.dh = middle.dz = dz.mutable_data_ptr();
    middle.range_rows = call.range_rows(H);
    const int64_t ranges = divide_up(M, middle.range_rows);
    const Tensor down_sums = call.memory(needs.down_bias ? ranges : 0, H, call.accumulator);
    if (needs.down_bias) middle.parts = down_sums.mutable_data_ptr();
    launch_bottleneck_middle(middle, stream);
    if (needs.down_bias) call.launch(sum_of(down_sums, ranges, H, grad.b_down, call.op));
  }

  if (needs.x) {
    const Tensor dx = as_matrix(grad.x, M, D), down = call.in_type(w_down, call.product);
    if (!call.wide()) {
      const Tensor residual = needs.residual_is_x ? as_matrix(dy.tensor, M, D) : dx;
      matmul_out(dx, dz, down, needs.residual_is_x ? &residual : nullptr);
    } else {
      const Tensor product = call.memory(M, D, call.product);
      matmul_out(product, dz, down, nullptr);
      BottleneckColumns finish{};
      finish.source = call.product;
      finish.target = call.dtype;
      finish.rows = M;
      finish.columns = D;
      finish.u = {product.const_data_ptr(), D};
      if (needs.residual_is_x) finish.residual = rows_of(dy);
      finish.scale = call.one();
      finish.out = dx.mutable_data_ptr();
      finish.range_rows = call.range_rows(D);
      launch_bottleneck_columns(finish, stream);
    }
  }
  if (needs.down) {
    const Tensor columns = call.matrix_in_type(*x, call.product), rows = torch::stable::transpose(dz, 0, 1);
    const bool same = dtype_of(w_down, call.op, "w_down") == call.product;
    const Tensor product = same ? grad.w_down : call.memory(H, D, call.product);
    matmul_out(product, rows, columns, nullptr);
    if (!same) torch::stable::copy_(grad.w_down, product);
  }
  if (needs.up_product && direct) {
    matmul_out(grad.w_up, torch::stable::transpose(g, 0, 1), h, nullptr);
  } else if (needs.up_product) {
    // scale's gradient is a sum over this product: in 16 bit it would lose its digits
    parts.raw = call.memory(D, H, call.accumulator);
    matmul_out(*parts.raw, torch::stable::transpose(call.in_type(g, call.accumulator), 0, 1),
               call.in_type(h, call.accumulator), nullptr);
  }
  finish_up(call, needs, w_up, parts, grad);
}

// Parts [count, ...] of the product of the columns of x, with dropout's mask where given, and of s [M, H].
struct Reduced {
  Tensor parts;
  int64_t count;
};
Reduced reduce(const Bottleneck& call, const Matrix& x, const Tensor& s, const DropoutSource& dropout,
               bool hidden_first) {
  LoraReduce reduction{};
  reduction.types = call.types;
  reduction.m = call.M;
  reduction.n = call.D;
  reduction.x = rows_of(x);
  const int ranks = static_cast<int>(call.H);
  reduction.range_rows = lora_range_rows(call.types, call.M, call.D, ranks, false, call.scope.multiprocessors());
  const int64_t count = divide_up(call.M, reduction.range_rows);
  const Reduced reduced{call.memory(count, call.D * call.H, call.accumulator), count};
  const LoraReduce::Adapter adapter{ranks,
                                    s.const_data_ptr(),
                                    dropout,
                                    reduced.parts.mutable_data_ptr(),
                                    hidden_first ? 1 : call.H,
                                    hidden_first ? call.D : 1};
  reduction.adapters = {&adapter, 1};
  launch_lora_reduce(reduction, call.scope.stream());
  return reduced;
}

// Both products of rows in one kernel, the mask made in registers; the weights' gradients by LoRA's pass over rows.
void backward_fused(const Bottleneck& call, const BottleneckNeeds& needs, const Tensor& grad_y,
                    const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up, const Tensor& z,
                    BottleneckGradients& grad) {
  const auto [M, D, H] = std::tuple(call.M, call.D, call.H);
  const auto transposed = [](const Tensor& matrix) {
    return Matrix(torch::stable::contiguous(torch::stable::transpose(matrix, 0, 1)));
  };
  const Matrix dy(grad_y), w1 = transposed(call.scaled_rows(w_up)), w2 = transposed(call.in_type(w_down, call.product));
  const int64_t blocks = divide_up(M, kFusedRows);
  const Tensor h = call.memory(needs.up_product ? M : 0, H, call.accumulator);
  const Tensor dz = call.memory(M, H, call.accumulator);
  const Tensor down_sums = call.memory(needs.down_bias ? blocks : 0, H, call.accumulator);
  UpParts parts;
  BottleneckFused fused = fused_call(call, dy, w1, w2);
  fused.x_dropout = call.dropout;
  fused.z_in = z.const_data_ptr();
  fused.dz_scale = call.uniform_scale();
  fused.scale = call.one();
  fused.dz = dz.mutable_data_ptr();
  if (needs.up_product) fused.h = h.mutable_data_ptr();
  if (needs.down_bias) fused.down_sums = down_sums.mutable_data_ptr();
  if (needs.sums) {
    parts.sums = call.memory(blocks, D, call.accumulator);
    parts.sum_count = blocks;
    fused.x_sums = parts.sums->mutable_data_ptr();
  }
  if (needs.x) {
    fused.out = grad.x.mutable_data_ptr();
    if (needs.residual_is_x) fused.residual = rows_of(dy);
  }
  launch_bottleneck_fused(fused, call.scope.stream());
  if (needs.down_bias) call.launch(sum_of(down_sums, blocks, H, grad.b_down, call.op));
  if (needs.down) {
    const Reduced down = reduce(call, Matrix(*x), dz, {}, true);
    call.launch(sum_of(down.parts, down.count, H * D, grad.w_down, call.op));
  }
  if (needs.up_product) {
    const Reduced up = reduce(call, dy, h, call.dropout, false);
    parts.raw = up.parts;
    parts.raw_count = up.count;
  }
  finish_up(call, needs, w_up, parts, grad);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up,
    const std::optional<Tensor>& b_down, const std::optional<Tensor>& b_up, const Tensor& z,
    const std::optional<Tensor>& scale_vector, int64_t activation, double scale, double dropout_p,
    const std::optional<Tensor>& seed, int64_t bits, bool allow_tf32) {
  const Bottleneck call("bottleneck_backward", grad_y, "grad_y", w_down, b_down, w_up, b_up, scale_vector, activation,
                        scale, dropout_p, seed, allow_tf32);
  const BottleneckNeeds needs(bits, b_down, b_up, scale_vector);
  call.check_backward(needs, grad_y, x, z);
  BottleneckGradients grad(call, grad_y, w_down, b_down, w_up, b_up, scale_vector, needs);
  if (call.is_empty()) {
    grad.set_zero();
    return grad.tuple();
  }
  const auto backward = call.fused() ? backward_fused : backward_by_passes;
  backward(call, needs, grad_y, x, w_down, w_up, z, grad);
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_bottleneck_forward", TORCH_BOX(&pyfused::bottleneck_forward));
  m.impl("_bottleneck_backward", TORCH_BOX(&pyfused::bottleneck_backward));
}
