// The second stage of every split sum: parts added in their order, scaled, rounded once.
#include "dispatch.cuh"
#include "sums.h"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxSums = 6;  // of one launch: two for each of three projections of one x

struct Jobs {
  PartSum sums[kMaxSums];
};

template <class S>
__global__ void __launch_bounds__(kThreads) sums_kernel(Jobs jobs) {
  const PartSum& job = jobs.sums[blockIdx.y];
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < job.count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const S* parts = static_cast<const S*>(job.parts) + i;
    double total = 0;
    for (int64_t part = 0; part < job.part_count; ++part) total += static_cast<double>(parts[part * job.part_stride]);
    const S sum = static_cast<S>(total);
    if (job.unscaled != nullptr) static_cast<S*>(job.unscaled)[i] = sum;
    S scale = static_cast<S>(job.factor);
    if (job.vector.data != nullptr) scale *= load_as<S>(job.vector, i / job.vector_run % job.vector_size);
    const int64_t to = job.out_columns == 0 ? i : i / job.out_columns * job.out_ld + i % job.out_columns;
    store_as<S>(job.out, job.out_dtype, to, sum * scale);
  }
}

}  // namespace

void launch_sums(std::span<const PartSum> sums, bool is_double, cudaStream_t stream) {
  for_each_part(sums, kMaxSums, [&](std::span<const PartSum> part) {
    Jobs jobs{};
    std::copy(part.begin(), part.end(), jobs.sums);
    int64_t longest = 0;
    for (const PartSum& sum : part) longest = std::max(longest, sum.count);
    if (longest == 0) return;
    const int64_t blocks = divide_up_to<int64_t>(longest, kThreads);
    const dim3 grid(static_cast<unsigned>(blocks < (1 << 20) ? blocks : 1 << 20), static_cast<unsigned>(part.size()));
    if (is_double) {
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (sums_kernel<double>), jobs);
    } else {
      PF_LAUNCH(grid, dim3(kThreads), 0, stream, (sums_kernel<float>), jobs);
    }
  });
}

}  // namespace pyfused
