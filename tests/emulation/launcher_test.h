// What the programs share that hold launchers against naive loops: matrices with fences, the dropout mask, comparison,
// and a run with every pair of types.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "checks.h"
#include "device_array.h"
#include "dispatch.cuh"
#include "dropout.cuh"
#include "fragments.cuh"

namespace pyfused {

inline float to_float(float value) { return value; }
inline double to_float(double value) { return value; }
inline float to_float(bf16 value) { return __bfloat162float(value); }
inline float to_float(fp16 value) { return __half2float(value); }

template <class T>
T from_double(double value) {
  if constexpr (std::is_same_v<T, double>) {
    return value;
  } else {
    return convert<T>(static_cast<float>(value));
  }
}

// A matrix with rows ld apart; what lies between them is NaN, and the memory ends with the last row's last element.
template <class T>
struct TestMatrix : DeviceArray<T> {
  int64_t rows, columns, ld;

  TestMatrix(int64_t rows, int64_t columns, int64_t ld, int seed)
      : DeviceArray<T>(static_cast<size_t>((rows - 1) * ld + columns)), rows(rows), columns(columns), ld(ld) {
    std::fill(this->host.begin(), this->host.end(), from_double<T>(std::numeric_limits<double>::quiet_NaN()));
    if (seed == 0) return;  // a result
    uint32_t state = static_cast<uint32_t>(seed) * 2654435761u;
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < columns; ++j) {
        state = state * 1664525u + 1013904223u;
        this->host[i * ld + j] = from_double<T>(static_cast<int>(state >> 24) / 128.0 - 1.0);
      }
    }
  }
  double at(int64_t i, int64_t j) const { return to_float(this->host[i * ld + j]); }
  ConstRows as_rows() { return {this->to_device(), ld}; }
};

template <class T>
struct TestVector : TestMatrix<T> {
  TestVector(int64_t size, int seed) : TestMatrix<T>(1, size, size, seed) {}
  double operator[](int64_t i) const { return this->at(0, i); }
};

// pyfused/reference/dropout.py, element by element.
inline bool keeps(uint64_t seed, uint32_t threshold, int64_t row, int64_t column) {
  const int64_t within = column % philox::kBlockColumns;
  uint32_t counter[4] = {
      static_cast<uint32_t>(column / philox::kBlockColumns * philox::kBlockCounters + within % 32 / 2),
      static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), 0};
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
  for (int round = 0; round < philox::kRounds; ++round) {
    const uint64_t first = uint64_t{philox::kMultiplier0} * counter[0];
    const uint64_t second = uint64_t{philox::kMultiplier1} * counter[2];
    const uint32_t next[4] = {static_cast<uint32_t>(second >> 32) ^ counter[1] ^ key[0], static_cast<uint32_t>(second),
                              static_cast<uint32_t>(first >> 32) ^ counter[3] ^ key[1], static_cast<uint32_t>(first)};
    std::memcpy(counter, next, sizeof next);
    key[0] += philox::kWeyl0;
    key[1] += philox::kWeyl1;
  }
  return (counter[within / 32] >> (column % 2 * 16) & 0xffffu) >= threshold;
}

// Element by element, relative to the largest value expected, or to 1.
template <class Got, class Wanted>
void compare(const std::string& what, int64_t rows, int64_t columns, double tolerance, const Got& got,
             const Wanted& wanted) {
  double worst = 0, largest = 1;
  bool number = true;
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; ++j) {
      const double value = got(i, j), expected = wanted(i, j);
      number = number && !std::isnan(value);
      worst = std::fmax(worst, std::abs(value - expected));
      largest = std::fmax(largest, std::abs(expected));
    }
  }
  check(number && worst <= tolerance * largest, what);
}

// Test<data, adapter>(name, types, shape).run()
template <template <class, class> class Test, class Shape>
void run_with_types(const char* name, Dtype data, Dtype adapter, const Shape& shape) {
  const KernelTypes types{data, adapter, false};
  with_types(types, [&](auto of) {
    Test<typename decltype(of)::Data, typename decltype(of)::Adapter>(name, types, shape).run();
  });
}

// With each pair of types that the kernels have.
template <template <class, class> class Test, class Shape>
void run_with_all_types(const Shape& shape) {
  run_with_types<Test>("bf16", Dtype::kBFloat16, Dtype::kBFloat16, shape);
  run_with_types<Test>("bf16+fp32", Dtype::kBFloat16, Dtype::kFloat32, shape);
  run_with_types<Test>("fp32", Dtype::kFloat32, Dtype::kFloat32, shape);
  run_with_types<Test>("fp64", Dtype::kFloat64, Dtype::kFloat64, shape);
  if constexpr (kHasFp16) {
    run_with_types<Test>("fp16", Dtype::kFloat16, Dtype::kFloat16, shape);
    run_with_types<Test>("fp16+fp32", Dtype::kFloat16, Dtype::kFloat32, shape);
  }
}

}  // namespace pyfused
