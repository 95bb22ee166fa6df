// What multi_lora's kernels share: the index as it comes, and an adapter's matrices as they are in memory.
#pragma once

#include "dispatch.cuh"
#include "multi_lora.h"

namespace pyfused {

template <class T>
inline constexpr Dtype dtype_v = std::is_same_v<T, double> ? Dtype::kFloat64
                                 : std::is_same_v<T, bf16> ? Dtype::kBFloat16
                                 : std::is_same_v<T, fp16> ? Dtype::kFloat16
                                                           : Dtype::kFloat32;

// a, or b transposed: element (rank, column) is data[rank * rank_stride + column * column_stride].
struct Factor {
  const void* data;
  Dtype type;
  int64_t rank_stride, column_stride;

  __device__ __forceinline__ Factor(const MultiAdapter& adapter, bool of_b)
      : data(of_b ? adapter.b : adapter.a),
        type(of_b ? adapter.type_b : adapter.type_a),
        rank_stride(of_b ? 1 : adapter.ld_a),
        column_stride(of_b ? adapter.ld_b : 1) {}

  // run(rank, column, value) for all of ranks x columns from (first_rank, first_column) on, among the threads in the
  // order of memory; value is zero beyond valid_ranks and valid_columns. TC: the type it most likely has.
  template <int threads, class T, class TC, class F>
  __device__ __forceinline__ void for_each(int64_t first_rank, int64_t first_column, int ranks, int columns,
                                           int64_t valid_ranks, int64_t valid_columns, int thread, const F& run) const {
    const bool by_rank = rank_stride == 1;
    const auto all = [&](const auto& element) {
      for (int i = thread; i < ranks * columns; i += threads) {
        const int r = by_rank ? i % ranks : i / columns;
        const int c = by_rank ? i / ranks : i % columns;
        const bool valid = r < valid_ranks && c < valid_columns;
        const int64_t at = (first_rank + r) * rank_stride + (first_column + c) * column_stride;
        run(r, c, valid ? element(at) : convert<T>(0.0f));
      }
    };
    if (is_16bit<TC> || type == dtype_v<TC>) {
      all([&](int64_t at) { return convert<T>(static_cast<const TC*>(data)[at]); });
    } else {
      all([&](int64_t at) { return load_as<T>(data, type, at); });
    }
  }
};

__device__ __forceinline__ int64_t integer(const void* data, bool wide, int64_t i) {
  return wide ? static_cast<const int64_t*>(data)[i] : static_cast<const int*>(data)[i];
}

struct Entry {
  int64_t id, begin, end;
};

// Entry i, one of no rows where i is beyond the last.
__device__ __forceinline__ Entry entry_at(const MultiLoraIndex& p, int64_t i) {
  if (i >= p.entries) return {-1, 0, 0};
  const int64_t id = integer(p.index, p.wide_index, i), length = p.m / p.entries;
  if (p.segments == nullptr) return {id, i * length, (i + 1) * length};
  return {id, integer(p.segments, p.wide_segments, i), integer(p.segments, p.wide_segments, i + 1)};
}

__device__ __forceinline__ void check(const MultiLoraIndex& p, int64_t i, const Entry& entry) {
  PF_REQUIRE(entry.id >= -1 && entry.id < p.adapters, "multi_lora: index must be from -1 to the table's last adapter");
  PF_REQUIRE(entry.begin >= 0 && entry.begin <= entry.end && entry.end <= p.m && (i > 0 || entry.begin == 0) &&
                 (i != p.entries - 1 || entry.end == p.m),
             "multi_lora: segments must ascend from 0 to the number of rows");
}

}  // namespace pyfused
