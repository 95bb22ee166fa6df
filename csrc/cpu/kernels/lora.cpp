// The loops of LoRA on CPU, compiled once per ISA level. No torch, no std: see simd.h for why.
//
// Every loop works on a tile of a few rows that is small enough for the first-level cache: rows are widened to the
// accumulation type and masked once, then the products of lora_products.h read them.
// bf16 has loops of its own from a few rows on, lora_bf16.h.
#include "lora.h"

#include "keep_bits.h"
#if defined(PYFUSED_ISA_AMX)
#include "lora_amx.h"
#endif
#include "lora_bf16.h"
#include "lora_products.h"
#include "mask_tile.h"
#include "pack.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Rows and columns of the widened tile: 16 and 24 KiB in fp32.
constexpr int kShrinkRows = 4;
constexpr int kShrinkColumns = 1024;
constexpr int kBackwardRows = 16;
constexpr int kBackwardColumns = 384;

// Rows a multiple of a page apart fall into the same sets of the first-level cache: where there are more of them than a
// set has ways they are copied before they are read again and again. Measured on AVX2 alone.
constexpr int64_t kPageBytes = 4096;
#if defined(__AVX512F__)
constexpr int64_t kRowsInPlace = kBackwardRows;
#else
constexpr int64_t kRowsInPlace = 8;
#endif

// The rows of a tile in the accumulation type: the data itself where nothing is to be done, else a copy in buffer,
// masked by bits where given and zero up to the next multiple of the vector width.
template <class T, int BufferColumns>
struct Widened {
  using Acc = Accumulator<T>;
  const Acc* data;
  int64_t ld;

  Widened(const T* src, int64_t ld_src, int64_t rows, int64_t columns, const uint32_t* bits, int64_t ld_bits,
          Acc* buffer) {
    if constexpr (sizeof(T) == sizeof(Acc)) {
      const bool in_place = rows <= kRowsInPlace || ld_src * static_cast<int64_t>(sizeof(T)) % kPageBytes != 0;
      if (bits == nullptr && columns % kWidth<Acc> == 0 && in_place) {
        data = src;
        ld = ld_src;
        return;
      }
    }
    for (int64_t m = 0; m < rows; ++m) {
      const T* from = src + m * ld_src;
      Acc* to = buffer + m * BufferColumns;
      const uint32_t* row_bits = bits == nullptr ? nullptr : bits + m * ld_bits;
      int64_t k = 0;
      for (; k + kWidth<Acc> <= columns; k += kWidth<Acc>) {
        Vector<Acc> v = load(from + k);
        if (row_bits != nullptr) v = select<Acc>(vector_bits<Acc>(row_bits, k), v);
        store(to + k, v);
      }
      if (k < columns) {
        Vector<Acc> v = load_first(from + k, static_cast<int>(columns - k));
        if (row_bits != nullptr) v = select<Acc>(vector_bits<Acc>(row_bits, k), v);
        store(to + k, v);
      }
    }
    data = buffer;
    ld = BufferColumns;
  }
};

// Asks for a row's elements of a block of the mask: memory answers while the mask of other elements is made.
template <class T>
PYFUSED_INLINE void prefetch_block(const T* row, int64_t block) {
  constexpr int64_t kLine = 64 / sizeof(T);
#pragma GCC unroll 16
  for (int64_t k = 0; k < philox::kBlockColumns; k += kLine) {
    __builtin_prefetch(row + block * philox::kBlockColumns + k, 0, 2);
  }
}

template <class T>
void shrink(const void* x_, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand operand,
            const Mask& mask, double factor, void* s_) {
  using Acc = Accumulator<T>;
  const T* x = static_cast<const T*>(x_);
  const Acc* a = static_cast<const Acc*>(operand.data);
  Acc* s = static_cast<Acc*>(s_);
  alignas(64) Acc buffer[kShrinkRows * kShrinkColumns];
  MaskTile<kShrinkRows, kShrinkColumns> tile_bits(mask);
  const int64_t ld_bits = tile_bits.ld;
  const bool drop = mask.dropout.threshold != 0;
  for (int64_t m = row_begin; m < row_end; m += kShrinkRows) {
    const int64_t rows = min_of(kShrinkRows, row_end - m);
    for (int64_t k = 0; k < K; k += kShrinkColumns) {
      const int64_t columns = min_of(kShrinkColumns, K - k);
      uint32_t* bits = tile_bits.at(m, k);
      if (drop) {
        const int64_t blocks = round_up(columns, philox::kBlockColumns) / philox::kBlockColumns;
        const T* next = k + columns < K ? x + m * ld_x + k + kShrinkColumns : x + (m + rows) * ld_x;
        keep_bits(mask.dropout, m, rows, k, blocks, bits, ld_bits,
                  [&](int64_t i, int64_t block) PYFUSED_INLINE_LAMBDA { prefetch_block(next + i * ld_x, block); });
      }
      const Widened<T, kShrinkColumns> tile(x + m * ld_x + k, ld_x, rows, columns, drop ? bits : nullptr, ld_bits,
                                            buffer);
      dot<Acc>(tile.data, tile.ld, rows, a + k, operand.ld, round_up(columns, kWidth<Acc>), R, s + m * R, R, k != 0);
    }
    if (factor != 1.0) {
      for (int64_t i = m * R; i < (m + rows) * R; ++i) s[i] *= static_cast<Acc>(factor);
    }
  }
}

template <class T>
void expand(const void* y_, int64_t ld_y, const void* bias_, void* out_, int64_t ld_out, int64_t row_begin,
            int64_t row_end, int64_t N, int64_t R, const void* s_, LoraOperand b) {
  using Acc = Accumulator<T>;
  // a bias is a y whose rows all are the same
  const T* y = static_cast<const T*>(y_ != nullptr ? y_ : bias_);
  if (y_ == nullptr) ld_y = 0;
  T* out = static_cast<T*>(out_);
  const Acc* s = static_cast<const Acc*>(s_);
  for (int64_t m = row_begin; m < row_end; m += kOuterRows) {
    const T* y_row = y + m * ld_y;
    T* out_row = out + m * ld_out;
    const int64_t rows = min_of(kOuterRows, row_end - m);
    outer<Acc>(s + m * R, R, 1, static_cast<const Acc*>(b.data), b.ld, rows, R, N,
               [&](int64_t i, int64_t n, Vector<Acc> delta) PYFUSED_INLINE_LAMBDA {
                 if (n + kWidth<Acc> <= N) {
                   if (y != nullptr) delta += load(y_row + i * ld_y + n);
                   store(out_row + i * ld_out + n, delta);
                 } else {
                   const int count = static_cast<int>(N - n);
                   if (y != nullptr) delta += load_first(y_row + i * ld_y + n, count);
                   store_first(out_row + i * ld_out + n, delta, count);
                 }
               });
  }
}

// c[r][n] += sum_m p[m][r] q[m][n] for the rows of one tile.
template <class Acc>
inline void add_outer(const Acc* p, int64_t ld_p, const Acc* q, int64_t ld_q, int64_t rows, int64_t R, int64_t columns,
                      Acc* c, int64_t ld_c) {
  outer<Acc>(p, 1, ld_p, q, ld_q, R, rows, columns, [&](int64_t r, int64_t n, Vector<Acc> sum) PYFUSED_INLINE_LAMBDA {
    Acc* to = c + r * ld_c + n;
    store(to, load(to) + sum);
  });
}

template <class T>
void backward_dy(const void* dy_, int64_t ld_dy, int64_t row_begin, int64_t row_end, int64_t N, int64_t R,
                 LoraOperand b, const void* s_, void* u_, void* dbt_, int64_t ld_dbt, void* dbias_) {
  using Acc = Accumulator<T>;
  const T* dy = static_cast<const T*>(dy_);
  const Acc* bt = static_cast<const Acc*>(b.data);
  const Acc* s = static_cast<const Acc*>(s_);
  Acc* u = static_cast<Acc*>(u_);
  Acc* dbt = static_cast<Acc*>(dbt_);
  Acc* dbias = static_cast<Acc*>(dbias_);
  alignas(64) Acc buffer[kBackwardRows * kBackwardColumns];
  double bias_sums[kBackwardColumns] = {};  // a plain sum over thousands of rows: fp32 would lose digits
  for (int64_t n = 0; n < N; n += kBackwardColumns) {
    const int64_t columns = min_of(kBackwardColumns, N - n);
    const int64_t padded = round_up(columns, kWidth<Acc>);
    if (dbt != nullptr) clear(dbt + n, ld_dbt, R, padded);
    for (int64_t m = row_begin; m < row_end; m += kBackwardRows) {
      const int64_t rows = min_of(kBackwardRows, row_end - m);
      const Widened<T, kBackwardColumns> wide(dy + m * ld_dy + n, ld_dy, rows, columns, nullptr, 0, buffer);
      if (u != nullptr) dot<Acc>(wide.data, wide.ld, rows, bt + n, b.ld, padded, R, u + m * R, R, n != 0);
      if (dbt != nullptr) add_outer<Acc>(s + m * R, R, wide.data, wide.ld, rows, R, padded, dbt + n, ld_dbt);
      if (dbias != nullptr) {
        for (int64_t k = 0; k < padded; k += kWidth<Acc>) {
          Vector<Acc> rows_sum{};
          for (int64_t i = 0; i < rows; ++i) rows_sum += load(wide.data + i * wide.ld + k);
          for (int i = 0; i < kWidth<Acc>; ++i) bias_sums[k + i] += rows_sum[i];
        }
      }
    }
    if (dbias != nullptr) {
      for (int64_t k = 0; k < padded; ++k) {
        dbias[n + k] = static_cast<Acc>(bias_sums[k]);
        bias_sums[k] = 0;
      }
    }
  }
}

template <class T>
PYFUSED_INLINE void pass_over_x(const void* x_, int64_t ld_x, void* dx_, int64_t ld_dx, bool accumulate_dx,
                                int64_t row_begin, int64_t row_end, int64_t K, int64_t R, LoraOperand operand,
                                const void* ds_, const Mask& mask, void* da_, int64_t ld_da) {
  using Acc = Accumulator<T>;
  const T* x = static_cast<const T*>(x_);
  T* dx = static_cast<T*>(dx_);
  const Acc* a = static_cast<const Acc*>(operand.data);
  const Acc* ds = static_cast<const Acc*>(ds_);
  Acc* da = static_cast<Acc*>(da_);
  alignas(64) Acc buffer[kBackwardRows * kBackwardColumns];
  MaskTile<kBackwardRows, kBackwardColumns> tile_bits(mask);
  const int64_t ld_bits = tile_bits.ld;
  const bool drop = mask.dropout.threshold != 0;
  for (int64_t k = 0; k < K; k += kBackwardColumns) {
    const int64_t columns = min_of(kBackwardColumns, K - k);
    const int64_t padded = round_up(columns, kWidth<Acc>);
    if (da != nullptr) clear(da + k, ld_da, R, padded);
    for (int64_t m = row_begin; m < row_end; m += kBackwardRows) {
      const int64_t rows = min_of(kBackwardRows, row_end - m);
      uint32_t* bits = tile_bits.at(m, k);
      if (drop && !mask.made) {
        const int64_t blocks = round_up(columns, philox::kBlockColumns) / philox::kBlockColumns;
        const T* next = da == nullptr        ? nullptr
                        : m + rows < row_end ? x + (m + rows) * ld_x + k
                        : k + columns < K    ? x + row_begin * ld_x + k + columns
                                             : x + row_end * ld_x;
        keep_bits(mask.dropout, m, rows, k, blocks, bits, ld_bits, [&](int64_t i, int64_t block) PYFUSED_INLINE_LAMBDA {
          if (next != nullptr) prefetch_block(next + i * ld_x, block);
        });
      }
      if (da != nullptr) {
        const Widened<T, kBackwardColumns> wide(x + m * ld_x + k, ld_x, rows, columns, drop ? bits : nullptr, ld_bits,
                                                buffer);
        add_outer<Acc>(ds + m * R, R, wide.data, wide.ld, rows, R, padded, da + k, ld_da);
      }
      if (dx != nullptr) {
        T* to = dx + m * ld_dx + k;
        outer<Acc>(ds + m * R, R, 1, a + k, operand.ld, rows, R, columns,
                   [&](int64_t i, int64_t n, Vector<Acc> delta) PYFUSED_INLINE_LAMBDA {
                     if (drop) delta = select<Acc>(vector_bits<Acc>(bits + i * ld_bits, n), delta);
                     T* at = to + i * ld_dx + n;
                     if (n + kWidth<Acc> <= columns) {
                       store(at, accumulate_dx ? load(at) + delta : delta);
                     } else {
                       const int count = static_cast<int>(columns - n);
                       store_first(at, accumulate_dx ? load_first(at, count) + delta : delta, count);
                     }
                   });
      }
    }
  }
}

template <class T>
void backward_x(const void* x, int64_t ld_x, void* dx, int64_t ld_dx, bool accumulate_dx, int64_t row_begin,
                int64_t row_end, int64_t K, int64_t R, LoraOperand a, const void* ds, const Mask& mask, void* da,
                int64_t ld_da) {
  pass_over_x<T>(x, ld_x, dx, ld_dx, accumulate_dx, row_begin, row_end, K, R, a, ds, mask, da, ld_da);
}

template <class T>
void sum_x(const void* x, int64_t ld_x, int64_t row_begin, int64_t row_end, int64_t K, int64_t R, Dtype, const void* ds,
           const Mask& mask, void* da, int64_t ld_da) {
  pass_over_x<T>(x, ld_x, nullptr, 0, false, row_begin, row_end, K, R, {}, ds, mask, da, ld_da);
}

// Whether a level may have the share of dx in a base product on vectors: as linear_vectors.cpp has them.
#if defined(__AVX512F__)
template <class T>
constexpr bool kSumsX = sizeof(T) == sizeof(float);
#else
template <class T>
constexpr bool kSumsX = sizeof(T) <= sizeof(float);
#endif

template <class T>
constexpr LoraKernels table() {
  using Acc = Accumulator<T>;
  return {true,
          false,
          packed_bytes<Acc>,
          pack_operand<Acc>,
          {unpack<float, Acc>, unpack<bf16, Acc>, unpack<fp16, Acc>, unpack<double, Acc>},
          shrink<T>,
          expand<T>,
          backward_dy<T>,
          backward_x<T>,
          kSumsX<T> ? sum_x<T> : nullptr};
}

// bf16 in pairs, but for a few rows: these cost less than an operand in the pairs' order.
constexpr int64_t kRowsAsTheyAre = 4;
constexpr LoraKernels pair_table() {
  LoraKernels kernels = table<bf16>();
  kernels.plain = false;
  kernels.pack = pack_pairs;
  kernels.shrink = shrink_pairs;
  kernels.expand = expand_bf16;
  kernels.backward_dy = backward_dy_pairs;
  kernels.backward_x = backward_x_pairs;
  if (kSumsX<bf16>) kernels.sum_x = sum_x_pairs;
  return kernels;
}

constexpr LoraKernels kTables[kDtypes] = {table<float>(), table<bf16>(), table<fp16>(), table<double>()};
constexpr LoraKernels kPairTable = pair_table();

#if defined(PYFUSED_ISA_AMX)
constexpr LoraKernels amx_table() {
  LoraKernels kernels = pair_table();
  kernels.keeps_mask = true;  // making it takes 1 to 2 % of a step of width 768
  kernels.packed_bytes = amx_packed_bytes;
  kernels.pack = amx_pack;
  kernels.shrink = amx_shrink;
  kernels.expand = amx_expand;
  kernels.backward_dy = amx_backward_dy;
  kernels.backward_x = amx_backward_x;
  kernels.sum_x = amx_sum_x;
  return kernels;
}
constexpr LoraKernels kAmxTable = amx_table();
#endif

}  // namespace

const LoraKernels& lora_kernels(Dtype dtype, int64_t rows, [[maybe_unused]] int64_t columns,
                                [[maybe_unused]] int64_t R) {
#if defined(PYFUSED_ISA_AMX)
  if (dtype == Dtype::kBFloat16 && amx_serves(rows, columns, R)) return kAmxTable;
#endif
  if (dtype == Dtype::kBFloat16 && rows > kRowsAsTheyAre) return kPairTable;
  return kTables[static_cast<int>(dtype)];
}

}  // namespace pyfused::PYFUSED_ISA
