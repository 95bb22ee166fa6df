// multi_lora's loops for bf16 data and adapters in AMX tiles, compiled for that level alone. No torch, no std: see
// simd.h.
//
// A row's bits are the same whatever the number of rows, because each result of a tile is the same sum whatever the
// tile's other rows and columns, and whichever factor is the left one. Of 32 products it adds those of even and those
// of odd place, each in one chain of fused multiply-adds, then the two sums, then that to what was there; subnormal
// numbers, its own among them, are zero.
//   shrink  32 columns after the other. Many rows: x is the left factor as it lies in memory, a is packed. Few: each
//           row's pairs are the right factor, of one column, and a is the left one, as it lies in memory.
//   expand  16 ranks after the other, s as two bf16 terms: of 8 ranks the high terms, then the low ones, then those of
//           the next 8. Many rows: in tiles, b packed. Few: vectors that add in the tiles' order.
#include "amx_products.h"
#include "multi_lora_factors.h"
#include "multi_lora_few.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int64_t kBlockOfRows = 64;
constexpr int64_t kColumnsAhead = 64;  // x is asked for so long before it is read
constexpr int64_t kOwnColumns = 32;    // of a step
constexpr int64_t kBlockColumns = 64;  // of b in tiles

// ---- shrink ---------------------------------------------------------------------------------------------------------

// Tiles for results of up to 32 rows and up to 32 columns: 0 to 3, left factors 4 and 5, right ones 6 and 7.
class ProductTiles {
 public:
  ~ProductTiles() { tile_release(); }

  void set(int64_t rows, int64_t columns) {
    if (rows == rows_ && columns == columns_) return;
    rows_ = rows;
    columns_ = columns;
    TileSizes sizes;
    for (int64_t i = 0, row = 0; row < rows; ++i, row += kTileRows) {
      const int64_t count = min_of(rows - row, kTileRows);
      sizes.set(static_cast<int>(4 + i), count, 64);
      for (int64_t j = 0, column = 0; column < columns; ++j, column += 16) {
        const int64_t bytes = min_of(columns - column, 16) * 4;
        sizes.set(static_cast<int>(2 * i + j), count, bytes);
        sizes.set(static_cast<int>(6 + j), kTileRows, bytes);
      }
    }
    sizes.load();
  }

 private:
  int64_t rows_ = 0, columns_ = 0;
};

// 0 up to whole tiles, and where bits are given but for what they keep.
inline void copy_row(const bf16* from, int64_t columns, const uint32_t* bits, bf16* to) {
  for (int64_t k = 0; k < columns; k += 32) {
    const __mmask32 keep = bits == nullptr ? 0xffffffffu : bits[k / 32];
    _mm512_store_si512(to + k, _mm512_maskz_loadu_epi16(keep & columns_present(k, columns), from + k));
  }
}

// s [R] (+)= x a^T for one row.
inline void shrink_row(ProductTiles& tiles, const bf16* x, int64_t columns, int64_t R, const bf16* a, int64_t ld_a,
                       float* s, bool add) {
  alignas(64) bf16 rest_of_x[32], rest_of_a[kTileRows * 32];
  const int64_t whole = columns / 32 * 32;
  if (whole != columns) copy_row(x + whole, columns - whole, nullptr, rest_of_x);
  for (int64_t r = 0; r < R; r += kTileRanks) {
    const int64_t ranks = min_of(R - r, kTileRanks);
    const bf16* rows = a + r * ld_a;
    tiles.set(ranks, 1);
    if (add) {
      tile_load<0>(s + r, 4);
    } else {
      tile_zero<0>();
    }
    for (int64_t k = 0; k < whole; k += 32) {
      for (int64_t i = 0; i < ranks; ++i) {
        __builtin_prefetch(reinterpret_cast<const char*>(rows + i * ld_a + k) + kAheadBytes);
      }
      tile_load<4>(rows + k, ld_a * 2);
      tile_load<6>(x + k, 4);
      tile_multiply<0, 4, 6>();
    }
    if (whole != columns) {
      for (int64_t i = 0; i < ranks; ++i)
        copy_row(rows + i * ld_a + whole, columns - whole, nullptr, rest_of_a + i * 32);
      tile_load<4>(rest_of_a, 64);
      tile_load<6>(rest_of_x, 4);
      tile_multiply<0, 4, 6>();
    }
    tile_store<0>(s + r, 4);
  }
}

inline void shrink_few(const bf16* x, int64_t ld_x, const int64_t* rows, int64_t count, int64_t K, int64_t R,
                       const bf16* a, int64_t ld_a, Dropout dropout, int64_t first_row, float* s) {
  alignas(64) bf16 copy[kCopyColumns];
  uint32_t bits[kCopyColumns / 32];
  const bool drop = dropout.threshold != 0;
  ProductTiles tiles;
  for (int64_t i = 0; i < count; ++i) {
    const bf16* row = x + rows[i] * ld_x;
    if (!drop) {
      shrink_row(tiles, row, K, R, a, ld_a, s + i * R, false);
      continue;
    }
    for (int64_t k = 0; k < K; k += kCopyColumns) {
      const int64_t columns = min_of(kCopyColumns, K - k);
      keep_bits(dropout, first_row + i, 1, k, round_up(columns, 128) / 128, bits, kCopyColumns / 32);
      copy_row(row + k, columns, bits, copy);
      shrink_row(tiles, copy, columns, R, a + k, ld_a, s + i * R, k != 0);
    }
  }
}

// The distance of rows that lie evenly spaced, else 0.
inline int64_t spacing(const int64_t* rows, int64_t count) {
  const int64_t step = count == 1 ? 1 : rows[1] - rows[0];
  for (int64_t i = 2; i < count; ++i) {
    if (rows[i] - rows[i - 1] != step) return 0;
  }
  return step;
}

// sums (+)= x a^T for Count tiles of ranks and up to 16 rows, or where Below is set more.
template <int Count, bool Below>
inline void sum_rows(const bf16* x, int64_t ld_x, int64_t rows, int64_t columns, const char* tiles_of_a, float* sums,
                     int64_t ld_sums, bool add) {
  float* below = sums + kTileRows * ld_sums;
  const int64_t sum_bytes = ld_sums * 4, x_bytes = ld_x * 2;
  if (add) {
    tile_load<0>(sums, sum_bytes);
    if constexpr (Below) tile_load<2>(below, sum_bytes);
    if constexpr (Count == 2) tile_load<1>(sums + 16, sum_bytes);
    if constexpr (Count == 2 && Below) tile_load<3>(below + 16, sum_bytes);
  } else {
    tile_zero<0>();
    if constexpr (Below) tile_zero<2>();
    if constexpr (Count == 2) tile_zero<1>();
    if constexpr (Count == 2 && Below) tile_zero<3>();
  }
  for (int64_t k = 0; k < columns; k += 32, tiles_of_a += Count * kTileBytes) {
    // a tile waits for its rows one after the other
    for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(x + i * ld_x + k + kColumnsAhead);
    tile_load<4>(x + k, x_bytes);
    if constexpr (Below) tile_load<5>(x + kTileRows * ld_x + k, x_bytes);
    tile_load<6>(tiles_of_a, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (Below) tile_multiply<2, 5, 6>();
    if constexpr (Count == 2) {
      tile_load<7>(tiles_of_a + kTileBytes, 64);
      tile_multiply<1, 4, 7>();
      if constexpr (Below) tile_multiply<3, 5, 7>();
    }
  }
  tile_store<0>(sums, sum_bytes);
  if constexpr (Below) tile_store<2>(below, sum_bytes);
  if constexpr (Count == 2) tile_store<1>(sums + 16, sum_bytes);
  if constexpr (Count == 2 && Below) tile_store<3>(below + 16, sum_bytes);
}

inline void shrink_many(const bf16* x, int64_t ld_x, const int64_t* rows, int64_t count, int64_t K, int64_t R,
                        const bf16* a, int64_t ld_a, Dropout dropout, int64_t first_row, float* s) {
  constexpr int64_t kWords = kCopyColumns / 32, kRanks = 2 * kTileRanks;
  alignas(64) bf16 copy[kBlockOfRows * kCopyColumns];
  alignas(64) char tiles_of_a[kWords * 2 * kTileBytes];
  uint32_t bits[kBlockOfRows * kWords];
  const bool drop = dropout.threshold != 0;
  ProductTiles tiles;
  for (int64_t m = 0; m < count; m += kBlockOfRows) {
    const int64_t block = min_of(kBlockOfRows, count - m), step = spacing(rows + m, block);
    for (int64_t k = 0; k < K; k += kCopyColumns) {
      const int64_t columns = min_of(kCopyColumns, K - k);
      const bf16* from = x + rows[m] * ld_x + k;
      int64_t ld = step * ld_x;
      if (drop || step == 0 || columns % 32 != 0) {
        if (drop) keep_bits(dropout, first_row + m, block, k, round_up(columns, 128) / 128, bits, kWords);
        for (int64_t i = 0; i < block; ++i) {
          copy_row(x + rows[m + i] * ld_x + k, columns, drop ? bits + i * kWords : nullptr, copy + i * kCopyColumns);
        }
        from = copy;
        ld = kCopyColumns;
      }
      for (int64_t r = 0; r < R; r += kRanks) {
        const int64_t ranks = min_of(R - r, kRanks);
        pack_a(a + r * ld_a + k, ld_a, columns, ranks, tiles_of_a);
        for (int64_t i = 0; i < block; i += kPanelRows) {
          const int64_t panel = min_of(kPanelRows, block - i);
          tiles.set(panel, ranks);
          const auto multiply = [&](auto tiles_of_ranks, auto below) PYFUSED_INLINE_LAMBDA {
            constexpr int kCount = decltype(tiles_of_ranks)::value;
            sum_rows<kCount, decltype(below)::value>(from + i * ld, ld, panel, columns, tiles_of_a, s + (m + i) * R + r,
                                                     R, k != 0);
          };
          const bool below = panel > kTileRows;
          if (ranks > kTileRanks) {
            below ? multiply(Int<2>{}, Bool<true>{}) : multiply(Int<2>{}, Bool<false>{});
          } else {
            below ? multiply(Int<1>{}, Bool<true>{}) : multiply(Int<1>{}, Bool<false>{});
          }
        }
      }
    }
  }
}

void shrink(const void* x_, int64_t ld_x, const int64_t* rows, int64_t count, int64_t K, int64_t R, const void* a_,
            int64_t ld_a, Dropout dropout, int64_t first_row, double factor, void* s_) {
  const bf16* x = static_cast<const bf16*>(x_);
  const bf16* a = static_cast<const bf16*>(a_);
  float* s = static_cast<float*>(s_);
  (count <= kFewRows ? shrink_few : shrink_many)(x, ld_x, rows, count, K, R, a, ld_a, dropout, first_row, s);
  if (factor == 1.0) return;
  for (int64_t i = 0; i < count * R; ++i) s[i] *= static_cast<float>(factor);
}

// ---- expand ---------------------------------------------------------------------------------------------------------

// For the life of one, vectors take subnormal numbers for zero, as tiles do.
class NoSubnormals {
 public:
  NoSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~NoSubnormals() { _mm_setcsr(before_); }
  NoSubnormals(const NoSubnormals&) = delete;
  NoSubnormals& operator=(const NoSubnormals&) = delete;

 private:
  unsigned before_;
};

// The bf16 terms of 16 ranks of s in the order of a tile's row, zero beyond R.
inline __m512i split_ranks(const float* s, int64_t r, int64_t R) {
  Vector<float> low = reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(ranks_present(r, R), s + r));
  const __m256i high = to_bf16(take_term(low));
  const __m512i terms = _mm512_inserti64x4(_mm512_castsi256_si512(high), to_bf16(low), 1);
  return _mm512_shuffle_i64x2(terms, terms, _MM_SHUFFLE(3, 1, 2, 0));
}

// Adds in the order of a tile: s has the terms of split_ranks, widened.
template <class A, int Rows>
struct SumsOfTiles {
  static constexpr int64_t kTerms = 2;
  Vector<float> sums[Rows] = {}, even[Rows], odd[Rows];

  PYFUSED_INLINE void add(int64_t r, int64_t R, const float* s, int64_t ld_s, const Vector<float> (&column)[8]) {
    const bool first = r % kTileRanks == 0, last = r + kChunkRanks >= R;
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      if (first) even[i] = odd[i] = Vector<float>{};
      const float* terms = s + i * ld_s;
#pragma GCC unroll 8
      for (int j = 0; j < 16; j += 2) {
        even[i] = multiply_add(splat<float>(terms[j]), column[j % 8], even[i]);
        odd[i] = multiply_add(splat<float>(terms[j + 1]), column[j % 8 + 1], odd[i]);
      }
      if (first && !last) continue;
      // the tile's zeros turn a sum of -0 into 0
      if (first) even[i] += Vector<float>{};
      sums[i] += even[i] + odd[i];
    }
  }
  PYFUSED_INLINE Vector<float> total(int i) const { return sums[i]; }
};

__attribute__((noinline)) void expand_in_vectors(bf16* y, int64_t ld_y, const int64_t* rows, int64_t count, int64_t N,
                                                 int64_t R, const float* s, const bf16* b, int64_t ld_b, float* terms) {
  const int64_t ld = round_up(R, kTileRanks) * 2;
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t r = 0; r < R; r += kTileRanks) {
      const Wide wide = widen_bf16(split_ranks(s + i * R, r, R));
      store(terms + i * ld + 2 * r, wide.low);
      store(terms + i * ld + 2 * r + 16, wide.high);
    }
  }
  expand_few<SumsOfTiles>(y, ld_y, rows, count, terms, ld, R, b, ld_b, N);
}

// 32 columns of up to 32 rows, in tiles 0 to 3, on their way into y.
struct Step {
  bf16* const* rows;
  int64_t count, n;
  const float (*sums)[kTileRows * kOwnColumns];

  PYFUSED_INLINE void finish(int64_t N, int half) const {
    const float* from = sums[half];
    const __mmask32 present = columns_present(n, N);
    const int64_t end = half == 0 ? min_of(count, kTileRows) : count;
    // a half word to the upper half of a word
    const __m512i low_half =
        _mm512_set_epi32(15 << 16, 14 << 16, 13 << 16, 12 << 16, 11 << 16, 10 << 16, 9 << 16, 8 << 16, 7 << 16, 6 << 16,
                         5 << 16, 4 << 16, 3 << 16, 2 << 16, 1 << 16, 0);
    const __m512i high_half = _mm512_or_si512(low_half, _mm512_set1_epi32(16 << 16));
    for (int64_t i = half * kTileRows; i < end; ++i, from += kOwnColumns) {
      bf16* to = rows[i] + n;
      const __m512i words = _mm512_maskz_loadu_epi16(present, to);
      const auto wide = [&](__m512i place) PYFUSED_INLINE_LAMBDA {
        return reinterpret_cast<Vector<float>>(_mm512_maskz_permutexvar_epi16(0xaaaaaaaau, place, words));
      };
      _mm512_mask_storeu_epi16(to, present, join_bf16(wide(low_half) + load(from), wide(high_half) + load(from + 16)));
    }
  }
};

__attribute__((noinline)) void expand_in_tiles(bf16* y, int64_t ld_y, const int64_t* rows, int64_t count, int64_t N,
                                               int64_t R, const float* s, const bf16* b, int64_t ld_b, void* scratch) {
  // See amx_wide_product: vectors finish a step while the tiles work on the next.
  alignas(64) float sums[2][2][kTileRows * kOwnColumns];
  const int64_t tiles = round_up(R, kTileRanks) / kTileRanks, ld = tiles * 32;
  bf16* split = static_cast<bf16*>(scratch);
  char* tiles_of_b = reinterpret_cast<char*>(split + kBlockOfRows * ld);
  const Tiles configured;
  for (int64_t m = 0; m < count; m += kBlockOfRows) {
    const int64_t block = min_of(kBlockOfRows, count - m);
    bf16* of_y[kBlockOfRows];
    for (int64_t i = 0; i < block; ++i) of_y[i] = y + rows[m + i] * ld_y;
    for (int64_t i = 0; i < round_up(block, kTileRows); ++i) {
      for (int64_t r = 0; r < R; r += kTileRanks) {
        const __m512i terms = i < block ? split_ranks(s + (m + i) * R, r, R) : _mm512_setzero_si512();
        _mm512_store_si512(split + i * ld + 2 * r, terms);
      }
    }
    Step last{nullptr, 0, 0, sums[1]};
    for (int64_t n = 0; n < N; n += kBlockColumns) {
      const int64_t columns = min_of(kBlockColumns, N - n);
      for (int64_t j = 0; j < round_up(columns, kOwnColumns); j += 16) {
        const int64_t first = n + min_of(j, columns - 1);  // beyond the last column: what comes of it is not read
        pack_b(b + first * ld_b, ld_b, min_of(16, N - first), R, tiles_of_b + j / 16 * tiles * kTileBytes);
      }
      for (int64_t i = 0; i < block; i += kPanelRows) {
        const bf16* left = split + i * ld;
        for (int64_t j = 0; j < columns; j += kOwnColumns) {
          float (*to)[kTileRows * kOwnColumns] = sums[last.sums == sums[0] ? 1 : 0];
          const Step step{of_y + i, min_of(kPanelRows, block - i), n + j, to};
          const char* right = tiles_of_b + j / 16 * tiles * kTileBytes;
          tile_zero<0>();
          tile_zero<1>();
          for (int64_t t = 0; t < tiles; ++t) {
            tile_load<4>(left + t * 32, ld * 2);
            tile_load<6>(right + t * kTileBytes, 64);
            tile_load<7>(right + (tiles + t) * kTileBytes, 64);
            tile_multiply<0, 4, 6>();
            tile_multiply<1, 4, 7>();
          }
          last.finish(N, 0);
          tile_store<0>(to[0], kOwnColumns * 4);
          tile_store<1>(to[0] + 16, kOwnColumns * 4);
          if (step.count > kTileRows) {
            tile_zero<2>();
            tile_zero<3>();
            for (int64_t t = 0; t < tiles; ++t) {
              tile_load<5>(left + kTileRows * ld + t * 32, ld * 2);
              if (tiles != 1) tile_load<6>(right + t * kTileBytes, 64);
              if (tiles != 1) tile_load<7>(right + (tiles + t) * kTileBytes, 64);
              tile_multiply<2, 5, 6>();
              tile_multiply<3, 5, 7>();
            }
          }
          last.finish(N, 1);
          if (step.count > kTileRows) {
            tile_store<2>(to[1], kOwnColumns * 4);
            tile_store<3>(to[1] + 16, kOwnColumns * 4);
          }
          last = step;
        }
      }
    }
    last.finish(N, 0);
    last.finish(N, 1);
  }
}

void expand(void* y_, int64_t ld_y, const int64_t* rows, int64_t count, int64_t N, int64_t R, const void* s_,
            const void* b_, int64_t ld_b, void* scratch) {
  bf16* y = static_cast<bf16*>(y_);
  const float* s = static_cast<const float*>(s_);
  const bf16* b = static_cast<const bf16*>(b_);
  const NoSubnormals mode;
  if (count <= kFewRows) {
    expand_in_vectors(y, ld_y, rows, count, N, R, s, b, ld_b, static_cast<float*>(scratch));
  } else {
    expand_in_tiles(y, ld_y, rows, count, N, R, s, b, ld_b, scratch);
  }
}

}  // namespace

MultiLoraKernels multi_lora_in_tiles(MultiLoraKernels kernels) {
  constexpr int kOfBf16 = static_cast<int>(Dtype::kBFloat16);
  kernels.shrink[kOfBf16] = shrink;
  kernels.expand[kOfBf16] = expand;
  return kernels;
}

}  // namespace pyfused::PYFUSED_ISA
