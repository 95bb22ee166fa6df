// An adapter's a and b as the right factors of multi_lora's products in AMX tiles.
#pragma once

#include "amx_products.h"
#include "multi_lora_panel.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Ranks of a tile of b, and of the terms that lie beside each other in one.
constexpr int64_t kTileRanks = 16, kChunkRanks = 8;

// 8 or fewer ranks of 16 rows as four rows of a tile.
PYFUSED_INLINE void pack_pairs(const bf16* const (&rows)[kTileRows], int64_t offset, int64_t count, Words (&pairs)[4]) {
  const __mmask8 present = static_cast<__mmask8>((1 << count) - 1);
  Words lanes[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto lane = [&](int j)
                          PYFUSED_INLINE_LAMBDA { return _mm_maskz_loadu_epi16(present, rows[i + 4 * j] + offset); };
    const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
    const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
    lanes[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }
  transpose_words(lanes, pairs);
}

// The first `count` rows of a matrix, then its last one again: what comes of it is not read.
struct TileOfRows {
  const bf16* rows[kTileRows];

  TileOfRows(const bf16* first, int64_t ld, int64_t count) {
    for (int64_t i = 0; i < kTileRows; ++i) rows[i] = first + min_of(i, count - 1) * ld;
  }
};

// Words of 8 rows to 8 columns of 16 rows, of 64 bytes each.
PYFUSED_INLINE void transpose_rows(const bf16* const* rows, int64_t offset, __mmask32 present, char* to) {
  const auto row = [&](int i) PYFUSED_INLINE_LAMBDA { return _mm512_maskz_loadu_epi16(present, rows[i] + offset); };
  Words first[4], second[4];
  {
    const Words lanes[4] = {row(0), row(1), row(2), row(3)};
    transpose_words(lanes, first);
  }
  {
    const Words lanes[4] = {row(4), row(5), row(6), row(7)};
    transpose_words(lanes, second);
  }
  const __m512i low = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), high = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
#pragma GCC unroll 4
  for (int w = 0; w < 4; ++w) {
    const Words upper = _mm512_permutex2var_epi64(first[w], low, second[w]);
    const Words lower = _mm512_permutex2var_epi64(first[w], high, second[w]);
    const auto put = [&](int at, __m256i half)
                         PYFUSED_INLINE_LAMBDA { _mm256_store_si256(reinterpret_cast<__m256i*>(to + at * 64), half); };
    put(w, _mm512_castsi512_si256(upper));
    put(w + 4, _mm512_extracti64x4_epi64(upper, 1));
    put(w + 8, _mm512_castsi512_si256(lower));
    put(w + 12, _mm512_extracti64x4_epi64(lower, 1));
  }
}

// a [ranks, columns] as right factors: for 32 columns the tiles of all ranks, one or two.
inline void pack_a(const bf16* a, int64_t ld_a, int64_t columns, int64_t ranks, char* tiles) {
  const int64_t step = round_up(ranks, kTileRanks) / kTileRanks * kTileBytes;
  for (int64_t r = 0; r < ranks; r += kTileRanks, tiles += kTileBytes) {
    const int64_t count = min_of(ranks - r, kTileRanks);
    const TileOfRows tile(a + r * ld_a, ld_a, count);
    char* to = tiles;
    for (int64_t k = 0; k < columns; k += 32, to += step) {
      const __mmask32 present = columns_present(k, columns);
      transpose_rows(tile.rows, k, present, to);
      if (count > 8) transpose_rows(tile.rows + 8, k, present, to + 32);
    }
  }
}

// b [columns, R], up to 16 of its rows, as right factors: a tile for each 16 ranks, with each pair of ranks for the
// high terms and for the low ones.
inline void pack_b(const bf16* b, int64_t ld_b, int64_t columns, int64_t R, char* tiles) {
  for (int64_t r = 0; r < round_up(R, kTileRanks); r += kChunkRanks, tiles += kTileBytes / 2) {
    Words pairs[4] = {};
    if (r + kChunkRanks <= R && columns == kTileRows) {
      Words row[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) row[i] = load_lanes(b + r + i * ld_b, 4 * ld_b, 16);
      transpose_words(row, pairs);
    } else if (r < R) {
      pack_pairs(TileOfRows(b, ld_b, columns).rows, r, min_of(R - r, kChunkRanks), pairs);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm512_store_si512(tiles + i * 64, pairs[i]);
      _mm512_store_si512(tiles + (4 + i) * 64, pairs[i]);
    }
  }
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
