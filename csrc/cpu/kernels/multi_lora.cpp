// The loops of multi_lora on CPU, compiled once per ISA level. No torch, no std: see simd.h for why.
//
// An adapter serves one row of a decoding step or hundreds of a prompt, and its matrices are read as they are: nothing
// is packed for the whole call. Both products keep the order of a row's sums whatever the number of rows, so blocking
// over rows and ranks changes speed alone:
//   shrink  one accumulator for each row and rank, chunks of kTileColumns columns, lanes added at a chunk's end
//   expand  one accumulator for each row and column, ranks ascending, y added last
// Level AMX has loops of its own for bf16 data with bf16 adapters, multi_lora_amx.cpp.
#include "multi_lora.h"

#include "keep_bits.h"
#include "multi_lora_few.h"
#include "multi_lora_panel.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Register blocking: 16 accumulators where there are 32 vector registers, 8 where there are 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileRanks = 4;
constexpr int kTileVectors = 4;
#else
constexpr int kTileRanks = 2;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 4;
constexpr int kRowRanks = 8;  // where there is one row
constexpr int kTileColumns = 1024;
constexpr int kTileWords = kTileColumns / 32;

// Adapters may be narrower than fp64 data.
template <class Acc, class A>
PYFUSED_INLINE Vector<Acc> load_as(const A* p) {
  if constexpr (sizeof(Accumulator<A>) == sizeof(Acc)) {
    return load(p);
  } else {
    Vector<Acc> v;
    for (int i = 0; i < kWidth<Acc>; ++i) v[i] = load_one(p + i);
    return v;
  }
}

template <class Acc, class A>
inline Vector<Acc> load_first_as(const A* p, int count) {
  Vector<Acc> v{};
  for (int i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}

// ---- shrink ---------------------------------------------------------------------------------------------------------

// How a chunk's products are made: widened to the accumulation type, or by the instruction for pairs of bf16.
template <class T, class A>
struct Product {
  using Acc = Accumulator<T>;
  using Row = Acc;  // elements of a tile of x
  static constexpr int kStep = kWidth<Acc>;
  using Operand = Vector<Acc>;

  static PYFUSED_INLINE Operand row(const Row* p) { return load(p); }
  static PYFUSED_INLINE Operand row_first(const Row* p, int count) { return load_first_as<Acc>(p, count); }
  static PYFUSED_INLINE Operand column(const A* p) { return load_as<Acc>(p); }
  static PYFUSED_INLINE Operand column_first(const A* p, int count) { return load_first_as<Acc>(p, count); }
  static PYFUSED_INLINE void add(Vector<Acc>& sum, Operand x, Operand a) { sum = multiply_add(x, a, sum); }

  // One row of a tile, masked by bits where given.
  static void fill(const T* from, int64_t columns, const uint32_t* bits, Row* to) {
    for (int64_t k = 0; k < columns; k += kStep) {
      const bool whole = k + kStep <= columns;
      Vector<Acc> v = whole ? load(from + k) : load_first(from + k, static_cast<int>(columns - k));
      if (bits != nullptr) v = select<Acc>(vector_bits<Acc>(bits, k), v);
      store(to + k, v);
    }
  }
  static constexpr bool kReadsDirectly = sizeof(T) == sizeof(Acc);
};

#if defined(__AVX512BF16__)
template <>
struct Product<bf16, bf16> {
  using Acc = float;
  using Row = bf16;
  static constexpr int kStep = 32;
  using Operand = __m512bh;

  static PYFUSED_INLINE Operand row(const Row* p) { return reinterpret_cast<Operand>(_mm512_loadu_si512(p)); }
  static PYFUSED_INLINE Operand row_first(const Row* p, int count) {
    return reinterpret_cast<Operand>(_mm512_maskz_loadu_epi16((1u << count) - 1, p));
  }
  static PYFUSED_INLINE Operand column(const bf16* p) { return row(p); }
  static PYFUSED_INLINE Operand column_first(const bf16* p, int count) { return row_first(p, count); }
  static PYFUSED_INLINE void add(Vector<float>& sum, Operand x, Operand a) {
    sum = reinterpret_cast<Vector<float>>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sum), x, a));
  }

  static void fill(const bf16* from, int64_t columns, const uint32_t* bits, Row* to) {
    for (int64_t k = 0; k < columns; k += kStep) {
      const uint32_t inside = k + kStep <= columns ? ~0u : (1u << (columns - k)) - 1;
      _mm512_storeu_si512(to + k, _mm512_maskz_loadu_epi16(inside & bits[k / kStep], from + k));
    }
  }
  static constexpr bool kReadsDirectly = true;
};
#endif

template <class P, class A, int Rows, int Ranks>
__attribute__((noinline)) void dot_tile(const typename P::Row* const* x, const A* a, int64_t ld_a, int64_t columns,
                                        typename P::Acc* s, int64_t ld_s, bool accumulate) {
  using Acc = typename P::Acc;
  Vector<Acc> sums[Rows][Ranks] = {};
  typename P::Operand rows[Rows];
  int64_t k = 0;
  for (; k + P::kStep <= columns; k += P::kStep) {
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) rows[m] = P::row(x[m] + k);
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const A* from = a + r * ld_a + k;
      if constexpr (Rows == 1) __builtin_prefetch(reinterpret_cast<const char*>(from) + kAheadBytes);
      const typename P::Operand column = P::column(from);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) P::add(sums[m][r], rows[m], column);
    }
  }
  if (k < columns) {
    const int count = static_cast<int>(columns - k);
#pragma GCC unroll 4
    for (int m = 0; m < Rows; ++m) rows[m] = P::row_first(x[m] + k, count);
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const typename P::Operand column = P::column_first(a + r * ld_a + k, count);
#pragma GCC unroll 4
      for (int m = 0; m < Rows; ++m) P::add(sums[m][r], rows[m], column);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < Rows; ++m) {
#pragma GCC unroll 8
    for (int r = 0; r < Ranks; ++r) {
      const Acc total = sum_lanes(sums[m][r]);
      s[m * ld_s + r] = accumulate ? s[m * ld_s + r] + total : total;
    }
  }
}

template <class P, class A, int Rows, int Ranks>
void dot_ranks(const typename P::Row* const* x, const A* a, int64_t ld_a, int64_t columns, int64_t r, int64_t R,
               typename P::Acc* s, bool accumulate) {
  for (; r + Ranks <= R; r += Ranks) {
    dot_tile<P, A, Rows, Ranks>(x, a + r * ld_a, ld_a, columns, s + r, R, accumulate);
  }
  if constexpr (Ranks > 1) dot_ranks<P, A, Rows, Ranks / 2>(x, a, ld_a, columns, r, R, s, accumulate);
}

template <class T, class A>
void shrink(const void* x_, int64_t ld_x, const int64_t* rows, int64_t count, int64_t K, int64_t R, const void* a_,
            int64_t ld_a, Dropout dropout, int64_t first_row, double factor, void* s_) {
  using P = Product<T, A>;
  using Acc = Accumulator<T>;
  const T* x = static_cast<const T*>(x_);
  const A* a = static_cast<const A*>(a_);
  Acc* s = static_cast<Acc*>(s_);
  alignas(64) typename P::Row buffer[kTileRows * kTileColumns];
  uint32_t bits[kTileRows * kTileWords];
  const bool drop = dropout.threshold != 0;
  for (int64_t i = 0; i < count; i += kTileRows) {
    const int tile_rows = static_cast<int>(min_of(kTileRows, count - i));
    for (int64_t k = 0; k < K; k += kTileColumns) {
      const int64_t columns = min_of(kTileColumns, K - k);
      if (drop) {
        const int64_t blocks = round_up(columns, philox::kBlockColumns) / philox::kBlockColumns;
        keep_bits(dropout, first_row + i, tile_rows, k, blocks, bits, kTileWords);
      }
      const typename P::Row* tile[kTileRows];
      for (int m = 0; m < tile_rows; ++m) {
        const T* from = x + rows[i + m] * ld_x + k;
        if constexpr (P::kReadsDirectly) {
          if (!drop) {
            tile[m] = from;
            continue;
          }
        }
        P::fill(from, columns, drop ? bits + m * kTileWords : nullptr, buffer + m * kTileColumns);
        tile[m] = buffer + m * kTileColumns;
      }
      Acc* to = s + i * R;
      if (tile_rows == kTileRows) {
        dot_ranks<P, A, kTileRows, kTileRanks>(tile, a + k, ld_a, columns, 0, R, to, k != 0);
      } else {
        for (int m = 0; m < tile_rows; ++m) {
          dot_ranks<P, A, 1, kRowRanks>(tile + m, a + k, ld_a, columns, 0, R, to + m * R, k != 0);
        }
      }
    }
  }
  if (factor != 1.0) {
    for (int64_t i = 0; i < count * R; ++i) s[i] *= static_cast<Acc>(factor);
  }
}

// ---- expand ---------------------------------------------------------------------------------------------------------

template <class T, int Rows>
PYFUSED_INLINE void expand_tile(T* const* y, const Accumulator<T>* s, int64_t R, const Accumulator<T>* panel,
                                int64_t columns) {
  using Acc = Accumulator<T>;
  for (int64_t n = 0; n < columns; n += kTileVectors * kWidth<Acc>) {
    Vector<Acc> sums[Rows][kTileVectors] = {};
    for (int64_t r = 0; r < R; ++r) {
      Vector<Acc> row[kTileVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) row[v] = load(panel + r * kPackedColumns + n + v * kWidth<Acc>);
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) {
        const Vector<Acc> factor = splat<Acc>(s[i * R + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sums[i][v] = multiply_add(factor, row[v], sums[i][v]);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) {
        const int64_t at = n + v * kWidth<Acc>;
        if (at + kWidth<Acc> <= columns) {
          store(y[i] + at, sums[i][v] + load(y[i] + at));
        } else if (at < columns) {
          const int count = static_cast<int>(columns - at);
          store_first(y[i] + at, sums[i][v] + load_first(y[i] + at, count), count);
        }
      }
    }
  }
}

// One sum, ranks ascending.
template <class A, int Rows>
struct PlainSums {
  static constexpr int64_t kTerms = 1;
  Vector<float> sums[Rows] = {};

  PYFUSED_INLINE void add(int64_t r, int64_t R, const float* s, int64_t ld_s,
                          const Vector<float> (&column)[kLaneRanks<A>]) {
#pragma GCC unroll 8
    for (int j = 0; j < kLaneRanks<A>; ++j) {
      if (j >= R - r) break;
#pragma GCC unroll 4
      for (int i = 0; i < Rows; ++i) sums[i] = multiply_add(splat<float>(s[i * ld_s + j]), column[j], sums[i]);
    }
  }
  PYFUSED_INLINE Vector<float> total(int i) const { return sums[i]; }
};

template <class T, class A>
void expand(void* y_, int64_t ld_y, const int64_t* rows, int64_t count, int64_t N, int64_t R, const void* s_,
            const void* b_, int64_t ld_b, void* panel_) {
  using Acc = Accumulator<T>;
  T* y = static_cast<T*>(y_);
  const Acc* s = static_cast<const Acc*>(s_);
  const A* b = static_cast<const A*>(b_);
  Acc* panel = static_cast<Acc*>(panel_);
  if constexpr (sizeof(Acc) == sizeof(float)) {
    if (count <= kFewRows) return expand_few<PlainSums>(y, ld_y, rows, count, s, R, R, b, ld_b, N);
  }
  for (int64_t n = 0; n < N; n += kPackedColumns) {
    const int64_t columns = min_of(kPackedColumns, N - n);
    pack_panel(b + n * ld_b, ld_b, columns, R, panel);
    T* tile[kTileRows];
    int64_t i = 0;
    for (; i + kTileRows <= count; i += kTileRows) {
      for (int m = 0; m < kTileRows; ++m) tile[m] = y + rows[i + m] * ld_y + n;
      expand_tile<T, kTileRows>(tile, s + i * R, R, panel, columns);
    }
    for (; i < count; ++i) {
      tile[0] = y + rows[i] * ld_y + n;
      expand_tile<T, 1>(tile, s + i * R, R, panel, columns);
    }
  }
}

template <class T>
constexpr MultiLoraKernels table() {
  return {{shrink<T, float>, shrink<T, bf16>, shrink<T, fp16>, nullptr},
          {expand<T, float>, expand<T, bf16>, expand<T, fp16>, nullptr}};
}
template <>
constexpr MultiLoraKernels table<double>() {
  return {{shrink<double, float>, shrink<double, bf16>, shrink<double, fp16>, shrink<double, double>},
          {expand<double, float>, expand<double, bf16>, expand<double, fp16>, expand<double, double>}};
}

constexpr MultiLoraKernels kTables[kDtypes] = {table<float>(), table<bf16>(), table<fp16>(), table<double>()};

}  // namespace

const MultiLoraKernels& multi_lora_kernels(Dtype dtype) { return kTables[static_cast<int>(dtype)]; }

}  // namespace pyfused::PYFUSED_ISA
