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

// Four rows' 16 bytes, of rows 0, 4, 8 and 12.
inline __m512i load_quarters(const char* from, int64_t row_bytes) {
  const auto part = [&](int64_t row) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + row * row_bytes));
  };
  __m512i all = _mm512_castsi128_si512(part(0));
  all = _mm512_inserti32x4(all, part(4), 1);
  all = _mm512_inserti32x4(all, part(8), 2);
  return _mm512_inserti32x4(all, part(12), 3);
}

// 16 rows of 32 columns as a right factor: pairs of columns, transposed.
inline void pack_pairs(const char* from, int64_t row_bytes, char* to) {
  for (int quarter = 0; quarter < 4; ++quarter, from += 16, to += 256) {
    __m512i rows[4];
    for (int i = 0; i < 4; ++i) rows[i] = load_quarters(from + i * row_bytes, row_bytes);
    const __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    const __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    _mm512_store_si512(to, _mm512_unpacklo_epi64(a, c));
    _mm512_store_si512(to + 64, _mm512_unpackhi_epi64(a, c));
    _mm512_store_si512(to + 128, _mm512_unpacklo_epi64(b, d));
    _mm512_store_si512(to + 192, _mm512_unpackhi_epi64(b, d));
  }
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

}  // namespace

int64_t linear_rows_bytes(int64_t M, int64_t K) { return row_tiles(M) * (K / 32) * kTileBytes; }

void linear_pack_rows(const void* x_, int64_t ld_x, int64_t M, int64_t K, int64_t begin, int64_t end, void* tiles) {
  const bf16* x = static_cast<const bf16*>(x_);
  const int64_t pair = min_of(row_tiles(M), 2);  // tiles beside each other
  for (int64_t m = begin; m < round_up(end, pair * kTileRows); m += kTileRows) {
    const int64_t t = m / kTileRows;
    char* to = static_cast<char*>(tiles) + (t / pair * pair * (K / 32) + t % pair) * kTileBytes;
    for (int64_t k = 0; k < K; k += 32, to += pair * kTileBytes) {
      if (m + kTileRows <= end) {
        pack_pairs(reinterpret_cast<const char*>(x + m * ld_x + k), ld_x * 2, to);
        continue;
      }
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

namespace {

// ---- many rows ------------------------------------------------------------------------------------------------------

constexpr int64_t kPanelBytes = 64;  // of one of its K rows of 32 columns
// Columns of x between two visits of a panel: 32 columns of w, 24 KB, stay in the first-level cache beside two blocks
// of sums while rows of x stream past from the second.
constexpr int64_t kBlockColumns = 448;
constexpr int64_t kBlockRows = 2 * kTileRows, kGroupBlocks = 2;

// Columns n to n + 31 of w [N, K]; the panel has two tiles for each 32 of K.
inline void pack_by_row(const bf16* w, int64_t ld_w, int64_t n, int64_t K, char* panel) {
  for (int64_t k = 0; k < K; k += 32, panel += 2 * kTileBytes) {
    const char* from = reinterpret_cast<const char*>(w + n * ld_w + k);
    pack_pairs(from, ld_w * 2, panel);
    pack_pairs(from + kTileRows * ld_w * 2, ld_w * 2, panel + kTileBytes);
  }
}

// The same of w [K, N] for `count` panels beside each other, `panel_bytes` apart.
inline void pack_by_column(const bf16* w, int64_t ld_w, int64_t n, int64_t K, int64_t count, char* panel,
                           int64_t panel_bytes) {
  // unpack works within 16 bytes: four columns of the left half go before four of the right one
  const __m512i halves = _mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0);
  for (int64_t k = 0; k < K; k += 2) {
    char* to = panel + k / 32 * 2 * kTileBytes + k % 32 / 2 * 64;
    for (int64_t p = 0; p < count; ++p, to += panel_bytes) {
      const bf16* from = w + k * ld_w + n + p * 32;
      const __m512i even = _mm512_permutexvar_epi64(halves, _mm512_loadu_si512(from));
      const __m512i odd = _mm512_permutexvar_epi64(halves, _mm512_loadu_si512(from + ld_w));
      _mm512_store_si512(to, _mm512_unpacklo_epi16(even, odd));
      _mm512_store_si512(to + kTileBytes, _mm512_unpackhi_epi16(even, odd));
    }
  }
}

// Sums of 32 rows and 32 columns are in tiles 0 to 3, as 4 x 256 numbers in memory.
inline void zero_sums() {
  tile_zero<0>();
  tile_zero<1>();
  tile_zero<2>();
  tile_zero<3>();
}
inline void load_sums(const float* sums) {
  tile_load<0>(sums, 64);
  tile_load<1>(sums + 256, 64);
  tile_load<2>(sums + 512, 64);
  tile_load<3>(sums + 768, 64);
}
inline void store_sums(float* sums) {
  tile_store<0>(sums, 64);
  tile_store<1>(sums + 256, 64);
  tile_store<2>(sums + 512, 64);
  tile_store<3>(sums + 768, 64);
}

// They grow by `columns` products of rows of x and a panel.
inline void add_products(const bf16* x, int64_t ld_x, int64_t columns, const char* panel) {
  const bf16* below = x + kTileRows * ld_x;
  const int64_t row_bytes = ld_x * 2;
  for (int64_t k = 0; k < columns; k += 32, panel += 2 * kTileBytes) {
    tile_load_once<4>(x + k, row_bytes);
    tile_load<6>(panel, 64);
    tile_multiply<0, 4, 6>();
    tile_load<7>(panel + kTileBytes, 64);
    tile_multiply<1, 4, 7>();
    tile_load_once<5>(below + k, row_bytes);
    tile_multiply<2, 5, 6>();
    tile_multiply<3, 5, 7>();
  }
}

inline Vector<float> load_kept(Vector<float> otherwise, __mmask16 keep, const float* from) {
  return reinterpret_cast<Vector<float>>(_mm512_mask_load_ps(reinterpret_cast<__m512>(otherwise), keep, from));
}

struct PanelResult {
  const LinearPanels& call;
  int64_t n;
  Wide shift, scale;

  PanelResult(const LinearPanels& call, int64_t n) : call(call), n(n), shift{}, scale{} {
    if (call.bias != nullptr) shift = widen_bf16(_mm512_loadu_si512(static_cast<const bf16*>(call.bias) + n));
    if (call.scale != nullptr) scale = {load(call.scale + n), load(call.scale + n + 16)};
  }

  // Rows from begin on, of sums, or where the mask has a bit of those with `more` columns. What does not change is read
  // once: instructions here take places in the queue from the tiles' before and after them.
  template <bool Masked>
  void write(const float* sums, const float* with_more, int64_t m, int64_t begin) const {
    const Wide shift = this->shift, scale = this->scale;
    const bool add = call.add, has_out = call.out != nullptr, has_scaled = call.scale != nullptr;
    const int64_t ld = call.N, ld_keep = call.ld_keep, first = (m + begin) * ld + n;
    // where one of them is null the other stands for it, unused
    bf16* out = static_cast<bf16*>(has_out ? call.out : call.scaled) + first;
    bf16* scaled = static_cast<bf16*>(has_scaled ? call.scaled : call.out) + first;
    int64_t word = (m + begin) * ld_keep + n / 32;
    const uint32_t* keep = call.keep;
    for (int64_t tile = 0; tile < 2; ++tile) {
      const int64_t row = tile * 512;
      for (int64_t i = begin > tile * kTileRows ? begin - tile * kTileRows : 0; i < kTileRows; ++i) {
        Vector<float> low = load(sums + row + i * 16), high = load(sums + row + i * 16 + 256);
        if constexpr (Masked) {
          // a word's halves from memory: taken apart in a mask register they would wait for each other
          const __mmask16* halves = reinterpret_cast<const __mmask16*>(keep + word);
          low = load_kept(low, halves[0], with_more + row + i * 16);
          high = load_kept(high, halves[1], with_more + row + i * 16 + 256);
          word += ld_keep;
        }
        low += shift.low;
        high += shift.high;
        if (add) {
          const Wide base = widen_bf16(_mm512_loadu_si512(out));
          low += base.low;
          high += base.high;
        }
        const __m512i value = join_bf16(low, high);
        if (has_out) _mm512_storeu_si512(out, value);
        out += ld;
        if (!has_scaled) continue;
        const Wide rounded = widen_bf16(value);
        _mm512_storeu_si512(scaled, join_bf16(rounded.low * scale.low, rounded.high * scale.high));
        scaled += ld;
      }
    }
  }
};

inline void multiply_panel(const LinearPanels& call, int64_t row_begin, int64_t row_end, int64_t n, const char* panel) {
  const bf16 *x = static_cast<const bf16*>(call.x), *more = static_cast<const bf16*>(call.more_x);
  const PanelResult result(call, n);
  const int64_t step = round_up((call.K + (call.K - 1) / kBlockColumns) / ((call.K - 1) / kBlockColumns + 1), 32);
  alignas(64) float sums[kGroupBlocks][1024], with_more[1024];
  const bool masked = call.keep != nullptr;
  // Vectors write a block while the tiles work on the next: its sums take their time to memory.
  int64_t waiting = -1, waiting_row = 0, waiting_begin = 0;
  const auto write_waiting = [&] {
    if (waiting < 0) return;
    masked ? result.write<true>(sums[waiting], with_more, waiting_row, waiting_begin)
           : result.write<false>(sums[waiting], with_more, waiting_row, waiting_begin);
    waiting = -1;
  };
  for (int64_t m = row_begin; m < row_end; m += kGroupBlocks * kBlockRows) {
    for (int64_t k = 0; k < call.K; k += step) {
      const int64_t columns = min_of(step, call.K - k);
      for (int64_t i = 0; i < kGroupBlocks && m + i * kBlockRows < row_end; ++i) {
        // the last rows make a whole block with some before them, which are written already
        const int64_t row = min_of(m + i * kBlockRows, row_end - kBlockRows);
        float* c = sums[i];
        k == 0 ? zero_sums() : load_sums(c);
        const bool last = k + columns == call.K;
        add_products(x + row * call.ld_x + k, call.ld_x, columns, panel + k * kPanelBytes);
        write_waiting();
        if (!last || call.more == 0) {
          store_sums(c);
        } else {
          if (masked) store_sums(c);
          add_products(more + row * call.more, call.more, call.more, panel + call.K * kPanelBytes);
          store_sums(masked ? with_more : c);
        }
        if (!last) continue;
        waiting = i;
        waiting_row = row;
        waiting_begin = m + i * kBlockRows - row;
      }
    }
  }
  write_waiting();
}

}  // namespace

void linear_panels(const LinearPanels& call, int64_t row_begin, int64_t row_end, int64_t column_begin,
                   int64_t column_end) {
  static_assert(kMaxPanelDepth >= kMaxPanelSource + kMaxTerms * kAmxMaxRank);
  const Tiles configured;
  alignas(64) char memory[kMaxPanelDepth * kPanelBytes];
  const bf16 *w = static_cast<const bf16*>(call.w), *more = static_cast<const bf16*>(call.more_w);
  const int64_t panel_bytes = (call.K + call.more) * kPanelBytes;
  const int64_t together = static_cast<int64_t>(sizeof memory) / panel_bytes;
  for (int64_t first = column_begin; first < column_end; first += together * 32) {
    const int64_t count = min_of(together, (column_end - first) / 32);
    if (call.by_row) {
      for (int64_t p = 0; p < count; ++p) {
        char* panel = memory + p * panel_bytes;
        pack_by_row(w, call.ld_w, first + p * 32, call.K, panel);
        pack_by_row(more, call.more, first + p * 32, call.more, panel + call.K * kPanelBytes);
      }
    } else {
      pack_by_column(w, call.ld_w, first, call.K, count, memory, panel_bytes);
      pack_by_column(more, call.N, first, call.more, count, memory + call.K * kPanelBytes, panel_bytes);
    }
    for (int64_t p = 0; p < count; ++p) {
      multiply_panel(call, row_begin, row_end, first + p * 32, memory + p * panel_bytes);
    }
  }
}

}  // namespace pyfused::PYFUSED_ISA
