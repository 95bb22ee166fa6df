// The passes of the bottleneck around the vendor's products. Those over rows of D are bound by bytes: a warp has 8 rows
// of 128 columns at a time, dropout's block, and a lane eight neighbours of each 32 columns of a row, so that all words
// of its random numbers are used and loads and stores are of 16 bytes.
#include <algorithm>

#include "activation.cuh"
#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kStepRows = 8 * kWarps;
constexpr int kColumns = philox::kBlockColumns;
constexpr int64_t kMaxRangeRows = 512;  // of which a thread adds 64 at most: few digits are lost in fp32

template <class TU, class T>
__global__ void __launch_bounds__(kThreads) bottleneck_columns_kernel(BottleneckColumns p, bool aligned) {
  using S = Sum<T>;
  PF_DYN_SMEM(S, shared);  // [scale, bias][column], then [warp][column]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.range_rows;
  const int64_t end = begin + p.range_rows < p.rows ? begin + p.range_rows : p.rows;
  S* scale = shared;
  S* bias = shared + kColumns;
  if (threadIdx.x < kColumns) {
    const int64_t d = column + threadIdx.x;
    scale[threadIdx.x] = d < p.columns ? scale_at<S>(p.scale, d) : S(0);
    bias[threadIdx.x] = d < p.columns && p.bias.data != nullptr ? load_as<S>(p.bias, d) * scale[threadIdx.x] : S(0);
  }
  __syncthreads();

  S sums[32] = {};
  for (int64_t row = begin + warp * 8 + g; row < end; row += kStepRows) {
    uint32_t keep[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.dropout.threshold != 0) {
        keep_masks(keep[i], static_cast<uint64_t>(__ldg(p.dropout.seed)), p.dropout.threshold, row, blockIdx.x,
                   4 * t + i);
      }
    }
#pragma unroll
    for (int first = 0; first < 4; first += 2) {
      TU u[2][8];  // two words' under way before the first of them is waited for
      T others[2][8];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int64_t d = column + 32 * (first + j) + 8 * t, valid = p.columns - d;
        load_run(u[j], static_cast<const TU*>(p.u.data) + row * p.u.ld + d, valid, aligned);
        if (p.residual.data == nullptr) continue;
        load_run(others[j], static_cast<const T*>(p.residual.data) + row * p.residual.ld + d, valid, aligned);
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int w = first + j, within = 32 * w + 8 * t;
        const int64_t d = column + within, valid = p.columns - d;
        S values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = convert<S>(u[j][i]) * scale[within + i] + bias[within + i];
          if (p.dropout.threshold != 0 && !(keep[i / 2][w] >> (i % 2 * 16) & 1u)) values[i] = S(0);
          sums[8 * w + i] += values[i];
        }
        if (p.out == nullptr || valid <= 0) continue;
        if (p.residual.data != nullptr) {
#pragma unroll
          for (int i = 0; i < 8; ++i) values[i] += convert<S>(others[j][i]);
        }
        store_run(values, static_cast<T*>(p.out) + row * p.columns + d, valid, aligned);
      }
    }
  }

  if (p.parts == nullptr) return;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    S sum = sums[i];
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (g == 0) shared[warp * kColumns + i / 8 * 32 + 8 * t + i % 8] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kColumns && column + threadIdx.x < p.columns) {
    S sum = shared[threadIdx.x];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += shared[other * kColumns + threadIdx.x];
    static_cast<S*>(p.parts)[static_cast<int64_t>(blockIdx.y) * p.columns + column + threadIdx.x] = sum;
  }
}

template <class P>
__global__ void __launch_bounds__(kThreads) bottleneck_middle_kernel(BottleneckMiddle p, bool aligned) {
  using S = Sum<P>;
  constexpr int N = 16 / sizeof(P), kTile = 32 * N;
  PF_DYN_SMEM(S, exchange);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_column = static_cast<int64_t>(blockIdx.x) * kTile, column = first_column + lane * N;
  const int64_t valid = p.columns - column;
  const int64_t begin = static_cast<int64_t>(blockIdx.y) * p.range_rows;
  const int64_t end = begin + p.range_rows < p.rows ? begin + p.range_rows : p.rows;
  const S h_scale = scale_at<S>(p.h_scale, 0), dz_scale = scale_at<S>(p.dz_scale, 0);
  S sums[N] = {};
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    const int64_t at = row * p.columns + column;
    S z[N], gradient[N] = {};
    load_run(z, static_cast<const P*>(p.z) + at, valid, aligned);
    if (p.dz != nullptr) load_run(gradient, static_cast<const P*>(p.dh) + at, valid, aligned);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      S slope;
      z[i] = activate_at(p.activation, z[i], slope) * h_scale;
      gradient[i] *= dz_scale * slope;
      if (i < valid) sums[i] += gradient[i];
    }
    if (p.h != nullptr) store_run(z, static_cast<P*>(p.h) + at, valid, aligned);
    if (p.dz != nullptr) store_run(gradient, static_cast<P*>(p.dz) + at, valid, aligned);
  }
  if (p.parts == nullptr) return;
#pragma unroll
  for (int i = 0; i < N; ++i) exchange[warp * kTile + lane * N + i] = sums[i];
  __syncthreads();
  for (int i = threadIdx.x; i < kTile && first_column + i < p.columns; i += kThreads) {
    S sum = exchange[i];
#pragma unroll
    for (int other = 1; other < kWarps; ++other) sum += exchange[other * kTile + i];
    static_cast<S*>(p.parts)[static_cast<int64_t>(blockIdx.y) * p.columns + first_column + i] = sum;
  }
}

// A warp has one row of raw.
template <class S>
__global__ void __launch_bounds__(kThreads) bottleneck_dots_kernel(BottleneckScaleGradient p) {
  const int lane = threadIdx.x % 32;
  const int64_t d = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (d >= p.width) return;
  double dot = 0;
  for (int64_t j = lane; j < p.hidden; j += 32) {
    dot += load_as<double>(p.w, p.weight, d * p.hidden + j) *
           static_cast<double>(static_cast<const S*>(p.raw)[d * p.hidden + j]);
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, lanes);
  if (lane != 0) return;
  if (p.bias.data != nullptr) dot += load_as<double>(p.bias, d) * static_cast<double>(static_cast<const S*>(p.sums)[d]);
  if (p.size == 1) {
    static_cast<double*>(p.dots)[d] = dot;
  } else {
    store_as<double>(p.out, p.out_dtype, d, dot * p.factor);
  }
}

// One block: each thread's dots, then the threads in a tree, the same order in every run.
__global__ void __launch_bounds__(kThreads) bottleneck_sum_dots_kernel(BottleneckScaleGradient p) {
  PF_DYN_SMEM(double, partial);
  double sum = 0;
  for (int64_t d = threadIdx.x; d < p.width; d += kThreads) sum += static_cast<const double*>(p.dots)[d];
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) store_as<double>(p.out, p.out_dtype, 0, partial[0] * p.factor);
}

dim3 grid_of(int64_t rows, int64_t range_rows, int64_t columns, int64_t tile) {
  return dim3(static_cast<unsigned>(divide_up_to(columns, tile)),
              static_cast<unsigned>(divide_up_to(rows, range_rows)));
}

}  // namespace

void launch_bottleneck_columns(const BottleneckColumns& call, cudaStream_t stream) {
  const auto launch = [&](auto source, auto target) {
    using TU = decltype(source);
    using T = decltype(target);
    const bool aligned =
        rows_aligned(call.u.data, call.u.ld, sizeof(TU)) &&
        (call.residual.data == nullptr || rows_aligned(call.residual.data, call.residual.ld, sizeof(T))) &&
        (call.out == nullptr || rows_aligned(call.out, call.columns, sizeof(T)));
    constexpr int kBytes = kWarps * kColumns * static_cast<int>(sizeof(Sum<T>));
    PF_LAUNCH(grid_of(call.rows, call.range_rows, call.columns, kColumns), dim3(kThreads), kBytes, stream,
              (bottleneck_columns_kernel<TU, T>), call, aligned);
  };
  with_dtype(call.source, [&](auto source) {
    using TU = decltype(source);
    if (call.source == call.target) return launch(source, source);
    if constexpr (is_16bit<TU>) {
      if (call.target == Dtype::kFloat32) return launch(source, float{});
    } else if constexpr (std::is_same_v<TU, float>) {
      if (call.target == Dtype::kBFloat16) return launch(source, bf16{});
      if (call.target == Dtype::kFloat16) return launch(source, fp16{});
    }
    throw std::runtime_error("pyfused: no kernel for these types");
  });
}

void launch_bottleneck_middle(const BottleneckMiddle& call, cudaStream_t stream) {
  with_dtype(call.dtype, [&](auto zero) {
    using P = decltype(zero);
    constexpr int kTile = 32 * 16 / sizeof(P);
    const auto aligned = [&](const void* data) {
      return data == nullptr || rows_aligned(data, call.columns, sizeof(P));
    };
    PF_LAUNCH(grid_of(call.rows, call.range_rows, call.columns, kTile), dim3(kThreads),
              kWarps * kTile * static_cast<int>(sizeof(Sum<P>)), stream, (bottleneck_middle_kernel<P>), call,
              aligned(call.z) && aligned(call.dh) && aligned(call.h) && aligned(call.dz));
  });
}

int64_t bottleneck_range_rows(int64_t rows, int64_t columns, int multiprocessors) {
  const int64_t filling = std::max<int64_t>(4 * multiprocessors / divide_up_to<int64_t>(columns, kColumns), 1);
  const int64_t ranges =
      std::max(std::min(filling, divide_up_to<int64_t>(rows, kStepRows)), divide_up_to(rows, kMaxRangeRows));
  return divide_up_to(divide_up_to(rows, std::min<int64_t>(ranges, 65535)), int64_t{kStepRows}) * kStepRows;
}

void launch_bottleneck_scale_gradient(const BottleneckScaleGradient& call, bool is_double, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.width, kWarps)));
  if (is_double) {
    PF_LAUNCH(grid, dim3(kThreads), 0, stream, (bottleneck_dots_kernel<double>), call);
  } else {
    PF_LAUNCH(grid, dim3(kThreads), 0, stream, (bottleneck_dots_kernel<float>), call);
  }
  if (call.size != 1) return;
  PF_LAUNCH(dim3(1), dim3(kThreads), kThreads * static_cast<int>(sizeof(double)), stream, bottleneck_sum_dots_kernel,
            call);
}

}  // namespace pyfused
