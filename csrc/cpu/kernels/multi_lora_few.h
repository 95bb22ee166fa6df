// multi_lora's expand for few rows without a panel: b's columns are used as they come out of the transposition.
#pragma once

#include "multi_lora_panel.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int64_t kFewRows = 4;

// y[i] += s[i] b^T. Sums<A, Rows> adds up a lane's ranks of 16 or fewer columns at a time; it has kTerms numbers in s
// for each rank, those of a row ld_s from those of the next.
template <template <class, int> class Sums, int Rows, class T, class A>
void expand_rows(T* const* y, const float* s, int64_t ld_s, int64_t R, const A* b, int64_t ld_b, int64_t N) {
  constexpr int kRanks = kLaneRanks<A>;
  int64_t n = 0;
  for (; n + kBlockRows <= N; n += kBlockRows) {
    const A* block = b + n * ld_b;
    Vector<float> column[kRanks];
    Sums<A, Rows> sums;
    ask_ahead(block, ld_b, R);
#if defined(__AVX512F__)
    if (R == kRanks && ld_b == kRanks) {
      transpose_packed(block, column);
      sums.add(0, R, s, ld_s, column);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) store(y[i] + n, in_order(sums.total(i)) + load(y[i] + n));
      continue;
    }
#endif
    for (int64_t r = 0; r < R; r += kRanks) {
      if (r + kRanks <= R) {
        transpose_block(block + r, ld_b, kRanks, column);
      } else {
        transpose_block(block + r, ld_b, static_cast<int>(R - r), column);
      }
      sums.add(r, R, s + r * sums.kTerms, ld_s, column);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) store(y[i] + n, sums.total(i) + load(y[i] + n));
  }
  if (n == N) return;
  const int columns = static_cast<int>(N - n);
  Sums<A, Rows> sums;
  for (int64_t r = 0; r < R; r += kRanks) {
    Vector<float> column[kRanks] = {};
    for (int i = 0; i < min_of(kRanks, R - r); ++i) {
      for (int j = 0; j < columns; ++j) column[i][j] = load_one(b + (n + j) * ld_b + r + i);
    }
    sums.add(r, R, s + r * sums.kTerms, ld_s, column);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) store_first(y[i] + n, sums.total(i) + load_first(y[i] + n, columns), columns);
}

// The same for up to kFewRows rows, which are rows[i] of y.
template <template <class, int> class Sums, class T, class A>
void expand_few(T* y, int64_t ld_y, const int64_t* rows, int64_t count, const float* s, int64_t ld_s, int64_t R,
                const A* b, int64_t ld_b, int64_t N) {
  T* few[kFewRows];
  for (int64_t m = 0; m < count; ++m) few[m] = y + rows[m] * ld_y;
  switch (count) {
    case 1:
      return expand_rows<Sums, 1>(few, s, ld_s, R, b, ld_b, N);
    case 2:
      return expand_rows<Sums, 2>(few, s, ld_s, R, b, ld_b, N);
    case 3:
      return expand_rows<Sums, 3>(few, s, ld_s, R, b, ld_b, N);
    case 4:
      return expand_rows<Sums, 4>(few, s, ld_s, R, b, ld_b, N);
  }
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
