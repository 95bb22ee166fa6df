// A linear layer in AMX tiles, compiled for that level alone. No torch, no std: see simd.h.
#include "linear_amx.h"

#include "amx_products.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Rows and columns exchanged, of 16 x 16 elements of 32 bits.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int half = 0; half < 2; ++half) {
      r[i + 2 * half] = _mm512_unpacklo_epi64(t[i + half], t[i + 2 + half]);
      r[i + 2 * half + 1] = _mm512_unpackhi_epi64(t[i + half], t[i + 2 + half]);
    }
  }
  // r[4 q + j] has column j of each 128 bits for rows 4 q to 4 q + 3
  for (int j = 0; j < 4; ++j) {
    const __m512i even = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), odd = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even, even_below, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even, even_below, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd, odd_below, 0xdd);
  }
  memcpy(r, t, sizeof r);
}

// Up to 16 rows one tile of x is multiplied, else two.
inline int64_t row_tiles(int64_t M) { return M <= kTileRows ? 1 : round_up(M, 2 * kTileRows) / kTileRows; }

// c[n][m] += sum_k w[n][k] x[m][k] in tiles 0 to 3, for 32 rows of w and Count tiles of x. What is read once, w for few
// rows and x for many, does not push the other out of the first-level cache.
template <int Count, bool Few>
inline void add_columns(const bf16* w, int64_t ld_w, int64_t K, const char* x) {
  constexpr int64_t kStep = Count * kTileBytes;
  const int64_t row_bytes = ld_w * 2;
  for (int64_t k = 0; k < K; k += 32, x += kStep) {
    Few ? tile_load_once<4>(w + k, row_bytes) : tile_load<4>(w + k, row_bytes);
    Few ? tile_load<6>(x, 64) : tile_load_once<6>(x, 64);
    tile_multiply<0, 4, 6>();
    if constexpr (Count == 2) {
      Few ? tile_load<7>(x + kTileBytes, 64) : tile_load_once<7>(x + kTileBytes, 64);
      tile_multiply<1, 4, 7>();
    }
    Few ? tile_load_once<5>(w + kTileRows * ld_w + k, row_bytes) : tile_load<5>(w + kTileRows * ld_w + k, row_bytes);
    tile_multiply<2, 5, 6>();
    if constexpr (Count == 2) tile_multiply<3, 5, 7>();
  }
}

template <int Count, bool Few>
inline void sum_products(const LinearRows& call, int64_t n, int64_t m, float (&c)[4][256]) {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
  const auto add = [&](const LinearRows::Product& product) PYFUSED_INLINE_LAMBDA {
    if (product.K == 0) return;
    const char* x = static_cast<const char*>(product.x) + m / kTileRows * (product.K / 32) * kTileBytes;
    add_columns<Count, Few>(static_cast<const bf16*>(product.w) + n * product.ld_w, product.ld_w, product.K, x);
  };
  add(call.base);
  add(call.update);
  tile_store<0>(c[0], 64);
  tile_store<2>(c[2], 64);
  if constexpr (Count == 2) {
    tile_store<1>(c[1], 64);
    tile_store<3>(c[3], 64);
  }
}

inline Vector<float> load_ranks(const void* b, Dtype dtype, int64_t element, __mmask16 present) {
  if (dtype == Dtype::kFloat32) {
    return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(present, static_cast<const float*>(b) + element));
  }
  const __m256i half = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(b) + element);
  return reinterpret_cast<Vector<float>>(dtype == Dtype::kFloat16 ? _mm512_castps_si512(_mm512_cvtph_ps(half))
                                                                  : _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

}  // namespace

int64_t linear_rows_bytes(int64_t M, int64_t K) { return row_tiles(M) * (K / 32) * kTileBytes; }

void linear_pack_rows(const void* x_, int64_t ld_x, int64_t M, int64_t K, int64_t begin, int64_t end, void* tiles) {
  const bf16* x = static_cast<const bf16*>(x_);
  const int64_t pair = min_of(row_tiles(M), 2);  // tiles beside each other
  for (int64_t m = begin; m < round_up(end, pair * kTileRows); m += kTileRows) {
    const int64_t t = m / kTileRows;
    char* to = static_cast<char*>(tiles) + (t / pair * pair * (K / 32) + t % pair) * kTileBytes;
    for (int64_t k = 0; k < K; k += 32, to += pair * kTileBytes) {
      __m512i values[kTileRows];
      for (int64_t i = 0; i < kTileRows; ++i) {
        values[i] = m + i < end ? _mm512_loadu_si512(x + (m + i) * ld_x + k) : _mm512_setzero_si512();
      }
      transpose(values);
      memcpy(to, values, kTileBytes);
    }
  }
}

void linear_block(const LinearRows& call, int64_t row_begin, int64_t row_end, int64_t column_begin,
                  int64_t column_end) {
  const Tiles configured;
  const bf16* bias = static_cast<const bf16*>(call.bias);
  bf16* out = static_cast<bf16*>(call.out);
  alignas(64) float c[4][256];
  const auto product = call.M <= kTileRows       ? sum_products<1, true>
                       : call.M <= 2 * kTileRows ? sum_products<2, true>
                                                 : sum_products<2, false>;
  for (int64_t n = column_begin; n < column_end; n += 32) {
    const Wide shift = bias == nullptr ? Wide{} : widen_bf16(_mm512_loadu_si512(bias + n));
    for (int64_t m = row_begin; m < row_end; m += 2 * kTileRows) {
      product(call, n, m, c);
      for (int64_t t = 0; t < 2 && m + t * kTileRows < row_end; ++t) {
        __m512i low[kTileRows], high[kTileRows];
        memcpy(low, c[t], sizeof low);
        memcpy(high, c[2 + t], sizeof high);
        transpose(low);
        transpose(high);
        const int64_t first = m + t * kTileRows, rows = min_of(kTileRows, row_end - first);
        for (int64_t i = 0; i < rows; ++i) {
          Vector<float> left = reinterpret_cast<Vector<float>>(low[i]);
          Vector<float> right = reinterpret_cast<Vector<float>>(high[i]);
          if (bias != nullptr) {
            left += shift.low;
            right += shift.high;
          }
          _mm512_storeu_si512(out + (first + i) * call.N + n, join_bf16(left, right));
        }
      }
    }
  }
}

int64_t lora_update_columns(Dtype of_b, int64_t R) { return rank_tiles(of_b, R) * 32; }

void lora_pack_update(const float* s, int64_t M, int64_t R, Dtype of_b, int64_t begin, int64_t end, void* tiles) {
  constexpr int64_t kRows = 2 * kTileRows;
  const int terms = rank_terms(of_b);
  const int64_t columns = lora_update_columns(of_b, R);
  alignas(64) bf16 rows[kRows * kSplitColumns];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t count = min_of(kRows, end - m);
    split_rows(s + m * R, count, R, terms, false, rows, columns);
    char* to = static_cast<char*>(tiles) + m / kTileRows * (columns / 32) * kTileBytes;
    linear_pack_rows(rows, columns, M, columns, 0, count, to);
  }
}

void lora_update_weight(const void* b, Dtype dtype, int64_t ld_b, int64_t R, int64_t begin, int64_t end, void* rows) {
  const int terms = rank_terms(dtype);
  const int64_t columns = lora_update_columns(dtype, R);
  bf16* to = static_cast<bf16*>(rows) + begin * columns;
  for (int64_t n = begin; n < end; ++n, to += columns) {
    for (int64_t r = 0; r < R; r += 16) {
      const __mmask16 present = ranks_present(r, R);
      Vector<float> rest = load_ranks(b, dtype, n * ld_b + r, present);
      const __m256i high = to_bf16(take_term(rest));
      _mm256_mask_storeu_epi16(to + r, present, high);
      _mm256_mask_storeu_epi16(to + R + r, present, high);
      if (terms == 3) _mm256_mask_storeu_epi16(to + 2 * R + r, present, to_bf16(rest));
    }
    memset(to + terms * R, 0, static_cast<size_t>(columns - terms * R) * sizeof(bf16));
  }
}

}  // namespace pyfused::PYFUSED_ISA
