// The passes of the bottleneck on CPU around its products, compiled once per ISA level. No torch, no std: see simd.h.
#include "bottleneck.h"

#include "activations.h"
#include "dropout.h"
#include "pack.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Columns and rows whose keep bits are made at a time, and rows that are summed in Acc before the sum goes on in fp64.
constexpr int64_t kBitColumns = 1024;
constexpr int64_t kBitRows = 8;
constexpr int64_t kSumRows = 16;
// A sum of lanes starts anew after so many terms: one of thousands would lose digits.
constexpr int64_t kLaneRun = 256;

// Blocks of keep bits that cover columns from a block's first.
inline int64_t bit_blocks(int64_t columns) { return round_up(columns, philox::kBlockColumns) / philox::kBlockColumns; }

template <class Acc, class T>
inline Vector<Acc> load_some(const T* p, int count) {
  return count == kWidth<Acc> ? load(p) : load_first(p, count);
}
template <class Acc, class T>
inline void store_some(T* p, Vector<Acc> v, int count) {
  count == kWidth<Acc> ? store(p, v) : store_first(p, v, count);
}

// run(column, count) for vectors of columns [begin, end), the last with fewer than a vector's lanes.
template <class Acc, class F>
inline __attribute__((always_inline)) void for_vectors(int64_t begin, int64_t end, const F& run) {
  int64_t k = begin;
  for (; k + kWidth<Acc> <= end; k += kWidth<Acc>) run(k, kWidth<Acc>);
  if (k < end) run(k, static_cast<int>(end - k));
}

template <class Acc>
inline void add_lanes(double* sums, Vector<Acc> v, int count) {
  for (int i = 0; i < count; ++i) sums[i] += v[i];
}

template <class P>
void activate_all(const void* z_, int64_t rows, int64_t H, Activation activation, void* h_) {
  using Acc = Accumulator<P>;
  const P* z = static_cast<const P*>(z_);
  P* h = static_cast<P*>(h_);
  with_activation(activation, [&]<Activation A>() {
    for_vectors<Acc>(0, rows * H, [&](int64_t j, int count) __attribute__((always_inline)) {
      store_some<Acc>(h + j, pyfused::activate<A, VectorMath<Acc>>(load_some<Acc>(z + j, count)), count);
    });
  });
}

template <class P>
void activate_backward(const void* z_, const void* dh_, int64_t rows, int64_t H, Activation activation, double factor_,
                       double h_factor_, void* h_, void* dz_, double* sums) {
  using Acc = Accumulator<P>;
  const P* z = static_cast<const P*>(z_);
  const P* dh = static_cast<const P*>(dh_);
  P* h = static_cast<P*>(h_);
  P* dz = static_cast<P*>(dz_);
  const Vector<Acc> factor = splat<Acc>(static_cast<Acc>(factor_)), h_factor = splat<Acc>(static_cast<Acc>(h_factor_));
  with_activation(activation, [&]<Activation A>() {
    for (int64_t m = 0; m < rows; m += kSumRows) {
      const int64_t last = min_of(m + kSumRows, rows);
      for_vectors<Acc>(0, H, [&](int64_t j, int count) __attribute__((always_inline)) {
        Vector<Acc> sum{};
        for (int64_t i = m; i < last; ++i) {
          Vector<Acc> value;
          const Vector<Acc> slope =
              activation_gradient<A, VectorMath<Acc>>(load_some<Acc>(z + i * H + j, count), value);
          const Vector<Acc> gradient = load_some<Acc>(dh + i * H + j, count) * factor * slope;
          store_some<Acc>(dz + i * H + j, gradient, count);
          if (h != nullptr) store_some<Acc>(h + i * H + j, value * h_factor, count);
          sum += gradient;
        }
        if (sums != nullptr) add_lanes<Acc>(sums + j, sum, count);
      });
    }
  });
}

template <class T, class U, bool Residual, bool Drop>
void finish_rows(const U* u, int64_t ld_u, const T* residual, int64_t ld_residual, T* out, int64_t ld_out,
                 int64_t first_row, int64_t rows, int64_t D, const Accumulator<T>* scale, const Accumulator<T>* bias,
                 Dropout dropout) {
  using Acc = Accumulator<T>;
  constexpr int64_t kWords = kBitColumns / 32;
  uint32_t bits[kBitRows * kWords];
  for (int64_t m = 0; m < rows; m += kBitRows) {
    const int64_t last = min_of(m + kBitRows, rows);
    for (int64_t begin = 0; begin < D; begin += kBitColumns) {
      const int64_t end = min_of(begin + kBitColumns, D);
      if constexpr (Drop) keep_bits(dropout, first_row + m, last - m, begin, bit_blocks(end - begin), bits, kWords);
      for (int64_t i = m; i < last; ++i) {
        for_vectors<Acc>(begin, end, [&](int64_t d, int count) __attribute__((always_inline)) {
          Vector<Acc> v = load_some<Acc>(u + i * ld_u + d, count) * load_some<Acc>(scale + d, count) +
                          load_some<Acc>(bias + d, count);
          if constexpr (Drop) v = select<Acc>(vector_bits<Acc>(bits + (i - m) * kWords, d - begin), v);
          if constexpr (Residual) v += load_some<Acc>(residual + i * ld_residual + d, count);
          store_some<Acc>(out + i * ld_out + d, v, count);
        });
      }
    }
  }
}

template <class T, class U>
void finish(const void* u_, int64_t ld_u, const void* residual_, int64_t ld_residual, void* out_, int64_t ld_out,
            int64_t first_row, int64_t rows, int64_t D, const void* scale_, const void* bias_, Dropout dropout) {
  using Acc = Accumulator<T>;
  const U* u = static_cast<const U*>(u_);
  const T* residual = static_cast<const T*>(residual_);
  T* out = static_cast<T*>(out_);
  const Acc* scale = static_cast<const Acc*>(scale_);
  const Acc* bias = static_cast<const Acc*>(bias_);
  const bool drop = dropout.threshold != 0;
  const auto run = residual != nullptr ? (drop ? finish_rows<T, U, true, true> : finish_rows<T, U, true, false>)
                                       : (drop ? finish_rows<T, U, false, true> : finish_rows<T, U, false, false>);
  run(u, ld_u, residual, ld_residual, out, ld_out, first_row, rows, D, scale, bias, dropout);
}

template <class T, bool Drop>
void mask_rows(const T* dy, int64_t ld_dy, int64_t first_row, int64_t rows, int64_t D, Dropout dropout, T* g,
               int64_t ld_g, double* sums) {
  using Acc = Accumulator<T>;
  constexpr int64_t kWords = kBitColumns / 32;
  uint32_t bits[kSumRows * kWords];
  for (int64_t m = 0; m < rows; m += kSumRows) {
    const int64_t last = min_of(m + kSumRows, rows);
    for (int64_t begin = 0; begin < D; begin += kBitColumns) {
      const int64_t end = min_of(begin + kBitColumns, D);
      if constexpr (Drop) keep_bits(dropout, first_row + m, last - m, begin, bit_blocks(end - begin), bits, kWords);
      for_vectors<Acc>(begin, end, [&](int64_t d, int count) __attribute__((always_inline)) {
        Vector<Acc> sum{};
        for (int64_t i = m; i < last; ++i) {
          Vector<Acc> v = load_some<Acc>(dy + i * ld_dy + d, count);
          if constexpr (Drop) v = select<Acc>(vector_bits<Acc>(bits + (i - m) * kWords, d - begin), v);
          if (g != nullptr) store_some<Acc>(g + i * ld_g + d, v, count);
          sum += v;
        }
        if (sums != nullptr) add_lanes<Acc>(sums + d, sum, count);
      });
    }
  }
}

template <class T>
void mask(const void* dy_, int64_t ld_dy, int64_t first_row, int64_t rows, int64_t D, Dropout dropout, void* g_,
          int64_t ld_g, double* sums) {
  const T* dy = static_cast<const T*>(dy_);
  T* g = static_cast<T*>(g_);
  const auto run = dropout.threshold != 0 ? mask_rows<T, true> : mask_rows<T, false>;
  run(dy, ld_dy, first_row, rows, D, dropout, g, ld_g, sums);
}

// The sums of four vectors' lanes: the halves of each are added, then all four are at once in one shuffle after
// another.
typedef float Quad __attribute__((vector_size(16)));
inline Quad quarter(Quad v) { return v; }
#if defined(__AVX2__)
inline Quad quarter(float __attribute__((vector_size(32))) v) {
  return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
}
#endif
#if defined(__AVX512F__)
inline Quad quarter(float __attribute__((vector_size(64))) v) {
  return quarter(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                 __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
#endif
inline Quad sum_lanes_of_four(Vector<float> a, Vector<float> b, Vector<float> c, Vector<float> d) {
  const Quad qa = quarter(a), qb = quarter(b), qc = quarter(c), qd = quarter(d);
  const Quad ab = __builtin_shufflevector(qa, qb, 0, 4, 1, 5) + __builtin_shufflevector(qa, qb, 2, 6, 3, 7);
  const Quad cd = __builtin_shufflevector(qc, qd, 0, 4, 1, 5) + __builtin_shufflevector(qc, qd, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

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
      const Quad total = sum_lanes_of_four(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
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
    dot_block<Acc, W, Rows, 4>(x + m * ld_x, ld_x, K, w + n * ld_w, ld_w, out + m * ld_out + n, ld_out);
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
      dot_block<Acc, W, 1, 1>(x + m * ld_x, ld_x, K, w + n * ld_w, ld_w, out + m * ld_out + n, ld_out);
    }
  }
}

// Outputs sums of every row at a time: a row is a lane, Vectors of lanes hold the M rows that there are.
template <class W, int Vectors, int Outputs>
PYFUSED_INLINE void lane_block(const float* x, int64_t M, int64_t K, const W* w, int64_t ld_w, float* out,
                               int64_t ld_out) {
  constexpr int kLanes = kWidth<float>;
  Vector<float> totals[Outputs][Vectors] = {};
  for (int64_t first = 0; first < K; first += kLaneRun) {
    const int64_t count = min_of(kLaneRun, K - first);
    alignas(64) float wide[sizeof(W) == sizeof(float) ? 1 : Outputs * kLaneRun];
    const float* rows = wide;
    int64_t ld = kLaneRun;
    if constexpr (sizeof(W) == sizeof(float)) {
      rows = w + first;
      ld = ld_w;
    } else {
      for (int n = 0; n < Outputs; ++n) {
        for_vectors<float>(0, count, [&](int64_t k, int lanes) __attribute__((always_inline)) {
          store(wide + n * kLaneRun + k, load_some<float>(w + n * ld_w + first + k, lanes));
        });
      }
    }
    Vector<float> sums[Outputs][Vectors] = {};
    for (int64_t k = 0; k < count; ++k) {
      Vector<float> lanes[Vectors];
      for (int v = 0; v < Vectors; ++v) lanes[v] = load(x + (first + k) * kBottleneckLanes + v * kLanes);
#pragma GCC unroll 8
      for (int n = 0; n < Outputs; ++n) {
        const Vector<float> factor = splat<float>(rows[n * ld + k]);
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) sums[n][v] += lanes[v] * factor;
      }
    }
#pragma GCC unroll 8
    for (int n = 0; n < Outputs; ++n) {
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) totals[n][v] += sums[n][v];
    }
  }
  alignas(64) float tile[Outputs * kBottleneckLanes];
  for (int n = 0; n < Outputs; ++n) {
    for (int v = 0; v < Vectors; ++v) store(tile + n * kBottleneckLanes + v * kLanes, totals[n][v]);
  }
  if constexpr (Outputs % 4 == 0) {
    for (int64_t m = 0; m < M; m += 4) {
      for (int n = 0; n < Outputs; n += 4) {
        pack_transposed_block(tile + n * kBottleneckLanes + m, kBottleneckLanes, out + m * ld_out + n, ld_out);
      }
    }
  } else {
    for (int64_t m = 0; m < M; ++m) {
      for (int n = 0; n < Outputs; ++n) out[m * ld_out + n] = tile[n * kBottleneckLanes + m];
    }
  }
}

template <class W>
void lane_rows(const void* x_, int64_t M, int64_t K, const void* w_, int64_t ld_w, int64_t begin, int64_t end,
               void* out_, int64_t ld_out) {
  const float* x = static_cast<const float*>(x_);
  const W* w = static_cast<const W*>(w_);
  float* out = static_cast<float*>(out_);
  const auto run = [&]<int Vectors>() {
    constexpr int kOutputs = Vectors == 1 ? 8 : 4;
    int64_t n = begin;
    for (; n + kOutputs <= end; n += kOutputs) {
      lane_block<W, Vectors, kOutputs>(x, M, K, w + n * ld_w, ld_w, out + n, ld_out);
    }
    for (; n < end; ++n) lane_block<W, Vectors, 1>(x, M, K, w + n * ld_w, ld_w, out + n, ld_out);
  };
  constexpr int kMost = kBottleneckLanes / kWidth<float>;
  if (kMost > 1 && M > kBottleneckLanes / 2) {
    run.template operator()<kMost>();
  } else {
    run.template operator()<(kMost + 1) / 2>();
  }
}

template <class T, class W>
constexpr auto few_rows_of() -> decltype(&few_rows<T, W>) {
  // fp64 weights go with fp64 data only
  if constexpr (sizeof(Accumulator<T>) < sizeof(W)) {
    return nullptr;
  } else {
    return few_rows<T, W>;
  }
}

template <class T>
constexpr BottleneckKernels table() {
  using Acc = Accumulator<T>;
  return {{pack<float, Acc>, pack<bf16, Acc>, pack<fp16, Acc>, pack<double, Acc>},
          {unpack<float, Acc>, unpack<bf16, Acc>, unpack<fp16, Acc>, unpack<double, Acc>},
          activate_all<T>,
          activate_backward<T>,
          finish<T, T>,
          finish<T, Acc>,
          mask<T>,
          {few_rows_of<T, float>(), few_rows_of<T, bf16>(), few_rows_of<T, fp16>(), few_rows_of<T, double>()},
          {lane_rows<float>, lane_rows<bf16>, lane_rows<fp16>, nullptr}};
}

constexpr BottleneckKernels kTables[kDtypes] = {table<float>(), table<bf16>(), table<fp16>(), table<double>()};

}  // namespace

const BottleneckKernels& bottleneck_kernels(Dtype dtype) { return kTables[static_cast<int>(dtype)]; }

}  // namespace pyfused::PYFUSED_ISA
