// A few rows with many adapters, both halves in one launch, see lora_decode.cu: bound by the latency of its steps. The
// table comes with the kernel's arguments; a block finds the rows of its adapter by itself, forms the whole s of 16 of
// them at a time and then updates its columns of one y. Products and their order are those of multi_lora_shrink.cu and
// multi_lora_expand.cu, to the bit: which way a row goes depends on the batch, what it gets does not.
#include "copy.cuh"
#include "multi_lora.cuh"

namespace pyfused {
namespace {

constexpr int kWarps = 16;  // one for each half of a split of the columns
constexpr int kThreads = kWarps * 32;
constexpr int kRows = 16;
constexpr int kColumns = kWarps * 16;  // of y at a time
constexpr int kStepColumns = 128;      // of x: a step of multi_lora_shrink.cu, whose halves are every other 16 columns
constexpr int kMaxBlocks = 256;        // that can have work: two for each multiprocessor of an H200, roughly

// Elements column and column + 1 of a row, zero where there are none; column is even.
template <class From>
__device__ __forceinline__ Pair<From> load_pair(const From* row, int64_t column, int64_t columns, bool aligned) {
  if (row != nullptr && aligned && column + 2 <= columns) return *reinterpret_cast<const Pair<From>*>(row + column);
  const From zero = convert<From>(0.0f);
  return {row != nullptr && column < columns ? row[column] : zero,
          row != nullptr && column + 1 < columns ? row[column + 1] : zero};
}
template <class From>
__device__ __forceinline__ bool pairs_aligned(const From* data, int64_t ld) {
  return reinterpret_cast<uintptr_t>(data) % sizeof(Pair<From>) == 0 && ld % 2 == 0;
}

// Pair i of a fragment whose pairs lie 8 columns apart.
template <class T, class Fragment, class From>
__device__ __forceinline__ void set(Fragment& fragment, int i, const Pair<From>& pair) {
  if constexpr (is_16bit<T>) {
    static_assert(std::is_same_v<T, From>);
    memcpy(&fragment.v[i], &pair, sizeof pair);
  } else {
    set_pair(fragment, i, pair.low, pair.high);
  }
}

// Ranks of an adapter that there are registers for.
constexpr int most_ranks(KernelTypes types) {
  if (types.data == Dtype::kFloat64) return 16;
  return types.data == types.adapter && types.data != Dtype::kFloat32 ? 64 : 32;
}

// NT: tiles of 8 ranks.
template <class TX, class TC, int NT>
__global__ void __launch_bounds__(kThreads, 1) multi_lora_decode_kernel(MultiLoraDecode p, int64_t block_columns) {
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kRanks = NT * 8;
  constexpr int kPlaces = (kRows * kRanks + kThreads - 1) / kThreads;  // of s, a thread's own
  [[maybe_unused]] constexpr int kAtOnce = is_16bit<T> ? 2 : 1;        // steps: as many as there are registers for
  PF_DYN_SMEM(S, partial);  // [warp][row][rank]; then s with its factor in the first of them
  int* adapter_of = reinterpret_cast<int*>(partial + kWarps * kRows * kRanks);  // [kMaxDecodeRows]
  int* own = adapter_of + kMaxDecodeRows;                                       // the adapter's rows
  unsigned* which = reinterpret_cast<unsigned*>(own + kMaxDecodeRows);          // the same as bits
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4, m = static_cast<int>(p.batch.m);

  // A block for each row; the first one of an adapter has all of its rows.
  for (int i = thread; i < p.batch.entries; i += kThreads) {
    const Entry entry = entry_at(p.batch, i);
    check(p.batch, i, entry);
    for (int64_t row = entry.begin; row < entry.end; ++row) adapter_of[row] = static_cast<int>(entry.id);
  }
  __syncthreads();
  const int first = static_cast<int>(blockIdx.y), id = adapter_of[first];
  const int64_t N = p.n[blockIdx.z];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * block_columns;
  const int64_t end = begin + block_columns < N ? begin + block_columns : N;
  if (id < 0 || begin >= end) return;
  if (thread < kMaxDecodeRows) {
    const unsigned bits = __ballot_sync(0xffffffffu, thread < m && adapter_of[thread] == id);
    if (lane == 0) which[warp] = bits;
  }
  __syncthreads();
  const uint64_t rows_of = which[0] | static_cast<uint64_t>(which[1]) << 32;
  if ((rows_of & ((uint64_t{1} << first) - 1)) != 0) return;
  if (thread < kMaxDecodeRows && (rows_of >> thread & 1) != 0) {
    const unsigned below = which[warp] & ((1u << lane) - 1u);
    own[__popc(below) + (warp == 1 ? __popc(which[0]) : 0)] = thread;
  }
  const int count = __popc(which[0]) + __popc(which[1]);
  const MultiLoraDecode::Adapter& adapter = p.adapters[blockIdx.z * p.batch.adapters + id];
  const int ranks = adapter.r;
  if (ranks == 0) return;
  __syncthreads();

  const TX* x = static_cast<const TX*>(p.x.data);
  const TC *a = static_cast<const TC*>(adapter.a), *b = static_cast<const TC*>(adapter.b);
  TX* y = static_cast<TX*>(p.out[blockIdx.z]);
  const int64_t ld_x = p.x.ld, ld_a = adapter.ld_a, ld_b = adapter.ld_b, ld_y = p.ld_out[blockIdx.z];
  const bool x_aligned = pairs_aligned(x, ld_x), a_aligned = pairs_aligned(a, ld_a), b_aligned = pairs_aligned(b, ld_b);
  const int halves = 2 * static_cast<int>((p.k + kSplitColumns - 1) / kSplitColumns);

  // b is read when s is there: it comes from memory meanwhile. Two lanes have a column.
  for (int64_t at = begin + warp * 16 + lane / 2; at < end; at += kColumns) {
    constexpr int kPer = 32 / static_cast<int>(sizeof(TC));
    for (int r = lane % 2 * kPer; r < ranks; r += 2 * kPer) prefetch_l2(b + at * ld_b + r);
  }

#pragma unroll 1
  for (int tile = 0; tile < count; tile += kRows) {
    const TX* of_x[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) of_x[i] = tile + g + 8 * i < count ? x + own[tile + g + 8 * i] * ld_x : nullptr;

    S total[kPlaces] = {};
#pragma unroll 1
    for (int half = 0; half < halves; half += kWarps) {
      S sums[NT][4] = {};
      const int64_t split = (half + warp) / 2 * static_cast<int64_t>(kSplitColumns);
      const int64_t split_end = split + kSplitColumns < p.k ? split + kSplitColumns : p.k;
#pragma unroll kAtOnce
      for (int64_t step = split; step < split_end; step += kStepColumns) {
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          const int64_t column = step + (2 * w + warp % 2) * 16 + 2 * t;
          FragmentA<T> rows;
#pragma unroll
          for (int i = 0; i < 4; ++i) set<T>(rows, i, load_pair(of_x[i & 1], column + (i >> 1) * 8, p.k, x_aligned));
#pragma unroll
          for (int n = 0; n < NT; ++n) {
            if (n * 8 >= ranks) continue;
            const TC* of_a = n * 8 + g < ranks ? a + (n * 8 + g) * ld_a : nullptr;
            FragmentB<T> columns;
#pragma unroll
            for (int i = 0; i < 2; ++i) set<T>(columns, i, load_pair(of_a, column + i * 8, p.k, a_aligned));
            multiply_add<is_16bit<TX>, T>(sums[n], rows, columns, false);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < NT * 4; ++i) {
        partial[(warp * kRows + g + i % 4 / 2 * 8) * kRanks + i / 4 * 8 + 2 * t + i % 2] = sums[i / 4][i % 4];
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < kPlaces; ++j) {
        const int place = thread + j * kThreads;
        if (place >= kRows * kRanks) continue;
        for (int other = 0; other < kWarps && half + other < halves; other += 2) {
          const S* two = partial + other * kRows * kRanks + place;
          total[j] += two[0] + two[kRows * kRanks];
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int j = 0; j < kPlaces; ++j) {
      const int place = thread + j * kThreads;
      if (place < kRows * kRanks) partial[place] = total[j] * static_cast<S>(adapter.scale);
    }
    __syncthreads();

    // a warp has two tiles of 8 columns
    for (int64_t column = begin + warp * 16; column < end; column += kColumns) {
      TX* of_y[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int row = tile + g + 8 * i;
        of_y[i] = row < count ? y + own[row] * ld_y + column + 2 * t : nullptr;
      }
      const auto inside = [&](int i) { return of_y[i % 4 / 2] != nullptr && column + i / 4 * 8 + 2 * t + i % 2 < end; };
      S updates[2][4] = {}, before[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // on their way together with b
        before[i] = inside(i) ? convert<S>(of_y[i % 4 / 2][i / 4 * 8 + i % 2]) : S(0);
      }
      for (int r = 0; r < ranks; r += 16) {
        FragmentA<T> rows;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int rank = r + 2 * t + (i >> 1) * 8;
          const S* from = partial + (g + (i & 1) * 8) * kRanks + rank;
          // beyond the adapter's ranks an infinity of x has made NaN of the zeros in place of a
          set_pair(rows, i, rank < ranks ? from[0] : S(0), rank + 1 < ranks ? from[1] : S(0));
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int64_t at = column + n * 8 + g;
          const TC* of_b = at < N ? b + at * ld_b : nullptr;
          FragmentB<T> columns;
#pragma unroll
          for (int i = 0; i < 2; ++i) set<T>(columns, i, load_pair(of_b, r + 2 * t + i * 8, ranks, b_aligned));
          multiply_add<false, T>(updates[n], rows, columns, false);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        if (inside(i)) of_y[i % 4 / 2][i / 4 * 8 + i % 2] = convert<TX>(before[i] + updates[i / 4][i % 4]);
      }
    }
    __syncthreads();  // s is read until here
  }
}

template <class TX, class TC, int NT>
void launch(const MultiLoraDecode& call, cudaStream_t stream) {
  constexpr int kBytes = kWarps * kRows * NT * 8 * static_cast<int>(sizeof(Sum<Compute<TX, TC>>)) +
                         (2 * kMaxDecodeRows + 2) * static_cast<int>(sizeof(int));
  static_assert(kBytes <= kSharedLimit);
  const int64_t steps = divide_up_to<int64_t>(*std::max_element(call.n, call.n + call.slices), kColumns);
  const int64_t most = std::max<int64_t>(kMaxBlocks / (call.batch.m * call.slices), 1);
  const int64_t block_columns = divide_up_to(steps, std::min(steps, most)) * kColumns;
  const dim3 grid(static_cast<unsigned>(divide_up_to(steps * kColumns, block_columns)),
                  static_cast<unsigned>(call.batch.m), static_cast<unsigned>(call.slices));
  PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (multi_lora_decode_kernel<TX, TC, NT>), call, block_columns);
}

}  // namespace

bool multi_lora_decode_fits(KernelTypes types, int64_t m, int64_t k, int64_t entries, int64_t descriptors, int slices,
                            int max_rank) {
  // every block reads all of its adapter's a: beyond these sizes passes that share the work are faster, by the byte
  // model in docs/performance-cuda.md (not measured)
  return m <= kMaxDecodeRows && entries <= kMaxDecodeRows && descriptors <= kMaxDecodeAdapters &&
         slices <= kMaxSlices && max_rank <= most_ranks(types) && k * max_rank * size_of(types.adapter) <= 512 * 1024;
}

void launch_multi_lora_decode(const MultiLoraDecode& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    int max_rank = 0;
    for (const MultiLoraDecode::Adapter& adapter : call.adapters) max_rank = std::max(max_rank, adapter.r);
    constexpr int kMost = most_ranks({dtype_v<TX>, dtype_v<TC>, false}) / 8;
    if (max_rank <= 16) return launch<TX, TC, 2>(call, stream);
    launch<TX, TC, kMost>(call, stream);
  });
}

}  // namespace pyfused
