// IA3's passes, one multiplication per element and bound by bytes: each thread has 16 bytes of a row at a time, of
// several rows before it works on the first.
#include <algorithm>

#include "copy.cuh"
#include "dispatch.cuh"
#include "ia3.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsAtOnce = 4;
constexpr int64_t kMinRangeRows = 64;   // parts are a sixteenth of 16-bit data at most
constexpr int64_t kMaxRangeRows = 512;  // of which a thread adds 64: few digits are lost in fp32
constexpr int64_t kRunColumns = 4096;

template <class T>
constexpr int kRun = 16 / sizeof(T);  // elements of a thread
template <class T>
constexpr int kTileColumns = 32 * kRun<T>;

struct ColumnArguments {
  int64_t rows, columns, range_rows;
  const void* source;
  int64_t ld_source;
  const void* z;
  int64_t ld_z;
  ConstVector scale, shift;
  void* out;
  void* parts;
  bool aligned;
};

template <class T, bool SUMS>
__global__ void __launch_bounds__(kThreads) ia3_columns_kernel(ColumnArguments p) {
  using S = Sum<T>;
  constexpr int N = kRun<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTileColumns<T> + lane * N;
  const int64_t valid = p.columns - column;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.range_rows;
  const int64_t end = begin + p.range_rows < p.rows ? begin + p.range_rows : p.rows;
  const T* source = static_cast<const T*>(p.source);

  S scale[N], shift[N], sums[N] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    scale[i] = i < valid ? load_as<S>(p.scale, column + i) : S(0);
    shift[i] = i < valid && p.shift.data != nullptr ? load_as<S>(p.shift, column + i) : S(0);
  }
  for (int64_t first = begin + warp; first < end; first += kWarps * kRowsAtOnce) {
    S values[kRowsAtOnce][N], others[SUMS ? kRowsAtOnce : 1][N];
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = first + j * kWarps, here = row < end ? valid : 0;
      load_run(values[j], source + row * p.ld_source + column, here, p.aligned);
      if constexpr (SUMS) {
        load_run(others[j], static_cast<const T*>(p.z) + row * p.ld_z + column, here, p.aligned);
      }
    }
#pragma unroll
    for (int j = 0; j < kRowsAtOnce; ++j) {
      const int64_t row = first + j * kWarps;
      if (row >= end) break;
      S results[N];
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if constexpr (SUMS) {
          sums[i] += values[j][i] * (others[j][i] + shift[i]);
          results[i] = values[j][i] * scale[i];
        } else {
          results[i] = (values[j][i] + shift[i]) * scale[i];
        }
      }
      if (p.out != nullptr) {
        store_run(results, static_cast<T*>(p.out) + row * p.columns + column, valid, p.aligned);
      }
    }
  }

  if constexpr (SUMS) {  // the warps, always in the same order
    PF_DYN_SMEM(S, exchange);
#pragma unroll
    for (int i = 0; i < N; ++i) exchange[warp * kTileColumns<T> + lane * N + i] = sums[i];
    __syncthreads();
    const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTileColumns<T>;
    S* part = static_cast<S*>(p.parts) + static_cast<int64_t>(blockIdx.y) * p.columns + first_column;
    for (int i = threadIdx.x; i < kTileColumns<T> && first_column + i < p.columns; i += kThreads) {
      S sum = exchange[i];
#pragma unroll
      for (int other = 1; other < kWarps; ++other) sum += exchange[other * kTileColumns<T> + i];
      part[i] = sum;
    }
  }
}

struct RowArguments {
  int64_t rows, columns, period, run_columns;
  const void* source;
  const void* z;
  ConstVector scale;
  void* out;
  void* parts;
  bool aligned;
};

// A warp has a run of one row.
template <class T, bool SUMS>
__global__ void __launch_bounds__(kThreads) ia3_rows_kernel(RowArguments p) {
  using S = Sum<T>;
  constexpr int N = kRun<T>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (row >= p.rows) return;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.run_columns;
  const int64_t end = begin + p.run_columns < p.columns ? begin + p.run_columns : p.columns;
  const S scale = load_as<S>(p.scale, row % p.period);
  S sum = 0;
#pragma unroll 2
  for (int64_t column = begin + lane * N; column < end; column += kTileColumns<T>) {
    S values[N], others[N];
    const int64_t at = row * p.columns + column;
    load_run(values, static_cast<const T*>(p.source) + at, end - column, p.aligned);
    if constexpr (SUMS) {
      load_run(others, static_cast<const T*>(p.z) + at, end - column, p.aligned);
#pragma unroll
      for (int i = 0; i < N; ++i) sum += values[i] * others[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] *= scale;
    if (p.out != nullptr) store_run(values, static_cast<T*>(p.out) + at, end - column, p.aligned);
  }
  if constexpr (SUMS) {
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (lane == 0) static_cast<S*>(p.parts)[static_cast<int64_t>(blockIdx.y) * p.rows + row] = sum;
  }
}

int64_t run_of(Dtype dtype) { return 16 / size_of(dtype); }

}  // namespace

void launch_ia3_columns(const Ia3Columns& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  with_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto aligned = [](const void* data, int64_t ld) {
      return data == nullptr || rows_aligned(data, ld, sizeof(T));
    };
    ColumnArguments p{};
    p.rows = call.rows;
    p.columns = call.columns;
    p.range_rows = call.range_rows;
    p.source = call.source.data;
    p.ld_source = call.source.ld;
    p.z = call.z.data;
    p.ld_z = call.z.ld;
    p.scale = call.scale;
    p.shift = call.shift;
    p.out = call.out;
    p.parts = call.parts;
    p.aligned = aligned(p.source, p.ld_source) && aligned(p.z, p.ld_z) && aligned(p.out, p.columns);
    const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.columns, kTileColumns<T>)),
                    static_cast<unsigned>(divide_up_to(call.rows, call.range_rows)));
    if (call.parts != nullptr) {
      constexpr int kBytes = kWarps * kTileColumns<T> * static_cast<int>(sizeof(Sum<T>));
      PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (ia3_columns_kernel<T, true>), p);
    } else {
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (ia3_columns_kernel<T, false>), p);
    }
  });
}

int64_t ia3_range_rows(Dtype dtype, int64_t rows, int64_t columns, int multiprocessors) {
  if (rows == 0 || columns == 0) return 1;
  const int64_t tiles = divide_up_to<int64_t>(columns, 32 * run_of(dtype));
  const int64_t filling = std::max<int64_t>(8 * multiprocessors / tiles, 1);
  const int64_t ranges =
      std::max(std::min(filling, divide_up_to(rows, kMinRangeRows)), divide_up_to(rows, kMaxRangeRows));
  return divide_up_to(rows, std::min<int64_t>(ranges, 65535));
}

void launch_ia3_rows(const Ia3Rows& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  with_dtype(call.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto aligned = [&](const void* data) {
      return data == nullptr || rows_aligned(data, call.columns, sizeof(T));
    };
    RowArguments p{};
    p.rows = call.rows;
    p.columns = call.columns;
    p.period = call.period;
    p.run_columns = call.run_columns;
    p.source = call.source;
    p.z = call.z;
    p.scale = call.scale;
    p.out = call.out;
    p.parts = call.parts;
    p.aligned = aligned(p.source) && aligned(p.z) && aligned(p.out);
    const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.rows, kWarps)),
                    static_cast<unsigned>(divide_up_to(call.columns, call.run_columns)));
    if (call.parts != nullptr) {
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (ia3_rows_kernel<T, true>), p);
    } else {
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (ia3_rows_kernel<T, false>), p);
    }
  });
}

int64_t ia3_run_columns(int64_t columns) {
  const int64_t runs = std::clamp<int64_t>(divide_up_to(columns, kRunColumns), 1, 65535);
  return divide_up_to(divide_up_to(columns, runs), int64_t{8}) * 8;
}

}  // namespace pyfused
