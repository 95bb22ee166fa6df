// One counter-based random generator for every device: Philox-4x32 with 7 rounds (Salmon, Moraes, Dror, Shaw 2011).
// pyfused/reference/dropout.py states which 16 bits belong to which element of a matrix and why.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define PYFUSED_HOST_DEVICE __host__ __device__
#else
#define PYFUSED_HOST_DEVICE
#endif

namespace pyfused {

// What a kernel needs to know of dropout. threshold of 65536 values drop an element; 0 means that dropout is off.
struct Dropout {
  uint64_t seed;
  uint32_t threshold;
};

namespace philox {

constexpr int kRounds = 7;
constexpr uint32_t kMultiplier0 = 0xD2511F53u;
constexpr uint32_t kMultiplier1 = 0xCD9E8D57u;
constexpr uint32_t kWeyl0 = 0x9E3779B9u;
constexpr uint32_t kWeyl1 = 0xBB67AE85u;

// Columns that share one group of counters; each of its 16 counters gives 4 words of 32 bits, each word two columns.
constexpr int kBlockColumns = 128;
constexpr int kBlockCounters = 16;

}  // namespace philox

inline PYFUSED_HOST_DEVICE uint32_t drop_threshold(double p) {
  if (p <= 0.0) return 0;
  const double rounded = p * 65536.0 + 0.5;
  if (rounded < 1.0) return 1;
  return rounded >= 65535.0 ? 65535u : static_cast<uint32_t>(rounded);
}

inline PYFUSED_HOST_DEVICE double keep_scale(uint32_t threshold) {
  return 65536.0 / (65536.0 - static_cast<double>(threshold));
}

}  // namespace pyfused
