// Dropout's keep bits for one row, a vector of counters at a time. The plain loop says what is computed; AVX2 and
// AVX-512 have it in intrinsics because compilers do not find the 32 x 32 -> 64 bit multiplication in it.
#pragma once

#include "../../common/philox.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {

// bits[w] has bit c set where column column_begin + 32 w + c is kept; count is a number of 128-column blocks.
#if defined(__AVX512F__)

inline void philox_multiply(__m512i a, __m512i multiplier, __m512i& high, __m512i& low) {
  const __m512i even = _mm512_mul_epu32(a, multiplier);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), multiplier);
  high = _mm512_mask_blend_epi32(0xAAAA, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32));
}

inline void keep_bits(Dropout dropout, int64_t row, int64_t column_begin, int64_t blocks, uint32_t* bits) {
  const __m512i m0 = _mm512_set1_epi32(static_cast<int32_t>(philox::kMultiplier0));
  const __m512i m1 = _mm512_set1_epi32(static_cast<int32_t>(philox::kMultiplier1));
  const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t counter = (column_begin / philox::kBlockColumns + block) * philox::kBlockCounters;
    __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(counter)), lanes);
    __m512i c1 = _mm512_set1_epi32(static_cast<int32_t>(row));
    __m512i c2 = _mm512_set1_epi32(static_cast<int32_t>(row >> 32));
    __m512i c3 = _mm512_setzero_si512();
    uint32_t k0 = static_cast<uint32_t>(dropout.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round) {
      __m512i high0, low0, high1, low1;
      philox_multiply(c0, m0, high0, low0);
      philox_multiply(c2, m1, high1, low1);
      // 0x96 is the truth table of a three-way exclusive or
      c0 = _mm512_ternarylogic_epi32(high1, c1, _mm512_set1_epi32(static_cast<int32_t>(k0)), 0x96);
      c2 = _mm512_ternarylogic_epi32(high0, c3, _mm512_set1_epi32(static_cast<int32_t>(k1)), 0x96);
      c1 = low1;
      c3 = low0;
      k0 += philox::kWeyl0;
      k1 += philox::kWeyl1;
    }
    bits[4 * block + 0] = _mm512_cmpge_epu16_mask(c0, threshold);
    bits[4 * block + 1] = _mm512_cmpge_epu16_mask(c1, threshold);
    bits[4 * block + 2] = _mm512_cmpge_epu16_mask(c2, threshold);
    bits[4 * block + 3] = _mm512_cmpge_epu16_mask(c3, threshold);
  }
}

#elif defined(__AVX2__)

inline void philox_multiply(__m256i a, __m256i multiplier, __m256i& high, __m256i& low) {
  const __m256i even = _mm256_mul_epu32(a, multiplier);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), multiplier);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}

// 32 bits from the 32 columns of one word of 16 counters, which lie in two registers.
inline uint32_t keep_word(__m256i first, __m256i second, __m256i threshold) {
  const __m256i keep0 = _mm256_cmpeq_epi16(_mm256_max_epu16(first, threshold), first);
  const __m256i keep1 = _mm256_cmpeq_epi16(_mm256_max_epu16(second, threshold), second);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(keep0, keep1), 0xD8);
  return static_cast<uint32_t>(_mm256_movemask_epi8(packed));
}

inline void keep_bits(Dropout dropout, int64_t row, int64_t column_begin, int64_t blocks, uint32_t* bits) {
  const __m256i m0 = _mm256_set1_epi32(static_cast<int32_t>(philox::kMultiplier0));
  const __m256i m1 = _mm256_set1_epi32(static_cast<int32_t>(philox::kMultiplier1));
  const __m256i lanes = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold));
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t counter = (column_begin / philox::kBlockColumns + block) * philox::kBlockCounters;
    __m256i c0[2], c1[2], c2[2], c3[2];
    for (int h = 0; h < 2; ++h) {
      c0[h] = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(counter) + 8 * h), lanes);
      c1[h] = _mm256_set1_epi32(static_cast<int32_t>(row));
      c2[h] = _mm256_set1_epi32(static_cast<int32_t>(row >> 32));
      c3[h] = _mm256_setzero_si256();
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.seed);
    uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round) {
      const __m256i key0 = _mm256_set1_epi32(static_cast<int32_t>(k0));
      const __m256i key1 = _mm256_set1_epi32(static_cast<int32_t>(k1));
      for (int h = 0; h < 2; ++h) {
        __m256i high0, low0, high1, low1;
        philox_multiply(c0[h], m0, high0, low0);
        philox_multiply(c2[h], m1, high1, low1);
        c0[h] = _mm256_xor_si256(_mm256_xor_si256(high1, c1[h]), key0);
        c2[h] = _mm256_xor_si256(_mm256_xor_si256(high0, c3[h]), key1);
        c1[h] = low1;
        c3[h] = low0;
      }
      k0 += philox::kWeyl0;
      k1 += philox::kWeyl1;
    }
    bits[4 * block + 0] = keep_word(c0[0], c0[1], threshold);
    bits[4 * block + 1] = keep_word(c1[0], c1[1], threshold);
    bits[4 * block + 2] = keep_word(c2[0], c2[1], threshold);
    bits[4 * block + 3] = keep_word(c3[0], c3[1], threshold);
  }
}

#else

inline void keep_bits(Dropout dropout, int64_t row, int64_t column_begin, int64_t blocks, uint32_t* bits) {
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = (column_begin / philox::kBlockColumns + block) * philox::kBlockCounters;
    uint32_t words[4] = {0, 0, 0, 0};
    for (int counter = 0; counter < philox::kBlockCounters; ++counter) {
      uint32_t c[4] = {static_cast<uint32_t>(first + counter), static_cast<uint32_t>(row),
                       static_cast<uint32_t>(row >> 32), 0};
      uint32_t k0 = static_cast<uint32_t>(dropout.seed);
      uint32_t k1 = static_cast<uint32_t>(dropout.seed >> 32);
      for (int round = 0; round < philox::kRounds; ++round) {
        const uint64_t product0 = static_cast<uint64_t>(philox::kMultiplier0) * c[0];
        const uint64_t product1 = static_cast<uint64_t>(philox::kMultiplier1) * c[2];
        c[0] = static_cast<uint32_t>(product1 >> 32) ^ c[1] ^ k0;
        c[1] = static_cast<uint32_t>(product1);
        c[2] = static_cast<uint32_t>(product0 >> 32) ^ c[3] ^ k1;
        c[3] = static_cast<uint32_t>(product0);
        k0 += philox::kWeyl0;
        k1 += philox::kWeyl1;
      }
      for (int w = 0; w < 4; ++w) {
        const uint32_t low = (c[w] & 0xffffu) >= dropout.threshold;
        const uint32_t high = (c[w] >> 16) >= dropout.threshold;
        words[w] |= (low | high << 1) << (2 * counter);
      }
    }
    for (int w = 0; w < 4; ++w) bits[4 * block + w] = words[w];
  }
}

#endif

// The bits of the vector of W columns that starts at this column of a chunk (W divides 32).
template <class Acc>
inline uint32_t vector_bits(const uint32_t* bits, int64_t column) {
  return bits[column / 32] >> (column % 32);
}

}  // namespace pyfused::PYFUSED_ISA
