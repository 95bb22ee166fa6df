// Factors of products in AMX tiles: numbers as sums of bf16 terms, an adapter's matrix in tiles, and s in the rows of a
// tile.
#pragma once

#include "amx.h"
#include "lora.h"
#include "pack.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int kMaxTerms = 3;
// Columns of s split into terms, up to whole tiles.
constexpr int64_t kSplitColumns = kMaxTerms * kAmxMaxRank;
inline bool is_bf16(Dtype dtype) { return dtype == Dtype::kBFloat16; }

// ---- fp32 numbers as bf16 terms ---------------------------------------------------------------------------------

// The next term of v, v becoming what is left of it. Cut off, not rounded: then three terms are exact, and a large v
// does not become infinite. An infinity leaves nothing.
inline Vector<float> take_term(Vector<float>& v) {
  const __m512 all = reinterpret_cast<__m512>(v);
  const __m512 term = _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_castps_si512(all), _mm512_set1_epi32(static_cast<int32_t>(0xffff0000u))));
  v = reinterpret_cast<Vector<float>>(_mm512_maskz_sub_ps(_mm512_cmp_ps_mask(all, term, _CMP_NEQ_UQ), all, term));
  return reinterpret_cast<Vector<float>>(term);
}

// 32 numbers as bf16, rounded where they have more bits.
inline __m512i join_bf16(Vector<float> low, Vector<float> high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

inline __m256i to_bf16(Vector<float> v) {
  return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
}

// 0, step, ... 15 step.
inline __m512i multiples_of(int step) {
  return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                            _mm512_set1_epi32(step));
}

// ---- operands: an adapter's matrix w [R, L] in tiles ----------------------------------------------------------------

// Summed over columns: for each 32 columns, the tiles of all ranks; the terms of w follow each other as more ranks.
inline int column_terms(Dtype source) { return is_bf16(source) ? 1 : 3; }
inline int64_t column_tiles(Dtype source, int64_t R) {
  return round_up(column_terms(source) * R, kTileRows) / kTileRows;
}
// Summed over ranks: for each 16 columns, the tiles of all ranks. Rank t R + r is term t of a product, with w's first
// term, its first again (for the other factor's second) and, where it has one, its second.
inline int rank_terms(Dtype source) { return is_bf16(source) ? 2 : 3; }
inline int64_t rank_tiles(Dtype source, int64_t R) { return round_up(rank_terms(source) * R, 32) / 32; }

inline int64_t tiles_of(SumOver product, Dtype source, int64_t R, int64_t L) {
  const int64_t blocks = round_up(L, 32) / 32;
  return product == SumOver::kColumns ? blocks * column_tiles(source, R) : 2 * blocks * rank_tiles(source, R);
}

inline int64_t amx_packed_bytes(SumOver product, Dtype source, int64_t R, int64_t L) {
  // behind the tiles the same matrix in fp32
  return tiles_of(product, source, R, L) * kTileBytes + packed_bytes<float>(product, source, R, L);
}

inline LoraOperand amx_pack(SumOver product, Dtype source, const void* src, int64_t rank_stride, int64_t column_stride,
                            int64_t R, int64_t L, void* dst) {
  char* tiles = static_cast<char*>(dst);
  const int64_t bytes = tiles_of(product, source, R, L) * kTileBytes;
  float* wide = reinterpret_cast<float*>(tiles + bytes);
  const int64_t ld = pack_operand<float>(product, source, src, rank_stride, column_stride, R, L, wide).ld;
  if (product == SumOver::kColumns) {
    const int terms = column_terms(source);
    const int64_t count = column_tiles(source, R);
    const __m512i pair_rows = multiples_of(kTileRows);
    for (int64_t l = 0; l < L; l += 32, tiles += count * kTileBytes) {
      if (terms * R % kTileRows != 0) memset(tiles + (count - 1) * kTileBytes, 0, kTileBytes);
      for (int64_t r = 0; r < R; ++r) {
        Vector<float> low = load(wide + r * ld + l), high = load(wide + r * ld + l + 16);
        for (int64_t rank = r; rank < terms * R; rank += R) {
          const __m512i pairs = join_bf16(take_term(low), take_term(high));
          _mm512_i32scatter_epi32(tiles + rank / kTileRows * kTileBytes + rank % kTileRows * 4, pair_rows, pairs, 4);
        }
      }
    }
  } else {
    const int64_t ranks = rank_terms(source) * R, rows = rank_tiles(source, R) * kTileRows;
    alignas(64) __m256i values[kSplitColumns + 32];
    for (int64_t r = ranks; r < 2 * rows; ++r) values[r] = _mm256_setzero_si256();
    for (int64_t l = 0; l < round_up(L, 32); l += kTileRows) {
      for (int64_t r = 0; r < R; ++r) {
        Vector<float> rest = load(wide + r * ld + l);
        const __m256i term = to_bf16(take_term(rest));
        values[r] = values[R + r] = term;
        if (ranks > 2 * R) values[2 * R + r] = to_bf16(rest);
      }
      for (int64_t pair = 0; pair < rows; ++pair, tiles += 64) {
        const __m512i even = _mm512_cvtepu16_epi32(values[2 * pair]), odd = _mm512_cvtepu16_epi32(values[2 * pair + 1]);
        _mm512_store_si512(tiles, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
  }
  return {dst, 0, source};
}

inline __mmask16 ranks_present(int64_t r, int64_t R) {
  return static_cast<__mmask16>(R - r >= 16 ? 0xffffu : (1u << (R - r)) - 1);
}

// ---- s [rows, R] as the left factor ---------------------------------------------------------------------------------

// Row m of split has s's terms in the order of rank_terms: high, low, high.
inline void split_rows(const float* s, int64_t rows, int64_t R, int terms, bf16* split, int64_t ld) {
  for (int64_t m = 0; m < rows; ++m) {
    bf16* to = split + m * ld;
    for (int64_t r = 0; r < R; r += 16) {
      const __mmask16 present = ranks_present(r, R);
      Vector<float> low = reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(present, s + m * R + r));
      const __m256i high = to_bf16(take_term(low));
      _mm256_mask_storeu_epi16(to + r, present, high);
      _mm256_mask_storeu_epi16(to + R + r, present, to_bf16(low));
      if (terms == 3) _mm256_mask_storeu_epi16(to + 2 * R + r, present, high);
    }
    memset(to + terms * R, 0, static_cast<size_t>(ld - terms * R) * sizeof(bf16));
  }
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
