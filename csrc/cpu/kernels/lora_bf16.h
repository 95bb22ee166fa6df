// LoRA's loops on bf16 data, for lora.cpp: the same products as there, on pairs of vectors (bf16_pairs.h) that are read
// as they are, with no widened copy of a tile. Operands and sums in parts are in the pairs' order.
#pragma once

#include "bf16_pairs.h"
#include "keep_bits.h"
#include "lora.h"
#include "mask_tile.h"
#include "pack.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Register blocking. Two rows and as many ranks as make one sum for each lane, so that these are added up together; an
// outer product has a pair of sums for each rank, or two pairs for each row.
constexpr int kPairDotRows = 2;
constexpr int kPairDotRanks = kWidth<float> / kPairDotRows;
#if defined(__AVX512F__)
constexpr int kPairOuterRanks = 8;
constexpr int kPairExpandRows = 4;
#else
constexpr int kPairOuterRanks = 4;
constexpr int kPairExpandRows = 2;
#endif

// A tile of rows that stays in the first-level cache between two products, 12 KiB.
constexpr int kPairRows = 16;
constexpr int kPairColumns = 384;

// Rows of bf16, masked by bits where these are given; nothing is read beyond the last column.
struct PairRows {
  const bf16* data;
  int64_t ld, columns;
  const uint32_t* bits;
  int64_t ld_bits;

  PairRows some(int64_t row) const {
    return {data + row * ld, ld, columns, bits == nullptr ? nullptr : bits + row * ld_bits, ld_bits};
  }
  template <bool Masked, bool Whole>
  PYFUSED_INLINE Pair at(int64_t row, int64_t column) const {
    const bf16* from = data + row * ld + column;
    PairWords words = Whole ? load_words(from) : load_words_first(from, columns - column);
    if constexpr (Masked) words = select_words(vector_bits<float>(bits + row * ld_bits, column), words, PairWords{});
    return widen(words);
  }
};

template <int Rows, int Ranks, bool Masked>
__attribute__((noinline)) void dot_pairs_tile(const PairRows& x, const float* a, int64_t ld_a, float* s, int64_t ld_s,
                                              bool accumulate) {
  Vector<float> sums[Rows * Ranks];
#pragma GCC unroll 16
  for (Vector<float>& sum : sums) sum = Vector<float>{};
  const auto step = [&](int64_t k, auto whole) PYFUSED_INLINE_LAMBDA {
    Pair rows[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) rows[m] = x.at<Masked, decltype(whole)::value>(m, k);
#pragma GCC unroll 16
    for (int r = 0; r < Ranks; ++r) {
      Vector<float> even = load(a + r * ld_a + k), odd = load(a + r * ld_a + k + kWidth<float>);
      // read once for both rows: as operands in memory they would take the load ports twice as long
      keep_in_register(even);
      keep_in_register(odd);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) sums[m * Ranks + r] += rows[m].even * even;
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) sums[m * Ranks + r] += rows[m].odd * odd;
    }
  };
  int64_t k = 0;
  for (; k + kPairWidth <= x.columns; k += kPairWidth) step(k, Bool<true>{});
  if (k < x.columns) step(k, Bool<false>{});

  float totals[Rows * Ranks];
  if constexpr (Rows * Ranks == kWidth<float>) {
    const Vector<float> together = sum_each(sums);
    memcpy(totals, &together, sizeof totals);
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Rows * Ranks; ++i) totals[i] = sum_lanes(sums[i]);
  }
  for (int m = 0; m < Rows; ++m) {
    for (int r = 0; r < Ranks; ++r) {
      float& to = s[m * ld_s + r];
      to = accumulate ? to + totals[m * Ranks + r] : totals[m * Ranks + r];
    }
  }
}

template <int Rows, int Ranks, bool Masked>
inline void dot_pairs_ranks(const PairRows& x, const float* a, int64_t ld_a, int64_t R, float* s, int64_t ld_s,
                            bool accumulate) {
  int64_t r = 0;
  for (; r + Ranks <= R; r += Ranks) {
    dot_pairs_tile<Rows, Ranks, Masked>(x, a + r * ld_a, ld_a, s + r, ld_s, accumulate);
  }
  if constexpr (Ranks > 1) {
    if (r < R) dot_pairs_ranks<Rows, Ranks / 2, Masked>(x, a + r * ld_a, ld_a, R - r, s + r, ld_s, accumulate);
  }
}

// s[m][r] (+)= sum_k x[m][k] a[r][k]; a is zero beyond the columns.
template <bool Masked>
inline void dot_pairs(const PairRows& x, int64_t rows, const float* a, int64_t ld_a, int64_t R, float* s, int64_t ld_s,
                      bool accumulate) {
  int64_t m = 0;
  for (; m + kPairDotRows <= rows; m += kPairDotRows) {
    dot_pairs_ranks<kPairDotRows, kPairDotRanks, Masked>(x.some(m), a, ld_a, R, s + m * ld_s, ld_s, accumulate);
  }
  if (m < rows) dot_pairs_ranks<1, kPairDotRanks, Masked>(x.some(m), a, ld_a, R, s + m * ld_s, ld_s, accumulate);
}

template <int Ranks, bool Masked, bool Whole>
PYFUSED_INLINE void add_outer_pairs_tile(const float* p, int64_t ld_p, const PairRows& x, int64_t rows, int64_t column,
                                         float* c, int64_t ld_c) {
  Pair sums[Ranks];
#pragma GCC unroll 8
  for (Pair& sum : sums) sum = {Vector<float>{}, Vector<float>{}};
  for (int64_t m = 0; m < rows; ++m) {
    const Pair row = x.at<Masked, Whole>(m, column);
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const Vector<float> factor = splat<float>(p[m * ld_p + r]);
      sums[r].even += factor * row.even;
      sums[r].odd += factor * row.odd;
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Ranks; ++r) {
    float* to = c + r * ld_c + column;
    store(to, load(to) + sums[r].even);
    store(to + kWidth<float>, load(to + kWidth<float>) + sums[r].odd);
  }
}

// c[r][n] += sum_m p[m][r] x[m][n], c in the pairs' order.
template <bool Masked, int Ranks = kPairOuterRanks>
inline void add_outer_pairs(const float* p, int64_t ld_p, const PairRows& x, int64_t rows, int64_t R, float* c,
                            int64_t ld_c) {
  int64_t r = 0;
  for (; r + Ranks <= R; r += Ranks) {
    int64_t n = 0;
    for (; n + kPairWidth <= x.columns; n += kPairWidth) {
      add_outer_pairs_tile<Ranks, Masked, true>(p + r, ld_p, x, rows, n, c + r * ld_c, ld_c);
    }
    if (n < x.columns) add_outer_pairs_tile<Ranks, Masked, false>(p + r, ld_p, x, rows, n, c + r * ld_c, ld_c);
  }
  if constexpr (Ranks > 1) {
    if (r < R) add_outer_pairs<Masked, Ranks / 2>(p + r, ld_p, x, rows, R - r, c + r * ld_c, ld_c);
  }
}

// out = base + p q on one tile, base a row of y, a bias that all rows share (ld 0), or null for zero. Where bits are
// given, elements whose bit is not set are base alone.
template <int Rows, int Pairs, bool Whole>
PYFUSED_INLINE void expand_pairs_tile(const bf16* base, int64_t ld_base, bf16* out, int64_t ld_out, const float* p,
                                      int64_t ld_p, const float* q, int64_t ld_q, int64_t R, const uint32_t* bits,
                                      int64_t ld_bits, int64_t column, int64_t count) {
  Pair sums[Rows][Pairs];
  const auto words_of = [&](int i, int v) PYFUSED_INLINE_LAMBDA {
    const bf16* from = base + i * ld_base + v * kPairWidth;
    return base == nullptr ? PairWords{} : Whole ? load_words(from) : load_words_first(from, count);
  };
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Pairs; ++v) sums[i][v] = widen(words_of(i, v));
  }
  for (int64_t r = 0; r < R; ++r) {
    Pair row[Pairs];
#pragma GCC unroll 2
    for (int v = 0; v < Pairs; ++v) {
      const float* from = q + r * ld_q + v * kPairWidth;
      row[v] = {load(from), load(from + kWidth<float>)};
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector<float> factor = splat<float>(p[i * ld_p + r]);
#pragma GCC unroll 2
      for (int v = 0; v < Pairs; ++v) {
        sums[i][v].even += factor * row[v].even;
        sums[i][v].odd += factor * row[v].odd;
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < Pairs; ++v) {
      PairWords words = narrow(sums[i][v]);
      if (bits != nullptr) {
        words = select_words(vector_bits<float>(bits + i * ld_bits, column + v * kPairWidth), words, words_of(i, v));
      }
      bf16* to = out + i * ld_out + v * kPairWidth;
      Whole ? store_words(to, words) : store_words_first(to, words, count);
    }
  }
}

template <int Rows>
PYFUSED_INLINE void expand_pairs_rows(const bf16* base, int64_t ld_base, bf16* out, int64_t ld_out, const float* p,
                                      int64_t ld_p, const float* q, int64_t ld_q, int64_t R, int64_t columns,
                                      const uint32_t* bits, int64_t ld_bits) {
  const auto tile = [&](auto pairs, auto whole, int64_t n) PYFUSED_INLINE_LAMBDA {
    expand_pairs_tile<Rows, decltype(pairs)::value, decltype(whole)::value>(base == nullptr ? nullptr : base + n,
                                                                            ld_base, out + n, ld_out, p, ld_p, q + n,
                                                                            ld_q, R, bits, ld_bits, n, columns - n);
  };
  int64_t n = 0;
  for (; n + 2 * kPairWidth <= columns; n += 2 * kPairWidth) tile(Int<2>{}, Bool<true>{}, n);
  for (; n + kPairWidth <= columns; n += kPairWidth) tile(Int<1>{}, Bool<true>{}, n);
  if (n < columns) tile(Int<1>{}, Bool<false>{}, n);
}

inline void expand_pairs(const bf16* base, int64_t ld_base, bf16* out, int64_t ld_out, int64_t rows, int64_t columns,
                         int64_t R, const float* p, const float* q, int64_t ld_q, const uint32_t* bits,
                         int64_t ld_bits) {
  const auto some = [&](auto count, int64_t m) PYFUSED_INLINE_LAMBDA {
    expand_pairs_rows<decltype(count)::value>(base == nullptr ? nullptr : base + m * ld_base, ld_base, out + m * ld_out,
                                              ld_out, p + m * R, R, q, ld_q, R, columns,
                                              bits == nullptr ? nullptr : bits + m * ld_bits, ld_bits);
  };
  int64_t m = 0;
  for (; m + kPairExpandRows <= rows; m += kPairExpandRows) some(Int<kPairExpandRows>{}, m);
  for (; m < rows; ++m) some(Int<1>{}, m);
}

// The passes ----------------------------------------------------------------------------------------------------------

inline LoraOperand pack_pairs(SumOver product, Dtype source, const void* src, int64_t rank_stride,
                              int64_t column_stride, int64_t R, int64_t L, void* dst) {
  const LoraOperand packed = pack_operand<float>(product, source, src, rank_stride, column_stride, R, L, dst);
  reorder<true>(static_cast<float*>(dst), packed.ld, R, L);
  return packed;
}

inline void shrink_pairs(const void* x_, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R,
                         LoraOperand operand, const Mask& mask, double factor, void* s_) {
  constexpr int kRows = 2 * kPairDotRows, kColumns = 2048;
  const bf16* x = static_cast<const bf16*>(x_);
  const float* a = static_cast<const float*>(operand.data);
  float* s = static_cast<float*>(s_);
  MaskTile<kRows, kColumns> tile_bits(mask);
  const int64_t ld_bits = tile_bits.ld;
  const bool drop = mask.dropout.threshold != 0;
  for (int64_t m = row_begin; m < row_end; m += kRows) {
    const int64_t rows = min_of(kRows, row_end - m);
    for (int64_t k = 0; k < K; k += kColumns) {
      uint32_t* bits = tile_bits.at(m, k);
      const PairRows tile{x + m * ld_x + k, ld_x, min_of(kColumns, K - k), bits, ld_bits};
      if (drop) {
        keep_bits(mask.dropout, m, rows, k, round_up(tile.columns, philox::kBlockColumns) / philox::kBlockColumns, bits,
                  ld_bits);
        dot_pairs<true>(tile, rows, a + k, operand.ld, R, s + m * R, R, k != 0);
      } else {
        dot_pairs<false>(tile, rows, a + k, operand.ld, R, s + m * R, R, k != 0);
      }
    }
    if (factor != 1.0) {
      for (int64_t i = m * R; i < (m + rows) * R; ++i) s[i] *= static_cast<float>(factor);
    }
  }
}

inline void expand_bf16(const void* y, int64_t ld_y, const void* bias, void* out, int64_t ld_out, int64_t row_begin,
                        int64_t row_end, int64_t N, int64_t R, const void* s, LoraOperand b) {
  // a bias is a y whose rows all are the same
  const bf16* base = static_cast<const bf16*>(y != nullptr ? y : bias);
  if (y == nullptr) ld_y = 0;
  expand_pairs(base == nullptr ? nullptr : base + row_begin * ld_y, ld_y, static_cast<bf16*>(out) + row_begin * ld_out,
               ld_out, row_end - row_begin, N, R, static_cast<const float*>(s) + row_begin * R,
               static_cast<const float*>(b.data), b.ld, nullptr, 0);
}

// sums[n] += sum_m x[m][n] for the rows of one tile, in fp64: a plain sum over thousands of rows in fp32 would lose
// digits.
inline void add_rows(const PairRows& x, int64_t rows, double* sums) {
  const auto step = [&](int64_t n, auto whole) {
    Pair sum{};
    for (int64_t m = 0; m < rows; ++m) {
      const Pair row = x.at<false, decltype(whole)::value>(m, n);
      sum.even += row.even;
      sum.odd += row.odd;
    }
    for (int i = 0; i < kWidth<float>; ++i) {
      sums[n + 2 * i] += sum.even[i];
      sums[n + 2 * i + 1] += sum.odd[i];
    }
  };
  int64_t n = 0;
  for (; n + kPairWidth <= x.columns; n += kPairWidth) step(n, Bool<true>{});
  if (n < x.columns) step(n, Bool<false>{});
}

inline void backward_dy_pairs(const void* dy_, int64_t ld_dy, int64_t row_begin, int64_t row_end, int64_t N, int64_t R,
                              LoraOperand b, const void* s_, void* u_, void* dbt_, int64_t ld_dbt, void* dbias_) {
  const bf16* dy = static_cast<const bf16*>(dy_);
  const float* bt = static_cast<const float*>(b.data);
  const float* s = static_cast<const float*>(s_);
  float* u = static_cast<float*>(u_);
  float* dbt = static_cast<float*>(dbt_);
  float* dbias = static_cast<float*>(dbias_);
  for (int64_t n = 0; n < N; n += kPairColumns) {
    const int64_t columns = min_of(kPairColumns, N - n);
    const int64_t padded = round_up(columns, kPairWidth);
    double bias_sums[kPairColumns] = {};
    if (dbt != nullptr) clear(dbt + n, ld_dbt, R, padded);
    for (int64_t m = row_begin; m < row_end; m += kPairRows) {
      const int64_t rows = min_of(kPairRows, row_end - m);
      const PairRows tile{dy + m * ld_dy + n, ld_dy, columns, nullptr, 0};
      if (u != nullptr) dot_pairs<false>(tile, rows, bt + n, b.ld, R, u + m * R, R, n != 0);
      if (dbt != nullptr) add_outer_pairs<false>(s + m * R, R, tile, rows, R, dbt + n, ld_dbt);
      if (dbias != nullptr) add_rows(tile, rows, bias_sums);
    }
    if (dbt != nullptr) reorder<false>(dbt + n, ld_dbt, R, padded);
    if (dbias != nullptr) {
      for (int64_t k = 0; k < padded; ++k) dbias[n + k] = static_cast<float>(bias_sums[k]);
    }
  }
}

PYFUSED_INLINE void pairs_over_x(const void* x_, int64_t ld_x, void* dx_, int64_t ld_dx, bool accumulate_dx,
                                 int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand operand,
                                 const void* ds_, const Mask& mask, void* da_, int64_t ld_da) {
  const bf16* x = static_cast<const bf16*>(x_);
  bf16* dx = static_cast<bf16*>(dx_);
  const float* a = static_cast<const float*>(operand.data);
  const float* ds = static_cast<const float*>(ds_);
  float* da = static_cast<float*>(da_);
  MaskTile<kPairRows, kPairColumns> tile_bits(mask);
  const int64_t ld_bits = tile_bits.ld;
  const bool drop = mask.dropout.threshold != 0;
  for (int64_t k = 0; k < K; k += kPairColumns) {
    const int64_t columns = min_of(kPairColumns, K - k);
    const int64_t padded = round_up(columns, kPairWidth);
    if (da != nullptr) clear(da + k, ld_da, R, padded);
    for (int64_t m = row_begin; m < row_end; m += kPairRows) {
      const int64_t rows = min_of(kPairRows, row_end - m);
      uint32_t* bits = tile_bits.at(m, k);
      if (drop && !mask.made) {
        keep_bits(mask.dropout, m, rows, k, round_up(columns, philox::kBlockColumns) / philox::kBlockColumns, bits,
                  ld_bits);
      }
      if (da != nullptr) {
        const PairRows tile{x + m * ld_x + k, ld_x, columns, bits, ld_bits};
        if (drop) {
          add_outer_pairs<true>(ds + m * R, R, tile, rows, R, da + k, ld_da);
        } else {
          add_outer_pairs<false>(ds + m * R, R, tile, rows, R, da + k, ld_da);
        }
      }
      if (dx != nullptr) {
        bf16* to = dx + m * ld_dx + k;
        expand_pairs(accumulate_dx ? to : nullptr, ld_dx, to, ld_dx, rows, columns, R, ds + m * R, a + k, operand.ld,
                     drop ? bits : nullptr, ld_bits);
      }
    }
    if (da != nullptr) reorder<false>(da + k, ld_da, R, padded);
  }
}

inline void backward_x_pairs(const void* x, int64_t ld_x, void* dx, int64_t ld_dx, bool accumulate_dx,
                             int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand a, const void* ds,
                             const Mask& mask, void* da, int64_t ld_da) {
  pairs_over_x(x, ld_x, dx, ld_dx, accumulate_dx, row_begin, row_end, K, R, a, ds, mask, da, ld_da);
}

inline void sum_x_pairs(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, Dtype,
                        const void* ds, const Mask& mask, void* da, int64_t ld_da) {
  pairs_over_x(x, ld_x, nullptr, 0, false, row_begin, row_end, K, R, {}, ds, mask, da, ld_da);
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
