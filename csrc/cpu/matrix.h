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
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../common/dtype.h"
#include "../common/tensor.h"
#include "kernels/tile.h"

namespace pyfused {

// Multiply-adds below which waking other threads costs more than it saves.
inline constexpr int64_t kParallelWork = 1 << 18;
// Tasks that a pass is cut into: enough for big machines, few enough for the partial sums to stay small.
inline constexpr int64_t kMaxTasks = 32;
inline constexpr int64_t kTaskRows = 64;
inline constexpr int64_t kRowsPerRank = 4;
inline constexpr int64_t kTaskColumns = 384;
// More rows make more tasks than that: a sum over more of them in one go loses accuracy.
inline constexpr int64_t kMaxTaskRows = 4096;

// The vendor's GEMM: out = a b, or bias + a b, into memory of ours. The C shim goes past the dispatcher, so neither
// autocast nor autograd of the caller's surroundings can change what comes out.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b, const std::optional<Tensor>& bias) {
  const AOTITorchError error = bias.has_value()
                                   ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), a.get(), b.get(), 1.0, 1.0)
                                   : aoti_torch_cpu_mm_out(out.get(), a.get(), b.get());
  if (error != AOTI_TORCH_SUCCESS) throw std::runtime_error("pyfused: torch's matrix product failed (message above)");
}

// out += a b
inline void matmul_add(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (aoti_torch_cpu_addmm_out(out.get(), out.get(), a.get(), b.get(), 1.0, 1.0) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("pyfused: torch's matrix product failed (message above)");
  }
}

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
  bool operator==(const Grid&) const = default;
  int64_t tasks() const { return row_tasks * column_tasks; }
  Tile tile(int64_t row_task, int64_t column_task) const {
    return {row_task * row_step, std::min((row_task + 1) * row_step, rows), column_task * column_step,
            std::min((column_task + 1) * column_step, columns)};
  }
};

}  // namespace pyfused
