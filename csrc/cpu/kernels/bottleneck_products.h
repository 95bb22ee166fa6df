// Products of a few rows with a weight that is read as it is: out[m][n] = sum_k x[m][k] w[n][k].
#pragma once

#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {

// ---- sums over lanes ------------------------------------------------------------------------------------------------

// A vector is one quad or more.
constexpr int kQuads = kVectorBytes / static_cast<int>(sizeof(Quad));

// sum_quads in each quad: lane i of the result's quad q is the sum of quad q of the i-th vector.
#if defined(__AVX2__)
typedef float TwoQuads __attribute__((vector_size(32)));
inline TwoQuads sum_quads(TwoQuads a, TwoQuads b, TwoQuads c, TwoQuads d) {
  const __m256 ab = _mm256_unpacklo_ps(a, b) + _mm256_unpackhi_ps(a, b);
  const __m256 cd = _mm256_unpacklo_ps(c, d) + _mm256_unpackhi_ps(c, d);
  return _mm256_shuffle_ps(ab, cd, 0x44) + _mm256_shuffle_ps(ab, cd, 0xee);
}
#endif
#if defined(__AVX512F__)
typedef float FourQuads __attribute__((vector_size(64)));
inline FourQuads sum_quads(FourQuads a, FourQuads b, FourQuads c, FourQuads d) {
  const __m512 ab = _mm512_unpacklo_ps(a, b) + _mm512_unpackhi_ps(a, b);
  const __m512 cd = _mm512_unpacklo_ps(c, d) + _mm512_unpackhi_ps(c, d);
  return _mm512_shuffle_ps(ab, cd, 0x44) + _mm512_shuffle_ps(ab, cd, 0xee);
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

// ---- fp32: rows in the lanes ----------------------------------------------------------------------------------------

// A vector of sums has `Span` lanes for each of its rows: all of them for one row, a quad for four or more. Span
// columns of a weight go into each of these groups at once, by the load itself, and are multiplied by the same columns
// of as many rows. With a row in few lanes no lane is without work, and a sum ends in fewer shuffles: H = 64 terms in
// one vector cost less than to add up its lanes.

// A lane's sum starts anew after so many terms: one of thousands would lose digits.
constexpr int64_t kLaneTerms = 64;
// 16-bit weights are widened before the product, once for all rows; for one row in all lanes, as they are read.
template <class W, int Span>
constexpr bool kWidens = sizeof(W) != sizeof(float) && (Span == 4 || Span < kWidth<float>);
template <class W, bool Widened>
struct OperandOf {
  using type = W;
};
template <class W>
struct OperandOf<W, true> {
  using type = float;
};
// Columns of one run.
template <class W, int Span>
constexpr int64_t kRun = (kWidens<W, Span> ? 4 : Span) * kLaneTerms;

// run.operator()<Span>() with M's.
template <class F>
PYFUSED_INLINE void with_span(int64_t M, const F& run) {
  constexpr int kLanes = kWidth<float>;
  if (kLanes > 4 && M == 1) {
    run.template operator()<kLanes>();
  } else if (kLanes > 8 && M == 2) {
    run.template operator()<kLanes / 2 < 4 ? 4 : kLanes / 2>();
  } else {
    run.template operator()<4>();
  }
}

// M filled up to whole vectors, from 4 rows on to an even number of them.
template <int Span>
constexpr int64_t padded_rows(int64_t M) {
  constexpr int64_t kRows = kWidth<float> / Span;
  return round_up(M, M < 4 ? kRows : 4);
}

// Rows of x [M, K] as [K / Span][padded_rows(M)][Span], K filled up with zeros to a multiple of 16.
template <class T>
void pack_lanes(const void* x_, int64_t ld_x, int64_t M, int64_t K, void* to_) {
  const T* x = static_cast<const T*>(x_);
  float* to = static_cast<float*>(to_);
  with_span(M, [&]<int Span>() PYFUSED_INLINE_LAMBDA {
    const int64_t rows = padded_rows<Span>(M);
    for (int64_t m = 0; m < rows; ++m) {
      const auto store_quads = [&](int64_t k, Vector<float> v) PYFUSED_INLINE_LAMBDA {
        for_quads(v, [&](int64_t q, Quad quad) PYFUSED_INLINE_LAMBDA {
          const int64_t column = k + q * 4;
          memcpy(to + (column / Span * rows + m) * Span + column % Span, &quad, sizeof quad);
        });
      };
      if (m >= M) {
        for (int64_t k = 0; k < K; k += kWidth<float>) store_quads(k, Vector<float>{});
      } else {
        for_vectors<float>(0, K, [&](int64_t k, int count) PYFUSED_INLINE_LAMBDA {
          store_quads(k, load_some<float>(x + m * ld_x + k, count));
        });
      }
    }
  });
}

// Span elements in each group of as many lanes.
template <int Span, class E>
inline Vector<float> repeat(const E* p) {
  if constexpr (Span < kWidth<float>) {
#if defined(__AVX512F__)
    return reinterpret_cast<Vector<float>>(
        Span == 4 ? _mm512_broadcast_f32x4(_mm_loadu_ps(p))
                  : _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castps_pd(_mm256_loadu_ps(p)))));
#elif defined(__AVX2__)
    return reinterpret_cast<Vector<float>>(_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p)));
#endif
  } else {
    return load(p);
  }
}

// Vectors of rows x Outputs sums at a time over K columns; `add` to what is there. Rows of out are ld_out apart.
template <int Span, int Vectors, int Outputs, class E>
PYFUSED_INLINE void lane_block(const float* x, int64_t ld_x, int64_t K, const E* const* w, float* out, int64_t ld_out,
                               bool add) {
  constexpr int kRows = kWidth<float> / Span;
  Vector<float> sums[Outputs][Vectors] = {};
  const auto multiply = [&](const E* const* weights, int64_t k) PYFUSED_INLINE_LAMBDA {
    Vector<float> rows[Vectors];
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) rows[v] = load(x + v * kWidth<float>);
#pragma GCC unroll 8
    for (int n = 0; n < Outputs; ++n) {
      const Vector<float> weight = repeat<Span>(weights[n] + k);
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) sums[n][v] += rows[v] * weight;
    }
  };
  int64_t k = 0;
  for (; k + Span <= K; k += Span, x += ld_x) multiply(w, k);
  if (k < K) {
    E last[Outputs][Span] = {};
    const E* weights[Outputs];
    for (int n = 0; n < Outputs; ++n) {
      memcpy(last[n], w[n] + k, static_cast<size_t>(K - k) * sizeof(E));
      weights[n] = last[n];
    }
    multiply(weights, 0);
  }
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
#pragma GCC unroll 2
    for (int n = 0; n < Outputs; n += 4) {
      const Vector<float> totals = sum_quads(sums[n][v], sums[n + 1][v], sums[n + 2][v], sums[n + 3][v]);
      Quad of_row[kQuads];
      for_quads(totals, [&](int64_t q, Quad quad) PYFUSED_INLINE_LAMBDA { of_row[q] = quad; });
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row) {
        Quad quad = of_row[row * (Span / 4)];
#pragma GCC unroll 4
        for (int q = 1; q < Span / 4; ++q) quad += of_row[row * (Span / 4) + q];
        float* to = out + (v * kRows + row) * ld_out + n;
        if (add) {
          Quad before;
          memcpy(&before, to, sizeof before);
          quad += before;
        }
        memcpy(to, &quad, sizeof quad);
      }
    }
  }
}

template <class W, int Span>
PYFUSED_INLINE void lane_rows_of_span(const float* x, int64_t M, int64_t K, const W* w, int64_t ld_w, int64_t begin,
                                      int64_t end, float* out, int64_t ld_out) {
  const int64_t rows = padded_rows<Span>(M), ld_x = rows * Span;
  constexpr int kRows = kWidth<float> / Span;
  constexpr int kMost = kQuads == 2 ? 2 : 4;  // vectors of rows; AVX2 has too few registers for four of eight lanes
  const auto columns = [&]<int Vectors, int Outputs>(int64_t first, int64_t count, int64_t n) PYFUSED_INLINE_LAMBDA {
    // Outputs behind the last are computed from its weights. Pointers go from row to row: a product for each, made in a
    // vector, would hold up the block.
    const typename OperandOf<W, kWidens<W, Span>>::type* weights[Outputs];
    alignas(64) float wide[kWidens<W, Span> ? Outputs * kRun<W, Span> : 1];
    const W* from = w + n * ld_w + first;
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i) {
      if constexpr (kWidens<W, Span>) {
        for_vectors<float>(0, count, [&](int64_t k, int lanes) PYFUSED_INLINE_LAMBDA {
          store(wide + i * kRun<W, Span> + k, load_some<float>(from + k, lanes));
        });
        weights[i] = wide + i * kRun<W, Span>;
      } else {
        weights[i] = from;
      }
      if (n + i + 1 < end) from += ld_w;
    }
    const float* block = x + first / Span * ld_x;
    for (int64_t m = 0; m < rows; m += Vectors * kRows) {
      lane_block<Span, Vectors, Outputs>(block + m * Span, ld_x, count, weights, out + m * ld_out + n - begin, ld_out,
                                         first > 0);
    }
  };
  const auto run = [&]<int Vectors, int Outputs>() PYFUSED_INLINE_LAMBDA {
    for (int64_t first = 0; first < K; first += kRun<W, Span>) {
      const int64_t count = min_of(kRun<W, Span>, K - first);
      for (int64_t n = begin; n < end; n += Outputs) columns.template operator()<Vectors, Outputs>(first, count, n);
    }
  };
  const int64_t vectors = rows / kRows;
  if (vectors == 1) {
    run.template operator()<1, 8>();
  } else if constexpr (Span == 4) {
    if (vectors == 2) {
      run.template operator()<2, kQuads == 4 ? 8 : 4>();
    } else if (vectors == 3) {
      run.template operator()<3, 4>();
    } else {
      run.template operator()<kMost, 4>();
    }
  }
}

template <class W>
void lane_rows(const void* x, int64_t M, int64_t K, const void* w, int64_t ld_w, int64_t begin, int64_t end, void* out,
               int64_t ld_out) {
  with_span(M, [&]<int Span>() PYFUSED_INLINE_LAMBDA {
    lane_rows_of_span<W, Span>(static_cast<const float*>(x), M, K, static_cast<const W*>(w), ld_w, begin, end,
                               static_cast<float*>(out), ld_out);
  });
}

// ---- fp64: dot products ---------------------------------------------------------------------------------------------

// Rows of x [M, K] as they are, K filled up with zeros to a multiple of 16.
inline void pack_doubles(const void* x_, int64_t ld_x, int64_t M, int64_t K, void* to_) {
  const double* x = static_cast<const double*>(x_);
  double* to = static_cast<double*>(to_);
  const int64_t ld = round_up(K, 16);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t k = 0; k < K; ++k) to[m * ld + k] = x[m * ld_x + k];
    for (int64_t k = K; k < ld; ++k) to[m * ld + k] = 0.0;
  }
}

template <class W, int Rows>
PYFUSED_INLINE void dot_block(const double* x, int64_t ld_x, int64_t K, const W* w, double* out, int64_t ld_out) {
  Vector<double> sums[Rows] = {};
  for_vectors<double>(0, K, [&](int64_t k, int count) PYFUSED_INLINE_LAMBDA {
    Vector<double> column{};
    if constexpr (sizeof(W) == sizeof(double)) {
      column = load_some<double>(w + k, count);
    } else {  // a narrower adapter
      for (int i = 0; i < count; ++i) column[i] = static_cast<double>(load_one(w + k + i));
    }
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) sums[m] += load(x + m * ld_x + k) * column;
  });
  for (int m = 0; m < Rows; ++m) out[m * ld_out] = sum_lanes(sums[m]);
}

template <class W>
void dot_rows(const void* x_, int64_t M, int64_t K, const void* w_, int64_t ld_w, int64_t begin, int64_t end,
              void* out_, int64_t ld_out) {
  const double* x = static_cast<const double*>(x_);
  const int64_t ld_x = round_up(K, 16);
  for (int64_t n = begin; n < end; ++n) {
    const W* w = static_cast<const W*>(w_) + n * ld_w;
    double* out = static_cast<double*>(out_) + n - begin;
    if (M == 4) dot_block<W, 4>(x, ld_x, K, w, out, ld_out);
    if (M == 3) dot_block<W, 3>(x, ld_x, K, w, out, ld_out);
    if (M == 2) dot_block<W, 2>(x, ld_x, K, w, out, ld_out);
    if (M == 1) dot_block<W, 1>(x, ld_x, K, w, out, ld_out);
  }
}

// ---- by type --------------------------------------------------------------------------------------------------------

template <class T>
constexpr auto pack_few_rows_of() -> void (*)(const void*, int64_t, int64_t, int64_t, void*) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return pack_doubles;
  } else {
    return pack_lanes<T>;
  }
}
// fp64 weights go with fp64 data only.
template <class T, class W>
constexpr auto few_rows_of() -> decltype(&dot_rows<W>) {
  if constexpr (sizeof(T) == sizeof(double)) {
    return dot_rows<W>;
  } else if constexpr (sizeof(W) == sizeof(double)) {
    return nullptr;
  } else {
    return lane_rows<W>;
  }
}

}  // namespace pyfused::PYFUSED_ISA
