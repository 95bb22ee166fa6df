// What the tests of intrinsics share: random lanes, and how results are compared.
#pragma once

#include <cstdint>
#include <cstring>
#include <iterator>
#include <random>

#include "../checks.h"
#include "cpu/kernels/amx.h"
#include "cpu/kernels/simd.h"

namespace pyfused::PYFUSED_ISA {

// numbers_test.cpp: conversions, arithmetic and tiles.
void test_numbers();

constexpr int kRounds = 2000;

template <class T, int Count>
struct Lanes {
  T lane[Count];
  T& operator[](int i) { return lane[i]; }
  T operator[](int i) const { return lane[i]; }
};
using U16 = Lanes<uint16_t, 32>;
using U32 = Lanes<uint32_t, 16>;
using U64 = Lanes<uint64_t, 8>;
using F32 = Lanes<float, 16>;
using F64 = Lanes<double, 8>;

template <class To, class From>
To as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

inline std::mt19937_64 generator(1);
inline uint32_t word() { return static_cast<uint32_t>(generator()); }

// Random bits, and every fourth time a number at which rounding, subnormal numbers, infinity or NaN begin.
inline uint32_t float_bits() {
  static const uint32_t special[] = {0x00000000, 0x80000000, 0x00000001, 0x807fffff, 0x00800000, 0x80800001,
                                     0x3f800000, 0x3f808000, 0x3f818000, 0x3f807fff, 0x3f808001, 0x7f7fffff,
                                     0xff7f8000, 0x7f7f7fff, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc12345,
                                     0x7f800001, 0x007f0000, 0x00010000};
  return word() % 4 == 0 ? special[word() % std::size(special)] : word();
}

struct Random {
  U32 a, b, c;
  uint32_t mask;

  template <class Draw>
  explicit Random(const Draw& draw) : mask(word()) {
    for (int i = 0; i < 16; ++i) {
      a[i] = draw();
      b[i] = draw();
      c[i] = draw();
    }
    if (word() % 8 == 0) mask = 0;
    if (word() % 8 == 0) mask = ~0u;
  }
  template <class V>
  V va() const {
    return as<V>(a);
  }
  template <class V>
  V vb() const {
    return as<V>(b);
  }
  template <class V>
  V vc() const {
    return as<V>(c);
  }
};

template <class Expected, class Got>
bool same(const Expected& expected, const Got& got) {
  return memcmp(&expected, &got, sizeof expected) == 0 && sizeof(Expected) == sizeof(Got);
}

// holds(random) for many of them.
template <class Holds>
void check_many(const char* name, const Holds& holds) {
  bool all = true;
  for (int round = 0; round < kRounds; ++round) all = all && holds(Random(round % 2 ? float_bits : word));
  check(all, name);
}

template <class T, int Count, class Make>
Lanes<T, Count> lanes(const Make& make) {
  Lanes<T, Count> result;
  for (int i = 0; i < Count; ++i) result[i] = static_cast<T>(make(i));
  return result;
}

}  // namespace pyfused::PYFUSED_ISA
