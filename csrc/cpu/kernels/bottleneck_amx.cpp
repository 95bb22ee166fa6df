// The bottleneck's rows in AMX tiles, compiled for that level alone. No torch, no std: see simd.h.
#include "bottleneck_amx.h"

#include "activations.h"
#include "amx_products.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int64_t kBitColumns = 1024;  // of a panel whose keep bits are made at a time
constexpr int64_t kWords = kBitColumns / 32;

inline int64_t column_tiles_of(int64_t H) { return H / kTileRows; }
inline int64_t hidden_tiles_of(int64_t H) { return round_up(H, 32) / 32; }

// One row of a tile: pairs of rows `row` and `row + 1` of 16 columns.
inline __m512i pair_rows(const bf16* w, int64_t ld, int64_t row, int64_t column) {
  const auto wide = [&](int64_t r) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + r * ld + column)));
  };
  return _mm512_or_si512(wide(row), _mm512_slli_epi32(wide(row + 1), 16));
}
// The same where pairs lie beside each other: columns `column` and `column + 1` of 16 rows.
inline __m512i pair_columns(const bf16* w, int64_t ld, int64_t row, int64_t column) {
  const __m512i rows = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                          _mm512_set1_epi32(static_cast<int>(ld)));
  return _mm512_i32gather_epi32(rows, w + row * ld + column, 2);
}

inline __m256i bf16_of(Vector<float> v) { return to_bf16(v); }
inline Vector<float> widen_half(__m256i half) {
  return reinterpret_cast<Vector<float>>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}
inline __m256i load_half(const bf16* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline void store_half(bf16* p, __m256i half) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half); }

// Rows [rows, ld] of h or dz as the left factor of a sum over rows, with a row of ones behind them where asked for.
inline void transpose_rows(const bf16* rows_of, int64_t ld, int64_t rows, int64_t H, bool with_ones, SplitColumns& to) {
  to.ranks = H + with_ones;
  const __m512i pairs = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                           _mm512_set1_epi32(kSumRows / 2));
  for (int64_t m = 0; m < kSumRows; m += 2) {
    for (int64_t j = 0; j < H; j += kTileRows) {
      _mm512_i32scatter_epi32(to.data + j * kSumRows + m, pairs, pair_rows(rows_of, ld, m, j), 4);
    }
  }
  bf16* last = to.data + H * kSumRows;
  if (!with_ones) return;
  memset(last, 0, static_cast<size_t>(kTileRows * kSumRows) * sizeof(bf16));
  for (int64_t m = 0; m < rows; ++m) last[m] = bf16{0x3f80};
}

template <Activation A>
void activate_panel(const float* sums, const float* bias, int64_t rows, int64_t H, bf16* z, bf16* h, int64_t ld_h) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < H; j += 16) {
      const __m256i rounded = bf16_of(load(sums + i * H + j) + load(bias + j));
      store_half(z + i * H + j, rounded);
      store_half(h + i * ld_h + j, bf16_of(activate<A, VectorMath<float>>(widen_half(rounded))));
    }
  }
}

// h and dz [kSumRows, ld], zero below the last row; sums of dz are added up in bias.
template <Activation A>
void differentiate_panel(const float* dh, const bf16* z, float factor, int64_t rows, int64_t H, bf16* h, bf16* dz,
                         int64_t ld, float* bias) {
  for (int64_t j = 0; j < H; j += 16) {
    Vector<float> sum{};
    for (int64_t i = 0; i < rows; ++i) {
      Vector<float> value;
      const Vector<float> slope =
          activation_gradient<A, VectorMath<float>>(widen_half(load_half(z + i * H + j)), value);
      const Vector<float> gradient = load(dh + i * H + j) * factor * slope;
      store_half(h + i * ld + j, bf16_of(value));
      store_half(dz + i * ld + j, bf16_of(gradient));
      sum += gradient;
    }
    if (bias != nullptr) store(bias + j, load(bias + j) + sum);
  }
}

inline Vector<float> sum_of_parts(const BottleneckAmxParts& parts, int64_t h, int64_t d) {
  Vector<float> sum = load(parts.data + h * parts.D + d);
  for (int64_t part = 1; part < parts.count; ++part) sum += load(parts.data + part * parts.stride + h * parts.D + d);
  return sum;
}

}  // namespace

int64_t bottleneck_weight_bytes(int64_t D, int64_t H) { return D / 32 * 2 * hidden_tiles_of(H) * kTileBytes; }

void bottleneck_pack_over_columns(const void* w_, bool of_up, int64_t D, int64_t H, int64_t begin, int64_t end,
                                  void* tiles) {
  const bf16* w = static_cast<const bf16*>(w_);
  char* to = static_cast<char*>(tiles) + begin / 32 * column_tiles_of(H) * kTileBytes;
  for (int64_t d = begin; d < end; d += 32) {
    for (int64_t h = 0; h < H; h += kTileRows) {
      for (int64_t pair = 0; pair < 32; pair += 2, to += 64) {
        _mm512_store_si512(to, of_up ? pair_rows(w, H, d + pair, h) : pair_columns(w, D, h, d + pair));
      }
    }
  }
}

void bottleneck_pack_over_hidden(const void* w_, bool of_up, int64_t D, int64_t H, int64_t begin, int64_t end,
                                 void* tiles) {
  const bf16* w = static_cast<const bf16*>(w_);
  char* to = static_cast<char*>(tiles) + begin / 16 * hidden_tiles_of(H) * kTileBytes;
  for (int64_t d = begin; d < end; d += 16) {
    for (int64_t h = 0; h < round_up(H, 32); h += 2, to += 64) {
      _mm512_store_si512(to, h >= H  ? _mm512_setzero_si512()
                             : of_up ? pair_columns(w, H, d, h)
                                     : pair_rows(w, D, h, d));
    }
  }
}

void bottleneck_forward_rows(const BottleneckForwardRows& call, int64_t row_begin, int64_t row_end) {
  const Tiles configured;
  const bf16 *x = static_cast<const bf16*>(call.x), *residual = static_cast<const bf16*>(call.residual);
  bf16 *z = static_cast<bf16*>(call.z), *out = static_cast<bf16*>(call.out);
  const int64_t D = call.D, H = call.H, tiles = hidden_tiles_of(H), ld_h = tiles * 32;
  const bool drop = call.dropout.threshold != 0;
  const LoraOperand down{call.down, 0, Dtype::kBFloat16}, up{call.up, 0, Dtype::kBFloat16};
  alignas(64) float sums[kPanelRows * kMaxAmxHidden];
  alignas(64) bf16 h[kPanelRows * kMaxAmxHidden];
  uint32_t bits[kPanelRows * kWords];
  memset(h, 0, sizeof h);
  for (int64_t m = row_begin; m < row_end; m += kPanelRows) {
    const int64_t rows = min_of(kPanelRows, row_end - m);
    amx_rank_product(x + m * call.ld_x, call.ld_x, 0, rows, D, H, down, Mask{}, 1.0f, sums);
    with_activation(call.activation,
                    [&]<Activation A>() { activate_panel<A>(sums, call.down_bias, rows, H, z + m * H, h, ld_h); });
    for (int64_t k = 0; k < D; k += kBitColumns) {
      const int64_t end = min_of(k + kBitColumns, D);
      if (drop) keep_bits(call.dropout, m, rows, k, round_up(end - k, 128) / 128, bits, kWords);
      amx_wide_product(h, ld_h, rows, up, tiles, k, end,
                       [&](int64_t i, int64_t n, Vector<float> low, Vector<float> high) PYFUSED_INLINE_LAMBDA {
                         low = low * load(call.scale + n) + load(call.bias + n);
                         high = high * load(call.scale + n + 16) + load(call.bias + n + 16);
                         if (drop) {
                           const uint32_t keep = bits[i * kWords + (n - k) / 32];
                           low = select<float>(keep, low);
                           high = select<float>(keep >> 16, high);
                         }
                         if (residual != nullptr) {
                           const Wide base = widen_bf16(_mm512_loadu_si512(residual + (m + i) * call.ld_residual + n));
                           low += base.low;
                           high += base.high;
                         }
                         _mm512_storeu_si512(out + (m + i) * D + n, join_bf16(low, high));
                       });
    }
  }
}

void bottleneck_backward_rows(const BottleneckBackwardRows& call, int64_t row_begin, int64_t row_end) {
  const Tiles configured;
  const bf16 *dy = static_cast<const bf16*>(call.dy), *x = static_cast<const bf16*>(call.x);
  const bf16* z = static_cast<const bf16*>(call.z);
  bf16 *dx = static_cast<bf16*>(call.dx), *masked = static_cast<bf16*>(call.masked);
  const int64_t D = call.D, H = call.H, tiles = hidden_tiles_of(H), ld = tiles * 32;
  const bool drop = call.dropout.threshold != 0;
  const LoraOperand up{call.up, 0, Dtype::kBFloat16}, down{call.down, 0, Dtype::kBFloat16};
  alignas(64) float dh[kSumRows * kMaxAmxHidden];
  alignas(64) bf16 h[kSumRows * kMaxAmxHidden], dz[kSumRows * kMaxAmxHidden];
  uint32_t bits[kSumRows * kWords];
  SplitColumns left;
  static_assert(kSumRows == kAmxBackwardRows);
  for (int64_t m = row_begin; m < row_end; m += kSumRows) {
    const int64_t rows = min_of(kSumRows, row_end - m);
    const bf16* g = dy + m * call.ld_dy;
    int64_t ld_g = call.ld_dy;
    if (drop) {
      for (int64_t k = 0; k < D; k += kBitColumns) {
        const int64_t columns = min_of(kBitColumns, D - k);
        keep_bits(call.dropout, m, rows, k, round_up(columns, 128) / 128, bits, kWords);
        for (int64_t i = 0; i < rows; ++i) {
          for (int64_t n = 0; n < columns; n += 32) {
            _mm512_store_si512(masked + i * D + k + n,
                               _mm512_maskz_loadu_epi16(bits[i * kWords + n / 32], g + i * ld_g + k + n));
          }
        }
      }
      g = masked;
      ld_g = D;
    }
    amx_rank_product(g, ld_g, 0, rows, D, H, up, Mask{}, 1.0f, dh);
    // rows that are missing add nothing to the sums over rows
    memset(h, 0, sizeof h);
    memset(dz, 0, sizeof dz);
    with_activation(call.activation, [&]<Activation A>() {
      differentiate_panel<A>(dh, z + m * H, call.factor, rows, H, h, dz, ld, call.down_bias_part);
    });
    const bool add = m != row_begin;
    if (call.up_part != nullptr) {
      transpose_rows(h, ld, rows, H, true, left);
      amx_sum_rows(left, left.ranks, g, ld_g, rows, D, nullptr, 0, call.up_part, D, add);
    }
    if (call.down_part != nullptr) {
      transpose_rows(dz, ld, rows, H, false, left);
      amx_sum_rows(left, left.ranks, x + m * call.ld_x, call.ld_x, rows, D, nullptr, 0, call.down_part, D, add);
    }
    for (int64_t p = 0; dx != nullptr && p < rows; p += kPanelRows) {
      amx_wide_product(dz + p * ld, ld, min_of(kPanelRows, rows - p), down, tiles, 0, D,
                       [&](int64_t i, int64_t n, Vector<float> low, Vector<float> high) PYFUSED_INLINE_LAMBDA {
                         if (call.add_dy) {
                           const Wide base = widen_bf16(_mm512_loadu_si512(dy + (m + p + i) * call.ld_dy + n));
                           low += base.low;
                           high += base.high;
                         }
                         _mm512_storeu_si512(dx + (m + p + i) * D + n, join_bf16(low, high));
                       });
    }
  }
}

void bottleneck_down_gradient(const BottleneckAmxParts& parts, void* gradient, int64_t begin, int64_t end) {
  for (int64_t h = 0; h < parts.H; ++h) {
    bf16* to = static_cast<bf16*>(gradient) + h * parts.D;
    for (int64_t d = begin; d < end; d += 16) store_half(to + d, bf16_of(sum_of_parts(parts, h, d)));
  }
}

void bottleneck_up_gradient(const BottleneckAmxUpGradient& call, int64_t begin, int64_t end) {
  const int64_t H = call.parts.H;
  const bf16* w_up = static_cast<const bf16*>(call.w_up);
  alignas(64) float columns[kMaxAmxHidden * 16];  // of 16 columns of the sums, [H, 16]
  const __m512i rows =
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(16));
  for (int64_t d = begin; d < end; d += 16) {
    for (int64_t h = 0; h < H; ++h) store(columns + h * 16, sum_of_parts(call.parts, h, d));
    for (int64_t i = d; i < d + 16; ++i) {
      const float scale = call.scale[i];
      Vector<float> dots{};
      for (int64_t h = 0; h < H; h += 16) {
        const Vector<float> sums =
            reinterpret_cast<Vector<float>>(_mm512_i32gather_ps(rows, columns + h * 16 + i - d, 4));
        if (call.gradient != nullptr) {
          store_half(static_cast<bf16*>(call.gradient) + i * H + h, bf16_of(sums * scale));
        }
        if (call.dots != nullptr) dots += sums * widen_half(load_half(w_up + i * H + h));
      }
      if (call.dots != nullptr) call.dots[i] = static_cast<double>(sum_lanes(dots));
    }
  }
}

}  // namespace pyfused::PYFUSED_ISA
