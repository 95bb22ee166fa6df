// The bottleneck's CPU loops as the host sees them: raw pointers, sizes in elements, one table per ISA level and type.
//
// Names of sizes: M rows, D width, H bottleneck. T is the type of x, y and dy. The products run in a type P, T itself
// or (where the adapter has another dtype) the accumulation type Acc: float, double for double data. Matrices of M x H
// are contiguous; those of M x D have a leading dimension.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../../common/dtype.h"
#include "../../common/philox.h"

namespace pyfused {

// The most rows that the products of a few rows take; fp64.
inline constexpr int64_t kMaxFewRows = 16;
inline constexpr int64_t kMaxFewDoubleRows = 4;

struct BottleneckKernels {
  // As in LoraKernels.
  void (*pack[kDtypes])(const void* src, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                        void* dst, int64_t ld_dst);
  void (*unpack[kDtypes])(const void* parts, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows,
                          int64_t column_begin, int64_t column_end, const double* scale, void* dst, int64_t row_stride,
                          int64_t column_stride);

  // h = activation(z) for rows of H; both of this table's type.
  void (*activate)(const void* z, int64_t rows, int64_t H, Activation activation, void* h);

  // From z and dh = dL/dh: dz = dh * factor * activation'(z), which may be dh, h = h_factor * activation(z), and
  // sums[j] += sum_m dz[m][j] in fp64. h and sums may be null. All else is of this table's type.
  void (*activate_backward)(const void* z, const void* dh, int64_t rows, int64_t H, Activation activation,
                            double factor, double h_factor, void* h, void* dz, double* sums);

  // out[m][d] = residual[m][d] + keep(first_row + m, first_column + d) * (u[m][d] * scale[d] + bias[d]); residual may
  // be null, out may be u. scale and bias in Acc, D long; dropout wants first_column to begin a block of philox.h.
  // finish: u is of this table's type; finish_wide: u is Acc.
  void (*finish)(const void* u, int64_t ld_u, const void* residual, int64_t ld_residual, void* out, int64_t ld_out,
                 int64_t first_row, int64_t first_column, int64_t rows, int64_t D, const void* scale, const void* bias,
                 Dropout dropout);
  void (*finish_wide)(const void* u, int64_t ld_u, const void* residual, int64_t ld_residual, void* out, int64_t ld_out,
                      int64_t first_row, int64_t first_column, int64_t rows, int64_t D, const void* scale,
                      const void* bias, Dropout dropout);

  // Bit d % 32 of bits[m * ld + d / 32] says whether dropout keeps (first_row + m, d); ld a multiple of four words.
  void (*make_keep_bits)(Dropout dropout, int64_t first_row, int64_t rows, int64_t D, uint32_t* bits, int64_t ld);

  // g[m][d] = dy[m][d] where the bits, if there are any, say so, else 0; sums[d] += sum_m g[m][d] in fp64. g and sums
  // may be null.
  void (*mask)(const void* dy, int64_t ld_dy, int64_t rows, int64_t D, const uint32_t* bits, int64_t ld_bits, void* g,
               int64_t ld_g, double* sums);

  // For a few rows, indexed by w's dtype: out[m][n - begin] = sum_k x[m][k] w[n][k] for n in [begin, end), in Acc, for
  // up to kMaxFewRows rows, kMaxFewDoubleRows in fp64. w has rows of unit stride. x is what pack_few_rows makes of rows
  // of this table's type in memory for a multiple of 4 rows of one of 16 columns; out has rows for a multiple of 4,
  // columns for one of 8.
  void (*pack_few_rows)(const void* x, int64_t ld_x, int64_t M, int64_t K, void* to);
  void (*few_rows[kDtypes])(const void* x, int64_t M, int64_t K, const void* w, int64_t ld_w, int64_t begin,
                            int64_t end, void* out, int64_t ld_out);
};

namespace DEFAULT {
const BottleneckKernels& bottleneck_kernels(Dtype dtype);
}
namespace AVX2 {
const BottleneckKernels& bottleneck_kernels(Dtype dtype);
}
namespace AVX512 {
const BottleneckKernels& bottleneck_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const BottleneckKernels& bottleneck_kernels(Dtype dtype);
}

}  // namespace pyfused
