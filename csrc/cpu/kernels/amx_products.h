// Products of bf16 data with a factor of few ranks, in AMX tiles: results of rank columns, results of full width, and
// results that are summed over rows. Sums are kept in fp32.
#pragma once

#include "amx.h"
#include "amx_factors.h"
#include "keep_bits.h"
#include "lora.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Rows that a loop takes at a time: two tiles for products that write them, four where they are summed over.
constexpr int64_t kPanelRows = 32;
constexpr int64_t kSumRows = 64;

// ---- results of rank columns: s = x a^T, u = dy b -------------------------------------------------------------------

constexpr int64_t kCopyColumns = 512;  // of 32 rows, half of the first-level cache

inline __mmask32 columns_present(int64_t n, int64_t columns) {
  return columns - n >= 32 ? 0xffffffffu : (1u << (columns - n)) - 1;
}

// Rows of x, zero up to whole tiles.
inline void copy_rows(const bf16* x, int64_t ld_x, int64_t rows, int64_t columns, bf16* to, int64_t ld) {
  const int64_t whole = columns / 32 * 32;
  for (int64_t m = 0; m < rows; ++m) {
    memcpy(to + m * ld, x + m * ld_x, static_cast<size_t>(whole) * sizeof(bf16));
    if (whole == columns) continue;
    const __m512i rest = _mm512_maskz_loadu_epi16(columns_present(whole, columns), x + m * ld_x + whole);
    _mm512_store_si512(to + m * ld + whole, rest);
  }
  if (rows < kPanelRows) memset(to + rows * ld, 0, static_cast<size_t>((kPanelRows - rows) * ld) * sizeof(bf16));
}

// The same, masked, of rows from row_begin and columns from column_begin on.
inline void copy_kept_rows(const bf16* x, int64_t ld_x, const Mask& mask, int64_t row_begin, int64_t rows,
                           int64_t column_begin, int64_t columns, bf16* to, int64_t ld) {
  for (int64_t k = 0; k < columns; k += philox::kBlockColumns) {
    uint32_t* bits = mask.bits != nullptr ? mask.bits + row_begin * mask.ld + (column_begin + k) / 32 : nullptr;
    for_kept_rows(mask.dropout, row_begin, rows, column_begin + k,
                  [&](int64_t i, const __mmask32(&words)[4]) PYFUSED_INLINE_LAMBDA {
                    if (bits != nullptr) store_words(words, bits + i * mask.ld);
                    const bf16* from = x + i * ld_x + k;
                    bf16* row = to + i * ld + k;
                    const auto copy = [&](int64_t w, __mmask32 keep) PYFUSED_INLINE_LAMBDA {
                      _mm512_store_si512(row + w * 32, _mm512_maskz_loadu_epi16(keep, from + w * 32));
                    };
                    if (columns - k >= philox::kBlockColumns) {
                      for (int64_t w = 0; w < 4; ++w) copy(w, words[w]);
                    } else {
                      for (int64_t w = 0; k + w * 32 < columns; ++w) {
                        copy(w, words[w] & columns_present(k + w * 32, columns));
                      }
                    }
                  });
  }
  if (rows < kPanelRows) memset(to + rows * ld, 0, static_cast<size_t>((kPanelRows - rows) * ld) * sizeof(bf16));
}

// sums[m] (+)= x[m] w for 32 rows and Count tiles; w's tiles for 32 columns are `step` bytes apart.
template <int Count>
inline void sum_columns(const bf16* x, int64_t ld_x, int64_t columns, const char* w, int64_t step, float* sums,
                        int64_t ld_sums, bool add) {
  float* below = sums + kTileRows * ld_sums;
  const int64_t sum_bytes = ld_sums * 4, x_bytes = ld_x * 2;
  if (add) {
    tile_load<0>(sums, sum_bytes);
    tile_load<2>(below, sum_bytes);
    if constexpr (Count == 2) {
      tile_load<1>(sums + 16, sum_bytes);
      tile_load<3>(below + 16, sum_bytes);
    }
  } else {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
  }
  for (int64_t k = 0; k < columns; k += 32, w += step) {
    tile_load<4>(x + k, x_bytes);
    tile_load<5>(x + kTileRows * ld_x + k, x_bytes);
    tile_load<6>(w, 64);
    tile_multiply<0, 4, 6>();
    tile_multiply<2, 5, 6>();
    if constexpr (Count == 2) {
      tile_load<7>(w + kTileBytes, 64);
      tile_multiply<1, 4, 7>();
      tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(sums, sum_bytes);
  tile_store<2>(below, sum_bytes);
  if constexpr (Count == 2) {
    tile_store<1>(sums + 16, sum_bytes);
    tile_store<3>(below + 16, sum_bytes);
  }
}

// out[m][r] = factor * sum_k keep(m, k) x[m][k] w[r][k]
inline void amx_rank_product(const bf16* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R,
                             LoraOperand w, const Mask& mask, float factor, float* out) {
  alignas(64) bf16 copy[kPanelRows * kCopyColumns];
  alignas(64) float sums[kPanelRows * kSplitColumns];
  const bool drop = mask.dropout.threshold != 0;
  const int terms = column_terms(w.source);
  const int64_t tiles = column_tiles(w.source, R);
  for (int64_t m = row_begin; m < row_end; m += kPanelRows) {
    const int64_t rows = min_of(kPanelRows, row_end - m);
    for (int64_t k = 0; k < K; k += kCopyColumns) {
      const int64_t columns = min_of(kCopyColumns, K - k);
      const bf16* from = x + m * ld_x + k;
      int64_t ld = ld_x;
      if (drop || rows < kPanelRows || columns % 32 != 0) {
        if (drop) {
          copy_kept_rows(from, ld_x, mask, m, rows, k, columns, copy, kCopyColumns);
        } else {
          copy_rows(from, ld_x, rows, columns, copy, kCopyColumns);
        }
        from = copy;
        ld = kCopyColumns;
      }
      const char* tile = static_cast<const char*>(w.data) + k / 32 * tiles * kTileBytes;
      int64_t t = 0;
      for (; t + 2 <= tiles; t += 2) {
        sum_columns<2>(from, ld, columns, tile + t * kTileBytes, tiles * kTileBytes, sums + t * 16, kSplitColumns,
                       k != 0);
      }
      if (t < tiles) {
        sum_columns<1>(from, ld, columns, tile + t * kTileBytes, tiles * kTileBytes, sums + t * 16, kSplitColumns,
                       k != 0);
      }
    }
    for (int64_t i = 0; i < rows; ++i) {
      const float* row = sums + i * kSplitColumns;
      for (int64_t r = 0; r < R; r += 16) {
        const __mmask16 present = ranks_present(r, R);
        Vector<float> sum{};
        for (int t = terms; t-- > 0;)
          sum += reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(present, row + t * R + r));
        _mm512_mask_storeu_ps(out + (m + i) * R + r, present, reinterpret_cast<__m512>(sum * factor));
      }
    }
  }
}

// ---- results of full width: y += s b^T, dx = ds a -------------------------------------------------------------------

// For rows of one panel, read(i, n) is what row i has in 32 columns from n on and write(i, n, base, low, high) gets
// that with the sums of these columns. 16 rows are read before the first is written: where rows are a multiple of 4 KiB
// apart, a load would wait for the store to the row before it, which has the same low 12 address bits.
template <class Read, class Write>
PYFUSED_INLINE void amx_wide_product(const bf16* split, int64_t ld_split, int64_t rows, LoraOperand w, int64_t tiles,
                                     int64_t column_begin, int64_t column_end, const Read& read, const Write& write) {
  // In steps of 16 rows x 32 columns. Vectors finish a step while the tiles work on the next but one: a result of
  // theirs takes its time to memory. A step's 2 KiB lie so that no load has the low 12 address bits of a store under
  // way to another place, for which it would wait.
  alignas(64) float sums[2][2][kTileRows * 32];
  const int64_t split_bytes = ld_split * 2;
  const auto finish_step = [&](int half, int64_t n) PYFUSED_INLINE_LAMBDA {
    if (n < column_begin) return;
    const float* row = sums[n / 32 % 2][half];
    const int64_t begin = half * kTileRows, count = min_of(rows - begin, kTileRows);
    __m512i bases[kTileRows];
    if (count == kTileRows) {
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) bases[i] = read(begin + i, n);
#pragma GCC unroll 16
      for (int i = 0; i < kTileRows; ++i) {
        write(begin + i, n, bases[i], load(row + 32 * i), load(row + 32 * i + 16));
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i, row += 32) {
      write(begin + i, n, read(begin + i, n), load(row), load(row + 16));
    }
  };
  if (tiles == 1) {
    tile_load<4>(split, split_bytes);
    tile_load<5>(split + kTileRows * ld_split, split_bytes);
  }
  int64_t n = column_begin;
  for (; n < column_end; n += 32) {
    const char* low = static_cast<const char*>(w.data) + n / 16 * tiles * kTileBytes;
    const char* high = low + tiles * kTileBytes;
    float (*to)[kTileRows * 32] = sums[n / 32 % 2];
    tile_zero<0>();
    tile_zero<1>();
    for (int64_t t = 0; t < tiles; ++t) {
      if (tiles != 1) tile_load<4>(split + t * 32, split_bytes);
      tile_load<6>(low + t * kTileBytes, 64);
      tile_load<7>(high + t * kTileBytes, 64);
      tile_multiply<0, 4, 6>();
      tile_multiply<1, 4, 7>();
    }
    finish_step(0, n - 32);
    tile_store<0>(to[0], 128);
    tile_store<1>(to[0] + 16, 128);
    if (rows <= kTileRows) continue;
    tile_zero<2>();
    tile_zero<3>();
    for (int64_t t = 0; t < tiles; ++t) {
      if (tiles != 1) {
        tile_load<5>(split + kTileRows * ld_split + t * 32, split_bytes);
        tile_load<6>(low + t * kTileBytes, 64);
        tile_load<7>(high + t * kTileBytes, 64);
      }
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
    finish_step(1, n - 32);
    tile_store<2>(to[1], 128);
    tile_store<3>(to[1] + 16, 128);
  }
  finish_step(0, n - 32);
  finish_step(1, n - 32);
}

// The same for results that replace what was there: finish(i, n, low, high) gets row i's sums.
template <class Finish>
PYFUSED_INLINE void amx_wide_product(const bf16* split, int64_t ld_split, int64_t rows, LoraOperand w, int64_t tiles,
                                     int64_t column_begin, int64_t column_end, const Finish& finish) {
  amx_wide_product(
      split, ld_split, rows, w, tiles, column_begin, column_end,
      [](int64_t, int64_t) PYFUSED_INLINE_LAMBDA { return _mm512_setzero_si512(); },
      [&](int64_t i, int64_t n, __m512i, Vector<float> low, Vector<float> high)
          PYFUSED_INLINE_LAMBDA { finish(i, n, low, high); });
}

// 32 columns of bf16 from n on, as fp32.
struct Wide {
  Vector<float> low, high;
};
inline Wide widen_bf16(__m512i halves) {
  const auto wide = [](__m256i half) {
    return reinterpret_cast<Vector<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  };
  return {wide(_mm512_castsi512_si256(halves)), wide(_mm512_extracti64x4_epi64(halves, 1))};
}

// ---- results summed over rows: db = s^T dy, da = ds^T x -------------------------------------------------------------

constexpr int64_t kPairBytes = kSumRows / 32 * 2 * kTileBytes;  // of 32 columns

// Pairs of rows with their columns interleaved. unpack works within 16 bytes, so columns 8 j .. 8 j + 3 of each 32 come
// to one tile and 8 j + 4 .. 8 j + 7 to the other; in_order() puts sums right.
inline void interleave_rows(const bf16* x, int64_t ld_x, int64_t rows, __mmask32 present, const uint32_t* bits,
                            int64_t ld_bits, char* pairs) {
  const auto store_pair = [&](int64_t m, __m512i even, __m512i odd) PYFUSED_INLINE_LAMBDA {
    char* to = pairs + m / 32 * 2 * kTileBytes + m % 32 / 2 * 64;
    _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
    _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(even, odd));
  };
  const auto row = [&](int64_t m) PYFUSED_INLINE_LAMBDA {
    const __mmask32 keep = bits == nullptr ? present : present & bits[m * ld_bits];
    return _mm512_maskz_loadu_epi16(keep, x + m * ld_x);
  };
  int64_t m = 0;
  for (; m + 2 <= rows; m += 2) store_pair(m, row(m), row(m + 1));
  if (m < rows) store_pair(m, row(m), _mm512_setzero_si512());
  for (m = round_up(rows, 2); m < round_up(rows, 32); m += 2) {
    store_pair(m, _mm512_setzero_si512(), _mm512_setzero_si512());
  }
}

inline Wide in_order(Vector<float> first, Vector<float> second) {
  const __m512 a = reinterpret_cast<__m512>(first), b = reinterpret_cast<__m512>(second);
  const __m512i low = _mm512_set_epi32(23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2, 1, 0);
  const __m512i high = _mm512_set_epi32(31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8);
  return {reinterpret_cast<Vector<float>>(_mm512_permutex2var_ps(a, low, b)),
          reinterpret_cast<Vector<float>>(_mm512_permutex2var_ps(a, high, b))};
}

// Sums of 32 columns for Count tiles of ranks, of one half of kSumRows rows or both.
template <int Count>
inline void sum_pairs(const bf16* s, const char* pairs, bool both_halves, float* sums) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  for (int half = 0; half <= both_halves; ++half, s += 32, pairs += 2 * kTileBytes) {
    tile_load<6>(pairs, 64);
    tile_load<7>(pairs + kTileBytes, 64);
    tile_load<4>(s, kSumRows * 2);
    tile_multiply<0, 4, 6>();
    tile_multiply<1, 4, 7>();
    if constexpr (Count == 2) {
      tile_load<5>(s + kTileRows * kSumRows, kSumRows * 2);
      tile_multiply<2, 5, 6>();
      tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(sums, 128);
  tile_store<1>(sums + 16, 128);
  if constexpr (Count == 2) {
    tile_store<2>(sums + kTileRows * 32, 128);
    tile_store<3>(sums + kTileRows * 32 + 16, 128);
  }
}

// The left factor of a sum over rows: terms of s, transposed to [terms R, kSumRows].
struct SplitColumns {
  alignas(64) bf16 data[kSplitColumns * kSumRows];
  int64_t ranks;  // terms included

  void fill(const float* s, int64_t rows, int64_t R, Dtype source) {
    const bool third = !is_bf16(source);
    ranks = (third ? 3 : 2) * R;
    const __m512i row_starts = multiples_of(static_cast<int>(R));
    for (int64_t m = 0; m < kSumRows; m += 16) {
      const __mmask16 present = m < rows ? ranks_present(m, rows) : 0;
      for (int64_t r = 0; r < R; ++r) {
        bf16* to = data + r * kSumRows + m;
        const auto put = [&](int64_t term, Vector<float> v) {
          _mm256_store_si256(reinterpret_cast<__m256i*>(to + term * R * kSumRows), to_bf16(v));
        };
        Vector<float> rest = reinterpret_cast<Vector<float>>(
            _mm512_mask_i32gather_ps(_mm512_setzero_ps(), present, row_starts, s + m * R + r, 4));
        put(0, take_term(rest));
        if (third) put(1, take_term(rest));
        put(third ? 2 : 1, rest);
      }
    }
    memset(data + ranks * kSumRows, 0, static_cast<size_t>((round_up(ranks, kTileRows) - ranks) * kSumRows) * 2);
  }
};

// c[r][k] (+)= sum_m s[m][r] keep(m, k) x[m][k] for up to kSumRows rows and `columns` columns.
inline void amx_sum_rows(const SplitColumns& s, int64_t R, const bf16* x, int64_t ld_x, int64_t rows, int64_t columns,
                         const uint32_t* bits, int64_t ld_bits, float* c, int64_t ld_c, bool add) {
  // In steps of 32 columns. While the tiles work on one, vectors prepare the next and write the one before: what either
  // leaves in memory takes its time to get there.
  alignas(64) char pairs[2][kPairBytes];
  alignas(64) float sums[2][kSplitColumns * 32];
  const bool both_halves = rows > 32;
  const auto prepare = [&](int64_t k) PYFUSED_INLINE_LAMBDA {
    if (k >= columns) return;
    interleave_rows(x + k, ld_x, rows, columns_present(k, columns), bits == nullptr ? nullptr : bits + k / 32, ld_bits,
                    pairs[k / 32 % 2]);
  };
  const auto multiply = [&](auto count, int64_t k, int64_t rank) PYFUSED_INLINE_LAMBDA {
    sum_pairs<decltype(count)::value>(s.data + rank * kSumRows, pairs[k / 32 % 2], both_halves,
                                      sums[k / 32 % 2] + rank * 32);
  };
  const auto finish = [&](int64_t k) PYFUSED_INLINE_LAMBDA {
    if (k < 0) return;
    const float* from = sums[k / 32 % 2];
    for (int64_t r = 0; r < R; ++r) {
      Vector<float> first = load(from + r * 32), second = load(from + r * 32 + 16);
      for (int64_t rank = r + R; rank < s.ranks; rank += R) {  // the other terms
        first += load(from + rank * 32);
        second += load(from + rank * 32 + 16);
      }
      const Wide sum = in_order(first, second);
      float* to = c + r * ld_c + k;
      store(to, add ? load(to) + sum.low : sum.low);
      store(to + 16, add ? load(to + 16) + sum.high : sum.high);
    }
  };
  prepare(0);
  int64_t k = 0;
  for (; k < columns; k += 32) {
    prepare(k + 32);
    int64_t rank = 0;
    for (; rank + kTileRows < s.ranks; rank += 2 * kTileRows) multiply(Int<2>{}, k, rank);
    if (rank < s.ranks) multiply(Int<1>{}, k, rank);
    finish(k - 32);
  }
  finish(k - 32);
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
