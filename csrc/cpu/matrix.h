// What every CPU op shares on the host side: tensors as matrices, checks, scratch memory, and how work is cut for
// threads.
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
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../common/check.h"
#include "kernels/dtype.h"
#include "kernels/tile.h"

namespace pyfused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Multiply-adds below which waking other threads costs more than it saves.
inline constexpr int64_t kParallelWork = 1 << 18;
// Tasks that a pass is cut into: enough for big machines, few enough for the partial sums to stay small.
inline constexpr int64_t kMaxTasks = 32;
inline constexpr int64_t kTaskRows = 64;
inline constexpr int64_t kRowsPerRank = 4;
inline constexpr int64_t kTaskColumns = 384;
// More rows make more tasks than that: a sum over more of them in one go loses accuracy.
inline constexpr int64_t kMaxTaskRows = 4096;

inline int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

inline Dtype dtype_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      fail(op, argument, "be float32, bfloat16, float16 or float64", "another dtype");
  }
}

inline void check_cpu(const Tensor& tensor, const char* op, const char* argument) {
  PF_CHECK(tensor.is_cpu(), op, argument, "be on the CPU", "another device");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* op,
                        const char* argument) {
  const auto sizes = tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) return;
  std::ostringstream expected;  // only now: building a message costs more than a small op
  expected << "have shape [";
  for (const int64_t* size = shape.begin(); size != shape.end(); ++size) {
    expected << (size == shape.begin() ? "" : ", ") << *size;
  }
  expected << ']';
  fail(op, argument, expected.str(), shape_of(tensor));
}

// A contiguous CPU tensor, not initialised: leading's sizes but for the last, then the last given.
inline Tensor empty(const int64_t* leading, size_t leading_count, int64_t last, ScalarType type) {
  std::vector<int64_t> sizes(leading, leading + leading_count);
  sizes.push_back(last);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
                               aoti_torch_device_type_cpu(), 0, &handle) != AOTI_TORCH_SUCCESS) {
    std::ostringstream message;
    message << "pyfused: not enough memory for a tensor of " << stride << " elements";
    throw std::runtime_error(message.str());
  }
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type) {
  return empty(shape.begin(), shape.size() - 1, shape.end()[-1], type);
}

// The vendor's GEMM: out = a b, or bias + a b, into memory of ours. The C shim goes past the dispatcher, so neither
// autocast nor autograd of the caller's surroundings can change what comes out.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  const AOTITorchError error = bias.has_value()
                                   ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                                   : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("pyfused: torch's matrix product failed (message above)");
}

// A tensor [..., columns] as a matrix: rows of unit stride, ld elements apart. Copied only where it has no such form.
struct Matrix {
  Tensor tensor;  // keeps a copy alive
  int64_t ld;

  explicit Matrix(const Tensor& source) : tensor(source), ld(leading_dimension(source)) {
    if (ld < 0) {
      tensor = torch::stable::contiguous(source);
      ld = source.size(source.dim() - 1);
    }
  }

 private:
  // -1 where rows are not evenly spaced or not of unit stride.
  static int64_t leading_dimension(const Tensor& source) {
    const auto sizes = source.sizes();
    const auto strides = source.strides();
    const int64_t last = source.dim() - 1;
    if (sizes[last] > 1 && strides[last] != 1) return -1;
    int64_t ld = sizes[last], expected = -1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (expected < 0) {
        ld = strides[i];
        if (ld < sizes[last]) return -1;  // rows overlap, as in an expanded tensor
      } else if (strides[i] != expected) {
        return -1;
      }
      expected = strides[i] * sizes[i];
    }
    return ld;
  }
};

// Memory that lives for one call. Not zeroed.
class Scratch {
 public:
  // rows x columns elements
  Scratch(int64_t rows, int64_t columns, Dtype accumulator) : size_(accumulator == Dtype::kFloat64 ? 8 : 4) {
    int64_t bytes;
    if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, size_, &bytes)) {
      throw std::bad_alloc();
    }
    bytes_.reset(new (std::align_val_t{64}) char[static_cast<size_t>(std::max<int64_t>(bytes, 1))]);
  }
  void* at(int64_t element) const { return bytes_.get() + element * size_; }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete[](p, std::align_val_t{64}); }
  };
  int64_t size_;
  std::unique_ptr<char[], Free> bytes_;
};

// An adapter's matrix in the accumulation type: packed, or the tensor itself where that is as good.
struct Operand {
  std::optional<Scratch> packed;
  const void* data;
  int64_t ld;
};

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

// Cuts an M x columns matrix into row ranges x column ranges, by shape alone. Each row range of a pass that sums over
// rows writes a part of [rank, columns]: the ranges are long enough for the parts to be small beside the matrix.
struct Grid {
  int64_t rows, columns, row_step, column_step, row_tasks, column_tasks;

  Grid(int64_t rows, int64_t columns, int64_t rank) : rows(rows), columns(columns) {
    column_tasks = std::clamp<int64_t>(divide_up(columns, kTaskColumns), 1, kMaxTasks);
    column_step = round_up(divide_up(columns, column_tasks), kTileColumns);
    column_tasks = std::max<int64_t>(divide_up(columns, column_step), 1);
    const int64_t shortest = std::max(kTaskRows, kRowsPerRank * rank);
    const int64_t wanted = std::clamp<int64_t>(kMaxTasks / column_tasks, 1, std::max<int64_t>(rows / shortest, 1));
    row_step = std::min(round_up(divide_up(rows, wanted), 16), kMaxTaskRows);
    row_tasks = std::max<int64_t>(divide_up(rows, std::max<int64_t>(row_step, 1)), 1);
  }
  int64_t tasks() const { return row_tasks * column_tasks; }
  Tile tile(int64_t row_task, int64_t column_task) const {
    return {row_task * row_step, std::min((row_task + 1) * row_step, rows), column_task * column_step,
            std::min((column_task + 1) * column_step, columns)};
  }
};

}  // namespace pyfused
