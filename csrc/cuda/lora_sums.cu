// The second stage of every split sum: parts added in their order, scaled, rounded once. And the gradient of the scale.
#include "dispatch.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;

struct Jobs {
  LoraSum sums[kMaxSums];
};

template <class S>
__global__ void __launch_bounds__(kThreads) lora_sums_kernel(Jobs jobs) {
  const LoraSum& job = jobs.sums[blockIdx.y];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < job.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const S* parts = static_cast<const S*>(job.parts) + i;
    S sum = 0;
    for (int64_t part = 0; part < job.part_count; ++part) sum += parts[part * job.part_stride];
    if (job.unscaled != nullptr) static_cast<S*>(job.unscaled)[i] = sum;
    S scale = static_cast<S>(job.factor);
    if (job.vector != nullptr) scale *= load_as<S>(job.vector, job.vector_dtype, i % job.r);
    store_as<S>(job.out, job.out_dtype, i, sum * scale);
  }
}

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

void launch_lora_sums(const LoraSum* sums, int count, bool is_double, cudaStream_t stream) {
  Jobs jobs{};
  int64_t longest = 0;
  for (int i = 0; i < count; ++i) {
    jobs.sums[i] = sums[i];
    longest = sums[i].count > longest ? sums[i].count : longest;
  }
  if (longest == 0) return;
  const int64_t blocks = divide_up_to<int64_t>(longest, kThreads);
  const dim3 grid(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), static_cast<unsigned>(count));
  if (is_double) {
    PF_LAUNCH(grid, dim3(kThreads), 0, stream, (lora_sums_kernel<double>), jobs);
  } else {
    PF_LAUNCH(grid, dim3(kThreads), 0, stream, (lora_sums_kernel<float>), jobs);
  }
}

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
