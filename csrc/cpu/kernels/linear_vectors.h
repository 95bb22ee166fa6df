// Matrix products on vectors, with an adapter's work in them, as the host sees them:
//   base = [keep of] update.x update.w + x [keep of] w [+ out],  out = (base [+ bias]) [* scale] [+ residual]
// for x, w, bias and results of one data type T, fp32 or 16 bits. Sums are in fp32, rounded to T as they are stored. w
// is copied into panels that the loop reads line by line, in whichever order it lies: weight^T of a forward or weight
// of a backward. Each result is one sum over k in an order that K alone gives: its bits depend neither on the rows and
// columns beside it nor on how the work is cut.
//
// Names of sizes: M rows, K what is summed over, N columns of out.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace pyfused {

struct LinearProduct {
  Dtype dtype;
  struct Base {
    const void* x;  // element (m, k) at m * x_row + k * x_column
    int64_t x_row, x_column;
    const void* w;  // element (k, n) at k * w_row + n * w_column, one of which is 1
    int64_t w_row, w_column, K;
    // Or null: bit n % 32 of w_keep[k][n / 32] says whether w[k][n] counts, where w_column is 1.
    const uint32_t* w_keep;
    int64_t ld_w_keep;
  } base;
  // Or null: base.w as `pack` leaves it, for calls that differ in their rows alone. They have no update.
  float* panels;
  // A few columns more of x and rows of w, in fp32, which come first; none where its K is 0.
  struct Update {
    const float* x;
    int64_t ld_x;
    const float* w;
    int64_t ld_w, K;
  } update;
  const uint32_t* keep;  // or null: bit n % 32 of keep[m][n / 32] says whether the update counts for out[m][n]
  int64_t ld_keep;
  const float* factor;  // [K] or null: of base.w's rows
  const void* bias;     // [N] or null
  const float* scale;   // [N] or null
  // [M, N], rows ld_out apart, or null: base is kept there, in 16 bits with the bias, as whoever reads it expects.
  void* unscaled;
  void* out;  // [M, N]
  int64_t ld_out;
  const void* residual;  // [M, N], rows ld_residual apart, or null
  int64_t ld_residual;
  bool add;  // to what out has
  // Or null: dots[p][n] += the sum of base times other [M, N] over part p of the rows, which are part_rows each, a
  // multiple of a tile's; parts are N apart.
  const void* other;
  int64_t ld_other, part_rows;
  float* dots;
  int64_t M, N;
};

// What a product is for, which says from how many rows on ours is faster than the vendor's and the passes that it
// saves: a forward whose results would be scaled, one with an adapter's share, which saves less; any such backward; the
// frozen layer's products alone; a bottleneck's by rows, and its weights' gradients, of as many rows as it has hidden
// values.
enum class ProductFor { kScaled, kForward, kBackward, kPlainForward, kPlainBackward, kBottleneck, kBottleneckGradient };

struct LinearVectorKernels {
  int64_t rows, columns;  // of a tile of results
  // By ProductFor: from how many rows on, and N and K below which copies and padding cost too much.
  struct Least {
    int64_t rows, size;
  } least[7];
  int64_t max_depth;  // columns of dY up to which LoRA's dX is: with more, sums go to dX and back more than once
  // Floats of memory, aligned to 64 bytes, that a block of so many columns needs.
  int64_t (*scratch)(const LinearProduct& call, int64_t columns);
  // Floats of call.panels, and what fills those of columns from column_begin, a multiple of `columns`, to column_end.
  int64_t (*packed_size)(const LinearProduct& call);
  void (*pack)(const LinearProduct& call, int64_t column_begin, int64_t column_end);
  // out[m][n] for a block of rows and of columns; column_begin is a multiple of `columns`, row_begin of part_rows.
  void (*block)(const LinearProduct& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                float* scratch);
};

// Null where there is no faster one than the vendor's.
namespace DEFAULT {
const LinearVectorKernels* linear_vector_kernels(Dtype dtype);
}
namespace AVX2 {
const LinearVectorKernels* linear_vector_kernels(Dtype dtype);
}
namespace AVX512 {
const LinearVectorKernels* linear_vector_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const LinearVectorKernels* linear_vector_kernels(Dtype dtype);
}

}  // namespace pyfused
