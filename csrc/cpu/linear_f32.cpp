#include "linear_f32.h"

#include "levels.h"

namespace pyfused {
namespace {

// Below these tiles are mostly padding.
constexpr int64_t kMinColumns = 64, kMinDepth = 64;
// Columns of a task, whose panels stay in the second-level cache for all rows; and rows that are worth a copy of them.
constexpr int64_t kTaskColumns = 256, kTaskRows = 128;
// Rows at most whose sums are added up in fp32 one after the other: whole tiles.
constexpr int64_t kPartRows = 56;

const LinearF32Kernels* kernels() { PF_RETURN_AT_LEVEL(linear_f32_kernels()) }

// A thread's own, kept between calls: memory that the system hands out anew costs a page fault for each 4 KB.
float* workspace(int64_t floats) {
  thread_local int64_t size = 0;
  thread_local std::optional<Scratch> memory;
  if (floats > size) {
    size = 0;  // should there be no memory
    memory.emplace(1, floats, Dtype::kFloat32);
    size = floats;
  }
  return static_cast<float*>(memory->at(0));
}

}  // namespace

int64_t f32_scaled_rows() { return kernels() == nullptr ? INT64_MAX : kernels()->scaled_rows; }
int64_t f32_rows() { return kernels() == nullptr ? INT64_MAX : kernels()->min_rows; }
int64_t f32_max_depth() { return kernels() == nullptr ? 0 : kernels()->max_depth; }

std::optional<F32Product> f32_product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias,
                                      int64_t min_rows) {
  const int64_t M = a.size(0), K = a.size(1), N = b.size(1);
  if (a.scalar_type() != ScalarType::Float || M < min_rows || N < kMinColumns || K < kMinDepth) return std::nullopt;
  if (a.stride(1) != 1 || (b.stride(0) != 1 && b.stride(1) != 1)) return std::nullopt;
  if ((bias != nullptr && bias->stride(0) != 1) || kernels() == nullptr) return std::nullopt;
  const auto at = [](const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); };
  F32Product call{};
  call.base = {at(a), a.stride(0), at(b), b.stride(0), b.stride(1), K};
  call.bias = bias == nullptr ? nullptr : at(*bias);
  call.out = static_cast<float*>(out.mutable_data_ptr());
  call.ld_out = out.stride(0);
  call.M = M;
  call.N = N;
  return call;
}

int64_t f32_part_rows() { return kPartRows / kernels()->rows * kernels()->rows; }

// The cut may depend on the number of threads, since results do not depend on the cut: as many ranges of columns as
// threads share evenly, and ranges of rows, which copy the same panels again, where columns are too few.
void multiply(const F32Product& call) {
  const LinearF32Kernels& level = *kernels();
  const int64_t threads = torch::stable::get_num_threads(), panels = divide_up(call.N, level.columns);
  int64_t across = divide_up(call.N, kTaskColumns);
  if (panels >= 2 * threads) across = std::min(round_up(across, threads), panels);
  const int64_t columns = divide_up(panels, across) * level.columns;
  across = divide_up(call.N, columns);
  const int64_t down = std::clamp<int64_t>(divide_up(threads, across), 1, divide_up(call.M, kTaskRows));
  // a part of the rows whose sums are asked for stays in one task
  const int64_t rows = round_up(divide_up(call.M, down), call.other == nullptr ? level.rows : call.part_rows);
  torch::stable::parallel_for(0, across * divide_up(call.M, rows), 1, [&](int64_t begin, int64_t end) {
    float* memory = workspace(level.scratch(call, columns));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t m = task / across * rows, n = task % across * columns;
      level.block(call, m, std::min(m + rows, call.M), n, std::min(n + columns, call.N), memory);
    }
  });
}

}  // namespace pyfused
