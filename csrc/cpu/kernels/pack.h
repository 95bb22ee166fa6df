// Small operands on their way into the loops and back: widened and padded, summed and rounded.
#pragma once

#include "lora.h"
#include "simd.h"
#include "tile.h"

namespace pyfused::PYFUSED_ISA {

// rows[i][j] becomes rows[j][i], for four numbers in each of four rows.
template <class Four>
inline void transpose_four(Four (&rows)[4]) {
  const Four low01 = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Four low23 = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Four high01 = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Four high23 = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

// dst[i][j] = src[i + j * column_stride] for a block of 4 x 4 fp32 results.
template <class T>
inline void pack_transposed_block(const T* src, int64_t column_stride, float* dst, int64_t ld_dst) {
  typedef float Vector4 __attribute__((vector_size(16)));
  Vector4 rows[4];
  for (int j = 0; j < 4; ++j) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = load_one(src + j * column_stride + i);
    memcpy(&rows[j], values, sizeof values);
  }
  transpose_four(rows);
  for (int i = 0; i < 4; ++i) memcpy(dst + i * ld_dst, &rows[i], sizeof(Vector4));
}

template <class T, class Acc>
void pack(const void* src_, int64_t row_stride, int64_t column_stride, int64_t rows, int64_t columns, void* dst_,
          int64_t ld_dst) {
  const T* src = static_cast<const T*>(src_);
  Acc* dst = static_cast<Acc*>(dst_);
  int64_t first_row = 0, whole_columns = 0;
  if constexpr (sizeof(Acc) == 4) {
    if (row_stride == 1 && column_stride != 1) {  // an [N, R] matrix that becomes [R, N]
      whole_columns = columns / 4 * 4;
      for (; first_row + 4 <= rows; first_row += 4) {
        for (int64_t j = 0; j < whole_columns; j += 4) {
          pack_transposed_block(src + first_row + j * column_stride, column_stride, dst + first_row * ld_dst + j,
                                ld_dst);
        }
      }
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const T* from = src + i * row_stride;
    Acc* to = dst + i * ld_dst;
    int64_t j = i < first_row ? whole_columns : 0;
    if (column_stride == 1) {
      for (; j < columns; ++j) to[j] = static_cast<Acc>(load_one(from + j));
    } else {
      for (; j < columns; ++j) to[j] = static_cast<Acc>(load_one(from + j * column_stride));
    }
    for (; j < ld_dst; ++j) to[j] = 0;
  }
}

template <class Acc>
int64_t packed_bytes(SumOver, Dtype, int64_t R, int64_t L) {
  return R * round_up(L, kPackedColumns) * static_cast<int64_t>(sizeof(Acc));
}

template <class Acc>
LoraOperand pack_operand(SumOver, Dtype source, const void* src, int64_t rank_stride, int64_t column_stride, int64_t R,
                         int64_t L, void* dst) {
  constexpr void (*kPack[kDtypes])(const void*, int64_t, int64_t, int64_t, int64_t, void*, int64_t) = {
      pack<float, Acc>, pack<bf16, Acc>, pack<fp16, Acc>, pack<double, Acc>};
  const int64_t ld = round_up(L, kPackedColumns);
  kPack[static_cast<int>(source)](src, rank_stride, column_stride, R, L, dst, ld);
  return {dst, ld, source};
}

template <int Bytes>
struct UintOf;
template <>
struct UintOf<2> {
  using type = uint16_t;
};
template <>
struct UintOf<4> {
  using type = uint32_t;
};
template <>
struct UintOf<8> {
  using type = uint64_t;
};

// to[j] = factor * sum_p parts[p][j], rounded; parts are part_stride apart.
template <class T, class Acc>
inline void add_up(const Acc* parts, int64_t part_count, int64_t part_stride, int64_t columns, Acc factor, T* to) {
  int64_t j = 0;
  if constexpr (sizeof(Accumulator<T>) == sizeof(Acc)) {
    for (; j + kWidth<Acc> <= columns; j += kWidth<Acc>) {
      Vector<Acc> sum = load(parts + j);
      for (int64_t p = 1; p < part_count; ++p) sum += load(parts + p * part_stride + j);
      store(to + j, sum * factor);
    }
  }
  for (; j < columns; ++j) {
    Acc sum = parts[j];
    for (int64_t p = 1; p < part_count; ++p) sum += parts[p * part_stride + j];
    store_one(to + j, sum * factor);
  }
}

template <class T, class Acc>
void unpack(const void* parts_, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows, int64_t column_begin,
            int64_t column_end, const double* scale, void* dst_, int64_t row_stride, int64_t column_stride) {
  const Acc* parts = static_cast<const Acc*>(parts_);
  T* dst = static_cast<T*>(dst_);
  typedef typename UintOf<sizeof(T)>::type Four __attribute__((vector_size(4 * sizeof(T))));
  T sums[4][kPackedColumns];
  for (int64_t block = column_begin; block < column_end; block += kPackedColumns) {
    const int64_t columns = min_of(kPackedColumns, column_end - block);
    for (int64_t first = 0, count; first < rows; first += count) {
      count = min_of(rows - first, 4);
      T* to = dst + first * row_stride + block * column_stride;
      for (int64_t i = 0; i < count; ++i) {
        const Acc factor = scale == nullptr ? Acc{1} : static_cast<Acc>(scale[first + i]);
        add_up(parts + (first + i) * ld + block, part_count, part_stride, columns, factor,
               column_stride == 1 ? to + i * row_stride : sums[i]);
      }
      if (column_stride == 1) continue;
      int64_t j = 0;
      if (row_stride == 1 && count == 4) {  // an [R, N] matrix that becomes [N, R]
        for (; j + 4 <= columns; j += 4) {
          Four numbers[4];
          for (int i = 0; i < 4; ++i) memcpy(&numbers[i], &sums[i][j], sizeof(Four));
          transpose_four(numbers);
          for (int i = 0; i < 4; ++i) memcpy(to + (j + i) * column_stride, &numbers[i], sizeof(Four));
        }
      }
      for (; j < columns; ++j) {
        for (int64_t i = 0; i < count; ++i) to[i * row_stride + j * column_stride] = sums[i][j];
      }
    }
  }
}

}  // namespace pyfused::PYFUSED_ISA
