// Products of a few rows with a weight that is read as it is: out[m][n] = sum_k x[m][k] w[n][k].
#pragma once

#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// Four lanes; a vector is one or more of them.
typedef float Quad __attribute__((vector_size(16)));
constexpr int kQuads = kVectorBytes / static_cast<int>(sizeof(Quad));

// Each quad's lanes added up: lane i of the result's quad q is the sum of quad q of the i-th vector.
inline Quad sum_quads(Quad a, Quad b, Quad c, Quad d) {
  const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}
// All of a vector's quads added up.
inline Quad quarter(Quad v) { return v; }
#if defined(__AVX2__)
typedef float TwoQuads __attribute__((vector_size(32)));
inline TwoQuads sum_quads(TwoQuads a, TwoQuads b, TwoQuads c, TwoQuads d) {
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  return _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
}
inline Quad quarter(TwoQuads v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif
#if defined(__AVX512F__)
typedef float FourQuads __attribute__((vector_size(64)));
inline FourQuads sum_quads(FourQuads a, FourQuads b, FourQuads c, FourQuads d) {
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  return _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
}
inline Quad quarter(FourQuads v) {
  return quarter(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif

// run(q, quad q of v).
template <class F>
PYFUSED_INLINE void for_quads(Vector<float> v, const F& run) {
#if defined(__AVX512F__)
  run(0, _mm512_castps512_ps128(v));
  run(1, _mm512_extractf32x4_ps(v, 1));
  run(2, _mm512_extractf32x4_ps(v, 2));
  run(3, _mm512_extractf32x4_ps(v, 3));
#elif defined(__AVX2__)
  run(0, _mm256_castps256_ps128(v));
  run(1, _mm256_extractf128_ps(v, 1));
#else
  run(0, v);
#endif
}

// ---- one row, and fp64: dot products --------------------------------------------------------------------------------

// Rows x Outputs sums at a time.
template <class Acc, class W, int Rows, int Outputs>
inline __attribute__((always_inline)) void dot_block(const Acc* x, int64_t ld_x, int64_t K, const W* w, int64_t ld_w,
                                                     Acc* out, int64_t ld_out) {
  Vector<Acc> sums[Rows][Outputs] = {};
  for_vectors<Acc>(0, K, [&](int64_t k, int count) __attribute__((always_inline)) {
    Vector<Acc> rows[Rows];
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) rows[m] = load(x + m * ld_x + k);
#pragma GCC unroll 4
    for (int n = 0; n < Outputs; ++n) {
      Vector<Acc> column;
      if constexpr (sizeof(Accumulator<W>) == sizeof(Acc)) {
        column = load_some<Acc>(w + n * ld_w + k, count);
      } else {  // a narrower adapter on fp64
        column = Vector<Acc>{};
        for (int i = 0; i < count; ++i) column[i] = static_cast<Acc>(load_one(w + n * ld_w + k + i));
      }
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) sums[m][n] += rows[m] * column;
    }
  });
  for (int m = 0; m < Rows; ++m) {
    if constexpr (Outputs == 4 && sizeof(Acc) == 4) {
      const Quad total = sum_quads(quarter(sums[m][0]), quarter(sums[m][1]), quarter(sums[m][2]), quarter(sums[m][3]));
      memcpy(out + m * ld_out, &total, sizeof total);
    } else {
      for (int n = 0; n < Outputs; ++n) out[m * ld_out + n] = sum_lanes(sums[m][n]);
    }
  }
}

template <class T, class W>
void few_rows(const void* x_, int64_t ld_x, int64_t M, int64_t K, const void* w_, int64_t ld_w, int64_t begin,
              int64_t end, void* out_, int64_t ld_out) {
  using Acc = Accumulator<T>;
  const Acc* x = static_cast<const Acc*>(x_);
  const W* w = static_cast<const W*>(w_);
  Acc* out = static_cast<Acc*>(out_);
  const auto rows = [&]<int Rows>(int64_t m, int64_t n) {
    dot_block<Acc, W, Rows, 4>(x + m * ld_x, ld_x, K, w + n * ld_w, ld_w, out + m * ld_out + n - begin, ld_out);
  };
  int64_t n = begin;
  for (; n + 4 <= end; n += 4) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) rows.template operator()<4>(m, n);
    if (M - m == 3) rows.template operator()<3>(m, n);
    if (M - m == 2) rows.template operator()<2>(m, n);
    if (M - m == 1) rows.template operator()<1>(m, n);
  }
  for (; n < end; ++n) {
    for (int64_t m = 0; m < M; ++m) {
      dot_block<Acc, W, 1, 1>(x + m * ld_x, ld_x, K, w + n * ld_w, ld_w, out + m * ld_out + n - begin, ld_out);
    }
  }
}

// ---- several rows: four columns of a row in each quad ---------------------------------------------------------------

// A weight's four columns go into all quads of a vector by the load itself, and are multiplied by four columns of as
// many rows. A sum's lanes are then those of a quad: a quarter of the work for a vector's, and less for short sums.

// A sum of lanes starts anew after so many terms: one of thousands would lose digits.
constexpr int64_t kLaneRun = 256;

// M filled up to whole vectors, from 4 rows on to an even number of them.
inline int64_t rows_in_quads(int64_t M) { return round_up(M, M < 4 ? kQuads : 4); }

// Rows of x [M, K] as [K / 4][rows_in_quads(M)][4], K filled up with zeros to a multiple of 16.
template <class T>
void pack_quads(const void* x_, int64_t ld_x, int64_t M, int64_t K, void* to_) {
  const T* x = static_cast<const T*>(x_);
  float* to = static_cast<float*>(to_);
  const int64_t rows = rows_in_quads(M);
  for (int64_t m = 0; m < rows; ++m) {
    const auto store_quads = [&](int64_t k, Vector<float> v) PYFUSED_INLINE_LAMBDA {
      for_quads(v, [&](int64_t q, Quad quad)
                       PYFUSED_INLINE_LAMBDA { memcpy(to + ((k / 4 + q) * rows + m) * 4, &quad, sizeof quad); });
    };
    if (m >= M) {
      for (int64_t k = 0; k < K; k += kWidth<float>) store_quads(k, Vector<float>{});
    } else {
      for_vectors<float>(0, K, [&](int64_t k, int count) PYFUSED_INLINE_LAMBDA {
        store_quads(k, load_some<float>(x + m * ld_x + k, count));
      });
    }
  }
}

inline Vector<float> repeat_quad(const float* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(_mm512_broadcast_f32x4(_mm_loadu_ps(p)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<float>>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#else
  return load(p);
#endif
}

// Vectors of rows x Outputs sums at a time over K columns; `add` to what is there. Rows of out are ld_out apart.
template <int Vectors, int Outputs>
PYFUSED_INLINE void quad_block(const float* x, int64_t ld_x, int64_t K, const float* const* w, float* out,
                               int64_t ld_out, bool add) {
  Vector<float> sums[Outputs][Vectors] = {};
  const auto multiply = [&](const float* const* weights, int64_t k) PYFUSED_INLINE_LAMBDA {
    Vector<float> rows[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) rows[v] = load(x + v * kWidth<float>);
#pragma GCC unroll 8
    for (int n = 0; n < Outputs; ++n) {
      const Vector<float> weight = repeat_quad(weights[n] + k);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[n][v] += rows[v] * weight;
    }
  };
  int64_t k = 0;
  for (; k + 4 <= K; k += 4, x += ld_x) multiply(w, k);
  if (k < K) {
    float last[Outputs][4] = {};
    const float* weights[Outputs];
    for (int n = 0; n < Outputs; ++n) {
      memcpy(last[n], w[n] + k, static_cast<size_t>(K - k) * sizeof(float));
      weights[n] = last[n];
    }
    multiply(weights, 0);
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 2
    for (int n = 0; n < Outputs; n += 4) {
      const Vector<float> totals = sum_quads(sums[n][v], sums[n + 1][v], sums[n + 2][v], sums[n + 3][v]);
      for_quads(totals, [&](int64_t q, Quad quad) PYFUSED_INLINE_LAMBDA {
        float* to = out + (v * kQuads + q) * ld_out + n;
        if (add) {
          Quad before;
          memcpy(&before, to, sizeof before);
          quad += before;
        }
        memcpy(to, &quad, sizeof quad);
      });
    }
  }
}

template <class W>
void quad_rows(const void* x_, int64_t M, int64_t K, const void* w_, int64_t ld_w, int64_t begin, int64_t end,
               void* out_, int64_t ld_out) {
  const float* x = static_cast<const float*>(x_);
  const W* w = static_cast<const W*>(w_);
  float* out = static_cast<float*>(out_);
  const int64_t rows = rows_in_quads(M), ld_x = rows * 4;
  constexpr int kMost = kQuads == 2 ? 2 : 4;  // vectors of rows; AVX2 has too few registers for four of eight lanes
  const auto columns = [&]<int Vectors, int Outputs>(int64_t first, int64_t count, int64_t n) PYFUSED_INLINE_LAMBDA {
    // Outputs behind the last are computed from its weights. Pointers go from row to row: a product for each, made in a
    // vector, would hold up the block.
    const float* weights[Outputs];
    alignas(64) float wide[sizeof(W) == sizeof(float) ? 1 : Outputs * kLaneRun];
    const W* from = w + n * ld_w + first;
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i) {
      if constexpr (sizeof(W) == sizeof(float)) {
        weights[i] = from;
      } else {
        for_vectors<float>(0, count, [&](int64_t k, int lanes) PYFUSED_INLINE_LAMBDA {
          store(wide + i * kLaneRun + k, load_some<float>(from + k, lanes));
        });
        weights[i] = wide + i * kLaneRun;
      }
      if (n + i + 1 < end) from += ld_w;
    }
    const float* block = x + first / 4 * ld_x;
    for (int64_t m = 0; m < rows; m += Vectors * kQuads) {
      quad_block<Vectors, Outputs>(block + m * 4, ld_x, count, weights, out + m * ld_out + n - begin, ld_out,
                                   first > 0);
    }
  };
  const auto run = [&]<int Vectors, int Outputs>() PYFUSED_INLINE_LAMBDA {
    for (int64_t first = 0; first < K; first += kLaneRun) {
      const int64_t count = min_of(kLaneRun, K - first);
      for (int64_t n = begin; n < end; n += Outputs) columns.template operator()<Vectors, Outputs>(first, count, n);
    }
  };
  const int64_t vectors = rows / kQuads;
  if (vectors == 1) {
    run.template operator()<1, 8>();
  } else if (vectors == 2) {
    run.template operator()<2, kQuads == 4 ? 8 : 4>();
  } else if (vectors == 3) {
    run.template operator()<3, 4>();
  } else {
    run.template operator()<kMost, 4>();
  }
}

// fp64 weights go with fp64 data only.
template <class T, class W>
constexpr auto few_rows_of() -> decltype(&few_rows<T, W>) {
  if constexpr (sizeof(Accumulator<T>) < sizeof(W)) {
    return nullptr;
  } else {
    return few_rows<T, W>;
  }
}
template <class T>
constexpr auto pack_quads_of() -> decltype(&pack_quads<T>) {
  if constexpr (sizeof(Accumulator<T>) == sizeof(double)) {
    return nullptr;
  } else {
    return pack_quads<T>;
  }
}

}  // namespace pyfused::PYFUSED_ISA
