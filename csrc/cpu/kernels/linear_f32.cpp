// fp32 matrix products on CPU, compiled once per ISA level. No torch, no std: see simd.h for why.
//
// A tile of results is in registers while k runs. Its panel of w comes from the second-level cache, where a block of
// panels stays for all rows, its rows of x from the first. The next rows of x and the tile's lines of out are asked for
// while k runs: a load or store that misses costs as much as dozens of products.
#include "linear_f32.h"

#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {

#if defined(__AVX2__)
namespace {

constexpr int kWide = kWidth<float>;
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kWide;
#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 sums, two vectors of w and one of x, of 32 registers
constexpr int64_t kScaledRows = 128, kMinRows = 512, kMaxDepth = 1536;
#else
constexpr int kRows = 6;  // 12, two and one, of 16
constexpr int64_t kScaledRows = 64, kMinRows = 64, kMaxDepth = INT64_MAX;
#endif
constexpr int kUnroll = 8;
constexpr int64_t kDepth = 768;
// Copied rows of x are kept this many floats further apart than they are long, and a page's floats.
constexpr int64_t kSpread = 16;
constexpr int64_t kPage = 1024;
// Rows of x that a tile asks for ahead; one pointer each.
constexpr int kAhead = 2;
// Rows of w that are asked for ahead of their copy where they lie along n: pieces too short for the hardware to follow.
constexpr int64_t kPackAhead = 8;

// A bias and a scale that change nothing.
constexpr float kZeros[kColumns] = {};
constexpr struct Ones {
  float values[kColumns];
  constexpr Ones() : values() {
    for (float& value : values) value = 1;
  }
} kOnes;

// out = (x w + update + [out] + bias) * scale
struct Tile {
  struct Term {
    const float* x;  // [rows, depth], rows ld_x apart
    int64_t ld_x;
    const float* w;  // [depth, kColumns]
    int64_t depth;
  };
  Term base;             // its depth a multiple of kUnroll
  Term update;           // none where its depth is 0
  const uint32_t* keep;  // or null: which of the update's sums count, from bit first_keep of a row's word on
  int64_t ld_keep;
  int first_keep;
  bool add;                   // to what out has
  const float *bias, *scale;  // [kColumns]
  float* unscaled;            // the sum before both; may be null
  float* out;                 // [rows, kColumns], rows ld_out apart, as in unscaled
  int64_t ld_out;
  const float*
      other;  // [rows, kColumns], rows ld_other apart, or null: dots [kColumns] += the sums of unscaled * other
  int64_t ld_other;
  float* dots;
  const float* ahead[kAhead];  // rows of x for a later tile
};

// __builtin_prefetch writes this instruction only where a -m flag of its own is given.
inline void prefetch_to_write(const float* p) { asm volatile("prefetchw %0" : : "m"(*p)); }

// sum += a * b. Of the instruction's forms this one leaves the sum in its register: with 12 sums in 16 of them the
// compiler's choice moves some, to memory too.
inline void multiply_add_to(Vector<float>& sum, Vector<float> a, Vector<float> b) {
#if defined(__AVX512F__)
  sum = multiply_add(a, b, sum);
#else
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
#endif
}

// sums += x w, k in steps of Unroll, before each of which ahead() runs.
template <int Rows, int Unroll, class Ahead>
PYFUSED_INLINE void add_product(const Tile::Term& term, Vector<float> (&sums)[Rows][kVectors], const Ahead& ahead) {
  // Rows in threes from one pointer each: what addressing modes reach without more registers.
  constexpr int kGroups = (Rows + 2) / 3;
  const float* x[kGroups];
  int64_t row_bytes = term.ld_x * static_cast<int64_t>(sizeof(float));
  asm("" : "+r"(row_bytes));
#pragma GCC unroll 8
  for (int g = 0; g < kGroups; ++g) {
    x[g] = term.x + 3 * g * term.ld_x;
    asm("" : "+r"(x[g]));  // or the compiler derives it from the others
  }
  const float* w = term.w;
  int64_t steps = term.depth / Unroll;
  do {
    ahead();
#pragma GCC unroll 8
    for (int k = 0; k < Unroll; ++k) {
      Vector<float> row[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) row[v] = load(w + k * kColumns + v * kWide);
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) {
        float element;
        memcpy(&element, reinterpret_cast<const char*>(x[r / 3] + k) + r % 3 * row_bytes, sizeof element);
        Vector<float> factor = splat(element);
        keep_in_register(factor);
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) multiply_add_to(sums[r][v], factor, row[v]);
      }
    }
    w += Unroll * kColumns;
#pragma GCC unroll 8
    for (int g = 0; g < kGroups; ++g) x[g] += Unroll;
  } while (--steps > 0);
}

template <int Rows>
__attribute__((noinline)) void multiply(const Tile& tile) {
  Vector<float> sum[Rows][kVectors] = {};
  if (tile.update.depth > 0) {
    add_product<Rows, 1>(tile.update, sum, []() PYFUSED_INLINE_LAMBDA {});
    if (tile.keep != nullptr) {
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) {
        const uint32_t bits = tile.keep[r * tile.ld_keep] >> tile.first_keep;
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) sum[r][v] = select<float>(bits >> v * kWide, sum[r][v]);
      }
    }
  }
  const float *ahead0 = tile.ahead[0], *ahead1 = tile.ahead[1];
  const float *line = tile.out, *last_line = tile.out + (Rows - 1) * tile.ld_out;
  // what goes beside out, or out again
  const int64_t unscaled = tile.unscaled == nullptr ? 0 : tile.unscaled - tile.out;
  const float* other = tile.other == nullptr ? tile.base.x : tile.other;
  const int64_t ld_other = tile.other == nullptr ? 0 : tile.ld_other;
  add_product<Rows, kUnroll>(tile.base, sum, [&]() PYFUSED_INLINE_LAMBDA {
    prefetch_to_write(line);
    prefetch_to_write(line + kColumns - 1);
    prefetch_to_write(line + unscaled);
    prefetch_to_write(line + unscaled + kColumns - 1);
    __builtin_prefetch(other, 0, 3);
    __builtin_prefetch(other + kColumns - 1, 0, 3);
    other = line == last_line ? other : other + ld_other;
    line = line == last_line ? line : line + tile.ld_out;
    __builtin_prefetch(ahead0, 0, 2);
    __builtin_prefetch(ahead1, 0, 2);
    ahead0 += kUnroll;
    ahead1 += kUnroll;
  });
  const auto for_each = [&](const auto& run) PYFUSED_INLINE_LAMBDA {
#pragma GCC unroll 14
    for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) run(r * tile.ld_out + v * kWide, v, sum[r][v]);
    }
  };
  if (tile.add) for_each([&](int64_t at, int, Vector<float>& value) { value += load(tile.out + at); });
  if (tile.unscaled != nullptr) {
    for_each([&](int64_t at, int, const Vector<float>& value) { store(tile.unscaled + at, value); });
  }
  if (tile.other != nullptr) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vector<float> dots = load(tile.dots + v * kWide);
#pragma GCC unroll 14
      for (int r = 0; r < Rows; ++r) {
        dots = multiply_add(sum[r][v], load(tile.other + r * tile.ld_other + v * kWide), dots);
      }
      store(tile.dots + v * kWide, dots);
    }
  }
  Vector<float> bias[kVectors], scale[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    bias[v] = load(tile.bias + v * kWide);
    scale[v] = load(tile.scale + v * kWide);
  }
  for_each([&](int64_t at, int v, const Vector<float>& value) { store(tile.out + at, (value + bias[v]) * scale[v]); });
}

template <int Rows = kRows>
inline void multiply_rows(int64_t rows, const Tile& tile) {
  if (rows == Rows) return multiply<Rows>(tile);
  if constexpr (Rows > 1) multiply_rows<Rows - 1>(rows, tile);
}

inline Vector<float> load_up_to(const float* p, int64_t count) {
  return load_some<float>(p, static_cast<int>(min_of(count, kWide)));
}

// dst [rows, columns] = src
inline void copy(const float* src, int64_t ld_src, int64_t rows, int64_t columns, float* dst, int64_t ld_dst) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* from = src + r * ld_src;
    float* to = dst + r * ld_dst;
    int64_t i = 0;
    for (; i + kWide <= columns; i += kWide) store(to + i, load(from + i));
    if (i < columns) memcpy(to + i, from + i, static_cast<size_t>(columns - i) * sizeof(float));
  }
}

// The last columns of out, fewer than a tile has, by way of a tile of their own.
void multiply_last(int64_t rows, const Tile& tile, int64_t columns) {
  alignas(64) float out[kRows * kColumns] = {}, unscaled[kRows * kColumns], bias[kColumns] = {}, scale[kColumns] = {};
  copy(tile.bias, 0, 1, columns, bias, 0);
  copy(tile.scale, 0, 1, columns, scale, 0);
  if (tile.add) copy(tile.out, tile.ld_out, rows, columns, out, kColumns);
  Tile whole = tile;
  whole.bias = bias;
  whole.scale = scale;
  whole.out = out;
  whole.ld_out = kColumns;
  if (tile.unscaled != nullptr) whole.unscaled = unscaled;
  alignas(64) float other[kRows * kColumns] = {}, dots[kColumns] = {};
  if (tile.other != nullptr) {
    copy(tile.other, tile.ld_other, rows, columns, other, kColumns);
    copy(tile.dots, 0, 1, columns, dots, 0);
    whole.other = other;
    whole.ld_other = kColumns;
    whole.dots = dots;
  }
  multiply_rows(rows, whole);
  if (tile.other != nullptr) copy(dots, 0, 1, columns, tile.dots, 0);
  copy(out, kColumns, rows, columns, tile.out, tile.ld_out);
  if (tile.unscaled != nullptr) copy(unscaled, kColumns, rows, columns, tile.unscaled, tile.ld_out);
}

// dst[j][i] = src[i][j] * scale[j] for a square of a vector's width, of which the first `rows` of dst are stored. Each
// round interleaves the first half of the rows with the second.
inline void transpose(const float* src, int64_t ld_src, Vector<float> scale, float* dst, int64_t rows) {
  typedef int32_t Lanes __attribute__((vector_size(kVectorBytes)));
  Lanes low, high;
  for (int i = 0; i < kWide; ++i) {
    low[i] = i / 2 + i % 2 * kWide;
    high[i] = low[i] + kWide / 2;
  }
  Vector<float> from[kWide], to[kWide];
#pragma GCC unroll 16
  for (int i = 0; i < kWide; ++i) from[i] = load(src + i * ld_src) * scale;
#pragma GCC unroll 4
  for (int round = 1; round < kWide; round *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < kWide / 2; ++i) {
      to[2 * i] = __builtin_shuffle(from[i], from[i + kWide / 2], low);
      to[2 * i + 1] = __builtin_shuffle(from[i], from[i + kWide / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) from[i] = to[i];
  }
  if (rows == kWide) {
#pragma GCC unroll 16
    for (int i = 0; i < kWide; ++i) store(dst + i * kColumns, from[i]);
  } else {
    for (int64_t i = 0; i < rows; ++i) store(dst + i * kColumns, from[i]);
  }
}

// Where a block's panels of w go.
struct Panels {
  float* first;
  int64_t stride, count;
  int64_t column, N;  // the first one's first column; of w's in all

  float* at(int64_t p) const { return first + p * stride; }
};

// Rows [begin, end) of w into its panels' rows from `row` on; zero beyond column N.
void pack(const F32Product::Term& term, const float* factor, int64_t begin, int64_t end, const Panels& panels,
          int64_t row) {
  if (term.column_stride == 1) {
    const int64_t last_column = min_of(panels.column + panels.count * kColumns, panels.N);
    for (int64_t k = begin; k < end; ++k) {  // along the rows, which is how they come into the cache
      const float* from = term.w + k * term.row_stride;
      const Vector<float> scale = splat(factor == nullptr ? 1.0f : factor[k]);
      for (int64_t n = panels.column; n < last_column; n += kWide) {
        __builtin_prefetch(from + kPackAhead * term.row_stride + n, 0, 3);
      }
      for (int64_t p = 0; p < panels.count; ++p) {
        float* to = panels.at(p) + (row + k - begin) * kColumns;
        for (int64_t v = 0; v < kColumns; v += kWide) {
          const int64_t n = panels.column + p * kColumns + v;
          store(to + v, n < panels.N ? load_up_to(from + n, panels.N - n) * scale : Vector<float>{});
        }
      }
    }
    return;
  }
  for (int64_t p = 0; p < panels.count; ++p) {
    for (int64_t k = begin; k < end; k += kWide) {
      const int64_t count = min_of(kWide, end - k);
      const Vector<float> scale = factor == nullptr ? splat(1.0f) : load_up_to(factor + k, count);
      for (int64_t v = 0; v < kColumns; v += kWide) {
        const int64_t n = panels.column + p * kColumns + v, columns = min_of(kWide, panels.N - n);
        float* to = panels.at(p) + (row + k - begin) * kColumns + v;
        if (columns == kWide && count == kWide) {
          transpose(term.w + k + n * term.column_stride, term.column_stride, scale, to, kWide);
          continue;
        }
        float square[kWide * kWide] = {};
        if (columns > 0) copy(term.w + k + n * term.column_stride, term.column_stride, columns, count, square, kWide);
        transpose(square, kWide, scale, to, count);
      }
    }
  }
}

// How far a block of k goes: all of about the same depth.
inline int64_t block_depth(int64_t K) {
  const int64_t blocks = (K + kDepth - 1) / kDepth;
  return round_up((K + blocks - 1) / blocks, kWide);
}
inline int64_t padded_depth(const F32Product& call) {
  return round_up(min_of(block_depth(call.base.K), call.base.K), kUnroll) + call.update.K;
}

// Whether tiles read rows of x as they lie. At a multiple of a page apart they would all fall into the same few sets of
// the first-level cache.
inline bool reads_in_place(const F32Product& call) { return call.base.K % kUnroll == 0 && call.base.ld_x % kPage != 0; }
inline int64_t row_pitch(const F32Product& call) {
  return reads_in_place(call) ? 0 : round_up(padded_depth(call), kSpread) + kSpread;
}

int64_t scratch(const F32Product& call, int64_t columns) {
  return round_up(columns, kColumns) * padded_depth(call) + kRows * row_pitch(call);
}

void block(const F32Product& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
           float* memory) {
  const auto &base = call.base, &update = call.update;
  const int64_t step = block_depth(base.K), count = (column_end - column_begin + kColumns - 1) / kColumns;
  const bool in_place = reads_in_place(call);
  const int64_t pitch = row_pitch(call);
  float *w = memory, *rows_of_x = memory + count * kColumns * padded_depth(call);
  for (int64_t begin = 0; begin < base.K; begin += step) {
    const int64_t end = min_of(begin + step, base.K), depth = end - begin, whole = round_up(depth, kUnroll);
    const bool last = end == base.K, with_dots = last && call.other != nullptr;
    const int64_t updated = begin == 0 ? update.K : 0;
    const Panels panels{w, (updated + whole) * kColumns, count, column_begin, call.N};
    if (updated > 0) pack(update, nullptr, 0, updated, panels, 0);
    pack(base, call.factor, begin, end, panels, updated);
    for (int64_t p = 0; p < count; ++p) {
      clear(panels.at(p) + (updated + depth) * kColumns, kColumns, whole - depth, kColumns);
    }
    if (!in_place) clear(rows_of_x + depth, pitch, kRows, whole - depth);
    for (int64_t m = row_begin; m < row_end; m += kRows) {
      const int64_t rows = min_of(kRows, row_end - m);
      const float* from = base.x + m * base.ld_x + begin;
      if (!in_place) copy(from, base.ld_x, rows, depth, rows_of_x, pitch);
      for (int64_t p = 0; p < count; ++p) {
        const int64_t n = column_begin + p * kColumns, at = m * call.ld_out + n;
        const int64_t next = min_of(m + kRows + p * kAhead, row_end - 1), after = min_of(next + 1, row_end - 1);
        const Tile tile{
            {in_place ? from : rows_of_x, in_place ? base.ld_x : pitch, panels.at(p) + updated * kColumns, whole},
            {update.x + m * update.ld_x, update.ld_x, panels.at(p), updated},
            call.keep != nullptr ? call.keep + m * call.ld_keep + n / 32 : nullptr,
            call.ld_keep,
            static_cast<int>(n % 32),
            call.add || begin > 0,
            last && call.bias != nullptr ? call.bias + n : kZeros,
            last && call.scale != nullptr ? call.scale + n : kOnes.values,
            last && call.unscaled != nullptr ? call.unscaled + at : nullptr,
            call.out + at,
            call.ld_out,
            with_dots ? call.other + m * call.ld_other + n : nullptr,
            call.ld_other,
            with_dots ? call.dots + m / call.part_rows * call.N + n : nullptr,
            {base.x + next * base.ld_x + begin, base.x + after * base.ld_x + begin}};
        call.N - n >= kColumns ? multiply_rows(rows, tile) : multiply_last(rows, tile, call.N - n);
      }
    }
  }
}

constexpr LinearF32Kernels kTable{kRows, kColumns, kScaledRows, kMinRows, kMaxDepth, scratch, block};

}  // namespace

const LinearF32Kernels* linear_f32_kernels() { return &kTable; }

#else

const LinearF32Kernels* linear_f32_kernels() { return nullptr; }

#endif

}  // namespace pyfused::PYFUSED_ISA
