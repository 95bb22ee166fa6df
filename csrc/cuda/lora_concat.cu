// out = bias + drop(s c^T) + x w^T as one product over R and then K: the rank-r update inside the base product, without
// a pass over out. Both are operands in shared memory like any other; between them the sums, which then hold s c^T
// alone, take dropout's mask.
//
// c and w come as [N, R] and [N, K] (forward) or, transposed, as [R, N] and [K, N] (the gradient of x, where a and the
// weight are read as they lie in memory).
#include "dispatch.cuh"
#include "linear.cuh"
#include "lora.h"

namespace pyfused {
namespace {

struct Aligned {
  bool x, s, w, c, out;
};

template <class T, bool transposed>
__global__ void __launch_bounds__(LinearBlock<T, transposed>::kThreads)
    lora_concat_kernel(LoraConcat p, Aligned aligned) {
  using L = LinearBlock<T, transposed>;
  PF_DYN_SMEM(T, shared);
  const int thread = threadIdx.x, g = thread % 32 / 4, t = thread % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * L::kColumns;
  const int64_t warp_row = row + thread / 32 * L::kWarpRows;
  const int rank_steps = (p.r + L::kInner - 1) / L::kInner;
  const int steps = rank_steps + static_cast<int>((p.k + L::kInner - 1) / L::kInner);
  const auto first = [&](int step) {
    return static_cast<int64_t>(step < rank_steps ? step : step - rank_steps) * L::kInner;
  };
  const auto valid = [&](int step) { return (step < rank_steps ? p.r : p.k) - first(step); };

  typename L::Sums sums = {};
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
      for (int tile = 0; tile < L::kTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (!(keep[tile % 4][tile / 4] >> (16 * i) & 1u)) sums[half / 2][tile][half % 2 * 2 + i] = 0.0f;
        }
      }
    }
  };

  for_each_step(
      L::kStages, steps,
      [&](int stage, int step) {
        const bool is_rank = step < rank_steps;
        L::load(shared + stage * L::kStage, is_rank ? p.s : p.x, is_rank ? p.c : p.w, is_rank ? aligned.s : aligned.x,
                is_rank ? aligned.c : aligned.w, row, column, p.m, p.n, first(step), valid(step), thread);
      },
      [&](int stage, int step) {
        if (warp_row >= p.m) return;
        L::multiply(sums, shared + stage * L::kStage, valid(step), thread);
        if (step == rank_steps - 1 && p.dropout.threshold != 0) drop_sums();
      });
  __syncthreads();
  if (warp_row >= p.m) return;
  const T* bias = static_cast<const T*>(p.bias);
  L::store(shared, sums, static_cast<T*>(p.out), p.ld_out, aligned.out, row, column, p.m, p.n, thread, [&](int within) {
    const int64_t n = column + within;
    const float shift = bias != nullptr && n < p.n ? convert<float>(bias[n]) : 0.0f;
    return [shift](float sum) { return sum + shift; };
  });
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
  const auto run = [&]<bool transposed>() {
    using L = LinearBlock<T, transposed>;
    PF_LAUNCH(L::grid(call.m, call.n), dim3(L::kThreads), L::kBytes, stream, (lora_concat_kernel<T, transposed>), call,
              aligned);
  };
  if (call.transposed) return run.template operator()<true>();
  run.template operator()<false>();
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
