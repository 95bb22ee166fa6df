// The two register-blocked products of LoRA's loops, for lora.cpp, on data of the accumulation type:
//   dot_tile    s[m][r] += sum_k x[m][k] a[r][k]        (rank-wide results, long sums)
//   outer_tile  c[i][n] += sum_j p[i][j] q[j][n]        (full-width results, sums over rank or a few rows)
#pragma once

#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Register blocking: 16 accumulators where there are 32 vector registers, 8 where there are 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDotRanks = 4;
constexpr int kOuterVectors = 4;
#else
constexpr int kDotRanks = 2;
constexpr int kOuterVectors = 2;
#endif
constexpr int kDotRows = 4;
constexpr int kOuterRows = 4;

template <class Acc, int Rows, int Ranks>
__attribute__((noinline)) void dot_tile(const Acc* x, int64_t ld_x, const Acc* a, int64_t ld_a, int64_t K, Acc* s,
                                        int64_t ld_s, bool accumulate) {
  Vector<Acc> sums[Rows][Ranks] = {};
  for (int64_t k = 0; k < K; k += kWidth<Acc>) {
    Vector<Acc> rows[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) rows[m] = load(x + m * ld_x + k);
#pragma GCC unroll 4
    for (int r = 0; r < Ranks; ++r) {
      const Vector<Acc> column = load(a + r * ld_a + k);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) multiply_add_to(sums[m][r], rows[m], column);
    }
  }
  // Copied, every index a constant: else the compiler keeps the sums in memory while the loop runs.
  Acc lanes[Rows * Ranks * kWidth<Acc>];
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 4
    for (int r = 0; r < Ranks; ++r) store(lanes + (m * Ranks + r) * kWidth<Acc>, sums[m][r]);
  }
  Acc totals[Rows * Ranks];
  sum_lanes<Rows * Ranks>(lanes, totals);
  for (int m = 0; m < Rows; ++m) {
    for (int r = 0; r < Ranks; ++r) {
      const Acc total = totals[m * Ranks + r];
      s[m * ld_s + r] = accumulate ? s[m * ld_s + r] + total : total;
    }
  }
}

template <class Acc, int Ranks>
inline void dot_rows(const Acc* x, int64_t ld_x, int64_t rows, const Acc* a, int64_t ld_a, int64_t K, Acc* s,
                     int64_t ld_s, bool accumulate) {
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows) {
    dot_tile<Acc, kDotRows, Ranks>(x + m * ld_x, ld_x, a, ld_a, K, s + m * ld_s, ld_s, accumulate);
  }
  for (; m < rows; ++m) dot_tile<Acc, 1, Ranks>(x + m * ld_x, ld_x, a, ld_a, K, s + m * ld_s, ld_s, accumulate);
}

// s[m][r] (+)= sum_k x[m][k] a[r][k]; K is a multiple of the vector width, a is zero beyond the data. All rows for some
// ranks at a time: the rows are in the first-level cache, of many ranks a is not.
template <class Acc>
inline void dot(const Acc* x, int64_t ld_x, int64_t rows, const Acc* a, int64_t ld_a, int64_t K, int64_t R, Acc* s,
                int64_t ld_s, bool accumulate) {
  int64_t r = 0;
  for (; r + kDotRanks <= R; r += kDotRanks) {
    dot_rows<Acc, kDotRanks>(x, ld_x, rows, a + r * ld_a, ld_a, K, s + r, ld_s, accumulate);
  }
  if constexpr (kDotRanks > 2) {
    if (r + 2 <= R) {
      dot_rows<Acc, 2>(x, ld_x, rows, a + r * ld_a, ld_a, K, s + r, ld_s, accumulate);
      r += 2;
    }
  }
  if (r < R) dot_rows<Acc, 1>(x, ld_x, rows, a + r * ld_a, ld_a, K, s + r, ld_s, accumulate);
}

template <class Acc, int Rows, int Vectors, class Finish>
PYFUSED_INLINE void outer_tile(const Acc* p, int64_t stride_i, int64_t stride_j, const Acc* q, int64_t ld_q, int64_t J,
                               const Finish& finish) {
  Vector<Acc> sums[Rows][Vectors] = {};
  for (int64_t j = 0; j < J; ++j) {
    Vector<Acc> row[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) row[v] = load(q + j * ld_q + v * kWidth<Acc>);
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector<Acc> factor = splat<Acc>(p[i * stride_i + j * stride_j]);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[i][v] += factor * row[v];
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) finish(i, v, sums[i][v]);
  }
}

template <class Acc, int Vectors, class Finish>
PYFUSED_INLINE void outer_rows(const Acc* p, int64_t stride_i, int64_t stride_j, const Acc* q, int64_t ld_q, int64_t I,
                               int64_t J, int64_t column, const Finish& finish) {
  int64_t i = 0;
  for (; i + kOuterRows <= I; i += kOuterRows) {
    outer_tile<Acc, kOuterRows, Vectors>(p + i * stride_i, stride_i, stride_j, q, ld_q, J,
                                         [&](int di, int v, Vector<Acc> sum)
                                             PYFUSED_INLINE_LAMBDA { finish(i + di, column + v * kWidth<Acc>, sum); });
  }
  for (; i < I; ++i) {
    outer_tile<Acc, 1, Vectors>(p + i * stride_i, stride_i, stride_j, q, ld_q, J,
                                [&](int, int v, Vector<Acc> sum)
                                    PYFUSED_INLINE_LAMBDA { finish(i, column + v * kWidth<Acc>, sum); });
  }
}

// finish(i, n, sum_j p[i][j] q[j][n .. n + W)) for all i in [0, I) and n in [0, columns) in steps of W.
// q is readable up to a multiple of W beyond columns.
template <class Acc, class Finish>
PYFUSED_INLINE void outer(const Acc* p, int64_t stride_i, int64_t stride_j, const Acc* q, int64_t ld_q, int64_t I,
                          int64_t J, int64_t columns, const Finish& finish) {
  int64_t n = 0;
  for (; n + (kOuterVectors - 1) * kWidth<Acc> < columns; n += kOuterVectors * kWidth<Acc>) {
    outer_rows<Acc, kOuterVectors>(p, stride_i, stride_j, q + n, ld_q, I, J, n, finish);
  }
  for (; n < columns; n += kWidth<Acc>) outer_rows<Acc, 1>(p, stride_i, stride_j, q + n, ld_q, I, J, n, finish);
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
