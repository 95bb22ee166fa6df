// out = (x w^T + bias) * scale as one product, in bf16 or fp16: IA3's factors where its output is made, without a pass
// over it. With base the unscaled product is stored too, which scale's gradient asks for.
#include "dispatch.cuh"
#include "ia3.h"
#include "linear.cuh"

namespace pyfused {
namespace {

struct Aligned {
  bool x, w, out;
};

template <class T>
__global__ void __launch_bounds__(LinearBlock<T, false>::kThreads) ia3_linear_kernel(Ia3Linear p, Aligned aligned) {
  using L = LinearBlock<T, false>;
  PF_DYN_SMEM(T, shared);
  const int thread = threadIdx.x;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * L::kRows;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * L::kColumns;
  const bool has_rows = row + thread / 32 * L::kWarpRows < p.m;
  typename L::Sums sums = {};
  for_each_step(
      L::kStages, static_cast<int>((p.k + L::kInner - 1) / L::kInner),
      [&](int stage, int step) {
        const int64_t first = static_cast<int64_t>(step) * L::kInner;
        L::load(shared + stage * L::kStage, p.x, p.w, aligned.x, aligned.w, row, column, p.m, p.n, first, p.k - first,
                thread);
      },
      [&](int stage, int step) {
        const int64_t first = static_cast<int64_t>(step) * L::kInner;
        if (has_rows) L::multiply(sums, shared + stage * L::kStage, p.k - first, thread);
      });
  __syncthreads();
  if (!has_rows) return;
  const T* bias = static_cast<const T*>(p.bias);
  const auto store = [&](void* out, const ConstVector& scale) {
    L::store(shared, sums, static_cast<T*>(out), p.n, aligned.out, row, column, p.m, p.n, thread, [&](int within) {
      const int64_t n = column + within;
      const bool inside = n < p.n;
      const float shift = bias != nullptr && inside ? convert<float>(bias[n]) : 0.0f;
      const float factor = scale.data != nullptr && inside ? load_as<float>(scale, n) : 1.0f;
      return [shift, factor](float sum) { return (sum + shift) * factor; };
    });
  };
  if (p.base != nullptr) store(p.base, {});
  store(p.out, p.scale);
}

#if defined(PYFUSED_CUTLASS)
// Whether the kernel of csrc/cuda/cutlass has such a call: its GPU, and what tensor maps and 16-byte stores ask for.
bool fits_sm90(const Ia3Linear& call) {
  const auto aligned = [](const void* data, int64_t ld = 0) { return rows_aligned(data, ld, 2); };
  constexpr int64_t kMaxSize = int64_t{1} << 30;
  return call.capability == 90 && call.m < kMaxSize && call.n < kMaxSize && call.k < kMaxSize && call.k % 8 == 0 &&
         aligned(call.x.data, call.x.ld) && aligned(call.w.data, call.w.ld) && aligned(call.out, call.n) &&
         aligned(call.base) && aligned(call.bias) && aligned(call.scale.data) &&
         (call.scale.dtype == Dtype::kFloat32 || call.scale.dtype == call.dtype);
}
#endif

template <class T>
void launch(const Ia3Linear& call, cudaStream_t stream) {
  using L = LinearBlock<T, false>;
  const auto aligned_rows = [](const void* data, int64_t ld) { return rows_aligned(data, ld, sizeof(T)); };
  const Aligned aligned{aligned_rows(call.x.data, call.x.ld), aligned_rows(call.w.data, call.w.ld),
                        aligned_rows(call.out, call.n) && aligned_rows(call.base, call.n)};
  PF_LAUNCH(L::grid(call.m, call.n), dim3(L::kThreads), L::kBytes, stream, (ia3_linear_kernel<T>), call, aligned);
}

}  // namespace

void launch_ia3_linear(const Ia3Linear& call, cudaStream_t stream) {
#if defined(PYFUSED_CUTLASS)
  if (fits_sm90(call)) return launch_ia3_linear_sm90(call, stream);
#endif
  if (call.dtype == Dtype::kBFloat16) return launch<bf16>(call, stream);
  if (call.dtype == Dtype::kFloat16) return launch<fp16>(call, stream);
  throw std::runtime_error("pyfused: ia3_linear in one product is for bf16 and fp16");
}

}  // namespace pyfused
