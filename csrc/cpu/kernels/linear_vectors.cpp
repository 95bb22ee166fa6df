// Matrix products on CPU by vectors, compiled once per ISA level. No torch, no std: see simd.h for why.
//
// A tile of results is in registers while k runs (linear_vectors_tile.h). Its panel of w comes from the second-level
// cache, where a block of panels stays for all rows, its rows of x from the first. The next rows of x and the tile's
// lines of out are asked for while k runs: a load or store that misses costs as much as dozens of products. 16-bit
// numbers are widened as they are copied, w once for all rows of a task and x once for all of its columns.
#include "linear_vectors.h"

#include "linear_vectors_tile.h"

namespace pyfused::PYFUSED_ISA {
namespace {

constexpr int64_t kDepth = 768;
// Copied rows of x are kept this many floats further apart than they are long, and a page's floats.
constexpr int64_t kSpread = 16;
constexpr int64_t kPage = 1024;
// Rows of w that are asked for ahead of their copy where they lie along n: pieces too short for the hardware to follow.
constexpr int64_t kPackAhead = 8;
// Into which cache. Rows a multiple of a page apart share sets of the first level, which may be full before they are
// read.
#if defined(__AVX512F__)
constexpr int kPackLocality = 3;
#else
constexpr int kPackLocality = 2;
#endif
// Rows between two panels, or as many lines as there are panels would fall into the same set of the first-level cache.
constexpr int64_t kBetween = 1;
// Rows for which a block keeps sums between two blocks of k where results are too narrow for them.
constexpr int64_t kSumRows = 1024 / kRows * kRows;

template <class T>
inline Vector<float> load_up_to(const T* p, int64_t count) {
  return load_some<float>(p, static_cast<int>(min_of(count, kWide)));
}

// dst[j][i] = src[i][j] * scale[j] for a square of a vector's width, of which the first `rows` of dst are stored. Each
// round interleaves the first half of the rows with the second.
template <class T>
inline void transpose(const T* src, int64_t ld_src, Vector<float> scale, float* dst, int64_t ld_dst, int64_t rows) {
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
    for (int i = 0; i < kWide; ++i) store(dst + i * ld_dst, from[i]);
  } else {
    for (int64_t i = 0; i < rows; ++i) store(dst + i * ld_dst, from[i]);
  }
}

// dst [rows, columns] = src, widened.
template <class T>
inline void widen(const T* src, int64_t ld_src, int64_t rows, int64_t columns, float* dst, int64_t ld_dst) {
  for (int64_t r = 0; r < rows; ++r) {
    const T* from = src + r * ld_src;
    float* to = dst + r * ld_dst;
    int64_t i = 0;
    for (; i + kWide <= columns; i += kWide) store(to + i, load(from + i));
    for (; i < columns; ++i) to[i] = load_one(from + i);
  }
}

// The same for a src of other strides, of which there are so many rows in all.
template <class T>
inline void widen(const T* src, int64_t src_row, int64_t src_column, int64_t rows, int64_t all_rows, int64_t columns,
                  float* dst, int64_t ld_dst) {
  const bool in_squares = src_row == 1 && round_up(rows, kWide) <= all_rows;
  const int64_t end = in_squares ? columns / kWide * kWide : 0;
  for (int64_t i = 0; i < end; i += kWide) {
    for (int64_t r = 0; r < rows; r += kWide) {
      transpose(src + r + i * src_column, src_column, splat(1.0f), dst + r * ld_dst + i, ld_dst,
                min_of(kWide, rows - r));
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = end; i < columns; ++i) dst[r * ld_dst + i] = load_one(src + r * src_row + i * src_column);
  }
}

// Where a block's panels of w go.
struct Panels {
  float* first;
  int64_t stride, count;
  int64_t column, N;  // the first one's first column; of w's in all

  float* at(int64_t p) const { return first + p * stride; }
};

// Rows [begin, end) of w, ld_w apart, into its panels' rows from `row` on; zero beyond column N, and where there are
// bits to keep by and they say so.
template <bool Keep, class T>
void pack_rows(const T* w, int64_t ld_w, const float* factor, const uint32_t* keep, int64_t ld_keep, int64_t begin,
               int64_t end, const Panels& panels, int64_t row) {
  const int64_t last_column = min_of(panels.column + panels.count * kColumns, panels.N);
  for (int64_t k = begin; k < end; ++k) {  // along the rows, which is how they come into the cache
    const T* from = w + k * ld_w;
    const Vector<float> scale = splat(factor == nullptr ? 1.0f : factor[k]);
    for (int64_t n = panels.column; n < last_column; n += 64 / static_cast<int64_t>(sizeof(T))) {
      __builtin_prefetch(from + kPackAhead * ld_w + n, 0, kPackLocality);
    }
    for (int64_t p = 0; p < panels.count; ++p) {
      float* to = panels.at(p) + (row + k - begin) * kColumns;
      const int64_t n = panels.column + p * kColumns, columns = panels.N - n;
      for (int64_t v = 0; v < kColumns; v += kWide) {
        Vector<float> value{};
        if (columns >= kColumns) {
          value = load(from + n + v) * scale;
        } else if (v < columns) {
          value = load_up_to(from + n + v, columns - v) * scale;
        }
        if constexpr (Keep) value = select<float>(keep[k * ld_keep + n / 32] >> (n % 32 + v), value);
        store(to + v, value);
      }
    }
  }
}

// The same for a w whose columns are ld_w apart and contiguous.
template <class T>
void pack_columns(const T* w, int64_t ld_w, const float* factor, int64_t begin, int64_t end, const Panels& panels,
                  int64_t row) {
  for (int64_t p = 0; p < panels.count; ++p) {
    for (int64_t k = begin; k < end; k += kWide) {
      const int64_t count = min_of(kWide, end - k);
      const Vector<float> scale = factor == nullptr ? splat(1.0f) : load_up_to(factor + k, count);
      for (int64_t v = 0; v < kColumns; v += kWide) {
        const int64_t n = panels.column + p * kColumns + v, columns = min_of(kWide, panels.N - n);
        float* to = panels.at(p) + (row + k - begin) * kColumns + v;
        if (columns == kWide && count == kWide) {
          transpose(w + k + n * ld_w, ld_w, scale, to, kColumns, kWide);
          continue;
        }
        float square[kWide * kWide] = {};
        if (columns > 0) widen(w + k + n * ld_w, ld_w, columns, count, square, kWide);
        transpose(square, kWide, scale, to, kColumns, count);
      }
    }
  }
}

// How far a block of k goes: all of about the same depth.
inline int64_t block_depth(int64_t K) {
  const int64_t blocks = (K + kDepth - 1) / kDepth;
  return round_up((K + blocks - 1) / blocks, kWide);
}
// Floats from a panel to the next.
inline int64_t panel_stride(int64_t depth) { return (depth + kBetween) * kColumns; }
inline int64_t padded_depth(const LinearProduct& call) {
  return round_up(min_of(block_depth(call.base.K), call.base.K), kUnroll) + call.update.K;
}

// Whether tiles read rows of x as they lie. At a multiple of a page apart they would all fall into the same few sets of
// the first-level cache.
template <class T>
inline bool reads_in_place(const LinearProduct& call) {
  const LinearProduct::Base& base = call.base;
  return sizeof(T) == sizeof(float) && base.x_column == 1 && base.K % kUnroll == 0 && base.x_row % kPage != 0;
}
template <class T>
inline int64_t row_pitch(const LinearProduct& call) {
  return reads_in_place<T>(call) ? 0 : round_up(padded_depth(call), kSpread) + kSpread;
}

// Whether sums between two blocks of k have memory of their own.
template <class T>
inline bool keeps_sums(const LinearProduct& call) {
  return sizeof(T) < sizeof(float) && call.base.K > block_depth(call.base.K);
}

template <class T>
int64_t scratch(const LinearProduct& call, int64_t columns) {
  const int64_t sum_rows = keeps_sums<T>(call) ? min_of(round_up(call.M, kRows), kSumRows) : 0;
  const int64_t panel_rows = call.panels == nullptr ? padded_depth(call) + kBetween : 0;
  return round_up(columns, kColumns) * (panel_rows + sum_rows) + kRows * row_pitch<T>(call);
}

int64_t packed_size(const LinearProduct& call) {
  const int64_t K = call.base.K, blocks = (K + block_depth(K) - 1) / block_depth(K);
  return round_up(call.N, kColumns) / kColumns * blocks * panel_stride(round_up(block_depth(K), kUnroll));
}

// The panels of columns from column_begin on for the block of k that starts at begin: in memory, or among call.panels,
// where those of all columns follow each other for one such block after the other.
inline Panels panels_of(const LinearProduct& call, int64_t begin, int64_t column_begin, int64_t count, float* memory) {
  const int64_t step = block_depth(call.base.K);
  const int64_t depth = round_up(min_of(step, call.base.K - begin), kUnroll) + (begin == 0 ? call.update.K : 0);
  if (call.panels != nullptr) {
    const int64_t before =
        begin / step * (round_up(call.N, kColumns) / kColumns) * panel_stride(round_up(step, kUnroll));
    memory = call.panels + before + column_begin / kColumns * panel_stride(depth);
  }
  return {memory, panel_stride(depth), count, column_begin, call.N};
}

// Rows [begin, end) of w, behind those of the update, into their panels, with zeros up to a multiple of kUnroll.
template <class T>
void pack_block(const LinearProduct& call, int64_t begin, int64_t end, const Panels& panels) {
  const LinearProduct::Base& base = call.base;
  const T* w = static_cast<const T*>(base.w);
  const int64_t updated = begin == 0 ? call.update.K : 0, depth = updated + end - begin;
  if (updated > 0) pack_rows<false>(call.update.w, call.update.ld_w, nullptr, nullptr, 0, 0, updated, panels, 0);
  if (base.w_column == 1) {
    const auto pack = base.w_keep != nullptr ? pack_rows<true, T> : pack_rows<false, T>;
    pack(w, base.w_row, call.factor, base.w_keep, base.ld_w_keep, begin, end, panels, updated);
  } else {
    pack_columns(w, base.w_column, call.factor, begin, end, panels, updated);
  }
  for (int64_t p = 0; p < panels.count; ++p) {
    clear(panels.at(p) + depth * kColumns, kColumns, round_up(end - begin, kUnroll) - (end - begin), kColumns);
  }
}

template <class T>
void pack(const LinearProduct& call, int64_t column_begin, int64_t column_end) {
  const int64_t step = block_depth(call.base.K), count = (column_end - column_begin + kColumns - 1) / kColumns;
  for (int64_t begin = 0; begin < call.base.K; begin += step) {
    pack_block<T>(call, begin, min_of(begin + step, call.base.K), panels_of(call, begin, column_begin, count, nullptr));
  }
}

template <class T>
void rows_block(const LinearProduct& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t count,
                float* memory) {
  const LinearProduct::Base& base = call.base;
  const LinearProduct::Update& update = call.update;
  const T *x = static_cast<const T*>(base.x), *residual = static_cast<const T*>(call.residual);
  T *out = static_cast<T*>(call.out), *unscaled = static_cast<T*>(call.unscaled);
  const int64_t step = block_depth(base.K), pitch = row_pitch<T>(call);
  const bool in_place = reads_in_place<T>(call), keep_sums = keeps_sums<T>(call);
  float* rows_of_x = memory + (call.panels == nullptr ? count * panel_stride(padded_depth(call)) : 0);
  float* sums = rows_of_x + kRows * pitch;
  for (int64_t begin = 0; begin < base.K; begin += step) {
    const int64_t end = min_of(begin + step, base.K), depth = end - begin, whole = round_up(depth, kUnroll);
    const bool last = end == base.K, with_dots = last && call.other != nullptr;
    const bool with_residual = last && residual != nullptr;
    const int64_t updated = begin == 0 ? update.K : 0;
    const Panels panels = panels_of(call, begin, column_begin, count, memory);
    if (call.panels == nullptr) pack_block<T>(call, begin, end, panels);
    if (!in_place) clear(rows_of_x + depth, pitch, kRows, whole - depth);
    for (int64_t m = row_begin; m < row_end; m += kRows) {
      const int64_t rows = min_of(kRows, row_end - m);
      const T* from = x + m * base.x_row + begin * base.x_column;
      if (base.x_column != 1) {
        widen(from, base.x_row, base.x_column, rows, call.M - m, depth, rows_of_x, pitch);
      } else if (!in_place) {
        widen(from, base.x_row, rows, depth, rows_of_x, pitch);
      }
      const float* x_rows = rows_of_x;
      if constexpr (sizeof(T) == sizeof(float)) x_rows = in_place ? from : rows_of_x;
      for (int64_t p = 0; p < count; ++p) {
        const int64_t n = column_begin + p * kColumns, at = m * call.ld_out + n;
        const int64_t next = min_of(m + kRows + p * kAhead, row_end - 1), after = min_of(next + 1, row_end - 1);
        float* tile_sums = sums + ((m - row_begin) * count + p * kRows) * kColumns;
        if constexpr (sizeof(T) == sizeof(float)) tile_sums = out + at;
        const Tile<T> tile{
            {x_rows, in_place ? base.x_row : pitch, panels.at(p) + updated * kColumns, whole},
            {update.x + m * update.ld_x, update.ld_x, panels.at(p), updated},
            call.keep != nullptr ? call.keep + m * call.ld_keep + n / 32 : nullptr,
            call.ld_keep,
            static_cast<int>(n % 32),
            call.add && begin == 0,
            begin > 0,
            last,
            tile_sums,
            keep_sums ? kColumns : call.ld_out,
            last && call.bias != nullptr ? static_cast<const T*>(call.bias) + n : kZeros<T>,
            last && call.scale != nullptr ? call.scale + n : kOnes.values,
            last && unscaled != nullptr ? unscaled + at : nullptr,
            out + at,
            call.ld_out,
            with_residual ? residual + m * call.ld_residual + n : nullptr,
            with_residual ? call.ld_residual : 0,
            with_dots ? static_cast<const T*>(call.other) + m * call.ld_other + n : nullptr,
            call.ld_other,
            with_dots ? call.dots + m / call.part_rows * call.N + n : nullptr,
            {x + next * base.x_row + begin * base.x_column, x + after * base.x_row + begin * base.x_column}};
        call.N - n >= kColumns ? multiply_rows(rows, tile) : multiply_last(rows, tile, call.N - n);
      }
    }
  }
}

template <class T>
void block(const LinearProduct& call, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end,
           float* memory) {
  const int64_t count = (column_end - column_begin + kColumns - 1) / kColumns;
  const int64_t step = keeps_sums<T>(call) ? kSumRows : row_end - row_begin;
  for (int64_t m = row_begin; m < row_end; m += step) {
    rows_block<T>(call, m, min_of(m + step, row_end), column_begin, count, memory);
  }
}

constexpr int64_t kNever = INT64_MAX;
template <class T>
constexpr LinearVectorKernels table(const LinearVectorKernels::Least (&least)[7], int64_t max_depth) {
  return {kRows,     kColumns,   {least[0], least[1], least[2], least[3], least[4], least[5], least[6]},
          max_depth, scratch<T>, packed_size,
          pack<T>,   block<T>};
}

constexpr LinearVectorKernels::Least kNot{kNever, 0};
#if defined(__AVX512F__)
constexpr LinearVectorKernels kF32Table = table<float>({{128, 64}, {512, 64}, {512, 64}, kNot, kNot, kNot, kNot}, 1536);
#elif defined(__AVX2__)
constexpr LinearVectorKernels kF32Table =
    table<float>({{64, 64}, {64, 64}, {64, 64}, kNot, kNot, {64, 8}, {8, 128}}, kNever);
#endif

// Without AVX-512 vendors have no kernels for 16 bits. Up to 16 rows a forward is theirs even so, as a base layer's is
// that is called alone: a row in a batch of many adapters has the same bits as alone.
template <class T>
constexpr LinearVectorKernels kNarrowTable =
    table<T>({{17, 1}, {17, 1}, {1, 1}, {17, 1}, {1, 1}, {1, 1}, {1, 1}}, kNever);

}  // namespace

const LinearVectorKernels* linear_vector_kernels([[maybe_unused]] Dtype dtype) {
#if defined(__AVX2__)
  if (dtype == Dtype::kFloat32) return &kF32Table;
#endif
#if defined(__x86_64__) && !defined(__AVX512F__)
  if (dtype == Dtype::kBFloat16) return &kNarrowTable<bf16>;
  if (dtype == Dtype::kFloat16) return &kNarrowTable<fp16>;
#endif
  return nullptr;
}

}  // namespace pyfused::PYFUSED_ISA
