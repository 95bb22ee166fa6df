// One pass over dy (or x) that reduces it both ways: over its columns, against b, to ds; over its rows, against s, to
// db (or from x, with dropout's mask made again, to da: of one adapter or several). Bound by the bytes of dy.
//
// A block owns a slab of columns and a range of rows, which it walks in tiles of 32 rows. Its eight warps are two
// groups of 16 rows times four groups of columns. The sums over rows stay in registers to the end; the sums over
// columns are complete for a tile once the column groups are added. Both leave as partial sums that sums.cu adds in a
// fixed order. A tile is read from shared memory once: the fragment that serves the sums over columns is transposed in
// registers for the sums over rows.
#include <algorithm>
#include <vector>

#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 32;
constexpr int kColumnGroups = 4;
constexpr int64_t kMaxRangeRows = 2048;

constexpr int kMaxAdapters =
    3;  // of one block; two where products are in fp32, whose fragments take twice the registers
constexpr int kMaxStackedRanks = 16;  // of each where there are several: their sums fill the registers
constexpr int kMaxNeighbours = 8;     // adapters of one launch, each with blocks of its own

struct Arguments {
  int64_t m, n, range_rows;
  const void* x;
  int64_t ld_x;
  LoraReduce::Adapter adapters[kMaxNeighbours];
  int rank_blocks;  // of all adapters: neighbours in the grid, so that one of them brings x to L2 for all
  void* rows_parts;
  const void* c;
  int64_t c_column_stride, c_rank_stride;
  bool x_aligned, s_aligned, tf32;
};

// 16-column tiles of a warp: as many as its registers hold sums for. Their order follows dropout's random numbers: all
// tiles of one `parity` use the same ones. rank_tiles: tiles of 8 ranks, of all adapters together.
template <class TX, int rank_tiles>
constexpr int warp_tiles() {
  if (sizeof(TX) == 8) return 2;
  return sizeof(TX) == 2 && rank_tiles <= 2 ? 8 : 4;
}

template <class TX, class TC, int ADAPTERS, int NT, bool WITH_ROWS>
struct Layout {
  using S = Sum<Compute<TX, TC>>;
  static constexpr int kTiles = warp_tiles<TX, ADAPTERS * NT>();
  static constexpr int kColumns = kColumnGroups * kTiles * 16;
  static constexpr int kRanks = NT * 8;
  static constexpr int kStride = kColumns + kPadding;
  static constexpr int kSStride = kRanks + 4;
  static constexpr int kXBytes = kRows * kStride * static_cast<int>(sizeof(TX));
  static constexpr int kSBytes = ADAPTERS * kRows * kSStride * static_cast<int>(sizeof(S));
  static constexpr int kStageBytes = kXBytes + kSBytes;
  static constexpr int kCBytes = WITH_ROWS ? kRanks * kStride * static_cast<int>(sizeof(TC)) : 0;
  static constexpr int kGroupSums = kRows * kRanks;
  static constexpr int kGroupBytes = WITH_ROWS ? kColumnGroups * kGroupSums * static_cast<int>(sizeof(S)) : 0;
  static constexpr int kMostStages = ADAPTERS == 1 ? 3 : 4;  // their registers leave a multiprocessor fewer blocks
  static constexpr int kStages = stages_that_fit(kSharedLimit - kCBytes - kGroupBytes, kStageBytes, kMostStages);
  static constexpr int kRowSums = ADAPTERS * kTiles * NT * 4;
  static constexpr int kExchangeBytes = 4 * kRowSums * 32 * static_cast<int>(sizeof(S));
  static constexpr int kLoopBytes = kStages * kStageBytes + kCBytes + kGroupBytes;
  static constexpr int kBytes = kLoopBytes > kExchangeBytes ? kLoopBytes : kExchangeBytes;
};

template <class TX, class TC, int ADAPTERS, int NT, bool WITH_ROWS>
__global__ void __launch_bounds__(kThreads) lora_reduce_kernel(Arguments p) {
  static_assert(ADAPTERS == 1 || (NT * 8 == kMaxStackedRanks && !WITH_ROWS));
  using L = Layout<TX, TC, ADAPTERS, NT, WITH_ROWS>;
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr bool kExact = is_16bit<TX>;
  constexpr int kPerParity = L::kTiles == 8 ? 4 : L::kTiles;  // tiles that share masks
  constexpr int kParities = L::kTiles / kPerParity;
  PF_DYN_SMEM(char, shared);
  TC* c_tile = reinterpret_cast<TC*>(shared + L::kStages * L::kStageBytes);
  S* group_sums = reinterpret_cast<S*>(shared + L::kStages * L::kStageBytes + L::kCBytes);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_group = warp / kColumnGroups, column_group = warp % kColumnGroups;
  const int64_t slab = blockIdx.x / p.rank_blocks, column = slab * L::kColumns;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.range_rows;
  const int64_t end = begin + p.range_rows < p.m ? begin + p.range_rows : p.m;
  int first_adapter = 0, first_rank = static_cast<int>(blockIdx.x % p.rank_blocks) * L::kRanks;
  if constexpr (ADAPTERS == 1) {
    for (; first_rank >= p.adapters[first_adapter].r; ++first_adapter) {
      first_rank -= (p.adapters[first_adapter].r + L::kRanks - 1) / L::kRanks * L::kRanks;
    }
  }
  const auto adapter = [&](int i) -> const LoraReduce::Adapter& { return p.adapters[first_adapter + i]; };
  const auto ranks = [&](int i) {
    const int left = adapter(i).r - first_rank;
    return left < L::kRanks ? left : L::kRanks;
  };
  const TX* x = static_cast<const TX*>(p.x) + column;

  const auto x_tile = [&](int stage) { return reinterpret_cast<TX*>(shared + stage * L::kStageBytes); };
  const auto s_tile = [&](int stage) { return reinterpret_cast<S*>(shared + stage * L::kStageBytes + L::kXBytes); };
  const auto load = [&](int stage, int64_t row) {
    copy_tile<kThreads>(x_tile(stage), L::kStride, x + row * p.ld_x, p.ld_x, kRows, L::kColumns, end - row,
                        p.n - column, p.x_aligned, thread);
#pragma unroll
    for (int i = 0; i < ADAPTERS; ++i) {
      const int64_t r = adapter(i).r;
      copy_tile<kThreads>(s_tile(stage) + i * kRows * L::kSStride, L::kSStride,
                          static_cast<const S*>(adapter(i).s) + row * r + first_rank, r, kRows, L::kRanks, end - row,
                          ranks(i), p.s_aligned, thread);
    }
  };

  // Column of tile j of this warp within the slab: 128-column blocks of dropout, tiles 2 w + parity of 16 in each.
  const auto tile_block = [&]() { return L::kTiles == 8 ? column_group : L::kTiles == 4 ? column_group / 2 : 0; };
  const auto tile_parity = [&](int half) { return L::kTiles == 8 ? half : column_group & 1; };
  const auto tile_word = [&](int i) { return L::kTiles == 2 ? i + 2 * (column_group >> 1) : i; };
  const auto tile_column = [&](int half, int i) {
    return tile_block() * 128 + (2 * tile_word(i) + tile_parity(half)) * 16;
  };

  if constexpr (WITH_ROWS) {  // c of the slab, ranks as rows
    const TC* c = static_cast<const TC*>(p.c);
    for (int i = thread; i < L::kRanks * L::kColumns; i += kThreads) {
      const bool by_rank = p.c_rank_stride == 1;
      const int r = by_rank ? i % L::kRanks : i / L::kColumns;
      const int n = by_rank ? i / L::kRanks : i % L::kColumns;
      const bool valid = r < ranks(0) && column + n < p.n;
      c_tile[r * L::kStride + n] =
          valid ? c[(column + n) * p.c_column_stride + (first_rank + r) * p.c_rank_stride] : convert<TC>(0.0f);
    }
  }

  S sums[ADAPTERS][L::kTiles][NT][4] = {};
  const auto reduce = [&](int stage, int64_t row) {
    const TX* tile = x_tile(stage) + row_group * 16 * L::kStride;
    S row_sums[NT][4] = {};
#pragma unroll
    for (int which = 0; which < ADAPTERS; ++which) {
      const S* s_rows = s_tile(stage) + (which * kRows + row_group * 16 + lane % 4 * 2) * L::kSStride + lane / 4;
      FragmentB<T> s_fragment[NT];
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const S* at = s_rows + i * 8 * L::kSStride + n * 8;
          set_pair(s_fragment[n], i, at[0], at[L::kSStride]);
        }
      }
#pragma unroll
      for (int half = 0; half < kParities; ++half) {
        const auto products = [&](int i, const FragmentA<T>& fragment) {
          if constexpr (WITH_ROWS) {
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const FragmentB<T> b = load_b<T>(c_tile + n * 8 * L::kStride + tile_column(half, i), L::kStride, lane);
              multiply_add<kExact, T>(row_sums[n], fragment, b, p.tf32);
            }
          }
          const FragmentA<T> columns = transposed(fragment, lane);
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            multiply_add<kExact, T>(sums[which][half * kPerParity + i][n], columns, s_fragment[n], p.tf32);
          }
        };
        const TileMasks masks(WITH_ROWS ? DropoutSource{} : adapter(which).dropout, row + row_group * 16 + lane / 4,
                              column / 128 + tile_block(), tile_parity(half), lane);
#pragma unroll
        for (int i = 0; i < kPerParity; ++i) {
          FragmentA<T> fragment = load_a<T>(tile + tile_column(half, i), L::kStride, lane);
          if constexpr (L::kTiles == 2) {  // a select, not an index: masks stay in registers
            if (column_group >> 1) {
              masks.apply(fragment, i + 2);
            } else {
              masks.apply(fragment, i);
            }
          } else {
            masks.apply(fragment, i);
          }
          products(i, fragment);
        }
      }
    }
    if constexpr (WITH_ROWS) {
      S* to = group_sums + column_group * L::kGroupSums + (row_group * 16 + lane / 4) * L::kRanks + lane % 4 * 2;
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) to[i / 2 * 8 * L::kRanks + n * 8 + i % 2] = row_sums[n][i];
      }
      __syncthreads();
      const int64_t r_all = adapter(0).r;
      S* part = static_cast<S*>(p.rows_parts) + slab * p.m * r_all;
      for (int i = thread; i < L::kGroupSums; i += kThreads) {
        const int64_t m = row + i / L::kRanks;
        const int r = i % L::kRanks;
        if (m >= end || r >= ranks(0)) continue;
        S sum = group_sums[i];
#pragma unroll
        for (int group = 1; group < kColumnGroups; ++group) sum += group_sums[group * L::kGroupSums + i];
        part[m * r_all + first_rank + r] = sum;
      }
    }
  };

  const int steps = static_cast<int>((end - begin + kRows - 1) / kRows);
  for_each_step(
      L::kStages, steps, [&](int stage, int step) { load(stage, begin + step * kRows); },
      [&](int stage, int step) { reduce(stage, begin + step * kRows); });
  __syncthreads();

  // the two row groups, always in the same order
  constexpr int kAdapterSums = L::kTiles * NT * 4;
  S* slot = reinterpret_cast<S*>(shared) + column_group * L::kRowSums * 32 + lane;
  if (row_group == 1) {
#pragma unroll
    for (int i = 0; i < L::kRowSums; ++i) {
      slot[i * 32] = sums[i / kAdapterSums][i / (NT * 4) % L::kTiles][i / 4 % NT][i % 4];
    }
  }
  __syncthreads();
  if (row_group == 1) return;
#pragma unroll
  for (int i = 0; i < L::kRowSums; ++i) {
    const LoraReduce::Adapter& of = adapter(i / kAdapterSums);
    S* part = static_cast<S*>(of.columns_parts) + static_cast<int64_t>(blockIdx.y) * p.n * of.r;
    const int tile = i / (NT * 4) % L::kTiles;
    const int64_t n = column + tile_column(tile / kPerParity, tile % kPerParity) + lane / 4 + (i % 4 / 2) * 8;
    const int r = i / 4 % NT * 8 + lane % 4 * 2 + i % 2;
    if (n < p.n && r < ranks(i / kAdapterSums)) {
      part[n * of.column_stride + (first_rank + r) * of.rank_stride] =
          sums[i / kAdapterSums][tile][i / 4 % NT][i % 4] + slot[i * 32];
    }
  }
}

// Tiles of 8 ranks of a block; fp64's would not fit every GPU's shared memory.
constexpr int rank_tiles(Dtype data, int r) { return r <= 16 || data == Dtype::kFloat64 ? 2 : 4; }

// Adapters in the same block, ADAPTERS of them, or each with blocks of its own.
template <class TX, class TC, int ADAPTERS, int NT, bool WITH_ROWS>
void launch(std::span<const LoraReduce::Adapter> adapters, Arguments& p, cudaStream_t stream) {
  using L = Layout<TX, TC, ADAPTERS, NT, WITH_ROWS>;
  static_assert(L::kBytes <= kSharedLimit);
  p.rank_blocks = 0;
  p.s_aligned = true;
  for (size_t i = 0; i < adapters.size(); ++i) {
    p.adapters[i] = adapters[i];
    p.rank_blocks += divide_up_to(adapters[i].r, L::kRanks);
    p.s_aligned = p.s_aligned && rows_aligned(adapters[i].s, adapters[i].r, sizeof(typename L::S));
  }
  if (ADAPTERS > 1) p.rank_blocks = 1;
  const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(p.n, L::kColumns) * p.rank_blocks),
                  static_cast<unsigned>(divide_up_to(p.m, p.range_rows)));
  PF_LAUNCH(grid, dim3(kThreads), L::kBytes, stream, (lora_reduce_kernel<TX, TC, ADAPTERS, NT, WITH_ROWS>), p);
}

template <class TX, int NT>
constexpr int64_t slab_columns() {
  return kColumnGroups * warp_tiles<TX, NT>() * 16;
}

int64_t slab_columns_of(KernelTypes types, int r) {
  int64_t columns = 0;
  with_types(types, [&](auto of) {
    using TX = typename decltype(of)::Data;
    columns = rank_tiles(types.data, r) == 2 ? slab_columns<TX, 2>() : slab_columns<TX, 4>();
  });
  return columns;
}

}  // namespace

void launch_lora_reduce(const LoraReduce& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    Arguments p{};
    p.m = call.m;
    p.n = call.n;
    p.range_rows = call.range_rows;
    p.x = call.x.data;
    p.ld_x = call.x.ld;
    p.rows_parts = call.rows_parts;
    p.c = call.c;
    p.c_column_stride = call.c_column_stride;
    p.c_rank_stride = call.c_rank_stride;
    p.x_aligned = rows_aligned(call.x.data, call.x.ld, sizeof(TX));
    p.tf32 = call.types.allow_tf32;
    if (call.rows_parts != nullptr) {
      if constexpr (sizeof(TX) < 8) {
        if (rank_tiles(call.types.data, call.adapters[0].r) == 4) {
          return launch<TX, TC, 1, 4, true>(call.adapters, p, stream);
        }
      }
      return launch<TX, TC, 1, 2, true>(call.adapters, p, stream);
    }
    std::vector<LoraReduce::Adapter> adapters(call.adapters.begin(), call.adapters.end());
    const auto has_few = [&](const LoraReduce::Adapter& one) { return rank_tiles(call.types.data, one.r) == 2; };
    const size_t few = std::stable_partition(adapters.begin(), adapters.end(), has_few) - adapters.begin();
    const std::span<const LoraReduce::Adapter> all(adapters);
    // in fp32 and fp64 a common block gains nothing that is worth as many kernels again
    const size_t together = !is_16bit<TX> ? kMaxNeighbours : is_16bit<TC> ? kMaxAdapters : 2;
    for_each_part(all.first(few), together, [&](std::span<const LoraReduce::Adapter> part) {
      if constexpr (is_16bit<TX>) {
        if constexpr (is_16bit<TC>) {
          if (part.size() == 3) return launch<TX, TC, 3, 2, false>(part, p, stream);
        }
        if (part.size() == 2) return launch<TX, TC, 2, 2, false>(part, p, stream);
      }
      launch<TX, TC, 1, 2, false>(part, p, stream);
    });
    if constexpr (sizeof(TX) < 8) {
      for_each_part(all.subspan(few), kMaxNeighbours,
                    [&](std::span<const LoraReduce::Adapter> part) { launch<TX, TC, 1, 4, false>(part, p, stream); });
    }
  });
}

int64_t lora_slab_columns(KernelTypes types, int r) { return slab_columns_of(types, r); }

int64_t lora_range_rows(KernelTypes types, int64_t m, int64_t n, int r, bool with_rows, int multiprocessors) {
  const int64_t slabs = divide_up_to(n, slab_columns_of(types, r)) * (with_rows ? 1 : divide_up_to(r, kMaxFusedRank));
  const int64_t size = size_of(types.data), sum_size = types.data == Dtype::kFloat64 ? 8 : 4;
  // two blocks fit a multiprocessor; the parts of all ranges together stay below an eighth of x's bytes
  const int64_t filling = std::max<int64_t>(2 * multiprocessors / slabs, 1);
  const int64_t bounded = std::max<int64_t>(m * size / (8 * sum_size * r), 1);
  // no sum runs over more rows than this: a tensor core rounds down at each step, and the errors add up
  const int64_t accurate = divide_up_to(m, kMaxRangeRows);
  const int64_t ranges = std::max(std::min({filling, bounded, divide_up_to<int64_t>(m, kRows)}), accurate);
  return divide_up_to(divide_up_to(m, std::min<int64_t>(ranges, 65535)), static_cast<int64_t>(kRows)) * kRows;
}

}  // namespace pyfused
