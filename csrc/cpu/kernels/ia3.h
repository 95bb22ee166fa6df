// IA3's CPU loops as the host sees them: raw pointers, sizes in elements, one table per ISA level and data type.
//
// `Acc` is float, double for double data. A matrix of data has rows of unit stride, ld elements apart. Vectors in Acc
// (scale, sums) are padded to a multiple of kPackedColumns, zero beyond the last column.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "tile.h"

namespace pyfused {

struct Ia3Kernels {
  // Vectors into Acc and sums in parts back: see LoraKernels.
  void (*pack[kDtypes])(const void* src, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns,
                        void* dst, int64_t ld_dst);
  void (*unpack[kDtypes])(const void* parts, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows,
                          int64_t column_begin, int64_t column_end, const double* scale, void* dst, int64_t row_stride,
                          int64_t column_stride);

  // dst[m][n] = (src[m][n] + shift[n]) * scale[n] for rows [row_begin, row_end); dst may be src, shift may be null.
  void (*scale_columns)(const void* src, int64_t ld_src, void* dst, int64_t ld_dst, int64_t row_begin, int64_t row_end,
                        int64_t columns, const void* scale, const void* shift);

  // One read of the gradient and of what was scaled, for what is not null:
  //   dst[m][n] = dy[m][n] * scale[n]       (dst may be dy)
  //   dscale[n] = sum_m dy[m][n] (z[m][n] + shift[n])    (Acc, this row range's share; shift may be null)
  void (*scale_columns_backward)(const void* dy, int64_t ld_dy, const void* z, int64_t ld_z, void* dst, int64_t ld_dst,
                                 int64_t row_begin, int64_t row_end, int64_t columns, const void* scale,
                                 const void* shift, void* dscale);

  // The same where rows share a factor: row r of the contiguous [rows, columns] is scaled by scale[r % period].
  void (*scale_rows)(const void* src, void* dst, int64_t row_begin, int64_t row_end, int64_t columns, int64_t period,
                     const void* scale);
  // dots[r] = sum_c dy[r][c] z[r][c], Acc; dst as above.
  void (*scale_rows_backward)(const void* dy, const void* z, void* dst, int64_t row_begin, int64_t row_end,
                              int64_t columns, int64_t period, const void* scale, void* dots);
};

namespace DEFAULT {
const Ia3Kernels& ia3_kernels(Dtype dtype);
}
namespace AVX2 {
const Ia3Kernels& ia3_kernels(Dtype dtype);
}
namespace AVX512 {
const Ia3Kernels& ia3_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const Ia3Kernels& ia3_kernels(Dtype dtype);
}

}  // namespace pyfused
