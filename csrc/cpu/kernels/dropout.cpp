// Dropout on its own, compiled once per ISA level: an element is read once, its bit is made beside it.
#include "dropout.h"

#include "keep_bits.h"
#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Rows and columns whose bits are made at a time: what does not depend on the row is made once for all of them.
constexpr int kRows = 16;
constexpr int kColumns = 1024;

template <class T>
void drop(const void* x_, int64_t ld_x, void* dst_, int64_t row_begin, int64_t row_end, int64_t columns,
          Dropout dropout, double scale_) {
  using Acc = Accumulator<T>;
  const T* x = static_cast<const T*>(x_);
  T* dst = static_cast<T*>(dst_);
  const Acc scale = static_cast<Acc>(scale_);
  uint32_t bits[kRows * (kColumns / 32)];
  for (int64_t m = row_begin; m < row_end; m += kRows) {
    const int64_t rows = min_of(kRows, row_end - m);
    for (int64_t k = 0; k < columns; k += kColumns) {
      const int64_t width = min_of(kColumns, columns - k);
      keep_bits(dropout, m, rows, k, round_up(width, philox::kBlockColumns) / philox::kBlockColumns, bits,
                kColumns / 32);
      for (int64_t i = 0; i < rows; ++i) {
        const T* from = x + (m + i) * ld_x + k;
        T* to = dst + (m + i) * columns + k;
        const uint32_t* row = bits + i * (kColumns / 32);
        for_vectors<Acc>(0, width, [&](int64_t n, int count) {
          // not by a product with 0, so that an infinity that is dropped is gone
          store_some<Acc>(to + n, select<Acc>(vector_bits<Acc>(row, n), load_some<Acc>(from + n, count) * scale),
                          count);
        });
      }
    }
  }
}

constexpr DropoutKernels kTables[kDtypes] = {{drop<float>}, {drop<bf16>}, {drop<fp16>}, {drop<double>}};

}  // namespace

const DropoutKernels& dropout_kernels(Dtype dtype) { return kTables[static_cast<int>(dtype)]; }

}  // namespace pyfused::PYFUSED_ISA
