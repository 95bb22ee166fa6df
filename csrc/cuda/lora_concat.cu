// out = bias + drop(s c^T) + x w^T as one product over R and then K: the rank-r update inside the base product, without
// a pass over out. Both are operands in shared memory like any other; between them the sums, which then hold s c^T
// alone, take dropout's mask.
//
// A block takes 128 x 128 of out, a warp 32 rows of it. c and w come as [N, R] and [N, K] (forward) or, transposed, as
// [R, N] and [K, N] (the gradient of x, where a and the weight are read as they lie in memory).
#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 128;
constexpr int kColumns = philox::kBlockColumns;
constexpr int kWarpRows = 32;
constexpr int kTiles = kColumns / 8;
constexpr int kInner = 32;  // of the contraction at a time
constexpr int kStages = 3;
constexpr int kStride = kInner + kPadding;
constexpr int kWideStride = kColumns + kPadding;
constexpr int kLeft = kRows * kStride;  // elements of a stage
constexpr int kStage = kLeft + (kColumns * kStride > kInner * kWideStride ? kColumns * kStride : kInner * kWideStride);
static_assert(kThreads / 32 * kWarpRows == kRows && kRows * kWideStride <= kStages * kStage);

struct Aligned {
  bool x, s, w, c, out;
};

template <class T, bool transposed>
__global__ void __launch_bounds__(kThreads) lora_concat_kernel(LoraConcat p, Aligned aligned) {
  PF_DYN_SMEM(T, shared);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows, column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t warp_row = row + warp * kWarpRows;
  const int rank_steps = (p.r + kInner - 1) / kInner;
  const int steps = rank_steps + static_cast<int>((p.k + kInner - 1) / kInner);
  // of the contraction from a step on
  const auto remaining = [&](int step) {
    return step < rank_steps ? p.r - static_cast<int64_t>(step) * kInner
                             : p.k - static_cast<int64_t>(step - rank_steps) * kInner;
  };

  const auto load = [&](int stage, int step) {
    const bool is_rank = step < rank_steps;
    const ConstRows left = is_rank ? p.s : p.x, right = is_rank ? p.c : p.w;
    const bool left_aligned = is_rank ? aligned.s : aligned.x, right_aligned = is_rank ? aligned.c : aligned.w;
    const int64_t first = static_cast<int64_t>(is_rank ? step : step - rank_steps) * kInner, valid = remaining(step);
    T* to = shared + stage * kStage;
    copy_tile<kThreads>(to, kStride, static_cast<const T*>(left.data) + row * left.ld + first, left.ld, kRows, kInner,
                        p.m - row, valid, left_aligned, thread);
    const T* from = static_cast<const T*>(right.data);
    if constexpr (transposed) {
      copy_tile<kThreads>(to + kLeft, kWideStride, from + first * right.ld + column, right.ld, kInner, kColumns, valid,
                          p.n - column, right_aligned, thread);
    } else {
      copy_tile<kThreads>(to + kLeft, kStride, from + column * right.ld + first, right.ld, kColumns, kInner,
                          p.n - column, valid, right_aligned, thread);
    }
  };

  float sums[2][kTiles][4] = {};
  const auto multiply = [&](int stage, int step) {
    const T* left = shared + stage * kStage + warp * kWarpRows * kStride;
    const T* right = shared + stage * kStage + kLeft;
    const int64_t valid = remaining(step);
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
  };
  const auto drop_sums = [&] {
#pragma unroll
    for (int half = 0; half < 4; ++half) {
      uint32_t keep[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        keep_masks(keep[i], static_cast<uint64_t>(__ldg(p.dropout.seed)), p.dropout.threshold, warp_row + 8 * half + g,
                   blockIdx.y, 4 * i + t);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!(keep[tile % 4][tile / 4] >> (16 * i) & 1u)) sums[half / 2][tile][half % 2 * 2 + i] = 0.0f;
        }
      }
    }
  };

  for_each_step(kStages, steps, load, [&](int stage, int step) {
    if (warp_row >= p.m) return;
    multiply(stage, step);
    if (step == rank_steps - 1 && p.dropout.threshold != 0) drop_sums();
  });
  __syncthreads();
  if (warp_row >= p.m) return;

  // Through shared memory, so that whole rows are stored.
  T* tile_out = shared + warp * kWarpRows * kWideStride;
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t n = column + tile * 8 + 2 * t;
    float bias[2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (p.bias != nullptr && n + i < p.n) bias[i] = convert<float>(static_cast<const T*>(p.bias)[n + i]);
    }
#pragma unroll
    for (int half = 0; half < 4; ++half) {
      const float* pair = sums[half / 2][tile] + half % 2 * 2;
      *reinterpret_cast<uint32_t*>(tile_out + (8 * half + g) * kWideStride + tile * 8 + 2 * t) =
          pack<T>(pair[0] + bias[0], pair[1] + bias[1]);
    }
  }
  __syncwarp();
#pragma unroll 4
  for (int i = lane; i < kWarpRows * kColumns / 8; i += 32) {
    const int local = i / (kColumns / 8), n = i % (kColumns / 8) * 8;
    if (warp_row + local >= p.m || column + n >= p.n) continue;
    alignas(16) T values[8];
    *reinterpret_cast<uint4*>(values) = *reinterpret_cast<const uint4*>(tile_out + local * kWideStride + n);
    T* to = static_cast<T*>(p.out) + (warp_row + local) * p.ld_out + column + n;
    store_run(values, to, p.n - column - n, aligned.out);
  }
}

#if defined(PYFUSED_CUTLASS)
// Whether the kernel of csrc/cuda/cutlass has such a call: its GPU, and what tensor maps and 16-byte stores ask for.
bool fits_sm90(const LoraConcat& call) {
  const auto aligned = [](const ConstRows& rows) { return rows_aligned(rows.data, rows.ld, 2); };
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  return call.capability == 90 && call.m < kMaxSize && call.n < kMaxSize && call.k < kMaxSize && aligned(call.x) &&
         aligned(call.s) && aligned(call.w) && aligned(call.c) && aligned({call.out, call.ld_out}) &&
         aligned({call.bias, 0});
}
#endif

template <class T>
void launch(const LoraConcat& call, cudaStream_t stream) {
  const auto aligned_rows = [](const ConstRows& rows) { return rows_aligned(rows.data, rows.ld, sizeof(T)); };
  const Aligned aligned{aligned_rows(call.x), aligned_rows(call.s), aligned_rows(call.w), aligned_rows(call.c),
                        rows_aligned(call.out, call.ld_out, sizeof(T))};
  const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.m, kRows)),
                  static_cast<unsigned>(divide_up_to<int64_t>(call.n, kColumns)));
  constexpr int kBytes = kStages * kStage * static_cast<int>(sizeof(T));
  static_assert(kBytes <= kSharedLimit);
  if (call.transposed) {
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_concat_kernel<T, true>), call, aligned);
  } else {
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_concat_kernel<T, false>), call, aligned);
  }
}

}  // namespace

void launch_lora_concat(const LoraConcat& call, cudaStream_t stream) {
#if defined(PYFUSED_CUTLASS)
  if (fits_sm90(call)) return launch_lora_concat_sm90(call, stream);
#endif
  if (call.type == Dtype::kBFloat16) return launch<bf16>(call, stream);
  if (call.type == Dtype::kFloat16) return launch<fp16>(call, stream);
  throw std::runtime_error("pyfused: lora_concat is for bf16 and fp16");
}

}  // namespace pyfused
