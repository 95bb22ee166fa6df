// s = drop(x) a^T for the rows of many adapters, or ds = dy b: lora_shrink.cu's pass with gathered rows. A block takes
// a tile of one adapter's rows; its eight warps are four groups of 16 rows times two that share the columns of a stage.
// Sums are complete every kSplitColumns, whether these are a block's or one's among several, and then added in order.
#include "copy.cuh"
#include "dropout.cuh"
#include "multi_lora.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kColumns = philox::kBlockColumns;
constexpr int kSplitSteps = kSplitColumns / kColumns;
static_assert(kSplitColumns % kColumns == 0 && kTileRows == 64);

template <class TX, class TC>
struct Layout {
  static constexpr int kRankTiles = sizeof(TX) == 2 ? 4 : 2;  // of 8 ranks; more ranks have blocks of their own
  static constexpr int kRanks = kRankTiles * 8;
  static constexpr int kStride = kColumns + kPadding;
  static constexpr int kXBytes = kTileRows * kStride * static_cast<int>(sizeof(TX));
  static constexpr int kStageBytes = kXBytes + kRanks * kStride * static_cast<int>(sizeof(TC));
  static constexpr int kExchangeBytes = 4 * kRankTiles * 4 * 32 * static_cast<int>(sizeof(Sum<Compute<TX, TC>>));
  static constexpr int kStages = stages_that_fit(kSharedLimit - kExchangeBytes, kStageBytes, 3);
  static constexpr int kBytes = kStages * kStageBytes + kExchangeBytes;
  static_assert(kXBytes % 16 == 0 && kStageBytes % 16 == 0 && kBytes <= kSharedLimit);
};

template <class TX, class TC>
__global__ void __launch_bounds__(kThreads, 1) multi_lora_shrink_kernel(MultiLoraShrink p) {
  using L = Layout<TX, TC>;
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  PF_DYN_SMEM(char, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_group = warp % 4, parity = warp / 4;
  const int rank_blocks = (p.pass.max_rank + L::kRanks - 1) / L::kRanks;
  const RowTile tile = p.pass.tiles[blockIdx.x / rank_blocks];
  if (tile.count == 0) return;
  const int slice = p.first_slice + static_cast<int>(blockIdx.z);
  const MultiAdapter& adapter = p.pass.table[slice * p.pass.adapters + tile.adapter];
  const int first_rank = static_cast<int>(blockIdx.x) % rank_blocks * L::kRanks;
  const int ranks = adapter.r - first_rank < L::kRanks ? adapter.r - first_rank : L::kRanks;
  if (ranks <= 0 || adapter.products != p.pass.types.adapter) return;

  const bool whole = gridDim.y == 1;
  const int64_t begin = whole ? 0 : static_cast<int64_t>(blockIdx.y) * kSplitColumns;
  const int64_t end = whole || begin + kSplitColumns > p.k ? p.k : begin + kSplitColumns;
  const Factor factor(adapter, p.backward);
  const DropoutSource dropout = p.backward ? DropoutSource{} : adapter.dropout;
  const TX* x = static_cast<const TX*>(p.x.data);
  const int* rows = p.pass.rows + tile.begin;
  const int padded_rows = (tile.count + 15) / 16 * 16, padded_ranks = (ranks + 7) / 8 * 8;
  const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && p.x.ld * sizeof(TX) % 16 == 0;
  const bool copied = factor.column_stride == 1 && factor.type == dtype_v<TC>;  // column by column, as it is
  const bool a_aligned =
      reinterpret_cast<uintptr_t>(factor.data) % 16 == 0 && factor.rank_stride * sizeof(TC) % 16 == 0;

  const auto x_tile = [&](int stage) { return reinterpret_cast<TX*>(shared + stage * L::kStageBytes); };
  const auto a_tile = [&](int stage) { return reinterpret_cast<TC*>(shared + stage * L::kStageBytes + L::kXBytes); };
  const auto load = [&](int stage, int64_t column) {
    copy_tile<kThreads>(x_tile(stage), L::kStride, x + column, p.x.ld, padded_rows, kColumns, tile.count, end - column,
                        x_aligned, thread, SameRow{}, [&](int row) { return static_cast<int64_t>(rows[row]); });
    TC* to = a_tile(stage);
    if (copied) {
      copy_tile<kThreads>(to, L::kStride,
                          static_cast<const TC*>(factor.data) + first_rank * factor.rank_stride + column,
                          factor.rank_stride, padded_ranks, kColumns, ranks, end - column, a_aligned, thread);
    } else {
      factor.for_each<kThreads, TC, TC>(first_rank, column, padded_ranks, kColumns, ranks, end - column, thread,
                                        [&](int r, int c, TC value) { to[r * L::kStride + c] = value; });
    }
  };

  S sums[L::kRankTiles][4] = {}, total[L::kRankTiles][4] = {};
  const auto multiply = [&](int stage, int64_t column) {
    if (row_group * 16 >= tile.count) return;
    const TX* of_x = x_tile(stage) + row_group * 16 * L::kStride;
    const TC* of_a = a_tile(stage);
    const auto products = [&](int w, const FragmentA<T>& fragment) {
#pragma unroll
      for (int n = 0; n < L::kRankTiles; ++n) {
        if (n * 8 >= ranks) continue;
        const FragmentB<T> b = load_b<T>(of_a + n * 8 * L::kStride + (2 * w + parity) * 16, L::kStride, lane);
        multiply_add<is_16bit<TX>, T>(sums[n], fragment, b, false);
      }
    };
    const TileMasks masks(dropout, tile.first + row_group * 16 + lane / 4, column / kColumns, parity, lane);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      FragmentA<T> fragment = load_a<T>(of_x + (2 * w + parity) * 16, L::kStride, lane);
      masks.apply(fragment, w);
      products(w, fragment);
    }
  };

  // total += the two halves of the columns, always in the same order
  S* slot = reinterpret_cast<S*>(shared + L::kStages * L::kStageBytes) + row_group * L::kRankTiles * 4 * 32 + lane;
  const auto add_up = [&]() {
    if (parity == 1) {
#pragma unroll
      for (int i = 0; i < L::kRankTiles * 4; ++i) slot[i * 32] = sums[i / 4][i % 4];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < L::kRankTiles * 4; ++i) {
      if (parity == 0) total[i / 4][i % 4] += sums[i / 4][i % 4] + slot[i * 32];
      sums[i / 4][i % 4] = S(0);
    }
  };

  const int steps = static_cast<int>((end - begin + kColumns - 1) / kColumns);
  for_each_step(
      L::kStages, steps, [&](int stage, int step) { load(stage, begin + step * kColumns); },
      [&](int stage, int step) {
        multiply(stage, begin + step * kColumns);
        if (step % kSplitSteps == kSplitSteps - 1 || step == steps - 1) add_up();
      });

  if (parity == 1) return;
  S* part = static_cast<S*>(p.parts) +
            ((static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * p.pass.m + tile.begin) * p.pass.max_rank;
  const S scale =
      !whole ? S(1) : static_cast<S>(p.backward ? adapter.scale * adapter.dropout_scale : adapter.dropout_scale);
#pragma unroll
  for (int i = 0; i < L::kRankTiles * 4; ++i) {
    const int m = row_group * 16 + lane / 4 + i % 4 / 2 * 8;
    const int r = i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (m < tile.count && r < ranks)
      part[static_cast<int64_t>(m) * p.pass.max_rank + first_rank + r] = total[i / 4][i % 4] * scale;
  }
}

}  // namespace

void launch_multi_lora_shrink(const MultiLoraShrink& call, cudaStream_t stream) {
  with_types(call.pass.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    using L = Layout<TX, TC>;
    const dim3 grid(static_cast<unsigned>(call.pass.tile_count * divide_up_to(call.pass.max_rank, L::kRanks)),
                    static_cast<unsigned>(call.splits), static_cast<unsigned>(call.slices));
    PF_LAUNCH(grid, dim3(kThreads), L::kBytes, stream, (multi_lora_shrink_kernel<TX, TC>), call);
  });
}

}  // namespace pyfused
