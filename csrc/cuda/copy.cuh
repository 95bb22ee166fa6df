// Neighbouring elements between registers and memory, and tiles into shared memory, 16 bytes at a time where addresses
// allow it.
#pragma once

#include <cstdint>

#include "fragments.cuh"

namespace pyfused {

inline constexpr int kSharedLimit = 99 * 1024;  // what a block may have on every GPU from sm_80 on
inline constexpr int kPadding = 8;  // elements after a row of shared memory: fragments load without conflicts

// N neighbouring elements, as far as they are among the first `valid`; else zeros, and nothing is read. `aligned`: they
// may be read 16 bytes at a time.
template <int N, class T, class S>
__device__ __forceinline__ void load_run(S (&values)[N], const T* from, int64_t valid, bool aligned) {
  static_assert(N * sizeof(T) % 16 == 0);
  if (aligned && valid >= N) {
    alignas(16) T buffer[N];
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(buffer) / 16); ++i) {
      reinterpret_cast<uint4*>(buffer)[i] = reinterpret_cast<const uint4*>(from)[i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = convert<S>(buffer[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) values[i] = i < valid ? convert<S>(from[i]) : S(0);
  }
}
template <int N, class T, class S>
__device__ __forceinline__ void store_run(const S (&values)[N], T* to, int64_t valid, bool aligned) {
  static_assert(N * sizeof(T) % 16 == 0);
  if (aligned && valid >= N) {
    alignas(16) T buffer[N];
#pragma unroll
    for (int i = 0; i < N; ++i) buffer[i] = convert<T>(values[i]);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(buffer) / 16); ++i) {
      reinterpret_cast<uint4*>(to)[i] = reinterpret_cast<const uint4*>(buffer)[i];
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < valid) to[i] = convert<T>(values[i]);
    }
  }
}

struct SameRow {
  __device__ __forceinline__ int operator()(int row) const { return row; }
};

// Copies rows x columns elements to shared memory, rows stride_to elements apart, asynchronously where `aligned` says
// that the source allows 16-byte copies; whatever lies outside valid_rows x valid_columns becomes zero. Row i is the
// source's row of(i) and goes to slot(i).
template <int threads, class T, class Slot = SameRow, class Of = SameRow>
__device__ __forceinline__ void copy_tile(T* to, int stride_to, const T* from, int64_t ld, int rows, int columns,
                                          int64_t valid_rows, int64_t valid_columns, bool aligned, int thread,
                                          const Slot& slot = {}, const Of& of = {}) {
  if (aligned) {
    constexpr int kPer = 16 / sizeof(T);
    const int per_row = columns / kPer;
#pragma unroll 4
    for (int i = thread; i < rows * per_row; i += threads) {
      const int row = i / per_row, column = i % per_row * kPer;
      int64_t valid = row < valid_rows ? valid_columns - column : 0;
      valid = valid < 0 ? 0 : valid > kPer ? kPer : valid;
      const T* source = valid > 0 ? from + of(row) * ld + column : from;
      cp_async_16(to + slot(row) * stride_to + column, source, static_cast<int>(valid * sizeof(T)));
    }
  } else {
#pragma unroll 4
    for (int i = thread; i < rows * columns; i += threads) {
      const int row = i / columns, column = i % columns;
      const bool valid = row < valid_rows && column < valid_columns;
      to[slot(row) * stride_to + column] = valid ? from[of(row) * ld + column] : convert<T>(0.0f);
    }
  }
}

// How many stages of so many bytes shared memory has room for, from 1 to `most`.
constexpr int stages_that_fit(int bytes, int stage_bytes, int most) {
  const int fit = bytes / stage_bytes;
  return fit < 1 ? 1 : fit > most ? most : fit;
}

inline constexpr int kMostStages = 4;

// work(stage, step) for all steps, each after load(stage, step) has copied what it reads, asynchronously and as many
// steps ahead as there are stages, up to kMostStages. Between two steps the block waits for all of its threads, after
// the last one it does not.
template <class Load, class Work>
__device__ __forceinline__ void for_each_step(int stages, int steps, const Load& load, const Work& work) {
#pragma unroll
  for (int step = 0; step < kMostStages - 1; ++step) {
    if (step >= stages - 1) break;
    if (step < steps) load(step, step);
    cp_async_commit();
  }
  for (int step = 0; step < steps; ++step) {
    if (stages == 1) {
      __syncthreads();
      load(0, step);
      cp_async_commit();
    }
    if (stages >= 4) {
      cp_async_wait<2>();
    } else if (stages == 3) {
      cp_async_wait<1>();
    } else {
      cp_async_wait<0>();
    }
    __syncthreads();  // the stage has arrived for all, and all are done with the one that is filled next
    if (stages > 1) {
      const int next = step + stages - 1;
      if (next < steps) load(next % stages, next);
      cp_async_commit();
    }
    work(step % stages, step);
  }
  cp_async_wait<0>();
}

}  // namespace pyfused
