// A block's share of a base product by mma.sync, in bf16 or fp16: 128 x 128 of out, 32 of the contraction at a time.
// Each of its four warps has 32 rows. The right operand comes as [columns, contraction] or, transposed, as
// [contraction, columns].
#pragma once

#include "copy.cuh"
#include "dropout.cuh"

namespace pyfused {

template <class T, bool transposed>
struct LinearBlock {
  static constexpr int kThreads = 128;
  static constexpr int kRows = 128;
  static constexpr int kColumns = philox::kBlockColumns;
  static constexpr int kWarpRows = 32;
  static constexpr int kTiles = kColumns / 8;
  static constexpr int kInner = 32;
  static constexpr int kStages = 3;
  static constexpr int kStride = kInner + kPadding;
  static constexpr int kWideStride = kColumns + kPadding;
  static constexpr int kLeft = kRows * kStride;  // elements of a stage
  static constexpr int kStage = kLeft + (transposed ? kInner * kWideStride : kColumns * kStride);
  static constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static_assert(kThreads / 32 * kWarpRows == kRows && kRows * kWideStride <= kStages * kStage &&
                kBytes <= kSharedLimit);
  static dim3 grid(int64_t m, int64_t n) {
    return dim3(static_cast<unsigned>(divide_up_to<int64_t>(m, kRows)),
                static_cast<unsigned>(divide_up_to<int64_t>(n, kColumns)));
  }
  // Of a thread: sums[i][tile] for rows 16 i of its warp's and columns 8 tile, as fragments.cuh has them.
  using Sums = float[2][kTiles][4];

  // Columns first, ..., `valid` of them, of left from `row` on and the same of right from `column` on. M x N is out.
  static __device__ __forceinline__ void load(T* stage, ConstRows left, ConstRows right, bool left_aligned,
                                              bool right_aligned, int64_t row, int64_t column, int64_t m, int64_t n,
                                              int64_t first, int64_t valid, int thread) {
    copy_tile<kThreads>(stage, kStride, static_cast<const T*>(left.data) + row * left.ld + first, left.ld, kRows,
                        kInner, m - row, valid, left_aligned, thread);
    const T* from = static_cast<const T*>(right.data);
    if constexpr (transposed) {
      copy_tile<kThreads>(stage + kLeft, kWideStride, from + first * right.ld + column, right.ld, kInner, kColumns,
                          valid, n - column, right_aligned, thread);
    } else {
      copy_tile<kThreads>(stage + kLeft, kStride, from + column * right.ld + first, right.ld, kColumns, kInner,
                          n - column, valid, right_aligned, thread);
    }
  }

  static __device__ __forceinline__ void multiply(Sums& sums, const T* stage, int64_t valid, int thread) {
    const int lane = thread % 32;
    const T* left = stage + thread / 32 * kWarpRows * kStride;
    const T* right = stage + kLeft;
#pragma unroll
    for (int k = 0; k < kInner; k += 16) {
      if (k >= valid) break;
      const FragmentA<T> a[2] = {load_a<T>(left + k, kStride, lane), load_a<T>(left + 16 * kStride + k, kStride, lane)};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        FragmentB<T> b;
        if constexpr (transposed) {
          b = load_b_transposed(right + k * kWideStride + tile * 8, kWideStride, lane);
        } else {
          b = load_b<T>(right + tile * 8 * kStride + k, kStride, lane);
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) mma_m16n8k16<T>(sums[i][tile], a[i].v, b.v);
      }
    }
  }

  // Stores the warp's rows of out [m, n], `row` and `column` being the block's first: of(a column within the
  // block)(sum) for each of the sums. They go through shared memory, so that whole rows are stored.
  template <class F>
  static __device__ __forceinline__ void store(T* shared, const Sums& sums, T* out, int64_t ld, bool aligned,
                                               int64_t row, int64_t column, int64_t m, int64_t n, int thread,
                                               const F& of) {
    const int lane = thread % 32, warp = thread / 32, g = lane / 4, t = lane % 4;
    T* rows = shared + warp * kWarpRows * kWideStride;
    const int64_t first_row = row + warp * kWarpRows;
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int within = tile * 8 + 2 * t;
      const auto low = of(within), high = of(within + 1);
#pragma unroll
      for (int half = 0; half < 4; ++half) {
        const float* pair = sums[half / 2][tile] + half % 2 * 2;
        *reinterpret_cast<uint32_t*>(rows + (8 * half + g) * kWideStride + within) =
            pack<T>(low(pair[0]), high(pair[1]));
      }
    }
    __syncwarp();
#pragma unroll 4
    for (int i = lane; i < kWarpRows * kColumns / 8; i += 32) {
      const int local = i / (kColumns / 8), within = i % (kColumns / 8) * 8;
      if (first_row + local >= m || column + within >= n) continue;
      alignas(16) T values[8];
      *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(rows + local * kWideStride + within);
      store_run(values, out + (first_row + local) * ld + column + within, n - column - within, aligned);
    }
  }
};

}  // namespace pyfused
