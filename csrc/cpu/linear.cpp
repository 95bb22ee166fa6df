#include "linear.h"

#include <torch/csrc/stable/library.h>

#include "isa.h"
#include "linear_vectors.h"

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

// Rows up to which a product in panels, with what it spares the passes after it, was measured faster than the vendor's,
// which packs the weight once for all of them.
int64_t max_forward_rows(int64_t N, int64_t K) {
  return K > kMaxPanelSource ? 0 : K > 1536 ? 512 : N * K > 3 << 18 ? 1024 : 2048;
}
// The backward reads pieces of the weight's rows, so a large weight takes longer to pack than is gained. With a small
// one there is more to write for each product.
int64_t max_backward_rows(int64_t N, int64_t K) {
  if (N > kMaxPanelSource || N * K > 1 << 20) return 0;
  return N > 1024 || K > 1024 || N * K < 1 << 18 ? 512 : 1024;
}

bool in_whole_tiles(const Tensor& weight) {
  return weight.scalar_type() == ScalarType::BFloat16 && weight.size(0) > 0 && weight.size(1) > 0 &&
         weight.size(0) % 32 == 0 && weight.size(1) % 32 == 0 && weight.stride(1) == 1 &&
         weight.stride(0) >= weight.size(1);
}

int64_t max_rows(const Tensor& weight) {
  return weight.size(0) * weight.size(1) < kLargeWeight ? kMaxRows : kMaxRowsOfLarge;
}

}  // namespace

bool linear_in_panels(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  return chosen_capability() == Capability::AMX && in_whole_tiles(weight) && x.size(0) > max_rows(weight) &&
         x.size(0) <= max_forward_rows(weight.size(0), weight.size(1)) && (bias == nullptr || bias->stride(0) == 1);
}

bool linear_backward_in_panels(int64_t rows, const Tensor& weight) {
  return chosen_capability() == Capability::AMX && in_whole_tiles(weight) && rows >= kMinPanelRows &&
         rows <= max_backward_rows(weight.size(0), weight.size(1));
}

LinearPanels linear_panels(const Tensor& out, const Matrix& x, const Tensor& weight, const Tensor* bias) {
  const int64_t N = weight.size(0), K = weight.size(1);
  LinearPanels call{};
  call.x = x.tensor.const_data_ptr();
  call.ld_x = x.ld;
  call.w = weight.const_data_ptr();
  call.ld_w = weight.stride(0);
  call.by_row = true;
  call.bias = bias == nullptr ? nullptr : bias->const_data_ptr();
  call.out = out.mutable_data_ptr();
  call.M = x.tensor.numel() / K;
  call.K = K;
  call.N = N;
  return call;
}

LinearPanels linear_backward_panels(const Tensor& out, const Matrix& dy, const Tensor& weight) {
  LinearPanels call = linear_panels(out, dy, weight, nullptr);
  call.by_row = false;
  call.K = weight.size(0);
  call.N = weight.size(1);
  call.M = dy.tensor.numel() / call.K;
  return call;
}

void multiply_panels(const LinearPanels& call) {
  const int64_t across = divide_up(call.N, kTaskColumns);
  const int64_t groups = std::min(divide_up(call.M * call.K * 2, kTaskBytes), call.M / (2 * kMinPanelRows) + 1);
  const auto bound = [&](int64_t group) { return group == groups ? call.M : call.M * group / groups / 32 * 32; };
  parallel(groups * across, call.M * call.N * call.K, [&](int64_t task) {
    const int64_t group = task / across, n = task % across * kTaskColumns;
    AMX::linear_panels(call, bound(group), bound(group + 1), n, std::min(n + kTaskColumns, call.N));
  });
}

bool linear_in_tiles(const Tensor& x, const Tensor& weight, const Tensor* bias) {
  return chosen_capability() == Capability::AMX && in_whole_tiles(weight) && x.size(0) > 0 &&
         x.size(0) <= max_rows(weight) && (bias == nullptr || bias->stride(0) == 1);
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
  if (linear_in_panels(x, weight, bias)) return multiply_panels(linear_panels(out, Matrix(x), weight, bias));
#endif
  product_out(out, x, transposed(weight), bias, ProductFor::kPlainForward);
}

void linear_backward_out(const Tensor& out, const Tensor& dy, const Tensor& weight) {
#if defined(PYFUSED_HAVE_AMX)
  if (linear_backward_in_panels(dy.size(0), weight))
    return multiply_panels(linear_backward_panels(out, Matrix(dy), weight));
#endif
  product_out(out, dy, weight, nullptr, ProductFor::kPlainBackward);
}

namespace {

#if defined(PYFUSED_HAVE_AMX)
// Rows up to which tiles add up in the vendor's order.
constexpr int64_t kSameBitsRows = 32;
#endif

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
#if defined(PYFUSED_HAVE_AMX)
  if (M <= kSameBitsRows && linear_in_tiles(rows, weight, or_null(bias))) {
    linear_out(out, rows, weight, or_null(bias));
    return y;
  }
#endif
  matmul_out(out, rows, transposed(weight), or_null(bias));
  return y;
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) { m.impl("_linear", TORCH_BOX(&pyfused::linear)); }
