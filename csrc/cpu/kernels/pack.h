// Small operands on their way into the loops and back: widened and padded, summed and rounded.
#pragma once

#include "lora.h"
#include "simd.h"
#include "tile.h"

namespace pyfused::PYFUSED_ISA {

// dst[i][j] = src[i + j * column_stride] for a block of 4 x 4 fp32 results.
template <class T>
inline void pack_transposed_block(const T* src, int64_t column_stride, float* dst, int64_t ld_dst) {
  typedef float Vector4 __attribute__((vector_size(16)));
  Vector4 column[4];
  for (int j = 0; j < 4; ++j) {
    float values[4];
    for (int i = 0; i < 4; ++i) values[i] = load_one(src + j * column_stride + i);
    memcpy(&column[j], values, sizeof values);
  }
  const Vector4 low01 = __builtin_shufflevector(column[0], column[1], 0, 4, 1, 5);
  const Vector4 low23 = __builtin_shufflevector(column[2], column[3], 0, 4, 1, 5);
  const Vector4 high01 = __builtin_shufflevector(column[0], column[1], 2, 6, 3, 7);
  const Vector4 high23 = __builtin_shufflevector(column[2], column[3], 2, 6, 3, 7);
  const Vector4 rows[4] = {
      __builtin_shufflevector(low01, low23, 0, 1, 4, 5), __builtin_shufflevector(low01, low23, 2, 3, 6, 7),
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5), __builtin_shufflevector(high01, high23, 2, 3, 6, 7)};
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

template <class T, class Acc>
void unpack(const void* parts_, int64_t part_count, int64_t part_stride, int64_t ld, int64_t rows, int64_t column_begin,
            int64_t column_end, const double* scale, void* dst_, int64_t row_stride, int64_t column_stride) {
  const Acc* parts = static_cast<const Acc*>(parts_);
  T* dst = static_cast<T*>(dst_);
  Acc sums[kPackedColumns];
  for (int64_t block = column_begin; block < column_end; block += kPackedColumns) {
    const int64_t columns = min_of(kPackedColumns, column_end - block);
    for (int64_t i = 0; i < rows; ++i) {
      const Acc* from = parts + i * ld + block;
      memcpy(sums, from, static_cast<size_t>(columns) * sizeof(Acc));
      for (int64_t p = 1; p < part_count; ++p) {
        for (int64_t j = 0; j < columns; ++j) sums[j] += from[p * part_stride + j];
      }
      if (scale != nullptr) {
        for (int64_t j = 0; j < columns; ++j) sums[j] *= static_cast<Acc>(scale[i]);
      }
      T* to = dst + i * row_stride + block * column_stride;
      for (int64_t j = 0; j < columns; ++j) store_one(to + j * column_stride, sums[j]);
    }
  }
}

}  // namespace pyfused::PYFUSED_ISA
