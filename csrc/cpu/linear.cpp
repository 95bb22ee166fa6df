#include "linear.h"

#include <torch/csrc/stable/library.h>

#include "isa.h"

namespace pyfused {

#if defined(PYFUSED_HAVE_AMX)
namespace {

// Rows up to which the vendor's copy of the weight costs more than its product gains by it, and the same for a weight
// that is far beyond the second-level cache.
constexpr int64_t kMaxRows = 256, kMaxRowsOfLarge = 512, kLargeWeight = 1 << 22;
// Columns of a task, and rows whose x, as tiles, is to stay in the second-level cache beside the weight's rows.
constexpr int64_t kTaskColumns = 64;
constexpr int64_t kTaskBytes = 1 << 20, kTaskRows = 256;
// Rows of a task that packs x.
constexpr int64_t kPackedRows = 64;

}  // namespace

bool linear_in_tiles(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  const int64_t K = weight.size(1), N = weight.size(0);
  const int64_t M = x.size(0), rows = K * N < kLargeWeight ? kMaxRows : kMaxRowsOfLarge;
  // every load of a tile lies within the weight
  return chosen_capability() == Capability::AMX && x.scalar_type() == ScalarType::BFloat16 && M > 0 && M <= rows &&
         N > 0 && K > 0 && K % 32 == 0 && N % 32 == 0 && weight.stride(1) == 1 && weight.stride(0) >= K &&
         (bias == nullptr || bias->stride(0) == 1);
}

LinearRows linear_rows(const Tensor& out, const Tensor& weight, const Tensor* bias, const Scratch& x_tiles) {
  const int64_t N = weight.size(0), K = weight.size(1);
  return {{x_tiles.at(0), weight.const_data_ptr(), weight.stride(0), K},
          {nullptr, nullptr, 0, 0},
          bias == nullptr ? nullptr : bias->const_data_ptr(),
          out.mutable_data_ptr(),
          out.size(0),
          N};
}

void multiply_in_tiles(const LinearRows& call) {
  const int64_t rows = std::clamp<int64_t>(kTaskBytes / (call.base.K * 2) / 32 * 32, 32, kTaskRows);
  const int64_t across = divide_up(call.N, kTaskColumns);
  parallel(divide_up(call.M, rows) * across, call.M * call.N * call.base.K, [&](int64_t task) {
    const int64_t m = task / across * rows, n = task % across * kTaskColumns;
    AMX::linear_block(call, m, std::min(m + rows, call.M), n, std::min(n + kTaskColumns, call.N));
  });
}
#endif

void linear_out(const Tensor& out, const Tensor& x, const Tensor& weight, const Tensor* bias) {
#if defined(PYFUSED_HAVE_AMX)
  if (linear_in_tiles(x, weight, bias)) {
    const int64_t M = x.size(0), K = weight.size(1);
    const Matrix rows(x);
    const Scratch tiles(1, AMX::linear_rows_bytes(M, K), int64_t{1});
    const RowRanges ranges(M, kPackedRows);
    parallel(ranges.count, M * K, [&](int64_t range) {
      AMX::linear_pack_rows(rows.tensor.const_data_ptr(), rows.ld, M, K, ranges.begin(range), ranges.end(range),
                            tiles.at(0));
    });
    return multiply_in_tiles(linear_rows(out, weight, bias, tiles));
  }
#endif
  matmul_out(out, x, transposed(weight), bias);
}

namespace {

// Rows up to which tiles add up in the vendor's order.
constexpr int64_t kSameBitsRows = 32;

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  const char* op = "linear";
  const Device cpu = Device::cpu();
  check_device(x, cpu, op, "x");
  PF_CHECK(x.dim() >= 1, op, "x", "have at least one dimension", "a scalar");
  PF_CHECK(weight.dim() == 2, op, "weight", "have shape [N, K]", shape_of(weight));
  const int64_t M = rows_of(x), K = x.size(x.dim() - 1), N = weight.size(0);
  dtype_of(x, op, "x");
  check_linear(x, weight, bias, N, K, cpu, op);
  const Tensor y = empty_rows(x, N, cpu), out = as_matrix(y, M, N), rows = as_matrix(x, M, K);
  if (M <= kSameBitsRows) {
    linear_out(out, rows, weight, or_null(bias));
  } else {
    matmul_out(out, rows, transposed(weight), or_null(bias));
  }
  return y;
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) { m.impl("_linear", TORCH_BOX(&pyfused::linear)); }
