// The bottleneck adapter on CPU: panels of rows that stay in the second-level cache, on each of which products,
// the vendor's or ours, and the passes of kernels/bottleneck.cpp take turns. Work is cut by shape alone, never by the
// number of threads.
#include "bottleneck.h"

#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../common/cpu_kernels.h"
#include "linear_vectors.h"

namespace pyfused {
namespace {

// Columns of a weight's gradient that one task computes; by a product of ours, whose copy of them stays in the
// second-level cache.
constexpr int64_t kGradientColumns = 512, kOwnGradientColumns = 192;

// A scale that changes nothing.
Scratch all_ones(const Bottleneck& call, int64_t size) {
  Scratch memory(1, size, call.accumulator);
  call.with_accumulator([&](auto one) {
    one = 1;
    std::fill_n(static_cast<decltype(one)*>(memory.at(0)), size, one);
  });
  return memory;
}

std::tuple<Tensor, Tensor> bottleneck_forward(const Tensor& x, const std::optional<Tensor>& residual,
                                              const Tensor& w_down, const std::optional<Tensor>& b_down,
                                              const Tensor& w_up, const std::optional<Tensor>& b_up,
                                              const std::optional<Tensor>& scale_vector, int64_t activation,
                                              double scale, double dropout_p, const std::optional<Tensor>& seed,
                                              bool /*allow_tf32*/) {
  const Bottleneck call("bottleneck", x, "x", w_down, b_down, w_up, b_up, scale_vector, activation, scale, dropout_p,
                        seed);
  if (residual.has_value()) call.check_like(x, *residual, "residual");
  const auto [M, D, H] = std::tuple(call.M, call.D, call.H);
  Tensor y = empty_rows(x, D, call.device);
  Tensor z = empty({M, H}, scalar_type(call.product), call.device);
  if (call.is_empty()) return {y, torch::stable::zero_(z)};

  const Matrix x_rows(x);
  const std::optional<Matrix> added = residual.has_value() ? std::optional<Matrix>(*residual) : std::nullopt;
  const View all_x = call.rows_of(x_rows), all_y(y.const_data_ptr(), M, D, D, call.dtype);
  const View all_z(z.const_data_ptr(), M, H, H, call.product);
  if (bottleneck_has_few_rows(call)) {
    bottleneck_forward_of_few_rows(call, x_rows, added ? &*added : nullptr, w_down, b_down, w_up, b_up, y, z);
    return {y, z};
  }
  const Bottleneck::Channels channels = call.channel_factors(b_up);

#if defined(PYFUSED_HAVE_AMX)
  if (bottleneck_in_tiles(call)) {
    bottleneck_forward_in_tiles(call, x_rows, added ? &*added : nullptr, w_down, b_down, w_up, channels, y, z);
    return {y, z};
  }
#endif

  std::optional<Bottleneck::Weight> bias;
  if (b_down.has_value()) bias.emplace(call.down_bias(*b_down));
  const Bottleneck::Weight down = call.weight(w_down), up = call.weight(w_up);
  const RowProducts to_z(down.view.transposed(), M), to_u(up.view.transposed(), M);
  RowProducts::pack({&to_z, &to_u});
  const auto finish = call.wide() ? call.kernels.finish_wide : call.kernels.finish;
  const bool in_product = call.residual_in_product(to_u) && call.threshold == 0;
  const Scratch b_up_memory = call.vector(b_up, in_product ? D : 0);
  const bool adds = added && call.adds_to_residual() && call.threshold == 0 && !call.channels;
  const Scratch ones = all_ones(call, adds ? D : 0);
  call.for_row_tasks([&](int64_t, int64_t begin, int64_t end) {
    const Scratch h_memory(call.panel_rows, H, call.product);
    const Scratch wide(call.wide() ? call.panel_rows : 0, D, call.product);  // x, then u
    for (int64_t first = begin; first < end; first += call.panel_rows) {
      const int64_t count = std::min(call.panel_rows, end - first);
      const View z_panel = all_z.some_rows(first, count), y_panel = all_y.some_rows(first, count);
      const View h(h_memory.at(0), count, H, H, call.product);
      const View u = call.wide() ? View(wide.at(0), count, D, D, call.product) : y_panel;
      to_z.multiply(z_panel, call.in_product_type(all_x.some_rows(first, count), wide), bias ? &bias->view : nullptr);
      call.products.activate(z_panel.data, count, H, call.activation, h.data);
      const void* residual_panel = added ? call.rows_of(*added).some_rows(first, count).data : nullptr;
      if (in_product) {
        LinearProduct product = to_u.product(y_panel, h);
        product.bias = b_up_memory.at(0);
        product.scale = static_cast<const float*>(channels.scale.at(0));
        product.residual = residual_panel;
        product.ld_residual = added ? added->ld : 0;
        multiply_here(product);
        continue;
      }
      if (adds) {
        finish(residual_panel, added->ld, nullptr, 0, y_panel.data, D, first, 0, count, D, ones.at(0),
               channels.bias.at(0), call.dropout);
        multiply_add(y_panel, h, up.view.transposed(), call.scalar * call.dropout_scale);
        continue;
      }
      to_u.multiply(u, h);
      finish(u.data, D, residual_panel, added ? added->ld : 0, y_panel.data, D, first, 0, count, D,
             channels.scale.at(0), channels.bias.at(0), call.dropout);
    }
  });
  return {y, z};
}

// Products [rows, columns] into the block of a gradient that begins at row, column: each row times its scale where
// given, rounded to the gradient's type.
void write_gradient(const Bottleneck& call, const View& product, const double* scale, const Tensor& gradient,
                    int64_t row, int64_t column) {
  const int64_t rows = product.rows, columns = product.columns;
  const Scratch wide(rows, columns, call.accumulator);
  call.kernels.pack[static_cast<int>(product.dtype)](product.data, product.row_stride, 1, rows, columns, wide.at(0),
                                                     columns);
  const Dtype to = dtype_of(gradient, call.op, "gradient");
  const View block = View(gradient, to).block(row, rows, column, columns);
  call.kernels.unpack[static_cast<int>(to)](wide.at(0), 1, rows * columns, columns, rows, 0, columns, scale, block.data,
                                            block.row_stride, 1);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& grad_y, const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up,
    const std::optional<Tensor>& b_down, const std::optional<Tensor>& b_up, const Tensor& z,
    const std::optional<Tensor>& scale_vector, int64_t activation, double scale, double dropout_p,
    const std::optional<Tensor>& seed, int64_t bits, bool /*allow_tf32*/) {
  const Bottleneck call("bottleneck_backward", grad_y, "grad_y", w_down, b_down, w_up, b_up, scale_vector, activation,
                        scale, dropout_p, seed);
  const auto [M, D, H] = std::tuple(call.M, call.D, call.H);
  const BottleneckNeeds needs(bits, b_down, b_up, scale_vector);
  call.check_backward(needs, grad_y, x, z);
  BottleneckGradients grad(call, grad_y, w_down, b_down, w_up, b_up, scale_vector, needs);
  if (call.is_empty()) {
    grad.set_zero();
    return grad.tuple();
  }

  const Matrix dy_rows(grad_y);
#if defined(PYFUSED_HAVE_AMX)
  if (bottleneck_in_tiles(call)) {
    bottleneck_backward_in_tiles(call, needs, dy_rows, x, w_down, w_up, b_up, z, grad);
    return grad.tuple();
  }
#endif
  const View dy = call.rows_of(dy_rows), all_z(z.const_data_ptr(), M, H, H, call.product);

  const Scratch mask = call.keep_memory(M);
  uint32_t* keep = call.threshold == 0 ? nullptr : static_cast<uint32_t*>(mask.at(0));
  const int64_t keep_words = call.keep_words();
  // g is dy with dropout's mask. Where w_up's gradient is a product of ours in fp32, its copy of dy takes the mask, and
  // a panel of g is all that is needed.
  const bool has_g = keep != nullptr && (needs.dz || needs.up_product);
  const bool mask_in_copy = has_g && call.product == Dtype::kFloat32 && call.own_gradients(call.product);
  const bool writes_g = has_g && (needs.dz || !mask_in_copy);
  const Scratch g_memory(has_g && !mask_in_copy ? M : 0, D, call.dtype);
  const View g = has_g && !mask_in_copy ? View(g_memory.at(0), M, D, D, call.dtype) : dy;
  const Scratch dz_memory(needs.dz ? M : 0, H, call.product), h_memory(needs.up_product ? M : 0, H, call.product);
  const View all_dz(dz_memory.at(0), M, H, H, call.product), all_h(h_memory.at(0), M, H, H, call.product);
  const Scratch up_sums(needs.sums ? call.tasks : 0, D, Dtype::kFloat64);
  const Scratch down_sums(needs.down_bias ? call.tasks : 0, H, Dtype::kFloat64);
  // The scale goes into h where nothing else is asked of the product h^T g, and the product then is the gradient.
  const bool direct = needs.dz && !scale_vector.has_value() && dtype_of(w_up, call.op, "w_up") == call.product;
  const double dh_factor = call.scalar * call.dropout_scale, h_factor = direct ? dh_factor : 1.0;
  const Bottleneck::Weight down = call.weight(w_down), up = call.scaled_rows(w_up);
  const RowProducts to_dh(up.view, M), to_dx(down.view, M);
  RowProducts::pack({&to_dh, &to_dx});
  const Scratch ones = all_ones(call, D), zeros = call.vector(std::nullopt, D);
  const bool in_product = needs.residual_is_x && call.residual_in_product(to_dx);
  const bool adds = needs.residual_is_x && call.adds_to_residual();

  const auto finish = call.wide() ? call.kernels.finish_wide : call.kernels.finish;
  call.for_row_tasks([&](int64_t task, int64_t begin, int64_t end) {
    const Scratch wide(call.wide() && needs.dz ? call.panel_rows : 0, D, call.product);  // g, then dx
    const Scratch g_panel_memory(writes_g && mask_in_copy ? call.panel_rows : 0, D, call.dtype);
    double* up_part = needs.sums ? static_cast<double*>(up_sums.at(task * D)) : nullptr;
    double* down_part = needs.down_bias ? static_cast<double*>(down_sums.at(task * H)) : nullptr;
    if (needs.sums) std::fill_n(up_part, D, 0.0);
    if (needs.down_bias) std::fill_n(down_part, H, 0.0);
    for (int64_t first = begin; first < end; first += call.panel_rows) {
      const int64_t count = std::min(call.panel_rows, end - first);
      const View dy_panel = dy.some_rows(first, count), z_panel = all_z.some_rows(first, count);
      const View g_panel =
          mask_in_copy ? View(g_panel_memory.at(0), count, D, D, call.dtype) : g.some_rows(first, count);
      uint32_t* keep_panel = keep == nullptr ? nullptr : keep + first * keep_words;
      if (keep_panel != nullptr && (needs.sums || has_g)) {
        call.kernels.make_keep_bits(call.dropout, first, count, D, keep_panel, keep_words);
      }
      if (needs.sums || writes_g) {
        call.kernels.mask(dy_panel.data, dy.row_stride, count, D, keep_panel, keep_words,
                          writes_g ? g_panel.data : nullptr, D, up_part);
      }
      void* h = needs.up_product ? all_h.some_rows(first, count).data : nullptr;
      if (!needs.dz) {
        if (needs.up_product) call.products.activate(z_panel.data, count, H, call.activation, h);
        continue;
      }
      const View dz = all_dz.some_rows(first, count);
      to_dh.multiply(dz, call.in_product_type(g_panel, wide));
      call.products.activate_backward(z_panel.data, dz.data, count, H, call.activation, dh_factor, h_factor, h, dz.data,
                                      down_part);
      if (!needs.x) continue;
      const View dx = View(grad.x.const_data_ptr(), M, D, D, call.dtype).some_rows(first, count);
      if (in_product) {
        LinearProduct sum = to_dx.product(dx, dz);
        sum.residual = dy_panel.data;
        sum.ld_residual = dy.row_stride;
        multiply_here(sum);
        continue;
      }
      if (adds) {
        finish(dy_panel.data, dy.row_stride, nullptr, 0, dx.data, D, first, 0, count, D, ones.at(0), zeros.at(0),
               Dropout{0, 0});
        multiply_add(dx, dz, down.view);
        continue;
      }
      const View product = call.wide() ? View(wide.at(0), count, D, D, call.product) : dx;
      to_dx.multiply(product, dz);
      if (call.wide() || needs.residual_is_x) {
        finish(product.data, D, needs.residual_is_x ? dy_panel.data : nullptr, dy.row_stride, dx.data, D, first, 0,
               count, D, ones.at(0), zeros.at(0), Dropout{0, 0});
      }
    }
  });
  if (needs.down_bias) call.from_doubles(add_parts<double>(down_sums.at(0), call.tasks, H, H, 1.0), grad.b_down);

  const int64_t blocks = divide_up(D, call.own_gradients(call.product) ? kOwnGradientColumns : kGradientColumns),
                step = round_up(divide_up(D, blocks), 64);
  const std::optional<Matrix> x_rows = needs.down ? std::optional<Matrix>(*x) : std::nullopt;
  const std::vector<double> channel_scale = call.channel_scale();
  std::vector<double> dots(static_cast<size_t>(needs.scale ? D : 0));
  // out = a b, of b what the bits keep where there are any.
  const auto multiply = [&](const View& out, const View& a, const View& b, const uint32_t* keep_of_b = nullptr) {
    if (!call.own_gradients(out.dtype)) return matmul_out(out.tensor(), a.tensor(), b.tensor(), nullptr);
    LinearProduct product = own_product(out, a, b);
    product.base.w_keep = keep_of_b;
    product.base.ld_w_keep = keep_words;
    multiply_here(product);
  };
  // out [columns, H] = g_columns^T h. Of ours in fp32 it is the transpose of h^T g_columns: copies are along rows of g.
  const auto multiply_up = [&](const View& out, const View& g_columns, const View& h, int64_t begin) {
    if (out.dtype != Dtype::kFloat32 || !call.own_gradients(out.dtype)) {
      return multiply(out, g_columns.transposed(), h);
    }
    const Scratch sums(H, out.rows, out.dtype);
    multiply(View(sums.at(0), H, out.rows, out.rows, out.dtype), h.transposed(), g_columns,
             mask_in_copy ? keep + begin / 32 : nullptr);
    call.kernels.pack[static_cast<int>(out.dtype)](sums.at(0), 1, out.rows, out.rows, H, out.data, out.row_stride);
  };
  const auto up_block = [&](int64_t begin, int64_t count) {
    const View g_columns = g.some_columns(begin, count);
    if (direct) {
      const Scratch wide(call.wide() ? M : 0, count, call.product);
      multiply_up(View(grad.w_up, call.product).some_rows(begin, count), call.in_product_type(g_columns, wide), all_h,
                  begin);
      return;
    }
    // scale's gradient is a sum over this product: in 16 bit it would lose its digits
    const Dtype type = needs.scale ? call.accumulator : call.product;
    const Scratch g_memory(call.dtype == type ? 0 : M, count, type), h_memory(call.product == type ? 0 : M, H, type);
    const Scratch raw_memory(count, H, type);
    const View raw(raw_memory.at(0), count, H, H, type);
    multiply_up(raw, call.as_type(g_columns, type, g_memory), call.as_type(all_h, type, h_memory), begin);
    if (needs.up) write_gradient(call, raw, channel_scale.data() + begin, grad.w_up, begin, 0);
    if (!needs.scale) return;
    const Dtype up_dtype = dtype_of(w_up, call.op, "w_up");
    const View w = View(w_up, up_dtype).some_rows(begin, count);
    const Scratch wide(count, H, call.accumulator);
    call.kernels.pack[static_cast<int>(up_dtype)](w.data, w.row_stride, w.column_stride, count, H, wide.at(0), H);
    call.with_accumulator([&](auto zero) {
      for (int64_t d = 0; d < count; ++d) {
        const auto* left = static_cast<const decltype(zero)*>(wide.at(d * H));
        const auto* right = static_cast<const decltype(zero)*>(raw_memory.at(d * H));
        double sum = 0.0;
        for (int64_t j = 0; j < H; ++j) sum += static_cast<double>(left[j]) * right[j];
        dots[begin + d] = sum;
      }
    });
  };
  const auto down_block = [&](int64_t begin, int64_t count) {
    const Scratch wide(call.wide() ? M : 0, count, call.product);
    const View columns = call.in_product_type(call.rows_of(*x_rows).some_columns(begin, count), wide);
    if (dtype_of(w_down, call.op, "w_down") == call.product) {
      multiply(View(grad.w_down, call.product).some_columns(begin, count), all_dz.transposed(), columns);
      return;
    }
    const Scratch memory(H, count, call.product);
    const View raw(memory.at(0), H, count, count, call.product);
    multiply(raw, all_dz.transposed(), columns);
    write_gradient(call, raw, nullptr, grad.w_down, 0, begin);
  };
  parallel(2 * blocks, M * D * H, [&](int64_t task) {
    const int64_t begin = task / 2 * step, count = std::min(step, D - begin);
    if (count <= 0) return;
    if (task % 2 == 0 && needs.up_product) up_block(begin, count);
    if (task % 2 == 1 && needs.down) down_block(begin, count);
  });

  const std::vector<double> sums =
      needs.sums ? add_parts<double>(up_sums.at(0), call.tasks, D, D, 1.0) : std::vector<double>();
  call.write_up_vectors(needs, b_up, sums, std::move(dots), grad);
  return grad.tuple();
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_bottleneck_forward", TORCH_BOX(&pyfused::bottleneck_forward));
  m.impl("_bottleneck_backward", TORCH_BOX(&pyfused::bottleneck_backward));
  pyfused::cpu_kernels.bottleneck_forward = &pyfused::bottleneck_forward;
  pyfused::cpu_kernels.bottleneck_backward = &pyfused::bottleneck_backward;
}
