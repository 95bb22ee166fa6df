// LoRA's CPU loops as the host sees them: raw pointers, sizes in elements, one table per ISA level and data type.
//
// Names of sizes: M rows, K input features, N output features, R rank. `Acc` is float, double for double data. Tensors
// of 16-bit or fp32 data (x, y, dy, dx) come with a leading dimension. Each loop does whole rows, [row_begin, row_end):
// what it writes for a row depends on that row alone, so a caller may go from loop to loop while rows are in the cache.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/philox.h"
#include "tile.h"

namespace pyfused {

// An adapter's matrix as the loops read it: a [R, K], or b transposed [R, N]; L is K or N.
struct LoraOperand {
  const void* data;
  int64_t ld;    // of rows in Acc, where the table says `plain`
  Dtype source;  // dtype of the tensor it comes from
};

// Dropout of x: bit k % 32 of bits[m * ld + k / 32], ld a multiple of four words, says whether x[m][k] is kept.
struct Mask {
  Dropout dropout;  // threshold 0: none
  uint32_t* bits;   // null: made on the way and forgotten
  int64_t ld;
  bool made;  // they are there, and dropout's seed is not asked; else they are made, and left there
};

// What a product with an operand sums over. A level may pack differently for each.
enum class SumOver { kColumns, kRanks };

using LoraUnpack = void (*)(const void* parts, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows,
                            int64_t column_begin, int64_t column_end, const double* scale, void* dst,
                            int64_t row_stride, int64_t column_stride);

struct LoraKernels {
  // Operands are [R, ld] in Acc, zero beyond the last column up to ld, a multiple of kPackedColumns. A tensor that is
  // so already need not be packed.
  bool plain;
  // Whether a forward keeps dropout's mask for the backward: where making it again costs more than its memory.
  bool keeps_mask;
  int64_t (*packed_bytes)(SumOver product, Dtype source, int64_t R, int64_t L);
  // From an operand's element (r, l) at src[r * rank_stride + l * column_stride].
  LoraOperand (*pack)(SumOver product, Dtype source, const void* src, int64_t rank_stride, int64_t column_stride,
                      int64_t R, int64_t L, void* dst);

  // The way back for sums in parts: dst[i * row_stride + j * column_stride] = scale[i] * sum_p parts[p][i * ld + j] for
  // rows i and columns j in [column_begin, column_end); parts in Acc, part_stride apart, added in their order; scale
  // may be null. Indexed by dst's dtype.
  LoraUnpack unpack[kDtypes];

  // s[m][r] = factor * sum_k keep(m, k) x[m][k] a[r][k]. a sums over columns; s [M, R] contiguous, Acc.
  // The mask is not one that is there.
  void (*shrink)(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand a,
                 const Mask& mask, double factor, void* s);

  // out[m][n] = base + sum_r s[m][r] b[r][n], base being y[m][n] (out may be y), bias[n] or 0, whichever is not null.
  // b sums over ranks.
  void (*expand)(const void* y, int64_t ld_y, const void* bias, void* out, int64_t ld_out, int64_t row_begin,
                 int64_t row_end, int64_t N, int64_t R, const void* s, LoraOperand b);

  // One pass over rows of dy, for what is not null:
  //   u[m][r] = sum_n dy[m][n] b[r][n]  (u [M, R], Acc; b sums over columns)
  //   dbt[r][n] = sum_m s[m][r] dy[m][n], dbias[n] = sum_m dy[m][n]  (Acc: these rows' share)
  void (*backward_dy)(const void* dy, int64_t ld_dy, int64_t row_begin, int64_t row_end, int64_t N, int64_t R,
                      LoraOperand b, const void* s, void* u, void* dbt, int64_t ld_dbt, void* dbias);

  // One pass over rows of x and dx with the mask made once, for what is not null:
  //   da[r][k] = sum_m ds[m][r] keep(m, k) x[m][k]  (Acc: these rows' share)
  //   dx[m][k] (+)= keep(m, k) sum_r ds[m][r] a[r][k]  (a sums over ranks)
  void (*backward_x)(const void* x, int64_t ld_x, void* dx, int64_t ld_dx, bool accumulate_dx, int64_t row_begin,
                     int64_t row_end, int64_t K, int64_t R, LoraOperand a, const void* ds, const Mask& mask, void* da,
                     int64_t ld_da);

  // backward_x's da, by the same bits, for an a of the dtype given, where it is not null, and the mask's bits where
  // they are not there. Null where no base product of ours has the share of dx in it.
  void (*sum_x)(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, Dtype of_a,
                const void* ds, const Mask& mask, void* da, int64_t ld_da);
};

// For calls on `rows` rows of `dtype` with rank R, where neither K nor N is below `columns`.
namespace DEFAULT {
const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, int64_t columns, int64_t R);
}
namespace AVX2 {
const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, int64_t columns, int64_t R);
}
namespace AVX512 {
const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, int64_t columns, int64_t R);
}
namespace AVX512_BF16 {
const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, int64_t columns, int64_t R);
}
// What level AMX does in tiles; the rest is left to its loops on vectors: for 24 rows packing operands into tiles costs
// more than the tiles save.
inline constexpr int64_t kAmxMinRows = 64, kAmxMaxRank = 64;
namespace AMX {
const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, int64_t columns, int64_t R);
}  // namespace AMX

}  // namespace pyfused
