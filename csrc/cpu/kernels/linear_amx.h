// A linear layer in AMX tiles, for bf16, as the host sees it: out = x w^T + bias. Rows of w are tiles as they lie in
// memory, so w is the left factor and is not copied; x, turned into pairs of columns, is the right one. Each result is
// one sum over columns in their order, in fp32, rounded once: its bits do not depend on the rows beside it.
//
// Names of sizes: M rows, K columns of x, N columns of out; K and N are multiples of 32.
#pragma once

#include <cstdint>

namespace pyfused {

struct LinearRows {
  // Products of a result, one after the other: of x and w, and of a few more columns that are added, none where K is 0.
  struct Product {
    const void* x;  // tiles, linear_pack_rows
    const void* w;  // rows of K, ld_w apart
    int64_t ld_w, K;
  } base, update;
  const void* bias;  // [N] or null
  void* out;         // [M, N], contiguous
  int64_t M, N;
};

// The same for many rows, out = x w^T + bias, and for the gradient out = x w: rows of x are tiles as they lie in
// memory, and w is the right factor, packed for 32 columns of out at a time. Sums have the same order.
struct LinearPanels {
  const void* x;  // [M, K], rows ld_x apart
  int64_t ld_x;
  const void* w;  // [N, K] where by_row is set, else [K, N]; rows ld_w apart
  int64_t ld_w;
  bool by_row;
  const void *more_x, *more_w;  // `more` further columns of x and w, a multiple of 32 or 0; contiguous
  int64_t more;
  const uint32_t* keep;  // or null: bits of the results to which these columns are added, from keep[m * ld_keep] on
  int64_t ld_keep;
  const void* bias;    // [N] or null
  const float* scale;  // [N], or null: then scaled = out * scale is written as well
  void *out, *scaled;  // [M, N], contiguous; out may be null where scaled is asked for
  bool add;            // to what out has, which is read
  int64_t M, K, N;
};
// K, at most, and with `more`: LoRA's update is three terms of 64 ranks.
inline constexpr int64_t kMaxPanelSource = 2048, kMaxPanelDepth = kMaxPanelSource + 3 * 64;
inline constexpr int64_t kMinPanelRows = 32;

namespace AMX {
int64_t linear_rows_bytes(int64_t M, int64_t K);
// Rows [begin, end) of x [M, K]; begin is a multiple of 32, and so is end unless it is M.
void linear_pack_rows(const void* x, int64_t ld_x, int64_t M, int64_t K, int64_t begin, int64_t end, void* tiles);
// out[m][n] for rows from row_begin and columns from column_begin on, which are multiples of 32, and so are the ends
// unless they are the last.
void linear_block(const LinearRows& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end);

// Likewise for LinearPanels; at least kMinPanelRows rows.
void linear_panels(const LinearPanels& call, int64_t row_begin, int64_t row_end, int64_t column_begin,
                   int64_t column_end);
}  // namespace AMX

}  // namespace pyfused
