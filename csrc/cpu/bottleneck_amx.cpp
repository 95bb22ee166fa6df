// The bottleneck in AMX tiles: bf16 data and weights. Rows go through both products in kernels/bottleneck_amx.cpp; here
// they are cut into ranges, by shape alone, and the ranges' sums added up.
#include "kernels/bottleneck_amx.h"

#include "bottleneck.h"

#if defined(PYFUSED_HAVE_AMX)

namespace pyfused {
namespace {

// Fewer rows do not earn back that the weights are packed.
constexpr int64_t kMinRows = 64;
// Columns of a task that packs a weight or writes a gradient.
constexpr int64_t kTaskColumns = 128;

// run(begin, end) for all columns on all threads.
template <class F>
void for_columns(const Bottleneck& call, const F& run) {
  parallel(divide_up(call.D, kTaskColumns), call.D * call.H * 8,
           [&](int64_t task) { run(task * kTaskColumns, std::min((task + 1) * kTaskColumns, call.D)); });
}

using Pack = void (*)(const void*, bool, int64_t, int64_t, int64_t, int64_t, void*);
Scratch pack(const Bottleneck& call, Pack run, const Tensor& weight, bool of_up) {
  const Tensor rows = torch::stable::contiguous(weight);
  Scratch tiles(1, AMX::bottleneck_weight_bytes(call.D, call.H), int64_t{1});
  for_columns(call, [&](int64_t begin, int64_t end) {
    run(rows.const_data_ptr(), of_up, call.D, call.H, begin, end, tiles.at(0));
  });
  return tiles;
}

}  // namespace

bool bottleneck_in_tiles(const Bottleneck& call) {
  return chosen_capability() == Capability::AMX && call.dtype == Dtype::kBFloat16 && !call.wide() &&
         call.M >= kMinRows && call.D % 32 == 0 && call.H % 16 == 0 && call.H <= kMaxAmxHidden;
}

void bottleneck_forward_in_tiles(const Bottleneck& call, const Matrix& x, const Matrix* residual, const Tensor& w_down,
                                 const std::optional<Tensor>& b_down, const Tensor& w_up,
                                 const Bottleneck::Channels& channels, const Tensor& y, const Tensor& z) {
  const Scratch down = pack(call, AMX::bottleneck_pack_over_columns, w_down, false);
  const Scratch up = pack(call, AMX::bottleneck_pack_over_hidden, w_up, true);
  const Scratch bias = call.vector(b_down, call.H);
  BottleneckForwardRows rows{};
  rows.x = x.tensor.const_data_ptr();
  rows.ld_x = x.ld;
  if (residual != nullptr) rows.residual = residual->tensor.const_data_ptr();
  if (residual != nullptr) rows.ld_residual = residual->ld;
  rows.D = call.D;
  rows.H = call.H;
  rows.down = down.at(0);
  rows.up = up.at(0);
  rows.down_bias = static_cast<const float*>(bias.at(0));
  rows.scale = static_cast<const float*>(channels.scale.at(0));
  rows.bias = static_cast<const float*>(channels.bias.at(0));
  rows.activation = call.activation;
  rows.dropout = call.dropout;
  rows.z = z.mutable_data_ptr();
  rows.out = y.mutable_data_ptr();
  const RowRanges ranges = RowRanges::independent(call.M);
  parallel(ranges.count, call.M * call.D * call.H,
           [&](int64_t range) { AMX::bottleneck_forward_rows(rows, ranges.begin(range), ranges.end(range)); });
}

void bottleneck_backward_in_tiles(const Bottleneck& call, const BottleneckNeeds& needs, const Matrix& grad_y,
                                  const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up,
                                  const std::optional<Tensor>& b_up, const Tensor& z, BottleneckGradients& grad) {
  const int64_t D = call.D, H = call.H;
  const Scratch up = pack(call, AMX::bottleneck_pack_over_columns, call.scaled_rows(w_up).view.tensor(), true);
  const Scratch down = pack(call, AMX::bottleneck_pack_over_hidden, w_down, false);
  const RowRanges ranges = RowRanges::summed(call.M, H);
  const bool sums_of_g = needs.up_product || needs.sums;
  const int64_t up_size = sums_of_g ? (H + 1) * D : 0, down_size = needs.down ? H * D : 0;
  const int64_t bias_size = needs.down_bias ? H : 0;
  const Scratch up_parts(ranges.count, up_size, Dtype::kFloat32);
  const Scratch down_parts(ranges.count, down_size, Dtype::kFloat32);
  const Scratch bias_parts(ranges.count, bias_size, Dtype::kFloat32);
  BottleneckBackwardRows rows{};
  rows.dy = grad_y.tensor.const_data_ptr();
  rows.ld_dy = grad_y.ld;
  const Matrix x_rows(needs.down ? *x : grad_y.tensor);
  if (needs.down) rows.x = x_rows.tensor.const_data_ptr();
  rows.ld_x = x_rows.ld;
  rows.D = D;
  rows.H = H;
  rows.up = up.at(0);
  rows.down = down.at(0);
  rows.activation = call.activation;
  rows.factor = static_cast<float>(call.scalar * call.dropout_scale);
  rows.dropout = call.dropout;
  rows.add_dy = needs.residual_is_x;
  rows.z = z.const_data_ptr();
  if (needs.x) rows.dx = grad.x.mutable_data_ptr();
  parallel(ranges.count, call.M * D * H, [&](int64_t range) {
    BottleneckBackwardRows part = rows;
    const Scratch masked(call.threshold != 0 ? kAmxBackwardRows : 0, D, call.dtype);
    part.masked = masked.at(0);
    if (sums_of_g) part.up_part = static_cast<float*>(up_parts.at(range * up_size));
    if (needs.down) part.down_part = static_cast<float*>(down_parts.at(range * down_size));
    if (needs.down_bias) {
      part.down_bias_part = static_cast<float*>(bias_parts.at(range * H));
      std::fill_n(part.down_bias_part, H, 0.0f);
    }
    AMX::bottleneck_backward_rows(part, ranges.begin(range), ranges.end(range));
  });

  const auto parts_of = [&](const Scratch& parts, int64_t size) {
    return BottleneckAmxParts{static_cast<const float*>(parts.at(0)), ranges.count, size, D, H};
  };
  std::vector<double> dots(static_cast<size_t>(needs.scale ? D : 0));
  if (needs.up_product) {
    const Scratch scale = call.channel_factors(std::nullopt).scale;
    const Tensor w = torch::stable::contiguous(w_up);
    const BottleneckAmxUpGradient up_gradient{parts_of(up_parts, up_size), static_cast<const float*>(scale.at(0)),
                                              w.const_data_ptr(), needs.up ? grad.w_up.mutable_data_ptr() : nullptr,
                                              needs.scale ? dots.data() : nullptr};
    for_columns(call, [&](int64_t begin, int64_t end) { AMX::bottleneck_up_gradient(up_gradient, begin, end); });
  }
  if (needs.down) {
    const BottleneckAmxParts parts = parts_of(down_parts, down_size);
    void* gradient = grad.w_down.mutable_data_ptr();
    for_columns(call, [&](int64_t begin, int64_t end) { AMX::bottleneck_down_gradient(parts, gradient, begin, end); });
  }
  const std::vector<double> sums =
      needs.sums ? add_parts<float>(up_parts.at(H * D), ranges.count, up_size, D, 1.0) : std::vector<double>();
  call.write_up_vectors(needs, b_up, sums, std::move(dots), grad);
  if (needs.down_bias) {
    call.from_doubles(add_parts<float>(bias_parts.at(0), ranges.count, H, H, 1.0), grad.b_down);
  }
}

}  // namespace pyfused

#endif
