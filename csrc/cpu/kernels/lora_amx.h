// LoRA's loops for bf16 data in AMX tiles. The rank is the short side of every product, so tiles have room to spare and
// fp32 numbers are taken as sums of bf16 terms at little or no cost:
//   * a number that is summed into an fp32 result (s, u, da, db) in three terms, which hold all of its 24 bits;
//   * both factors of a result that is rounded to bf16 (y, dX) in two, as hi hi + lo hi + hi lo;
//   * where the adapter is bf16, its own numbers in one, and what multiplies a result for it in two.
// Sums are kept in fp32. The instruction takes subnormal numbers for zero.
#pragma once

#include "amx_products.h"
#include "lora_bf16.h"
#include "mask_tile.h"
#include "pack.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int64_t kAmxMinColumns = 32;  // a tile's

inline void amx_shrink(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R,
                       LoraOperand a, const Mask& mask, double factor, void* s) {
  const Tiles configured;
  amx_rank_product(static_cast<const bf16*>(x), ld_x, row_begin, row_end, K, R, a, mask, static_cast<float>(factor),
                   static_cast<float*>(s));
}

inline void amx_expand(const void* y_, int64_t ld_y, const void* bias_, void* out_, int64_t ld_out, int64_t row_begin,
                       int64_t row_end, int64_t N, int64_t R, const void* s_, LoraOperand b) {
  const Tiles configured;
  const bf16* y = static_cast<const bf16*>(y_ != nullptr ? y_ : bias_);
  if (y_ == nullptr) ld_y = 0;
  bf16* out = static_cast<bf16*>(out_);
  alignas(64) bf16 split[kPanelRows * kSplitColumns];
  const int64_t tiles = rank_tiles(b.source, R), ld = tiles * 32;
  for (int64_t m = row_begin; m < row_end; m += kPanelRows) {
    const int64_t rows = min_of(kPanelRows, row_end - m);
    split_rows(static_cast<const float*>(s_) + m * R, rows, R, rank_terms(b.source), split, ld);
    memset(split + rows * ld, 0, static_cast<size_t>((kPanelRows - rows) * ld) * sizeof(bf16));
    amx_wide_product(
        split, ld, rows, b, tiles, 0, N,
        [&](int64_t i, int64_t n) PYFUSED_INLINE_LAMBDA {
          if (y == nullptr) return _mm512_setzero_si512();
          return _mm512_maskz_loadu_epi16(columns_present(n, N), y + (m + i) * ld_y + n);
        },
        [&](int64_t i, int64_t n, __m512i base, Vector<float> low, Vector<float> high) PYFUSED_INLINE_LAMBDA {
          const Wide wide = widen_bf16(base);
          if (y != nullptr) {
            low += wide.low;
            high += wide.high;
          }
          _mm512_mask_storeu_epi16(out + (m + i) * ld_out + n, columns_present(n, N), join_bf16(low, high));
        });
  }
}

// Into the second-level cache, row by row: in the order in which sums over rows read them, a line from each row, the
// processor fetches nothing ahead, and a few lines at a time take three times as long.
inline void prefetch_rows(const bf16* x, int64_t ld_x, int64_t rows, int64_t columns) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t k = 0; k < columns; k += 32) _mm_prefetch(x + m * ld_x + k, _MM_HINT_T1);
  }
}

inline void amx_backward_dy(const void* dy_, int64_t ld_dy, int64_t row_begin, int64_t row_end, int64_t N, int64_t R,
                            LoraOperand b, const void* s, void* u, void* dbt, int64_t ld_dbt, void* dbias) {
  const bf16* dy = static_cast<const bf16*>(dy_);
  if (dbias != nullptr) {
    backward_dy_pairs(dy_, ld_dy, row_begin, row_end, N, R, b, nullptr, nullptr, nullptr, 0, dbias);
  }
  const Tiles configured;
  SplitColumns split;
  for (int64_t m = row_begin; m < row_end; m += kSumRows) {
    const int64_t rows = min_of(kSumRows, row_end - m);
    if (u != nullptr) {
      amx_rank_product(dy, ld_dy, m, m + rows, N, R, b, Mask{}, 1.0f, static_cast<float*>(u));
    } else {
      prefetch_rows(dy + m * ld_dy, ld_dy, rows, N);
    }
    if (dbt != nullptr) {
      split.fill(static_cast<const float*>(s) + m * R, rows, R, b.source);
      amx_sum_rows(split, R, dy + m * ld_dy, ld_dy, rows, N, nullptr, 0, static_cast<float*>(dbt), ld_dbt,
                   m != row_begin);
    }
  }
}

// The mask of rows of x that are read next: these come in meanwhile, in the order of prefetch_rows.
inline void keep_bits_of_next(const bf16* x, int64_t ld_x, Dropout dropout, int64_t row_begin, int64_t rows,
                              int64_t column_begin, int64_t columns, uint32_t* bits, int64_t ld_bits) {
  constexpr int64_t kColumns = philox::kBlockColumns;
  const int64_t blocks = round_up(columns, kColumns) / kColumns;
  int64_t ahead = 0;
  keep_bits(dropout, row_begin, rows, column_begin, blocks, bits, ld_bits, [&](int64_t, int64_t) PYFUSED_INLINE_LAMBDA {
    for (int64_t k = 0; k < kColumns; k += 32) _mm_prefetch(x + ahead * kColumns + k, _MM_HINT_T1);
    if (++ahead < blocks) return;
    ahead = 0;
    x += ld_x;
  });
}

inline void amx_backward_x(const void* x_, int64_t ld_x, void* dx_, int64_t ld_dx, bool accumulate_dx,
                           int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand a, const void* ds_,
                           const Mask& mask, void* da_, int64_t ld_da) {
  const Tiles configured;
  const bf16* x = static_cast<const bf16*>(x_);
  bf16* dx = static_cast<bf16*>(dx_);
  const float* ds = static_cast<const float*>(ds_);
  float* da = static_cast<float*>(da_);
  constexpr int64_t kColumns = 1024;
  MaskTile<kSumRows, kColumns> tile_bits(mask);
  const int64_t ld_bits = tile_bits.ld;
  alignas(64) bf16 split[kSumRows * kSplitColumns];
  SplitColumns columns_of_ds;
  const bool drop = mask.dropout.threshold != 0, make = drop && !mask.made;
  const int64_t tiles = rank_tiles(a.source, R), ld = tiles * 32;
  for (int64_t m = row_begin; m < row_end; m += kSumRows) {
    const int64_t rows = min_of(kSumRows, row_end - m);
    if (da != nullptr) columns_of_ds.fill(ds + m * R, rows, R, a.source);
    if (dx != nullptr) {
      split_rows(ds + m * R, rows, R, rank_terms(a.source), split, ld);
      memset(split + rows * ld, 0, static_cast<size_t>((kSumRows - rows) * ld) * sizeof(bf16));
    }
    for (int64_t k = 0; k < K; k += kColumns) {
      const int64_t columns = min_of(kColumns, K - k);
      uint32_t* bits = tile_bits.at(m, k);
      if (make && da != nullptr) {
        keep_bits_of_next(x + m * ld_x + k, ld_x, mask.dropout, m, rows, k, columns, bits, ld_bits);
      } else if (make) {
        keep_bits(mask.dropout, m, rows, k, round_up(columns, 128) / 128, bits, ld_bits);
      } else if (da != nullptr) {
        prefetch_rows(x + m * ld_x + k, ld_x, rows, columns);
      }
      if (da != nullptr) {
        amx_sum_rows(columns_of_ds, R, x + m * ld_x + k, ld_x, rows, columns, drop ? bits : nullptr, ld_bits, da + k,
                     ld_da, m != row_begin);
      }
      for (int64_t p = 0; dx != nullptr && p < rows; p += kPanelRows) {
        bf16* to = dx + (m + p) * ld_dx;
        const uint32_t* panel_bits = bits + p * ld_bits;
        const auto kept = [&](int64_t i, int64_t n) PYFUSED_INLINE_LAMBDA {
          return drop ? panel_bits[i * ld_bits + (n - k) / 32] : 0xffffffffu;
        };
        amx_wide_product(
            split + p * ld, ld, min_of(kPanelRows, rows - p), a, tiles, k, k + columns,
            [&](int64_t i, int64_t n) PYFUSED_INLINE_LAMBDA {
              if (!accumulate_dx) return _mm512_setzero_si512();
              return _mm512_maskz_loadu_epi16(columns_present(n, K), to + i * ld_dx + n);
            },
            [&](int64_t i, int64_t n, __m512i base, Vector<float> low, Vector<float> high) PYFUSED_INLINE_LAMBDA {
              const __mmask32 present = columns_present(n, K), keep = kept(i, n);
              bf16* at = to + i * ld_dx + n;
              if (accumulate_dx) {  // what dropout took out of x stays as it is
                const Wide wide = widen_bf16(base);
                _mm512_mask_storeu_epi16(at, present & keep, join_bf16(wide.low + low, wide.high + high));
              } else {
                _mm512_mask_storeu_epi16(at, present, _mm512_maskz_mov_epi16(keep, join_bf16(low, high)));
              }
            });
      }
    }
  }
}

inline void amx_sum_x(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, Dtype of_a,
                      const void* ds, const Mask& mask, void* da, int64_t ld_da) {
  amx_backward_x(x, ld_x, nullptr, 0, false, row_begin, row_end, K, R, {nullptr, 0, of_a}, ds, mask, da, ld_da);
}

// _fake_mask of pyfused/ops/lora.py has the same.
inline bool amx_serves(int64_t rows, int64_t columns, int64_t R) {
  return R <= kAmxMaxRank && rows >= kAmxMinRows && columns >= kAmxMinColumns;
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
