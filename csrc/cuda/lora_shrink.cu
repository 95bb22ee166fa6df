// s = drop(x) a^T for one adapter or several: one pass over x, bound by its bytes. A block takes 64 rows; its eight
// warps are four groups of 16 rows times two that share the columns of a stage: the even and the odd tiles of 16
// columns, so that each uses all the bits of the random numbers that it makes. x and a come through cp.async in stages
// of 128 columns, dropout's block.
#include <algorithm>

#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = 64;
constexpr int kColumns = philox::kBlockColumns;

constexpr int kMaxAdapters = 3;  // of one pass

struct Arguments {
  int64_t m, k, split_columns;
  int rank_blocks;  // neighbours in the grid, so that one of them brings x to L2 for all
  const void* x;
  int64_t ld_x;
  LoraShrink::Adapter adapters[kMaxAdapters];
  bool x_aligned, a_aligned, tf32;
};

// NT: tiles of 8 ranks per adapter.
template <class TX, class TC, int ADAPTERS, int NT>
struct Layout {
  static constexpr int kStride = kColumns + kPadding;
  static constexpr int kRanks = NT * 8;
  static constexpr int kXBytes = kRows * kStride * static_cast<int>(sizeof(TX));
  static constexpr int kABytes = ADAPTERS * kRanks * kStride * static_cast<int>(sizeof(TC));
  static constexpr int kStageBytes = kXBytes + kABytes;
  static constexpr int kStages = stages_that_fit(kSharedLimit, kStageBytes, 4);
  static constexpr int kBytes = kStages * kStageBytes;
  static_assert(kABytes % 16 == 0 && kXBytes % 16 == 0);
};

template <class TX, class TC, int ADAPTERS, int NT>
__global__ void __launch_bounds__(kThreads, 1) lora_shrink_kernel(Arguments p) {
  using L = Layout<TX, TC, ADAPTERS, NT>;
  using T = Compute<TX, TC>;
  constexpr bool kExact = is_16bit<TX>;
  PF_DYN_SMEM(char, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int row_group = warp % 4, parity = warp / 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x / p.rank_blocks) * kRows;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.split_columns;
  const int64_t end = begin + p.split_columns < p.k ? begin + p.split_columns : p.k;
  const int first_rank = static_cast<int>(blockIdx.x % p.rank_blocks) * L::kRanks;
  const TX* x = static_cast<const TX*>(p.x) + row * p.ld_x;

  const auto x_tile = [&](int stage) { return reinterpret_cast<TX*>(shared + stage * L::kStageBytes); };
  const auto a_tile = [&](int stage) { return reinterpret_cast<TC*>(shared + stage * L::kStageBytes + L::kXBytes); };
  const auto load = [&](int stage, int64_t column) {
    copy_tile<kThreads>(x_tile(stage), L::kStride, x + column, p.ld_x, kRows, kColumns, p.m - row, end - column,
                        p.x_aligned, thread);
#pragma unroll
    for (int i = 0; i < ADAPTERS; ++i) {
      const LoraShrink::Adapter& adapter = p.adapters[i];
      if (adapter.r <= first_rank) continue;
      const TC* a = static_cast<const TC*>(adapter.a.data) + first_rank * adapter.a.ld + column;
      copy_tile<kThreads>(a_tile(stage) + i * L::kRanks * L::kStride, L::kStride, a, adapter.a.ld, L::kRanks, kColumns,
                          adapter.r - first_rank, end - column, p.a_aligned, thread);
    }
  };

  Sum<T> sums[ADAPTERS][NT][4] = {};
  const auto multiply = [&](int stage, int64_t column) {
    const TX* tile = x_tile(stage) + row_group * 16 * L::kStride;
#pragma unroll
    for (int i = 0; i < ADAPTERS; ++i) {
      if (p.adapters[i].r <= first_rank) continue;
      const DropoutSource& dropout = p.adapters[i].dropout;
      const TC* a = a_tile(stage) + i * L::kRanks * L::kStride;
      const auto products = [&](int w, const FragmentA<T>& fragment) {
#pragma unroll
        for (int n = 0; n < NT; ++n) {
          const FragmentB<T> b = load_b<T>(a + n * 8 * L::kStride + (2 * w + parity) * 16, L::kStride, lane);
          multiply_add<kExact, T>(sums[i][n], fragment, b, p.tf32);
        }
      };
      const TileMasks masks(dropout, row + row_group * 16 + lane / 4, column / kColumns, parity, lane);
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        FragmentA<T> fragment = load_a<T>(tile + (2 * w + parity) * 16, L::kStride, lane);
        masks.apply(fragment, w);
        products(w, fragment);
      }
    }
  };

  const int steps = static_cast<int>((end - begin + kColumns - 1) / kColumns);
  for_each_step(
      L::kStages, steps, [&](int stage, int step) { load(stage, begin + step * kColumns); },
      [&](int stage, int step) { multiply(stage, begin + step * kColumns); });
  __syncthreads();

  // the two halves of the columns, always in the same order
  Sum<T>* exchange = reinterpret_cast<Sum<T>*>(shared);
  constexpr int kSums = ADAPTERS * NT * 4;
  static_assert(4 * kSums * 32 * static_cast<int>(sizeof(Sum<T>)) <= L::kBytes);
  Sum<T>* slot = exchange + row_group * kSums * 32 + lane;
  if (parity == 1) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) slot[i * 32] = sums[i / (NT * 4)][i / 4 % NT][i % 4];
  }
  __syncthreads();
  if (parity == 1) return;
#pragma unroll
  for (int i = 0; i < kSums; ++i) {
    const LoraShrink::Adapter& adapter = p.adapters[i / (NT * 4)];
    const int64_t m = row + row_group * 16 + lane / 4 + (i % 4 / 2) * 8;
    const int r = first_rank + i / 4 % NT * 8 + lane % 4 * 2 + i % 2;
    if (m < p.m && r < adapter.r) {
      Sum<T>* part = static_cast<Sum<T>*>(adapter.parts) + static_cast<int64_t>(blockIdx.y) * p.m * adapter.r;
      const Sum<T> sum = sums[i / (NT * 4)][i / 4 % NT][i % 4] + slot[i * 32];
      part[m * adapter.r + r] = sum * static_cast<Sum<T>>(adapter.factor);
    }
  }
}

template <class TX, class TC, int ADAPTERS, int NT>
void launch(int splits, int r, Arguments& p, cudaStream_t stream) {
  using L = Layout<TX, TC, ADAPTERS, NT>;
  static_assert(L::kBytes <= kSharedLimit);
  p.rank_blocks = divide_up_to(r, L::kRanks);
  const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(p.m, kRows) * p.rank_blocks),
                  static_cast<unsigned>(splits));
  PF_LAUNCH(grid, dim3(kThreads), L::kBytes, stream, (lora_shrink_kernel<TX, TC, ADAPTERS, NT>), p);
}

// Up to r ranks each: fewer at a time where more would not fit every GPU's shared memory; blocks of their own take the
// rest.
template <class TX, class TC, int ADAPTERS>
void launch_for_rank(int splits, int r, Arguments& p, cudaStream_t stream) {
  if constexpr (ADAPTERS == 1 && is_16bit<TX> && is_16bit<TC>) {
    if (r > 32) return launch<TX, TC, ADAPTERS, 8>(splits, r, p, stream);
  }
  if constexpr (sizeof(TX) < 8 && (ADAPTERS == 1 || is_16bit<TC>)) {
    if (r > 16) return launch<TX, TC, ADAPTERS, 4>(splits, r, p, stream);
  }
  launch<TX, TC, ADAPTERS, 2>(splits, r, p, stream);
}

}  // namespace

void launch_lora_shrink(const LoraShrink& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    Arguments p{};
    p.m = call.m;
    p.k = call.k;
    p.split_columns = divide_up_to<int64_t>(divide_up_to<int64_t>(call.k, kColumns), call.splits) * kColumns;
    p.x = call.x.data;
    p.ld_x = call.x.ld;
    p.x_aligned = rows_aligned(call.x.data, call.x.ld, sizeof(TX));
    p.tf32 = call.types.allow_tf32;
    // fp32 and fp64 data gain nothing from a common pass that is worth as many kernels again
    for_each_part(call.adapters, is_16bit<TX> ? kMaxAdapters : 1, [&](std::span<const LoraShrink::Adapter> adapters) {
      int r = 0;
      p.a_aligned = true;
      for (size_t i = 0; i < adapters.size(); ++i) {
        p.adapters[i] = adapters[i];
        p.a_aligned = p.a_aligned && rows_aligned(adapters[i].a.data, adapters[i].a.ld, sizeof(TC));
        r = std::max(r, adapters[i].r);
      }
      if constexpr (is_16bit<TX>) {
        if (adapters.size() == 3) return launch_for_rank<TX, TC, 3>(call.splits, r, p, stream);
        if (adapters.size() == 2) return launch_for_rank<TX, TC, 2>(call.splits, r, p, stream);
      }
      launch_for_rank<TX, TC, 1>(call.splits, r, p, stream);
    });
  });
}

int lora_shrink_splits(int64_t m, int64_t k, int r, int multiprocessors) {
  const int64_t blocks = divide_up_to<int64_t>(m, kRows) * divide_up_to(r, 64);
  const int64_t steps = divide_up_to<int64_t>(k, kColumns);
  if (blocks * 2 > multiprocessors) return 1;
  // each split reads four stages at least, so that its loads overlap
  const int64_t wanted = std::min<int64_t>(multiprocessors / blocks, std::max<int64_t>(steps / 4, 1));
  const int64_t columns = divide_up_to<int64_t>(steps, std::clamp<int64_t>(wanted, 1, 32));
  return static_cast<int>(divide_up_to<int64_t>(steps, columns));
}

}  // namespace pyfused
