// A tile of results of a matrix product, in registers while k runs, for linear_vectors.cpp.
#pragma once

#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int kWide = kWidth<float>;
constexpr int kVectors = 2;
constexpr int kColumns = kVectors * kWide;
#if defined(__AVX512F__)
constexpr int kRows = 14;  // 28 sums, two vectors of w and one of x, of 32 registers
#else
constexpr int kRows = 6;  // 12 sums, of 16 registers
#endif
constexpr int kUnroll = 8;
// Rows of x that a tile asks for ahead; one pointer each.
constexpr int kAhead = 2;

// A bias and a scale that change nothing.
template <class T>
constexpr T kZeros[kColumns] = {};
constexpr struct Ones {
  float values[kColumns];
  constexpr Ones() : values() {
    for (float& value : values) value = 1;
  }
} kOnes;

// out = (x w + update + [out] + [sums] + bias) * scale + [residual]; or, where it is not the last block of k, sums is
// what is left.
template <class T>
struct Tile {
  struct Term {
    const float* x;  // [rows, depth], rows ld_x apart
    int64_t ld_x;
    const float* w;  // [depth, kColumns]
    int64_t depth;
  };
  Term base;             // its depth a multiple of kUnroll
  Term update;           // none where its depth is 0
  const uint32_t* keep;  // or null: which of the update's sums count, a word for a row, ld_keep apart, of which the
  int64_t ld_keep;       // columns' bits begin at keep_shift
  int keep_shift;
  bool add;             // to what out has
  bool add_sums, last;  // whether there are sums of blocks before, and results of this one
  float* sums;          // [rows, kColumns], rows ld_sums apart; out itself where that is fp32
  int64_t ld_sums;
  const T* bias;       // [kColumns]
  const float* scale;  // [kColumns]
  T* unscaled;         // the sum before both, in 16 bits with the bias, which then is scaled; may be null
  T* out;              // [rows, kColumns], rows ld_out apart, as in unscaled
  int64_t ld_out;
  const T* residual;  // [rows, kColumns], rows ld_residual apart, or null
  int64_t ld_residual;
  const T* other;  // [rows, kColumns], rows ld_other apart, or null: dots [kColumns] += the sums of unscaled * other
  int64_t ld_other;
  float* dots;
  const T* ahead[kAhead];  // rows of x for a later tile
};

// __builtin_prefetch writes this instruction only where a -m flag of its own is given.
inline void prefetch_to_write([[maybe_unused]] const char* p) {
#if defined(__AVX2__)
  asm volatile("prefetchw %0" : : "m"(*p));
#else
  __builtin_prefetch(p, 1, 3);
#endif
}

// sums += x w, k in steps of Unroll, before each of which ahead() runs.
template <int Rows, int Unroll, class Term, class Ahead>
PYFUSED_INLINE void add_product(const Term& term, Vector<float> (&sums)[Rows][kVectors], const Ahead& ahead) {
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

// run(row, v, sum) for each vector of the sums.
template <int Rows, class F>
PYFUSED_INLINE void for_each_sum(Vector<float> (&sums)[Rows][kVectors], const F& run) {
#pragma GCC unroll 14
  for (int r = 0; r < Rows; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) run(r, v, sums[r][v]);
  }
}

template <int Rows, class T>
__attribute__((noinline)) void multiply(const Tile<T>& tile) {
  Vector<float> sum[Rows][kVectors] = {};
  if (tile.update.depth > 0) {
    add_product<Rows, 1>(tile.update, sum, []() PYFUSED_INLINE_LAMBDA {});
    if (tile.keep != nullptr) {
      for_each_sum(sum, [&](int r, int v, Vector<float>& value) PYFUSED_INLINE_LAMBDA {
        value = select<float>(tile.keep[r * tile.ld_keep] >> (tile.keep_shift + v * kWide), value);
      });
    }
  }
  const T *ahead0 = tile.ahead[0], *ahead1 = tile.ahead[1];
  // what is written
  const char* line = tile.last ? reinterpret_cast<const char*>(tile.out) : reinterpret_cast<const char*>(tile.sums);
  const int64_t element = tile.last ? static_cast<int64_t>(sizeof(T)) : static_cast<int64_t>(sizeof(float));
  const int64_t pitch = element * (tile.last ? tile.ld_out : tile.ld_sums), end = element * (kColumns - 1);
  const char* last_line = line + (Rows - 1) * pitch;
  // what goes beside it, or it again
  const int64_t unscaled = tile.unscaled == nullptr ? 0 : (tile.unscaled - tile.out) * static_cast<int64_t>(sizeof(T));
  const T* other = tile.other != nullptr ? tile.other : tile.residual != nullptr ? tile.residual : tile.ahead[0];
  const int64_t ld_other = tile.other != nullptr ? tile.ld_other : tile.ld_residual;
  add_product<Rows, kUnroll>(tile.base, sum, [&]() PYFUSED_INLINE_LAMBDA {
    prefetch_to_write(line);
    prefetch_to_write(line + end);
    prefetch_to_write(line + unscaled);
    prefetch_to_write(line + unscaled + end);
    __builtin_prefetch(other, 0, 3);
    __builtin_prefetch(other + kColumns - 1, 0, 3);
    other = line == last_line ? other : other + ld_other;
    line = line == last_line ? line : line + pitch;
    __builtin_prefetch(ahead0, 0, 2);
    __builtin_prefetch(ahead1, 0, 2);
    ahead0 += kUnroll;
    ahead1 += kUnroll;
  });
  if (tile.add) {
    for_each_sum(sum, [&](int r, int v, Vector<float>& value)
                          PYFUSED_INLINE_LAMBDA { value += load(tile.out + r * tile.ld_out + v * kWide); });
  }
  if (tile.add_sums) {
    for_each_sum(sum, [&](int r, int v, Vector<float>& value)
                          PYFUSED_INLINE_LAMBDA { value += load(tile.sums + r * tile.ld_sums + v * kWide); });
  }
  if (!tile.last) {
    for_each_sum(sum, [&](int r, int v, const Vector<float>& value)
                          PYFUSED_INLINE_LAMBDA { store(tile.sums + r * tile.ld_sums + v * kWide, value); });
    return;
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
  if constexpr (sizeof(T) < sizeof(float)) {  // what is scaled is what is kept, or would be
    for_each_sum(sum, [&](int r, int v, const Vector<float>& value) PYFUSED_INLINE_LAMBDA {
      T kept[kWide];
      store(kept, value + bias[v]);
      if (tile.unscaled != nullptr) memcpy(tile.unscaled + r * tile.ld_out + v * kWide, kept, sizeof kept);
      Vector<float> result = load(kept) * scale[v];
      if (tile.residual != nullptr) result += load(tile.residual + r * tile.ld_residual + v * kWide);
      store(tile.out + r * tile.ld_out + v * kWide, result);
    });
    return;
  }
  if (tile.unscaled != nullptr) {
    for_each_sum(sum, [&](int r, int v, const Vector<float>& value)
                          PYFUSED_INLINE_LAMBDA { store(tile.unscaled + r * tile.ld_out + v * kWide, value); });
  }
  if (tile.residual != nullptr) {
    for_each_sum(sum, [&](int r, int v, const Vector<float>& value) PYFUSED_INLINE_LAMBDA {
      store(tile.out + r * tile.ld_out + v * kWide,
            (value + bias[v]) * scale[v] + load(tile.residual + r * tile.ld_residual + v * kWide));
    });
    return;
  }
  for_each_sum(sum, [&](int r, int v, const Vector<float>& value) PYFUSED_INLINE_LAMBDA {
    store(tile.out + r * tile.ld_out + v * kWide, (value + bias[v]) * scale[v]);
  });
}

template <class T, int Rows = kRows>
inline void multiply_rows(int64_t rows, const Tile<T>& tile) {
  if (rows == Rows) return multiply<Rows>(tile);
  if constexpr (Rows > 1) multiply_rows<T, Rows - 1>(rows, tile);
}

// dst [rows, columns] = src
template <class T>
inline void copy(const T* src, int64_t ld_src, int64_t rows, int64_t columns, T* dst, int64_t ld_dst) {
  for (int64_t r = 0; r < rows; ++r) {
    memcpy(dst + r * ld_dst, src + r * ld_src, static_cast<size_t>(columns) * sizeof(T));
  }
}

// The last columns of out, fewer than a tile has, by way of a tile of their own.
template <class T>
void multiply_last(int64_t rows, const Tile<T>& tile, int64_t columns) {
  alignas(64) T out[kRows * kColumns] = {}, unscaled[kRows * kColumns], other[kRows * kColumns] = {};
  alignas(64) T residual[kRows * kColumns] = {};
  alignas(64) T bias[kColumns] = {};
  alignas(64) float scale[kColumns] = {}, dots[kColumns] = {};
  copy(tile.bias, 0, 1, columns, bias, 0);
  copy(tile.scale, 0, 1, columns, scale, 0);
  Tile<T> whole = tile;
  whole.bias = bias;
  whole.scale = scale;
  whole.out = out;
  whole.ld_out = kColumns;
  if constexpr (sizeof(T) == sizeof(float)) {  // sums are there
    if (tile.add || tile.add_sums) copy(tile.out, tile.ld_out, rows, columns, out, kColumns);
    whole.sums = out;
    whole.ld_sums = kColumns;
  } else if (tile.add) {
    copy(tile.out, tile.ld_out, rows, columns, out, kColumns);
  }
  if (tile.unscaled != nullptr) whole.unscaled = unscaled;
  if (tile.residual != nullptr) {
    copy(tile.residual, tile.ld_residual, rows, columns, residual, kColumns);
    whole.residual = residual;
    whole.ld_residual = kColumns;
  }
  if (tile.other != nullptr) {
    copy(tile.other, tile.ld_other, rows, columns, other, kColumns);
    copy(tile.dots, 0, 1, columns, dots, 0);
    whole.other = other;
    whole.ld_other = kColumns;
    whole.dots = dots;
  }
  multiply_rows(rows, whole);
  if (tile.other != nullptr) copy(dots, 0, 1, columns, tile.dots, 0);
  if (tile.last || sizeof(T) == sizeof(float)) copy(out, kColumns, rows, columns, tile.out, tile.ld_out);
  if (tile.unscaled != nullptr) copy(unscaled, kColumns, rows, columns, tile.unscaled, tile.ld_out);
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
