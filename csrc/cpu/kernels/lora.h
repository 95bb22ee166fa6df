// LoRA's CPU loops as the host sees them: raw pointers, sizes in elements, one table per ISA level and data type.
//
// Names of sizes: M rows, K input features, N output features, R rank. `Acc` is float, double for double data. Tensors
// of 16-bit or fp32 data (x, y, dy, dx) come with a leading dimension; a and bt are packed in Acc with a leading
// dimension that is a multiple of kPackedColumns, zero beyond the last column.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/philox.h"
#include "tile.h"

namespace pyfused {

struct LoraKernels {
  // dst[i][j] = src[i * row_stride + j * column_stride] in Acc; columns up to ld_dst are zero. Indexed by src's dtype.
  void (*pack[kDtypes])(const void* src, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                        void* dst, int64_t ld_dst);

  // The way back for sums in parts: dst[i * row_stride + j * column_stride] = scale[i] * sum_p parts[p][i * ld + j] for
  // rows i and columns j in [column_begin, column_end); parts in Acc, part_stride apart, added in their order; scale
  // may be null. Indexed by dst's dtype.
  void (*unpack[kDtypes])(const void* parts, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows,
                          int64_t column_begin, int64_t column_end, const double* scale, void* dst, int64_t row_stride,
                          int64_t column_stride);

  // s[m][r] = sum_k keep(m, k) x[m][k] a[r][k] for rows [row_begin, row_end). s [M, R] contiguous, Acc.
  void (*shrink)(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, const void* a,
                 int64_t ld_a, Dropout dropout, void* s);

  // out[m][n] = y[m][n] + sum_r s[m][r] bt[r][n] on a tile; out may be y.
  void (*expand)(const void* y, int64_t ld_y, void* out, int64_t ld_out, Tile tile, int64_t R, const void* s,
                 const void* bt, int64_t ld_bt);

  // The same for a few rows and b [N, R] as it is, in Acc with rows of unit stride: packing would touch b's memory
  // twice more. False, and nothing done, where R is no multiple of the vector width.
  bool (*decode_expand)(const void* y, int64_t ld_y, void* out, int64_t ld_out, int64_t M, int64_t N, int64_t R,
                        const void* s, const void* b, int64_t ld_b);

  // One pass over a tile of dy, for what is not null:
  //   ds[m][r] = sum_n dy[m][n] bt[r][n]  (ds [M, R], Acc: this column range's share)
  //   dbt[r][n] = sum_m s[m][r] dy[m][n], dbias[n] = sum_m dy[m][n]  (Acc: this row range's share)
  void (*backward_dy)(const void* dy, int64_t ld_dy, Tile tile, int64_t R, const void* bt, int64_t ld_bt, const void* s,
                      void* ds, void* dbt, int64_t ld_dbt, void* dbias);

  // One pass over a tile of x and dx with the mask made once, for what is not null:
  //   da[r][k] = sum_m ds[m][r] keep(m, k) x[m][k]  (Acc: this row range's share)
  //   dx[m][k] (+)= keep(m, k) sum_r ds[m][r] a[r][k]
  void (*backward_x)(const void* x, int64_t ld_x, void* dx, int64_t ld_dx, bool accumulate_dx, Tile tile, int64_t R,
                     const void* a, int64_t ld_a, const void* ds, Dropout dropout, void* da, int64_t ld_da);
};

namespace DEFAULT {
const LoraKernels& lora_kernels(Dtype dtype);
}
namespace AVX2 {
const LoraKernels& lora_kernels(Dtype dtype);
}
namespace AVX512 {
const LoraKernels& lora_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const LoraKernels& lora_kernels(Dtype dtype);
}

}  // namespace pyfused
