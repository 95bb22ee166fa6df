// The passes of the bottleneck on CPU around its products, compiled once per ISA level. No torch, no std: see simd.h.
#include "bottleneck.h"

#include "activations.h"
#include "bottleneck_products.h"
#include "keep_bits.h"
#include "pack.h"
#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Columns and rows whose keep bits are made at a time, and rows that are summed in Acc before the sum goes on in fp64.
constexpr int64_t kBitColumns = 1024;
constexpr int64_t kBitRows = 8;
constexpr int64_t kSumRows = 16;

// Blocks of keep bits that cover columns from a block's first.
inline int64_t bit_blocks(int64_t columns) { return round_up(columns, philox::kBlockColumns) / philox::kBlockColumns; }

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
                 int64_t first_row, int64_t first_column, int64_t rows, int64_t D, const Accumulator<T>* scale,
                 const Accumulator<T>* bias, Dropout dropout) {
  using Acc = Accumulator<T>;
  constexpr int64_t kWords = kBitColumns / 32;
  uint32_t bits[kBitRows * kWords];
  for (int64_t m = 0; m < rows; m += kBitRows) {
    const int64_t last = min_of(m + kBitRows, rows);
    for (int64_t begin = 0; begin < D; begin += kBitColumns) {
      const int64_t end = min_of(begin + kBitColumns, D);
      if constexpr (Drop) {
        keep_bits(dropout, first_row + m, last - m, first_column + begin, bit_blocks(end - begin), bits, kWords);
      }
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
            int64_t first_row, int64_t first_column, int64_t rows, int64_t D, const void* scale_, const void* bias_,
            Dropout dropout) {
  using Acc = Accumulator<T>;
  const U* u = static_cast<const U*>(u_);
  const T* residual = static_cast<const T*>(residual_);
  T* out = static_cast<T*>(out_);
  const Acc* scale = static_cast<const Acc*>(scale_);
  const Acc* bias = static_cast<const Acc*>(bias_);
  const bool drop = dropout.threshold != 0;
  const auto run = residual != nullptr ? (drop ? finish_rows<T, U, true, true> : finish_rows<T, U, true, false>)
                                       : (drop ? finish_rows<T, U, false, true> : finish_rows<T, U, false, false>);
  run(u, ld_u, residual, ld_residual, out, ld_out, first_row, first_column, rows, D, scale, bias, dropout);
}

void make_keep_bits(Dropout dropout, int64_t first_row, int64_t rows, int64_t D, uint32_t* bits, int64_t ld) {
  keep_bits(dropout, first_row, rows, 0, bit_blocks(D), bits, ld);
}

template <class T, bool Drop>
void mask_rows(const T* dy, int64_t ld_dy, int64_t rows, int64_t D, const uint32_t* bits, int64_t ld_bits, T* g,
               int64_t ld_g, double* sums) {
  using Acc = Accumulator<T>;
  for (int64_t m = 0; m < rows; m += kSumRows) {
    const int64_t last = min_of(m + kSumRows, rows);
    for_vectors<Acc>(0, D, [&](int64_t d, int count) __attribute__((always_inline)) {
      Vector<Acc> sum{};
      for (int64_t i = m; i < last; ++i) {
        Vector<Acc> v = load_some<Acc>(dy + i * ld_dy + d, count);
        if constexpr (Drop) v = select<Acc>(vector_bits<Acc>(bits + i * ld_bits, d), v);
        if (g != nullptr) store_some<Acc>(g + i * ld_g + d, v, count);
        sum += v;
      }
      if (sums != nullptr) add_lanes<Acc>(sums + d, sum, count);
    });
  }
}

template <class T>
void mask(const void* dy_, int64_t ld_dy, int64_t rows, int64_t D, const uint32_t* bits, int64_t ld_bits, void* g_,
          int64_t ld_g, double* sums) {
  const T* dy = static_cast<const T*>(dy_);
  T* g = static_cast<T*>(g_);
  const auto run = bits != nullptr ? mask_rows<T, true> : mask_rows<T, false>;
  run(dy, ld_dy, rows, D, bits, ld_bits, g, ld_g, sums);
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
          make_keep_bits,
          mask<T>,
          pack_few_rows_of<T>(),
          {few_rows_of<T, float>(), few_rows_of<T, bf16>(), few_rows_of<T, fp16>(), few_rows_of<T, double>()}};
}

constexpr BottleneckKernels kTables[kDtypes] = {table<float>(), table<bf16>(), table<fp16>(), table<double>()};

}  // namespace

const BottleneckKernels& bottleneck_kernels(Dtype dtype) { return kTables[static_cast<int>(dtype)]; }

}  // namespace pyfused::PYFUSED_ISA
