// A few rows, both halves in one launch: bound by the latency of its steps, not by bytes. A block has 16 rows and makes
// the whole s of them for itself - a is read from L2, its eight warps share the columns of x - and then updates 128
// columns of one adapter's y.
#include <algorithm>
#include <vector>

#include "dispatch.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRows = 16;
constexpr int kMaxRows = 64;
constexpr int kMaxBlocks = 256;  // with more than kRows rows: two for each multiprocessor of an H200, roughly
constexpr int kColumns = 128;
constexpr int kMaxRanks = 64;
constexpr int kMaxAdapters = 8;  // of one launch

struct Arguments {
  int64_t m, k;
  ConstRows x;
  LoraDecode::Adapter adapters[kMaxAdapters];
  bool x_aligned, a_aligned, tf32;
};

// Eight neighbouring elements of a row, zero where there are none.
template <class From>
struct alignas(16) Eight {
  From v[8];
};
template <class From>
__device__ __forceinline__ Eight<From> load_eight(const From* row, int64_t column, int64_t columns, bool exists,
                                                  bool aligned) {
  Eight<From> out;
  if (exists && aligned && column + 8 <= columns) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(out) / 16); ++i) {
      reinterpret_cast<uint4*>(out.v)[i] = reinterpret_cast<const uint4*>(row + column)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out.v[i] = exists && column + i < columns ? row[column + i] : convert<From>(0.0f);
    }
  }
  return out;
}

// NT: tiles of 8 ranks.
template <class TX, class TC, int NT>
__global__ void __launch_bounds__(kThreads, 1) lora_decode_kernel(Arguments p) {
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kRanks = NT * 8;
  PF_DYN_SMEM(S, partial);  // [warp][row][rank]; then s with its factor in the first of them
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kRows, rows_left = p.m - first_row;
  const LoraDecode::Adapter& adapter = p.adapters[blockIdx.z];
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kColumns;
  if (first_column >= adapter.n) return;  // others have more columns

  // b is read when s is there: it comes from memory meanwhile. Two lanes have a column.
  const int ranks = adapter.r;
  const int64_t column = first_column + warp * 16;  // a warp has two tiles of 8
  const TC* b = static_cast<const TC*>(adapter.b);
  if (column + lane / 2 < adapter.n) {
    constexpr int kPer = 32 / static_cast<int>(sizeof(TC));
    const TC* of_b = b + (column + lane / 2) * adapter.b_row_stride;
    for (int r = lane % 2 * kPer; r < ranks; r += 2 * kPer) prefetch_l2(of_b + r);
  }

  S sums[NT][4] = {};
  const int64_t ld_x = p.x.ld, ld_a = adapter.a.ld;
  const TX* x = static_cast<const TX*>(p.x.data) + first_row * ld_x;
  const TC* a = static_cast<const TC*>(adapter.a.data);
  for (int64_t k = warp * 32; k < p.k; k += kWarps * 32) {
    // the order of k within these 32 is the same for both operands, so any order will do: eight neighbours per lane
    const int64_t first = k + 8 * t;
    const Eight<TX> low = load_eight(x + g * ld_x, first, p.k, g < rows_left, p.x_aligned);
    const Eight<TX> high = load_eight(x + (g + 8) * ld_x, first, p.k, g + 8 < rows_left, p.x_aligned);
    FragmentA<T> rows[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Eight<TX>& from = i & 1 ? high : low;
      set_pair(rows[0], i, convert<S>(from.v[(i >> 1) * 2]), convert<S>(from.v[(i >> 1) * 2 + 1]));
      set_pair(rows[1], i, convert<S>(from.v[4 + (i >> 1) * 2]), convert<S>(from.v[4 + (i >> 1) * 2 + 1]));
    }
#pragma unroll
    for (int n = 0; n < NT; ++n) {
      const int rank = n * 8 + g;
      const Eight<TC> from = load_eight(a + rank * ld_a, first, p.k, rank < ranks, p.a_aligned);
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        FragmentB<T> b;
        set_pair(b, 0, convert<S>(from.v[4 * i]), convert<S>(from.v[4 * i + 1]));
        set_pair(b, 1, convert<S>(from.v[4 * i + 2]), convert<S>(from.v[4 * i + 3]));
        multiply_add<is_16bit<TX>, T>(sums[n], rows[i], b, p.tf32);
      }
    }
  }
#pragma unroll
  for (int n = 0; n < NT; ++n) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partial[(warp * kRows + g + i / 2 * 8) * kRanks + n * 8 + 2 * t + i % 2] = sums[n][i];
    }
  }
  __syncthreads();
  for (int i = thread; i < kRows * kRanks; i += kThreads) {
    const int m = i / kRanks, r = i % kRanks;
    S sum = partial[i];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += partial[other * kRows * kRanks + i];
    S scale = static_cast<S>(adapter.factor);
    if (r < ranks && m < rows_left) {
      if (blockIdx.x == 0) static_cast<S*>(adapter.s)[(first_row + m) * ranks + r] = sum;
      if (adapter.vector.data != nullptr) scale *= load_as<S>(adapter.vector, r);
    }
    partial[i] = sum * scale;
  }
  __syncthreads();

  S updates[2][4] = {}, before[2][4];
#pragma unroll
  for (int i = 0; i < 8; ++i) {  // on their way together with b
    const int64_t m = first_row + g + i % 4 / 2 * 8, n = column + i / 4 * 8 + 2 * t + i % 2;
    const TX* source = static_cast<const TX*>(adapter.source.data) + m * adapter.source.ld + n;
    before[i / 4][i % 4] = m < p.m && n < adapter.n ? convert<S>(*source) : S(0);
  }
#pragma unroll
  for (int r = 0; r < kRanks; r += 16) {
    FragmentA<T> rows;
    FragmentB<T> columns[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int rank = r + 2 * t + (i >> 1) * 8;
      const S* from = partial + (g + (i & 1) * 8) * kRanks + rank;
      // beyond the last rank an infinity of x has made NaN of the zeros in place of a
      set_pair(rows, i, rank < ranks ? from[0] : S(0), rank + 1 < ranks ? from[1] : S(0));
    }
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      const int64_t n = column + tile * 8 + g;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int rank = r + 2 * t + i * 8;
        const TC* from = b + n * adapter.b_row_stride + rank;
        const S low = n < adapter.n && rank < ranks ? convert<S>(from[0]) : S(0);
        const S high = n < adapter.n && rank + 1 < ranks ? convert<S>(from[1]) : S(0);
        set_pair(columns[tile], i, low, high);
      }
      multiply_add<false, T>(updates[tile], rows, columns[tile], p.tf32);
    }
  }
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t m = first_row + g + i / 2 * 8, n = column + tile * 8 + 2 * t + i % 2;
      if (m >= p.m || n >= adapter.n) continue;
      static_cast<TX*>(adapter.out)[m * adapter.ld_out + n] = convert<TX>(before[tile][i] + updates[tile][i]);
    }
  }
}

template <class TX, class TC, int NT>
void launch(std::span<const LoraDecode::Adapter> adapters, Arguments& p, cudaStream_t stream) {
  constexpr int kBytes = kWarps * kRows * NT * 8 * static_cast<int>(sizeof(Sum<Compute<TX, TC>>));
  int64_t n = 0;
  p.a_aligned = true;
  for (size_t i = 0; i < adapters.size(); ++i) {
    p.adapters[i] = adapters[i];
    p.a_aligned = p.a_aligned && rows_aligned(adapters[i].a.data, adapters[i].a.ld, sizeof(TC));
    n = std::max(n, adapters[i].n);
  }
  const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(n, kColumns)),
                  static_cast<unsigned>(divide_up_to<int64_t>(p.m, kRows)), static_cast<unsigned>(adapters.size()));
  PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_decode_kernel<TX, TC, NT>), p);
}

}  // namespace

bool lora_decode_fits(KernelTypes types, int64_t m, int64_t k, int64_t n, int r) {
  // every block reads all of a and its rows of x: beyond these sizes two launches that share the work are faster, by
  // the byte model in docs/performance-cuda.md (not measured)
  const int64_t row_blocks = divide_up_to<int64_t>(m, kRows), blocks = row_blocks * divide_up_to<int64_t>(n, kColumns);
  return m <= kMaxRows && r <= kMaxRanks && k * r * size_of(types.adapter) <= 512 * 1024 &&
         (row_blocks == 1 || blocks <= kMaxBlocks);
}

void launch_lora_decode(const LoraDecode& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    Arguments p{};
    p.m = call.m;
    p.k = call.k;
    p.x = call.x;
    p.x_aligned = rows_aligned(call.x.data, call.x.ld, sizeof(TX));
    p.tf32 = call.types.allow_tf32;
    std::vector<LoraDecode::Adapter> adapters(call.adapters.begin(), call.adapters.end());
    const auto has_few = [](const LoraDecode::Adapter& adapter) { return adapter.r <= 16; };
    const size_t few = std::stable_partition(adapters.begin(), adapters.end(), has_few) - adapters.begin();
    const std::span<const LoraDecode::Adapter> all(adapters);
    for_each_part(all.first(few), kMaxAdapters, [&](auto part) { launch<TX, TC, 2>(part, p, stream); });
    for_each_part(all.subspan(few), kMaxAdapters, [&](auto part) { launch<TX, TC, 8>(part, p, stream); });
  });
}

}  // namespace pyfused
