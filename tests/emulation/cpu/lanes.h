// Vectors of 64 bytes as halves and as arrays, masks as vectors, bf16: what the intrinsics in avx512.h are made of.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

#define PF_INLINE inline __attribute__((always_inline))

namespace pyfused::PYFUSED_ISA::emulated {

// ---- a vector as two halves and as an array -------------------------------------------------------------------------

constexpr int32_t kUndefined = static_cast<int32_t>(0xdeadbeef);

template <class To, class From>
PF_INLINE To cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

struct Halves {
  __m256i low, high;
};
PF_INLINE Halves halves(__m512i v) { return cast<Halves>(v); }
PF_INLINE __m512i join(__m256i low, __m256i high) { return cast<__m512i>(Halves{low, high}); }

struct FloatHalves {
  __m256 low, high;
};
PF_INLINE FloatHalves halves(__m512 v) { return cast<FloatHalves>(v); }
PF_INLINE __m512 join(__m256 low, __m256 high) { return cast<__m512>(FloatHalves{low, high}); }

struct DoubleHalves {
  __m256d low, high;
};
PF_INLINE DoubleHalves halves(__m512d v) { return cast<DoubleHalves>(v); }
PF_INLINE __m512d join(__m256d low, __m256d high) { return cast<__m512d>(DoubleHalves{low, high}); }

template <class Lane, int Count>
struct Array {
  Lane lane[Count];
  PF_INLINE Lane& operator[](int64_t i) { return lane[i]; }
  PF_INLINE Lane operator[](int64_t i) const { return lane[i]; }
};
using Halfwords = Array<uint16_t, 32>;
using Words = Array<uint32_t, 16>;
using Doublewords = Array<uint64_t, 8>;
struct Quarters {
  __m128i part[4];
};

PF_INLINE void require_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % 64 != 0) __builtin_trap();
}

// ---- masks ----------------------------------------------------------------------------------------------------------

// All bits of lane i where bit i is set.
PF_INLINE __m256i lanes_of_16(uint32_t bits) {
  const __m256i one =
      _mm256_set_epi16(-0x8000, 0x4000, 0x2000, 0x1000, 0x800, 0x400, 0x200, 0x100, 0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
  return _mm256_cmpeq_epi16(_mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), one), one);
}
PF_INLINE __m256i lanes_of_32(uint32_t bits) {
  const __m256i one = _mm256_set_epi32(0x80, 0x40, 0x20, 0x10, 8, 4, 2, 1);
  return _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int32_t>(bits)), one), one);
}
PF_INLINE __m256i lanes_of_64(uint32_t bits) {
  const __m256i one = _mm256_set_epi64x(8, 4, 2, 1);
  return _mm256_cmpeq_epi64(_mm256_and_si256(_mm256_set1_epi64x(bits), one), one);
}
PF_INLINE __m512i mask_of_16(uint32_t bits) { return join(lanes_of_16(bits), lanes_of_16(bits >> 16)); }
PF_INLINE __m512i mask_of_32(uint32_t bits) { return join(lanes_of_32(bits), lanes_of_32(bits >> 8)); }
PF_INLINE __m512i mask_of_64(uint32_t bits) { return join(lanes_of_64(bits), lanes_of_64(bits >> 4)); }
PF_INLINE __m512i blend(__m512i keep, __m512i chosen, __m512i other) { return (chosen & keep) | (other & ~keep); }

// to[i] = from[i] where bit i is set; nothing else is read or written.
template <class Lane>
PF_INLINE void copy_lanes(uint32_t bits, int count, const void* from, void* to) {
  const uint32_t all = count == 32 ? ~0u : (1u << count) - 1;
  if ((bits & all) == all) {
    memcpy(to, from, static_cast<size_t>(count) * sizeof(Lane));
    return;
  }
  for (int i = 0; i < count; ++i) {
    const size_t at = static_cast<size_t>(i) * sizeof(Lane);
    if (bits >> i & 1) memcpy(static_cast<char*>(to) + at, static_cast<const char*>(from) + at, sizeof(Lane));
  }
}

// ---- bf16 -----------------------------------------------------------------------------------------------------------

// To the nearest, to even where two are as near, subnormal numbers to zero, NaN to a quiet one; as words below 0x10000.
PF_INLINE __m256i round_to_bf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v), high = _mm256_srli_epi32(bits, 16);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
  const __m256i odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i small = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800000), magnitude);
  const __m256i nan = _mm256_cmpgt_epi32(magnitude, _mm256_set1_epi32(0x7f800000));
  __m256i result = _mm256_srli_epi32(up, 16);
  result = _mm256_blendv_epi8(result, _mm256_and_si256(high, _mm256_set1_epi32(0x8000)), small);
  return _mm256_blendv_epi8(result, _mm256_or_si256(high, _mm256_set1_epi32(0x40)), nan);
}

// The low 16 bits of each word, in their order.
PF_INLINE __m256i narrow_words(__m256i low, __m256i high) {
  const __m256i mask = _mm256_set1_epi32(0xffff);
  const __m256i packed = _mm256_packus_epi32(_mm256_and_si256(low, mask), _mm256_and_si256(high, mask));
  return _mm256_permute4x64_epi64(packed, 0xD8);
}

PF_INLINE __m256i to_bf16(__m512 v) {
  return narrow_words(round_to_bf16(halves(v).low), round_to_bf16(halves(v).high));
}

// c + a b of the odd elements, then of the even ones, each rounded to the nearest; subnormal numbers are zero, whatever
// the thread's mode. One piece of assembly, since the compiler moves arithmetic across a change of the mode.
PF_INLINE __m256 add_pairs(__m256 c, __m256i a, __m256i b) {
  const unsigned before = _mm_getcsr(), mode = 0x9fc0;
  const __m256i upper = _mm256_set1_epi32(-0x10000);
  const __m256i odd_a = _mm256_and_si256(a, upper), odd_b = _mm256_and_si256(b, upper);
  const __m256i even_a = _mm256_slli_epi32(a, 16), even_b = _mm256_slli_epi32(b, 16);
  asm("vldmxcsr %[mode]\n\t"
      "vfmadd231ps %[odd_b], %[odd_a], %[c]\n\t"
      "vfmadd231ps %[even_b], %[even_a], %[c]\n\t"
      "vldmxcsr %[before]"
      : [c] "+x"(c)
      : [mode] "m"(mode), [before] "m"(before), [odd_a] "x"(odd_a), [odd_b] "x"(odd_b), [even_a] "x"(even_a),
        [even_b] "x"(even_b));
  return c;
}

}  // namespace pyfused::PYFUSED_ISA::emulated
