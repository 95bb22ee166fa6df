// fp32 matrix products with an adapter's work in them, as the host sees them:
//   base = [keep of] update.x update.w + x w [+ out],  out = (base [+ bias]) [* scale]
// w is copied into panels that the loop reads line by line, in whichever order it lies: weight^T of a forward or weight
// of a backward. Each result is one sum over k in an order that K alone gives: its bits depend neither on the rows and
// columns beside it nor on how the work is cut.
//
// Names of sizes: M rows, K what is summed over, N columns of out.
#pragma once

#include <cstdint>

namespace pyfused {

struct F32Product {
  struct Term {
    const float* x;  // [M, K], rows ld_x apart
    int64_t ld_x;
    const float* w;  // element (k, n) at k * row_stride + n * column_stride, one of which is 1
    int64_t row_stride, column_stride, K;
  };
  Term base;
  Term update;           // a few columns more of x and rows of w, which come first; none where its K is 0
  const uint32_t* keep;  // or null: bit n % 32 of keep[m][n / 32] says whether the update counts for out[m][n]
  int64_t ld_keep;
  const float* factor;  // [K] or null: of base.w's rows
  const float* bias;    // [N] or null
  const float* scale;   // [N] or null
  float* unscaled;      // [M, N], rows ld_out apart, or null: base is kept there
  float* out;           // [M, N]
  int64_t ld_out;
  bool add;  // to what out has
  // Or null: dots[p][n] += the sum of base times other [M, N] over part p of the rows, which are part_rows each, a
  // multiple of a tile's; parts are N apart.
  const float* other;
  int64_t ld_other, part_rows;
  float* dots;
  int64_t M, N;
};

struct LinearF32Kernels {
  int64_t rows, columns;  // of a tile of results
  // Rows from which a call is faster than the vendor's product and the passes that it saves: a forward whose results
  // would be scaled, and other calls, which save less. And columns of dY up to which LoRA's dX is: with more, sums go
  // to dX and back more than once.
  int64_t scaled_rows, min_rows, max_depth;
  // Floats of memory, aligned to 64 bytes, that a block of so many columns needs.
  int64_t (*scratch)(const F32Product& call, int64_t columns);
  // out[m][n] for a block of rows and of columns; column_begin is a multiple of `columns`, row_begin of part_rows.
  void (*block)(const F32Product& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
                float* scratch);
};

// Null below AVX2.
namespace DEFAULT {
const LinearF32Kernels* linear_f32_kernels();
}
namespace AVX2 {
const LinearF32Kernels* linear_f32_kernels();
}
namespace AVX512 {
const LinearF32Kernels* linear_f32_kernels();
}
namespace AVX512_BF16 {
const LinearF32Kernels* linear_f32_kernels();
}

}  // namespace pyfused
