// LoRA where the base product is in our own AMX tiles: the adapter's share is more columns of it, [x, s] times [weight,
// b]^T in the forward and [dy, ds] times [weight, a] in the backward, so y and dX are written once and rounded once.
#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/lora_update_amx.h"
#include "linear.h"
#include "lora.h"

#if defined(PYFUSED_HAVE_AMX)

namespace pyfused {
namespace {

struct TilePass {
  const LoraForward& call;
  const Lora& lora;
  Mask mask;
  PackedOperand a;
  Matrix b;
  Dtype of_b;
  int64_t columns;
  bool panels;
  Scratch scaled, s_tiles, b_rows;

  TilePass(const LoraForward& call, bool panels)
      : call(call),
        lora(call.lora),
        mask(call.dropout()),
        a(PackedOperand::of_a(lora, SumOver::kColumns, call.a)),
        b(call.b),
        of_b(dtype_of(call.b, lora.op, "b")),
        columns(AMX::lora_update_columns(of_b, lora.R)),
        panels(panels),
        scaled(lora.M, lora.R, Dtype::kFloat32),
        s_tiles(1, panels ? lora.M * columns * 2 : AMX::linear_rows_bytes(lora.M, columns), int64_t{1}),
        b_rows(lora.N, columns, Dtype::kBFloat16) {}

  void pack_s(const Matrix& x, int64_t begin, int64_t end) const {
    void* s = call.s.mutable_data_ptr();
    lora.kernels.shrink(x.tensor.const_data_ptr(), x.ld, begin, end, lora.K, lora.R, a.data, mask, lora.dropout_scale,
                        s);
    lora.scale_rows(s, scaled.at(0), begin, end, 1.0);
    const float* from = static_cast<const float*>(scaled.at(0));
    if (panels) return AMX::lora_more_rows(from, lora.R, of_b, begin, end, s_tiles.at(0));
    AMX::lora_pack_update(from, lora.M, lora.R, of_b, begin, end, s_tiles.at(0));
  }

  // One of `parts` shares of b.
  void pack_b(int64_t part, int64_t parts) const {
    AMX::lora_update_weight(b.tensor.const_data_ptr(), of_b, b.ld, lora.R, lora.N * part / parts,
                            lora.N * (part + 1) / parts, b_rows.at(0));
  }

  void multiply(const Matrix& x, const Scratch& x_tiles) const {
    const Tensor out = as_matrix(call.out, lora.M, lora.N);
    if (panels) {
      LinearPanels product = linear_panels(out, x, *call.weight, call.bias);
      product.more_x = s_tiles.at(0);
      product.more_w = b_rows.at(0);
      product.more = columns;
      return multiply_panels(product);
    }
    LinearRows rows = linear_rows(out, *call.weight, call.bias, x_tiles);
    rows.update = {s_tiles.at(0), b_rows.at(0), columns, columns};
    multiply_in_tiles(rows);
  }
};

}  // namespace

bool served_by_tiles(const LoraForward& call, const Tensor& x_rows) {
  return call.weight != nullptr && call.lora.M >= kAmxMinRows && call.lora.R <= kAmxMaxRank &&
         (linear_in_tiles(x_rows, *call.weight, call.bias) || linear_in_panels(x_rows, *call.weight, call.bias));
}

void lora_forward_in_tiles(std::span<const LoraForward> calls, const Tensor& x) {
  const Lora& first = calls[0].lora;
  const Tensor x_rows = as_matrix(x, first.M, first.K);
  std::vector<TilePass> passes;
  passes.reserve(calls.size());
  bool tiles = false;
  for (const LoraForward& call : calls) {
    const bool panels = linear_in_panels(x_rows, *call.weight, call.bias);
    tiles = tiles || !panels;
    passes.emplace_back(call, panels);
  }
  const Matrix rows(x);
  const Scratch x_tiles(1, tiles ? AMX::linear_rows_bytes(first.M, first.K) : 0, int64_t{1});
  const RowRanges ranges(first.M, std::max<int64_t>(RowRanges::independent(first.M).step, 32));
  int64_t ranks = 1;
  for (const TilePass& pass : passes) ranks += pass.lora.R;
  parallel(ranges.count, first.M * first.K * ranks, [&](int64_t task) {
    const int64_t begin = ranges.begin(task), end = ranges.end(task);
    for (const TilePass& pass : passes) {
      pass.pack_s(rows, begin, end);
      pass.pack_b(task, ranges.count);
    }
    if (!tiles) return;
    AMX::linear_pack_rows(rows.tensor.const_data_ptr(), rows.ld, first.M, first.K, begin, end, x_tiles.at(0));
  });
  for (const TilePass& pass : passes) pass.multiply(rows, x_tiles);
}

namespace {

// Rows of `columns` numbers multiply a: ds and a in terms.
struct ShareInPanels : ShareOfDx {
  int64_t R;
  Dtype of_a;
  int64_t columns;
  Scratch rows, a;

  explicit ShareInPanels(const LoraBackward& call)
      : ShareOfDx(call.lora),
        R(call.lora.R),
        of_a(dtype_of(call.a, call.lora.op, "a")),
        columns(AMX::lora_update_columns(of_a, R)),
        rows(call.lora.M, columns, Dtype::kBFloat16),
        a(columns, call.lora.K, Dtype::kBFloat16) {
    const Matrix from(call.a);
    AMX::lora_more_weight(from.tensor.const_data_ptr(), of_a, from.ld, R, call.lora.K, a.at(0));
  }

  void take_rows(int64_t row_begin, int64_t row_end) const override {
    AMX::lora_more_rows(static_cast<const float*>(ds.at(0)), R, of_a, row_begin, row_end, rows.at(0));
  }
};

}  // namespace

bool lora_backward_in_panels(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x) {
  // fewer rows, or more ranks, have the loops on vectors, with whose bits a's gradient comes without dX
  for (const LoraBackward& call : calls) {
    const Lora& lora = call.lora;
    if (lora.kernels.sum_x == nullptr || !linear_backward_in_panels(lora.M, *call.weight)) return false;
  }
  std::vector<ShareInPanels> shares;
  shares.reserve(calls.size());
  for (LoraBackward& call : calls) call.share = &shares.emplace_back(call);
  lora_backward(calls, x, nullptr, false);
  const Tensor dx = as_matrix(grad_x, calls[0].lora.M, calls[0].lora.K);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ShareInPanels& share = shares[i];
    const Matrix dy(calls[i].grad_y);
    LinearPanels product = linear_backward_panels(dx, dy, *calls[i].weight);
    product.add = i > 0;
    product.more_x = share.rows.at(0);
    product.more_w = share.a.at(0);
    product.more = share.columns;
    product.keep = share.mask.bits;
    product.ld_keep = share.mask.ld;
    multiply_panels(product);
  }
  return true;
}

}  // namespace pyfused

#endif
