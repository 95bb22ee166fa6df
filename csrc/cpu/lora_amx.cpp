// LoRA's forward where the base product is in our own AMX tiles: the adapter's share is more columns of it, [x, s]
// times [weight, b]^T, so y is written once and rounded once.
#include <algorithm>
#include <optional>
#include <vector>

#include "linear.h"
#include "lora.h"

#if defined(PYFUSED_HAVE_AMX)

namespace pyfused {
namespace {

// Rows of b of a task that packs them.
constexpr int64_t kTaskFeatures = 256;

struct TilePass {
  const LoraForward& call;
  const Lora& lora;
  PackedOperand a;
  Matrix b;
  Dtype of_b;
  int64_t columns;
  Scratch scaled, s_tiles, b_rows;

  explicit TilePass(const LoraForward& call)
      : call(call),
        lora(call.lora),
        a(PackedOperand::of_a(lora, SumOver::kColumns, call.a)),
        b(call.b),
        of_b(dtype_of(call.b, lora.op, "b")),
        columns(AMX::lora_update_columns(of_b, lora.R)),
        scaled(lora.M, lora.R, Dtype::kFloat32),
        s_tiles(1, AMX::linear_rows_bytes(lora.M, columns), int64_t{1}),
        b_rows(lora.N, columns, Dtype::kBFloat16) {}

  void pack_s(const Matrix& x, int64_t begin, int64_t end) const {
    void* s = call.s.mutable_data_ptr();
    lora.kernels.shrink(x.tensor.const_data_ptr(), x.ld, begin, end, lora.K, lora.R, a.data, lora.dropout,
                        lora.dropout_scale, s);
    lora.scale_rows(s, scaled.at(0), begin, end, 1.0);
    AMX::lora_pack_update(static_cast<const float*>(scaled.at(0)), lora.M, lora.R, of_b, begin, end, s_tiles.at(0));
  }

  int64_t tasks() const { return divide_up(lora.N, kTaskFeatures); }
  void pack_b(int64_t task) const {
    AMX::lora_update_weight(b.tensor.const_data_ptr(), of_b, b.ld, lora.R, task * kTaskFeatures,
                            std::min((task + 1) * kTaskFeatures, lora.N), b_rows.at(0));
  }

  void multiply(const Scratch& x_tiles) const {
    LinearRows rows = linear_rows(as_matrix(call.out, lora.M, lora.N), *call.weight, call.bias, x_tiles);
    rows.update = {s_tiles.at(0), b_rows.at(0), columns, columns};
    multiply_in_tiles(rows);
  }
};

}  // namespace

bool lora_forward_in_tiles(std::span<const LoraForward> calls, const Tensor& x) {
  const Lora& first = calls[0].lora;
  const Tensor x_rows = as_matrix(x, first.M, first.K);
  for (const LoraForward& call : calls) {
    if (call.weight == nullptr || first.M < kAmxMinRows || call.lora.R > kAmxMaxRank ||
        !linear_in_tiles(x_rows, *call.weight, call.bias)) {
      return false;
    }
  }
  const Matrix rows(x);
  std::vector<TilePass> passes(calls.begin(), calls.end());
  const Scratch x_tiles(1, AMX::linear_rows_bytes(first.M, first.K), int64_t{1});
  const RowRanges ranges(first.M, std::max<int64_t>(RowRanges::independent(first.M).step, 32));
  int64_t tasks = ranges.count, ranks = 1;
  for (const TilePass& pass : passes) {
    tasks += pass.tasks();
    ranks += pass.lora.R;
  }
  parallel(tasks, first.M * first.K * ranks, [&](int64_t task) {
    if (task < ranges.count) {
      const int64_t begin = ranges.begin(task), end = ranges.end(task);
      for (const TilePass& pass : passes) pass.pack_s(rows, begin, end);
      return AMX::linear_pack_rows(rows.tensor.const_data_ptr(), rows.ld, first.M, first.K, begin, end, x_tiles.at(0));
    }
    task -= ranges.count;
    const TilePass* pass = passes.data();
    for (; task >= pass->tasks(); ++pass) task -= pass->tasks();
    pass->pack_b(task);
  });
  for (const TilePass& pass : passes) pass.multiply(x_tiles);
  return true;
}

}  // namespace pyfused

#endif
