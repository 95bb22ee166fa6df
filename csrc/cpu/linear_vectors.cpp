#include "linear_vectors.h"

#include "levels.h"

namespace pyfused {
namespace {

// Columns of a task, whose panels stay in the second-level cache for all rows; and rows that are worth a copy of them.
constexpr int64_t kTaskColumns = 256, kTaskRows = 128;
// Tasks that copy one factor, and what copying a number of it costs, as multiply-adds.
constexpr int64_t kPackTasks = 4, kPackWork = 8;
// Rows at most whose sums are added up in fp32 one after the other: whole tiles.
constexpr int64_t kPartRows = 56;

const LinearVectorKernels* kernels(Dtype dtype) { PF_RETURN_AT_LEVEL(linear_vector_kernels(dtype)) }

}  // namespace

bool has_linear_product(Dtype dtype, int64_t rows, ProductFor purpose, int64_t size) {
  const LinearVectorKernels* level = kernels(dtype);
  if (level == nullptr) return false;
  const LinearVectorKernels::Least& least = level->least[static_cast<int>(purpose)];
  return rows >= least.rows && size >= least.size;
}

int64_t max_product_depth(Dtype dtype) { return kernels(dtype) == nullptr ? 0 : kernels(dtype)->max_depth; }

LinearProduct own_product(const View& out, const View& a, const View& b) {
  LinearProduct call{};
  call.dtype = a.dtype;
  call.base = {a.data, a.row_stride, a.column_stride, b.data, b.row_stride, b.column_stride, a.columns, nullptr, 0};
  call.out = out.data;
  call.ld_out = out.row_stride;
  call.M = a.rows;
  call.N = b.columns;
  return call;
}

namespace {

std::optional<LinearProduct> product_of(const View& out, const View& a, const View& b, const void* bias,
                                        int64_t bias_stride, ProductFor purpose) {
  if (!has_linear_product(a.dtype, a.rows, purpose, std::min(a.columns, b.columns))) return std::nullopt;
  if (a.column_stride != 1 && a.dtype == Dtype::kFloat32) return std::nullopt;
  if (b.row_stride != 1 && b.column_stride != 1) return std::nullopt;
  if (bias != nullptr && bias_stride != 1) return std::nullopt;
  LinearProduct call = own_product(out, a, b);
  call.bias = bias;
  return call;
}

}  // namespace

std::optional<LinearProduct> linear_product(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias,
                                            ProductFor purpose) {
  const Dtype dtype = dtype_of(a, "linear", "x");
  if (!has_linear_product(dtype, a.size(0), purpose)) return std::nullopt;  // before views, which take their time
  return product_of(View(out, dtype), View(a, dtype), View(b, dtype),
                    bias == nullptr ? nullptr : bias->const_data_ptr(), bias == nullptr ? 0 : bias->stride(0), purpose);
}

int64_t product_part_rows(const LinearProduct& call) {
  const int64_t rows = kernels(call.dtype)->rows;
  return kPartRows / rows * rows;
}

namespace {

// For a block of so many columns, the calling thread's.
float* memory_of(const LinearVectorKernels& level, const LinearProduct& call, int64_t columns) {
  return static_cast<float*>(workspace(level.scratch(call, columns) * int64_t{sizeof(float)}));
}

}  // namespace

// The cut may depend on the number of threads, since results do not depend on the cut: as many ranges of columns as
// threads share evenly, and ranges of rows, which copy the same panels again, where columns are too few.
void multiply(const LinearProduct& call) {
  const LinearVectorKernels& level = *kernels(call.dtype);
  const int64_t threads = torch::stable::get_num_threads(), panels = divide_up(call.N, level.columns);
  int64_t across = divide_up(call.N, kTaskColumns);
  if (panels >= 2 * threads) across = std::min(round_up(across, threads), panels);
  const int64_t columns = divide_up(panels, across) * level.columns;
  across = divide_up(call.N, columns);
  const int64_t down = std::clamp<int64_t>(divide_up(threads, across), 1, divide_up(call.M, kTaskRows));
  // a part of the rows whose sums are asked for stays in one task
  const int64_t rows = round_up(divide_up(call.M, down), call.other == nullptr ? level.rows : call.part_rows);
  parallel(across * divide_up(call.M, rows), call.M * call.N * call.base.K, [&](int64_t task) {
    const int64_t m = task / across * rows, n = task % across * columns;
    level.block(call, m, std::min(m + rows, call.M), n, std::min(n + columns, call.N), memory_of(level, call, columns));
  });
}

void multiply_here(const LinearProduct& call) {
  const LinearVectorKernels& level = *kernels(call.dtype);
  float* memory = memory_of(level, call, std::min(kTaskColumns, call.N));
  for (int64_t n = 0; n < call.N; n += kTaskColumns) {
    level.block(call, 0, call.M, n, std::min(n + kTaskColumns, call.N), memory);
  }
}

void product_out(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias, ProductFor purpose) {
  if (const auto call = linear_product(out, a, b, bias, purpose)) return multiply(*call);
  matmul_out(out, a, b, bias);
}

void product_add(const Tensor& out, const Tensor& a, const Tensor& b, ProductFor purpose) {
  std::optional<LinearProduct> call = linear_product(out, a, b, nullptr, purpose);
  if (!call.has_value()) return matmul_add(out, a, b);
  call->add = true;
  multiply(*call);
}

RowProducts::RowProducts(const View& b, int64_t rows) : b_(b) {
  const View a(nullptr, rows, b.rows, b.rows, b.dtype), out(nullptr, rows, b.columns, b.columns, b.dtype);
  call_ = product_of(out, a, b, nullptr, 0, ProductFor::kBottleneck);
  if (!ours()) return;
  panels_.emplace(1, kernels(b.dtype)->packed_size(*call_), Dtype::kFloat32);
  call_->panels = static_cast<float*>(panels_->at(0));
}

void RowProducts::pack(std::initializer_list<const RowProducts*> products) {
  const auto count = static_cast<int64_t>(products.size());
  int64_t elements = 0;
  for (const RowProducts* each : products) elements += each->ours() ? each->b_.rows * each->b_.columns : 0;
  parallel(count * kPackTasks, elements * kPackWork, [&](int64_t task) {
    const RowProducts& each = *products.begin()[task / kPackTasks];
    if (!each.ours()) return;
    const LinearVectorKernels& level = *kernels(each.b_.dtype);
    const int64_t step = round_up(divide_up(each.b_.columns, kPackTasks), level.columns);
    const int64_t begin = task % kPackTasks * step;
    if (begin < each.b_.columns) level.pack(*each.call_, begin, std::min(begin + step, each.b_.columns));
  });
}

void RowProducts::multiply(const View& out, const View& a, const View* bias) const {
  if (ours()) {
    LinearProduct call = product(out, a);
    call.bias = bias == nullptr ? nullptr : bias->data;
    return multiply_here(call);
  }
  const std::optional<Tensor> added = bias ? std::optional<Tensor>(bias->tensor()) : std::nullopt;
  matmul_out(out.tensor(), a.tensor(), b_.tensor(), or_null(added));
}

LinearProduct RowProducts::product(const View& out, const View& a) const {
  LinearProduct call = *call_;
  call.base.x = a.data;
  call.base.x_row = a.row_stride;
  call.out = out.data;
  call.ld_out = out.row_stride;
  call.M = a.rows;
  return call;
}

}  // namespace pyfused
