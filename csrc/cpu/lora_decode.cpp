// LoRA's forward for a few rows on CPU, as in decoding: the base product is the frozen layer's own call, and a and b
// are read as they are, by the loops of multi_lora. Packing them would touch their memory twice more, and vendors have
// products of their own for a few rows, but none that adds to what is there.
#include <algorithm>
#include <numeric>

#include "linear.h"
#include "lora.h"

namespace pyfused {
namespace {

// The adapter's share for a few rows, added to what out has. Such a call costs what it finds cold, a and b, so their
// ranks and columns are shared out among threads even where the arithmetic is small; the cut changes no sum.
struct DecodePass {
  // Ranks and columns of a task, and elements of the adapter from which on a thread is woken for them.
  static constexpr int64_t kTaskRanks = 8, kTaskColumns = 1024, kParallelElements = 1 << 15;

  const Lora& lora;
  const MultiLoraKernels& kernels;
  Matrix a, b;
  Dtype dtype_a, dtype_b;
  Scratch scaled;
  void *s, *out;
  int64_t rows[kDecodeRows];

  explicit DecodePass(const LoraForward& call)
      : lora(call.lora),
        kernels(multi_lora_kernels_for(lora.dtype)),
        a(call.a),
        b(call.b),
        dtype_a(dtype_of(call.a, lora.op, "a")),
        dtype_b(dtype_of(call.b, lora.op, "b")),
        scaled(lora.M, lora.R, lora.accumulator_size()),
        s(call.s.mutable_data_ptr()),
        out(call.out.mutable_data_ptr()) {
    std::iota(rows, rows + kDecodeRows, 0);
  }

  void run(const Matrix& x) const {
    // s has a row of R for each row of x, so that ranks can be cut for one row alone
    const int64_t step = lora.M == 1 ? kTaskRanks : lora.R;
    parallel_over(lora.R, step, lora.R * lora.K, [&](int64_t rank, int64_t count) {
      kernels.shrink[static_cast<int>(dtype_a)](x.tensor.const_data_ptr(), x.ld, rows, lora.M, lora.K, count,
                                                at(a.tensor.const_data_ptr(), rank * a.ld, dtype_a), a.ld,
                                                lora.mask.dropout, 0, lora.dropout_scale,
                                                static_cast<char*>(s) + rank * lora.accumulator_size());
    });
    lora.scale_rows(s, scaled.at(0), 0, lora.M, 1.0);
    parallel_over(lora.N, kTaskColumns, lora.R * lora.N, [&](int64_t column, int64_t count) {
      void* panel = workspace(kPanelElements * round_up(lora.R, kPanelRanks) * lora.accumulator_size());
      kernels.expand[static_cast<int>(dtype_b)](static_cast<char*>(out) + column * lora.element_size(), lora.N, rows,
                                                lora.M, count, lora.R, scaled.at(0),
                                                at(b.tensor.const_data_ptr(), column * b.ld, dtype_b), b.ld, panel);
    });
  }

 private:
  static const void* at(const void* data, int64_t element, Dtype dtype) {
    return static_cast<const char*>(data) + element * size_of(dtype);
  }

  template <class F>
  static void parallel_over(int64_t size, int64_t step, int64_t elements, const F& run) {
    const int64_t work = elements >= kParallelElements ? kParallelWork : 0;
    parallel(divide_up(size, step), work, [&](int64_t task) { run(task * step, std::min(step, size - task * step)); });
  }
};

}  // namespace

void lora_decode(std::span<const LoraForward> calls, const Tensor& x) {
  const Matrix rows(x);
  const Tensor x_rows = as_matrix(x, calls[0].lora.M, calls[0].lora.K);
  for (const LoraForward& call : calls) {
    if (call.weight == nullptr) {
      Tensor out = call.out;
      torch::stable::copy_(out, *call.y);
    } else {
      linear_out(as_matrix(call.out, call.lora.M, call.lora.N), x_rows, *call.weight, call.bias);
    }
  }
  for (const LoraForward& call : calls) DecodePass(call).run(rows);
}

}  // namespace pyfused
