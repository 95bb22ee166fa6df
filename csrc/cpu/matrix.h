// What every CPU op shares on the host side: the vendor's GEMM, scratch memory, and how work is cut for threads.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../common/dtype.h"
#include "../common/tensor.h"
#include "kernels/tile.h"

namespace pyfused {

// Multiply-adds below which waking other threads costs more than it saves.
inline constexpr int64_t kParallelWork = 1 << 18;
// Row ranges that a pass is cut into: enough for big machines, few enough for partial sums to stay small.
inline constexpr int64_t kMaxRanges = 32;
inline constexpr int64_t kRangeRows = 64;
inline constexpr int64_t kRowsPerRank = 4;
// More rows make more ranges than that: a sum over more of them in one go loses accuracy.
inline constexpr int64_t kMaxRangeRows = 4096;
// Columns of a task that adds up parts of sums.
inline constexpr int64_t kFinishColumns = 384;

// The vendor's GEMM: out = a b, or bias + a b, into memory of ours. The C shim goes past the dispatcher, so neither
// autocast nor autograd of the caller's surroundings can change what comes out.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* bias) {
  const AOTITorchError error = bias != nullptr
                                   ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                                   : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  if (error != AOTI_TORCH_SUCCESS) fail_in_torch("torch's matrix product failed");
}

// out += factor a b, added in the accumulation type before the one rounding.
inline void matmul_add(const Tensor& out, const Tensor& a, const Tensor& b, double factor = 1.0) {
  if (aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, factor) != AOTI_TORCH_SUCCESS) {
    fail_in_torch("torch's matrix product failed");
  }
}

// Memory as a matrix for the vendor's GEMM. No autograd state: a tensor that requires a gradient may not be an output.
struct View {
  void* data;
  int64_t rows, columns, row_stride, column_stride;
  Dtype dtype;

  View(const void* data, int64_t rows, int64_t columns, int64_t ld, Dtype dtype)
      : data(const_cast<void*>(data)), rows(rows), columns(columns), row_stride(ld), column_stride(1), dtype(dtype) {}
  View(const Tensor& matrix, Dtype dtype)
      : View(matrix.const_data_ptr(), matrix.size(0), matrix.size(1), matrix.stride(0), dtype) {
    column_stride = matrix.stride(1);
  }

  View transposed() const {
    View view = *this;
    std::swap(view.rows, view.columns);
    std::swap(view.row_stride, view.column_stride);
    return view;
  }
  View block(int64_t row, int64_t row_count, int64_t column, int64_t column_count) const {
    View view = *this;
    view.data = static_cast<char*>(data) + (row * row_stride + column * column_stride) * size_of(dtype);
    view.rows = row_count;
    view.columns = column_count;
    return view;
  }
  View some_rows(int64_t row, int64_t count) const { return block(row, count, 0, columns); }
  View some_columns(int64_t column, int64_t count) const { return block(0, rows, column, count); }

  Tensor tensor() const {
    const int64_t sizes[] = {rows, columns}, strides[] = {row_stride, column_stride};
    AtenTensorHandle handle;
    if (aoti_torch_create_tensor_from_blob(
            data, 2, sizes, strides, 0,
            torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type(dtype))),
            aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS) {
      fail_in_torch("torch made no tensor of memory");
    }
    return Tensor(handle);
  }
};

// out += factor a b.
inline void multiply_add(const View& out, const View& a, const View& b, double factor = 1.0) {
  matmul_add(out.tensor(), a.tensor(), b.tensor(), factor);
}

// Memory that lives for one call. Not zeroed.
class Scratch {
 public:
  Scratch(int64_t rows, int64_t columns, Dtype dtype) : Scratch(rows, columns, int64_t{size_of(dtype)}) {}
  Scratch(int64_t rows, int64_t columns, int64_t element_size) : size_(element_size) {
    int64_t bytes, padded;
    if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, size_, &bytes) ||
        __builtin_add_overflow(bytes, kAlignment, &padded)) {
      throw std::bad_alloc();
    }
    // malloc keeps small blocks at hand, but not those that it is to align
    bytes_.reset(new char[static_cast<size_t>(padded)]);
    data_ = reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(bytes_.get()), kAlignment));
  }
  void* at(int64_t element) const { return data_ + element * size_; }

 private:
  static constexpr int64_t kAlignment = 64;
  int64_t size_;
  std::unique_ptr<char[]> bytes_;
  char* data_;
};

// A thread's own, kept between calls and good until it asks again: memory that the system hands out anew costs a page
// fault for each 4 KB, and what is neither small nor large malloc finds in lists.
inline void* workspace(int64_t bytes) {
  thread_local int64_t size = 0;
  thread_local std::optional<Scratch> memory;
  if (bytes > size) {
    size = 0;  // should there be no memory
    memory.emplace(1, bytes, int64_t{1});
    size = bytes;
  }
  return memory->at(0);
}

template <class F>
void parallel(int64_t tasks, int64_t work, const F& run) {
  if (tasks <= 1 || work < kParallelWork) {
    for (int64_t i = 0; i < tasks; ++i) run(i);
    return;
  }
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// Rows cut into ranges, by shape alone.
struct RowRanges {
  int64_t rows, step, count;

  RowRanges(int64_t rows, int64_t step) : rows(rows), step(step), count(divide_up(rows, step)) {}

  // For a pass whose rows have nothing to do with each other.
  static RowRanges independent(int64_t rows) {
    return {rows, std::max<int64_t>(round_up(divide_up(rows, 2 * kMaxRanges), 32), rows <= 64 ? 16 : 32)};
  }
  // For a pass in which each range leaves a part of a sum over rows, rank x columns: ranges are long enough for the
  // parts to be small beside the matrix.
  static RowRanges summed(int64_t rows, int64_t rank) {
    const int64_t shortest = std::max(rows < 4 * kRangeRows ? kRangeRows / 2 : kRangeRows, kRowsPerRank * rank);
    const int64_t wanted = std::clamp<int64_t>(rows / shortest, 1, kMaxRanges);
    return {rows, std::min(round_up(divide_up(rows, wanted), 32), kMaxRangeRows)};
  }
  int64_t begin(int64_t range) const { return range * step; }
  int64_t end(int64_t range) const { return std::min((range + 1) * step, rows); }
  bool operator==(const RowRanges&) const = default;
};

}  // namespace pyfused
