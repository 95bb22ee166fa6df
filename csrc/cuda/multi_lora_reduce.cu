// The gradients of every adapter in a batch: db = scale * dy^T s, or da = ds^T drop(x), over each one's own rows. A
// block takes 128 columns (64 of fp32), 16 ranks and one part of the rows of an adapter and walks them 64 at a time. An
// adapter of one part is done with that; the sums of more are added by a second kernel, in their order. Where the cuts
// are is said by a row's number within its adapter, so what is summed in which order is the adapter's own affair. The
// eight warps are four groups of 16 rows times two that share the columns, as in multi_lora_shrink.cu.
#include "copy.cuh"
#include "dropout.cuh"
#include "multi_lora.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kSumBlocks = 64;  // of an adapter whose parts are added up
constexpr int64_t kMostY = 65535;   // blocks of a grid in y

template <class TX, class TC>
struct Layout {
  using S = Sum<Compute<TX, TC>>;
  static constexpr int kWords = sizeof(TX) == 4 ? 2 : 4;  // pairs of 16-column tiles: what there are registers for
  static constexpr int kColumns = kWords * 32;
  static constexpr int kRankTiles = 2;  // of 8 ranks
  static constexpr int kRanks = kRankTiles * 8;
  static constexpr int kSums = kWords * kRankTiles * 4;  // of a lane
  static constexpr int kStride = kColumns + kPadding;
  static constexpr int kSStride = kRanks + 4;
  static constexpr int kXBytes = kTileRows * kStride * static_cast<int>(sizeof(TX));
  static constexpr int kStageBytes = kXBytes + kTileRows * kSStride * static_cast<int>(sizeof(S));
  static constexpr int kStages = stages_that_fit(kSharedLimit, kStageBytes, 3);
  static constexpr int kExchangeBytes = 3 * 2 * kSums * 32 * static_cast<int>(sizeof(S));
  static constexpr int kBytes = kStages * kStageBytes > kExchangeBytes ? kStages * kStageBytes : kExchangeBytes;
  static_assert(kXBytes % 16 == 0 && kStageBytes % 16 == 0 && kBytes <= kSharedLimit);
};

// How far apart the sums of two parts are.
__device__ __forceinline__ int64_t part_size(const MultiLoraReduce& p) { return p.pass.max_rank * p.n; }

// The sums of a group's first part.
template <class S>
__device__ __forceinline__ S* sums_of(const MultiLoraReduce& p, const RowGroup& group) {
  return static_cast<S*>(p.part_sums) + 2 * static_cast<int64_t>(group.begin) / p.pass.part_rows * part_size(p);
}

// Element i of the gradient from the sum over all rows.
template <class S>
__device__ __forceinline__ void store(const MultiLoraReduce& p, const MultiAdapter& adapter, int64_t i, S sum) {
  const S scale = p.of_a ? S(1) : static_cast<S>(adapter.scale);
  store_as<S>(p.of_a ? adapter.grad_a : adapter.grad_b, p.of_a ? adapter.type_a : adapter.type_b, i, sum * scale);
}

template <class TX, class TC>
__global__ void __launch_bounds__(kThreads, 1) multi_lora_reduce_kernel(MultiLoraReduce p) {
  using L = Layout<TX, TC>;
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kColumns = L::kColumns, kRankTiles = L::kRankTiles, kRanks = L::kRanks, kSums = L::kSums;
  PF_DYN_SMEM(char, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_group = warp % 4, parity = warp / 4;
  const int rank_blocks = (p.pass.max_rank + kRanks - 1) / kRanks;
  const RowTile part = p.pass.parts[blockIdx.y];
  const MultiAdapter& adapter = p.pass.table[p.slice * p.pass.adapters + part.adapter];
  void* grad = p.of_a ? adapter.grad_a : adapter.grad_b;
  const int64_t column = static_cast<int64_t>(blockIdx.x / rank_blocks) * kColumns;
  const int first_rank = static_cast<int>(blockIdx.x) % rank_blocks * kRanks;
  const int r_all = adapter.r, ranks = r_all - first_rank < kRanks ? r_all - first_rank : kRanks;
  if (grad == nullptr || ranks <= 0 || adapter.products != p.pass.types.adapter) return;
  if (part.count == 0 && part.first > 0) return;
  const DropoutSource dropout = p.of_a ? adapter.dropout : DropoutSource{};
  const TX* x = static_cast<const TX*>(p.x.data) + column;
  const S* s = static_cast<const S*>(p.s) + static_cast<int64_t>(part.begin) * p.pass.max_rank + first_rank;
  const int* rows = p.pass.rows + part.begin;
  const bool x_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0 && p.x.ld * sizeof(TX) % 16 == 0;
  const bool s_aligned = reinterpret_cast<uintptr_t>(s) % 16 == 0 && p.pass.max_rank * sizeof(S) % 16 == 0;

  const auto x_tile = [&](int stage) { return reinterpret_cast<TX*>(shared + stage * L::kStageBytes); };
  const auto s_tile = [&](int stage) { return reinterpret_cast<S*>(shared + stage * L::kStageBytes + L::kXBytes); };
  const auto load = [&](int stage, int row) {
    copy_tile<kThreads>(x_tile(stage), L::kStride, x, p.x.ld, kTileRows, kColumns, part.count - row, p.n - column,
                        x_aligned, thread, SameRow{}, [&](int i) { return static_cast<int64_t>(rows[row + i]); });
    copy_tile<kThreads>(s_tile(stage), L::kSStride, s + static_cast<int64_t>(row) * p.pass.max_rank, p.pass.max_rank,
                        kTileRows, kRanks, part.count - row, ranks, s_aligned, thread);
  };

  S sums[L::kWords][kRankTiles][4] = {};                         // of the column tiles 2 w + parity
  const bool second_half = column % philox::kBlockColumns != 0;  // of dropout's block
  const auto reduce = [&](int stage, int row) {
    if (row + row_group * 16 >= part.count) return;
    const TX* of_x = x_tile(stage) + row_group * 16 * L::kStride;
    const S* of_s = s_tile(stage) + (row_group * 16 + lane % 4 * 2) * L::kSStride + lane / 4;
    const auto products = [&](int w, const FragmentA<T>& fragment) {
      const FragmentA<T> columns = transposed(fragment, lane);
#pragma unroll
      for (int n = 0; n < kRankTiles; ++n) {
        FragmentB<T> b;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const S* at = of_s + i * 8 * L::kSStride + n * 8;
          set_pair(b, i, at[0], at[L::kSStride]);
        }
        multiply_add<is_16bit<TX>, T>(sums[w][n], columns, b, false);
      }
    };
    const TileMasks masks(dropout, part.first + row + row_group * 16 + lane / 4, column / philox::kBlockColumns, parity,
                          lane);
#pragma unroll
    for (int w = 0; w < L::kWords; ++w) {
      FragmentA<T> fragment = load_a<T>(of_x + (2 * w + parity) * 16, L::kStride, lane);
      if (second_half) {  // a select, not an index: masks stay in registers
        masks.apply(fragment, w + 4 - L::kWords);
      } else {
        masks.apply(fragment, w);
      }
      products(w, fragment);
    }
  };

  const int steps = (part.count + kTileRows - 1) / kTileRows;
  for_each_step(
      L::kStages, steps, [&](int stage, int step) { load(stage, step * kTileRows); },
      [&](int stage, int step) { reduce(stage, step * kTileRows); });
  __syncthreads();

  // the four row groups, always in the same order
  S* slots = reinterpret_cast<S*>(shared) + parity * kSums * 32 + lane;
  constexpr int kGroupSums = 2 * kSums * 32;
  if (row_group > 0) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) {
      slots[(row_group - 1) * kGroupSums + i * 32] = sums[i / (kRankTiles * 4)][i / 4 % kRankTiles][i % 4];
    }
  }
  __syncthreads();
  if (row_group > 0) return;
  const RowGroup group = p.pass.groups[part.adapter];
  S* part_sums = nullptr;
  if (group.count > p.pass.part_rows) part_sums = sums_of<S>(p, group) + part.first / p.pass.part_rows * part_size(p);
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const int64_t n = column + (2 * (i / (kRankTiles * 4)) + parity) * 16 + lane / 4 + i % 4 / 2 * 8;
    const int r = i / 4 % kRankTiles * 8 + lane % 4 * 2 + i % 2;
    if (n >= p.n || r >= ranks) continue;
    S sum = sums[i / (kRankTiles * 4)][i / 4 % kRankTiles][i % 4];
#pragma unroll
    for (int other = 0; other < 3; ++other) sum += slots[other * kGroupSums + i * 32];
    const int64_t at = p.of_a ? (first_rank + r) * p.n + n : n * r_all + first_rank + r;
    if (part_sums != nullptr) {
      part_sums[at] = sum;
    } else {
      store(p, adapter, at, sum);
    }
  }
}

template <class S>
__global__ void __launch_bounds__(kThreads) multi_lora_sum_parts_kernel(MultiLoraReduce p) {
  const RowGroup group = p.pass.groups[blockIdx.y];
  if (group.count <= p.pass.part_rows) return;
  const MultiAdapter& adapter = p.pass.table[p.slice * p.pass.adapters + static_cast<int>(blockIdx.y)];
  if ((p.of_a ? adapter.grad_a : adapter.grad_b) == nullptr || adapter.products != p.pass.types.adapter) return;
  const int parts = (group.count + p.pass.part_rows - 1) / p.pass.part_rows;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < adapter.r * p.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    double total = 0;
#pragma unroll 4
    for (int part = 0; part < parts; ++part)
      total += static_cast<double>(sums_of<S>(p, group)[part * part_size(p) + i]);
    store(p, adapter, i, static_cast<S>(total));
  }
}

}  // namespace

void launch_multi_lora_reduce(const MultiLoraReduce& call, cudaStream_t stream) {
  with_types(call.pass.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    using L = Layout<TX, TC>;
    const int64_t slabs = divide_up_to<int64_t>(call.n, L::kColumns);
    const int64_t parts = row_parts(call.pass.m, call.pass.adapters, call.pass.part_rows);
    for (int64_t first = 0; first < parts; first += kMostY) {
      const dim3 grid(static_cast<unsigned>(slabs * divide_up_to(call.pass.max_rank, L::kRanks)),
                      static_cast<unsigned>(std::min(parts - first, kMostY)));
      MultiLoraReduce some = call;
      some.pass.parts += first;
      PF_LAUNCH(grid, dim3(kThreads), L::kBytes, stream, (multi_lora_reduce_kernel<TX, TC>), some);
    }
    if (call.pass.m <= call.pass.part_rows) return;
    const int64_t blocks = divide_up_to<int64_t>(call.pass.max_rank * call.n, kThreads);
    for (int64_t first = 0; first < call.pass.adapters; first += kMostY) {
      const dim3 grid(static_cast<unsigned>(std::min(blocks, kSumBlocks)),
                      static_cast<unsigned>(std::min(call.pass.adapters - first, kMostY)));
      MultiLoraReduce some = call;
      some.pass.groups += first;
      some.pass.table += first;
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (multi_lora_sum_parts_kernel<typename L::S>), some);
    }
  });
}

}  // namespace pyfused
