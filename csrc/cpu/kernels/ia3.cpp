// The loops of IA3 on CPU, compiled once per ISA level. No torch, no std: see simd.h for why.
//
// They do one multiplication per element, so what counts is that each element is read once, and along its row.
#include "ia3.h"

#include "pack.h"
#include "vector_loops.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Columns whose sums over rows stay in the first-level cache, and rows that share one read and write of these sums.
constexpr int kSumColumns = 512;
constexpr int kGroupRows = 4;
// A plain sum over thousands of rows or columns would lose digits in fp32: after this many it goes on in fp64.
constexpr int64_t kSumRows = 64;
constexpr int64_t kSumRun = 2048;

template <class T>
void scale_columns(const void* src_, int64_t ld_src, void* dst_, int64_t ld_dst, int64_t row_begin, int64_t row_end,
                   int64_t columns, const void* scale_, const void* shift_) {
  using Acc = Accumulator<T>;
  const T* src = static_cast<const T*>(src_);
  T* dst = static_cast<T*>(dst_);
  const Acc* scale = static_cast<const Acc*>(scale_);
  const Acc* shift = shift_ == nullptr ? nullptr : static_cast<const Acc*>(shift_);
  for (int64_t m = row_begin; m < row_end; ++m) {
    const T* from = src + m * ld_src;
    T* to = dst + m * ld_dst;
    for_vectors<Acc>(0, columns, [&](int64_t n, int count) {
      Vector<Acc> value = load_some<Acc>(from + n, count);
      if (shift != nullptr) value += load(shift + n);
      store_some<Acc>(to + n, value * load(scale + n), count);
    });
  }
}

// sums[n] += sum_i dy[i][n] (z[i][n] + shift[n]) and dst[i][n] = dy[i][n] scale[n] for a few rows.
template <class T, bool kStore, bool kSum, int Rows>
inline void backward_rows(const T* dy, int64_t ld_dy, const T* z, int64_t ld_z, T* dst, int64_t ld_dst,
                          const Accumulator<T>* scale, const Accumulator<T>* shift, int64_t columns,
                          Accumulator<T>* sums) {
  using Acc = Accumulator<T>;
  for_vectors<Acc>(0, columns, [&](int64_t n, int count) {
    Vector<Acc> factor{}, sum{}, added{};
    if constexpr (kStore) factor = load(scale + n);
    if constexpr (kSum) {
      sum = load(sums + n);
      if (shift != nullptr) added = load(shift + n);
    }
#pragma GCC unroll 4
    for (int i = 0; i < Rows; ++i) {
      const Vector<Acc> gradient = load_some<Acc>(dy + i * ld_dy + n, count);
      if constexpr (kSum) sum += gradient * (load_some<Acc>(z + i * ld_z + n, count) + added);
      if constexpr (kStore) store_some<Acc>(dst + i * ld_dst + n, gradient * factor, count);
    }
    if constexpr (kSum) store(sums + n, sum);
  });
}

template <class T, bool kStore, bool kSum>
void backward_range(const T* dy, int64_t ld_dy, const T* z, int64_t ld_z, T* dst, int64_t ld_dst, int64_t row_begin,
                    int64_t row_end, int64_t columns, const Accumulator<T>* scale, const Accumulator<T>* shift,
                    Accumulator<T>* dscale) {
  using Acc = Accumulator<T>;
  alignas(64) Acc sums[kSumColumns];
  double totals[kSumColumns];
  for (int64_t n = 0; n < columns; n += kSumColumns) {
    const int64_t width = min_of(kSumColumns, columns - n);
    if constexpr (kSum) memset(totals, 0, sizeof totals);
    for (int64_t first = row_begin; first < row_end; first += kSumRows) {
      const int64_t last = min_of(first + kSumRows, row_end);
      if constexpr (kSum) memset(sums, 0, sizeof sums);
      int64_t m = first;
      const auto rows = [&]<int Rows>() {
        backward_rows<T, kStore, kSum, Rows>(
            dy + m * ld_dy + n, ld_dy, kSum ? z + m * ld_z + n : nullptr, ld_z, kStore ? dst + m * ld_dst + n : nullptr,
            ld_dst, kStore ? scale + n : nullptr, shift == nullptr ? nullptr : shift + n, width, sums);
        m += Rows;
      };
      while (m + kGroupRows <= last) rows.template operator()<kGroupRows>();
      while (m < last) rows.template operator()<1>();
      if constexpr (kSum) {
        for (int64_t i = 0; i < width; ++i) totals[i] += static_cast<double>(sums[i]);
      }
    }
    if constexpr (kSum) {
      for (int64_t i = 0; i < width; ++i) dscale[n + i] = static_cast<Acc>(totals[i]);
    }
  }
}

template <class T>
void scale_columns_backward(const void* dy_, int64_t ld_dy, const void* z_, int64_t ld_z, void* dst_, int64_t ld_dst,
                            int64_t row_begin, int64_t row_end, int64_t columns, const void* scale_, const void* shift_,
                            void* dscale_) {
  using Acc = Accumulator<T>;
  const T* dy = static_cast<const T*>(dy_);
  const T* z = static_cast<const T*>(z_);
  T* dst = static_cast<T*>(dst_);
  const Acc* scale = static_cast<const Acc*>(scale_);
  const Acc* shift = static_cast<const Acc*>(shift_);
  Acc* dscale = static_cast<Acc*>(dscale_);
  if (dst != nullptr && dscale != nullptr) {
    backward_range<T, true, true>(dy, ld_dy, z, ld_z, dst, ld_dst, row_begin, row_end, columns, scale, shift, dscale);
  } else if (dscale != nullptr) {
    backward_range<T, false, true>(dy, ld_dy, z, ld_z, dst, ld_dst, row_begin, row_end, columns, scale, shift, dscale);
  } else if (dst != nullptr) {
    backward_range<T, true, false>(dy, ld_dy, z, ld_z, dst, ld_dst, row_begin, row_end, columns, scale, shift, dscale);
  }
}

template <class T>
void scale_rows(const void* src_, void* dst_, int64_t row_begin, int64_t row_end, int64_t columns, int64_t period,
                const void* scale_) {
  using Acc = Accumulator<T>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* src = static_cast<const T*>(src_) + r * columns;
    T* dst = static_cast<T*>(dst_) + r * columns;
    const Vector<Acc> factor = splat(static_cast<const Acc*>(scale_)[r % period]);
    for_vectors<Acc>(0, columns, [&](int64_t n, int count) {
      store_some<Acc>(dst + n, load_some<Acc>(src + n, count) * factor, count);
    });
  }
}

template <class T>
void scale_rows_backward(const void* dy_, const void* z_, void* dst_, int64_t row_begin, int64_t row_end,
                         int64_t columns, int64_t period, const void* scale_, void* dots_) {
  using Acc = Accumulator<T>;
  for (int64_t r = row_begin; r < row_end; ++r) {
    const T* dy = static_cast<const T*>(dy_) + r * columns;
    const T* z = dots_ == nullptr ? nullptr : static_cast<const T*>(z_) + r * columns;
    T* dst = dst_ == nullptr ? nullptr : static_cast<T*>(dst_) + r * columns;
    const Vector<Acc> factor = splat(static_cast<const Acc*>(scale_)[r % period]);
    double total = 0;
    for (int64_t first = 0; first < columns; first += kSumRun) {
      Vector<Acc> sum{};
      for_vectors<Acc>(0, min_of(kSumRun, columns - first), [&](int64_t n, int count) {
        const Vector<Acc> gradient = load_some<Acc>(dy + first + n, count);
        if (z != nullptr) sum += gradient * load_some<Acc>(z + first + n, count);
        if (dst != nullptr) store_some<Acc>(dst + first + n, gradient * factor, count);
      });
      total += static_cast<double>(sum_lanes(sum));
    }
    if (dots_ != nullptr) static_cast<Acc*>(dots_)[r] = static_cast<Acc>(total);
  }
}

template <class T>
constexpr Ia3Kernels table() {
  using Acc = Accumulator<T>;
  return {{pack<float, Acc>, pack<bf16, Acc>, pack<fp16, Acc>, pack<double, Acc>},
          {unpack<float, Acc>, unpack<bf16, Acc>, unpack<fp16, Acc>, unpack<double, Acc>},
          scale_columns<T>,
          scale_columns_backward<T>,
          scale_rows<T>,
          scale_rows_backward<T>};
}

constexpr Ia3Kernels kTables[kDtypes] = {table<float>(), table<bf16>(), table<fp16>(), table<double>()};

}  // namespace

const Ia3Kernels& ia3_kernels(Dtype dtype) { return kTables[static_cast<int>(dtype)]; }

}  // namespace pyfused::PYFUSED_ISA
