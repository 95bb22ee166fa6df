// Dropout's keep bits, a vector of counters at a time. The plain loop of keep_bits says what is computed; AVX2 and
// AVX-512 have it in intrinsics because compilers do not find the 32 x 32 -> 64 bit multiplication in it.
#pragma once

#include "../../common/philox.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {

#if defined(__AVX2__)

// A vector of 64-bit lanes with one counter in each. The multiplication reads the low half of a lane and nothing reads
// what an exclusive or leaves in the high half, so each of a round's two products takes three instructions: multiply,
// exchange the halves, three-way exclusive or. Even counters are in one vector and odd ones in another: joined at the
// end they are 32-bit words in the counters' order.
#if defined(__AVX512F__)
using Lanes = __m512i;
inline Lanes broadcast(uint64_t v) { return _mm512_set1_epi64(static_cast<int64_t>(v)); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }
inline Lanes swap_halves(Lanes a) { return _mm512_shuffle_epi32(a, _MM_PERM_CDAB); }
inline Lanes xor2(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
// 0x96 is the truth table of a three-way exclusive or
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline Lanes join(Lanes low, Lanes high) { return _mm512_mask_blend_epi32(0xAAAA, low, high); }
inline Lanes every_second(int64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(first), _mm512_set_epi64(14, 12, 10, 8, 6, 4, 2, 0));
}
#else
using Lanes = __m256i;
inline Lanes broadcast(uint64_t v) { return _mm256_set1_epi64x(static_cast<int64_t>(v)); }
inline Lanes multiply(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes swap_halves(Lanes a) { return _mm256_shuffle_epi32(a, 0xB1); }
inline Lanes xor2(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
inline Lanes xor3(Lanes a, Lanes b, Lanes c) { return xor2(xor2(a, b), c); }
inline Lanes join(Lanes low, Lanes high) { return _mm256_blend_epi32(low, high, 0xAA); }
inline Lanes every_second(int64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(first), _mm256_set_epi64x(6, 4, 2, 0));
}
#endif

// Counters of an even and an odd vector together.
constexpr int kPairCounters = static_cast<int>(sizeof(Lanes)) / 4;
constexpr int kPairs = philox::kBlockCounters / kPairCounters;

struct PhiloxKeys {
  uint64_t k0[philox::kRounds], k1[philox::kRounds];

  explicit PhiloxKeys(uint64_t seed) {
    uint32_t low = static_cast<uint32_t>(seed), high = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < philox::kRounds; ++round) {
      k0[round] = low | static_cast<uint64_t>(low) << 32;  // twice: the last round leaves words in either half
      k1[round] = high | static_cast<uint64_t>(high) << 32;
      low += philox::kWeyl0;
      high += philox::kWeyl1;
    }
  }
};

// What the row's low 32 bits bring into round 3, the same for all counters.
struct PhiloxRow {
  uint64_t c2, c3;

  PhiloxRow(int64_t row, const PhiloxKeys& keys) {
    const uint64_t of_high = philox::kMultiplier1 * (static_cast<uint64_t>(row) >> 32);
    const uint32_t c0 = static_cast<uint32_t>((of_high >> 32) ^ static_cast<uint64_t>(row) ^ keys.k0[0]);
    const uint64_t product = static_cast<uint64_t>(philox::kMultiplier0) * c0;
    c2 = (product >> 32) ^ keys.k1[1];
    c3 = product & 0xffffffffu;
  }
};

// The first two and a half of the seven rounds of one pair, which do not depend on the row's low 32 bits: they are made
// once for many rows.
struct PhiloxColumns {
  Lanes c3[2], c1[2], product0[2], c2[2];

  PhiloxColumns(int64_t first_counter, int64_t row_high, const PhiloxKeys& keys) {
    const Lanes m0 = broadcast(philox::kMultiplier0), m1 = broadcast(philox::kMultiplier1);
    const uint64_t of_high = philox::kMultiplier1 * static_cast<uint64_t>(row_high);
    for (int odd = 0; odd < 2; ++odd) {
      c3[odd] = multiply(every_second(first_counter + odd), m0);
      const Lanes product1 = multiply(xor2(swap_halves(c3[odd]), broadcast(keys.k1[0])), m1);
      const Lanes c0 = xor3(swap_halves(product1), broadcast(of_high & 0xffffffffu), broadcast(keys.k0[1]));
      c1[odd] = xor2(product1, broadcast(keys.k0[2]));
      product0[odd] = multiply(c0, m0);
      c2[odd] = xor2(swap_halves(product0[odd]), broadcast(keys.k1[2]));
    }
  }
};

// The four words of a pair's counters, in their order.
struct PhiloxWords {
  Lanes words[4];

  __attribute__((always_inline)) PhiloxWords(const PhiloxColumns& columns, const PhiloxRow& row,
                                             const PhiloxKeys& keys) {
    const Lanes m0 = broadcast(philox::kMultiplier0), m1 = broadcast(philox::kMultiplier1);
    // products and what the next round needs of them with their halves exchanged
    Lanes p0[2], p1[2], s0[2], s1[2], c0[2], c2[2];
    for (int odd = 0; odd < 2; ++odd) {  // round 3
      p0[odd] = columns.product0[odd];
      p1[odd] = multiply(xor2(columns.c3[odd], broadcast(row.c2)), m1);
      c0[odd] = xor2(swap_halves(p1[odd]), columns.c1[odd]);
      c2[odd] = xor2(columns.c2[odd], broadcast(row.c3));
    }
#pragma GCC unroll 4
    for (int round = 3; round < philox::kRounds - 1; ++round) {
      for (int odd = 0; odd < 2; ++odd) {
        const Lanes next0 = multiply(c0[odd], m0), next1 = multiply(c2[odd], m1);
        s0[odd] = swap_halves(next0);
        s1[odd] = swap_halves(next1);
        c0[odd] = xor3(s1[odd], p1[odd], broadcast(keys.k0[round]));
        c2[odd] = xor3(s0[odd], p0[odd], broadcast(keys.k1[round]));
        p0[odd] = next0;
        p1[odd] = next1;
      }
    }
    constexpr int kLast = philox::kRounds - 1;
    const Lanes even0 = multiply(c0[0], m0), even1 = multiply(c2[0], m1);
    const Lanes odd0 = multiply(c0[1], m0), odd1 = multiply(c2[1], m1);
    // even counters' words belong into low halves, odd ones' into high halves
    words[0] = xor3(join(swap_halves(even1), odd1), join(p1[0], s1[1]), broadcast(keys.k0[kLast]));
    words[1] = join(even1, swap_halves(odd1));
    words[2] = xor3(join(swap_halves(even0), odd0), join(p0[0], s0[1]), broadcast(keys.k1[kLast]));
    words[3] = join(even0, swap_halves(odd0));
  }
};

#endif

#if defined(__AVX512F__)

// run(i, words) for rows row_begin + i, of 128 columns from column_begin on, a multiple of 128: words[w] has bit c set
// where column 32 w + c is kept. For loops that apply the mask as it is made: what they read of memory comes meanwhile.
template <class Run>
PYFUSED_INLINE void for_kept_rows(Dropout dropout, int64_t row_begin, int64_t rows, int64_t column_begin,
                                  const Run& run) {
  const PhiloxKeys keys(dropout.seed);
  const int64_t counter = column_begin / philox::kBlockColumns * philox::kBlockCounters;
  const __m512i threshold = _mm512_set1_epi16(static_cast<int16_t>(dropout.threshold));
  for (int64_t begin = 0, end; begin < rows; begin = end) {
    const int64_t row_high = (row_begin + begin) >> 32;
    end = min_of(rows, ((row_high + 1) << 32) - row_begin);
    const PhiloxColumns columns(counter, row_high, keys);
    for (int64_t i = begin; i < end; ++i) {
      const PhiloxWords random(columns, PhiloxRow(row_begin + i, keys), keys);
      const __mmask32 words[4] = {
          _mm512_cmpge_epu16_mask(random.words[0], threshold), _mm512_cmpge_epu16_mask(random.words[1], threshold),
          _mm512_cmpge_epu16_mask(random.words[2], threshold), _mm512_cmpge_epu16_mask(random.words[3], threshold)};
      run(i, words);
    }
  }
}

// A store from mask registers: the compiler would gather four of them in a vector first.
inline void store_words(const __mmask32 (&words)[4], uint32_t* to) {
  for (int w = 0; w < 4; ++w) _store_mask32(reinterpret_cast<__mmask32*>(to + w), words[w]);
}

#endif

// bits[i * ld + w] has bit c set where column column_begin + 32 w + c of row row_begin + i is kept; blocks is a number
// of 128-column blocks, column_begin a multiple of 128. each(i, block) runs as a row's bits of a block are made.
#if defined(__AVX512F__)

template <class Each>
inline void keep_bits(Dropout dropout, int64_t row_begin, int64_t rows, int64_t column_begin, int64_t blocks,
                      uint32_t* bits, int64_t ld, const Each& each) {
  for (int64_t block = 0; block < blocks; ++block) {
    for_kept_rows(dropout, row_begin, rows, column_begin + block * philox::kBlockColumns,
                  [&](int64_t i, const __mmask32(&words)[4]) PYFUSED_INLINE_LAMBDA {
                    each(i, block);
                    store_words(words, bits + i * ld + 4 * block);
                  });
  }
}

#elif defined(__AVX2__)

template <class Each>
inline void keep_bits(Dropout dropout, int64_t row_begin, int64_t rows, int64_t column_begin, int64_t blocks,
                      uint32_t* bits, int64_t ld, const Each& each) {
  const PhiloxKeys keys(dropout.seed);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t counter = (column_begin / philox::kBlockColumns + block) * philox::kBlockCounters;
    for (int64_t begin = 0, end; begin < rows; begin = end) {
      const int64_t row_high = (row_begin + begin) >> 32;
      end = min_of(rows, ((row_high + 1) << 32) - row_begin);
      const __m256i threshold = _mm256_set1_epi16(static_cast<int16_t>(dropout.threshold));
      const PhiloxColumns first(counter, row_high, keys), second(counter + kPairCounters, row_high, keys);
      for (int64_t i = begin; i < end; ++i) {
        each(i, block);
        const PhiloxRow row(row_begin + i, keys);
        const PhiloxWords low(first, row, keys), high(second, row, keys);
        for (int w = 0; w < 4; ++w) {
          // 32 columns of word w of 16 counters, which lie in two registers
          const __m256i keep0 = _mm256_cmpeq_epi16(_mm256_max_epu16(low.words[w], threshold), low.words[w]);
          const __m256i keep1 = _mm256_cmpeq_epi16(_mm256_max_epu16(high.words[w], threshold), high.words[w]);
          const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(keep0, keep1), 0xD8);
          bits[i * ld + 4 * block + w] = static_cast<uint32_t>(_mm256_movemask_epi8(packed));
        }
      }
    }
  }
}

#else

template <class Each>
inline void keep_bits(Dropout dropout, int64_t row_begin, int64_t rows, int64_t column_begin, int64_t blocks,
                      uint32_t* bits, int64_t ld, const Each& each) {
  for (int64_t i = 0; i < rows; ++i) {
    const uint64_t row = static_cast<uint64_t>(row_begin + i);
    for (int64_t block = 0; block < blocks; ++block) {
      each(i, block);
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
      for (int w = 0; w < 4; ++w) bits[i * ld + 4 * block + w] = words[w];
    }
  }
}

#endif

inline void keep_bits(Dropout dropout, int64_t row_begin, int64_t rows, int64_t column_begin, int64_t blocks,
                      uint32_t* bits, int64_t ld) {
  keep_bits(dropout, row_begin, rows, column_begin, blocks, bits, ld, [](int64_t, int64_t) {});
}

// The bits of the vector of W columns that starts at this column of a chunk (W divides 32).
template <class Acc>
inline uint32_t vector_bits(const uint32_t* bits, int64_t column) {
  return bits[column / 32] >> (column % 32);
}

}  // namespace pyfused::PYFUSED_ISA
