// Dropout on a tensor of its own: a thread makes four words of random bits and reads the eight elements that they are
// for, pairs in each 32 columns of a block of 128; 16 threads share a row.
#include "dispatch.cuh"
#include "dropout.cuh"
#include "dropout.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kThreads / philox::kBlockCounters;
constexpr int64_t kMaxGridY = 65535;

template <class T>
__global__ void __launch_bounds__(kThreads) dropout_kernel(DropoutPass p) {
  using S = Sum<T>;
  const int pair = threadIdx.x % philox::kBlockCounters;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + threadIdx.x / philox::kBlockCounters;
  if (row >= p.rows) return;
  const T* from = static_cast<const T*>(p.x.data) + row * p.x.ld;
  T* to = static_cast<T*>(p.out) + row * p.columns;
  const uint64_t seed = static_cast<uint64_t>(__ldg(p.dropout.seed));
  const S scale = static_cast<S>(p.scale);
  const int64_t blocks = (p.columns + philox::kBlockColumns - 1) / philox::kBlockColumns;
  for (int64_t block = blockIdx.y; block < blocks; block += gridDim.y) {
    uint32_t keep[4];
    keep_masks(keep, seed, p.dropout.threshold, row, block, pair);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = block * philox::kBlockColumns + 32 * w + 2 * pair + half;
        if (column >= p.columns) continue;
        const bool kept = keep[w] >> (16 * half) & 1u;
        to[column] = kept ? convert<T>(convert<S>(from[column]) * scale) : convert<T>(S(0));
      }
    }
  }
}

}  // namespace

void launch_dropout(const DropoutPass& call, cudaStream_t stream) {
  if (call.rows == 0 || call.columns == 0) return;
  const dim3 grid(
      static_cast<unsigned>(divide_up_to<int64_t>(call.rows, kRows)),
      static_cast<unsigned>(std::min(divide_up_to<int64_t>(call.columns, philox::kBlockColumns), kMaxGridY)));
  with_dtype(call.dtype,
             [&](auto zero) { PF_LAUNCH(grid, dim3(kThreads), 0, stream, dropout_kernel<decltype(zero)>, call); });
}

}  // namespace pyfused
