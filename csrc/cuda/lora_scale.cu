// The gradient of a scale that is one factor per rank.
#include "dispatch.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;

// One block per rank; each thread's rows, then the threads in a tree: the same order in every run.
template <class S>
__global__ void __launch_bounds__(kThreads)
    lora_scale_gradient_kernel(const S* s, const S* u, int64_t m, int r, double factor, void* out, Dtype out_dtype) {
  PF_DYN_SMEM(double, partial);
  const int rank = static_cast<int>(blockIdx.x);
  double sum = 0;
  for (int64_t row = threadIdx.x; row < m; row += kThreads) {
    sum += static_cast<double>(s[row * r + rank]) * static_cast<double>(u[row * r + rank]);
  }
  partial[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kThreads / 2; width > 0; width /= 2) {
    if (static_cast<int>(threadIdx.x) < width) partial[threadIdx.x] += partial[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) store_as<double>(out, out_dtype, rank, partial[0] * factor);
}

}  // namespace

void launch_lora_scale_gradient(const void* s, const void* u, int64_t m, int r, double factor, void* out,
                                Dtype out_dtype, bool is_double, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(r));
  constexpr int kBytes = kThreads * static_cast<int>(sizeof(double));
  if (is_double) {
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_scale_gradient_kernel<double>), static_cast<const double*>(s),
              static_cast<const double*>(u), m, r, factor, out, out_dtype);
  } else {
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_scale_gradient_kernel<float>), static_cast<const float*>(s),
              static_cast<const float*>(u), m, r, factor, out, out_dtype);
  }
}

}  // namespace pyfused
