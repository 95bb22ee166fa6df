// A vector's worth of bf16 as two fp32 vectors, the elements of even and of odd index. Taken apart by a shift and a
// mask: widening them in their order takes twice as many instructions, which bounded LoRA's loops in bf16.
#pragma once

#include "simd.h"

namespace pyfused::PYFUSED_ISA {

// Elements of a pair of vectors.
constexpr int kPairWidth = 2 * kWidth<float>;

typedef uint32_t PairWords __attribute__((vector_size(kVectorBytes)));
typedef uint16_t PairLanes __attribute__((vector_size(kVectorBytes)));

struct Pair {
  Vector<float> even, odd;
};

inline PairWords load_words(const bf16* p) {
  PairWords words;
  memcpy(&words, p, sizeof words);
  return words;
}
// Of the first elements, zero beyond. On AVX-512 no call, for which all sums would have to leave their registers.
inline PairWords load_words_first(const bf16* p, int64_t count) {
#if defined(__AVX512BW__)
  return reinterpret_cast<PairWords>(_mm512_maskz_loadu_epi16((1u << count) - 1u, p));
#else
  PairWords words{};
  memcpy(&words, p, static_cast<size_t>(count) * sizeof(bf16));
  return words;
#endif
}
inline void store_words_first(bf16* p, PairWords words, int64_t count) {
#if defined(__AVX512BW__)
  _mm512_mask_storeu_epi16(p, (1u << count) - 1u, reinterpret_cast<__m512i>(words));
#else
  memcpy(p, &words, static_cast<size_t>(count) * sizeof(bf16));
#endif
}
inline void store_words(bf16* p, PairWords words) { memcpy(p, &words, sizeof words); }
inline Pair widen(PairWords words) {
  return {reinterpret_cast<Vector<float>>(words << 16), reinterpret_cast<Vector<float>>(words & 0xffff0000u)};
}

// Each element rounded to bf16, even and odd ones in their order again.
inline PairWords narrow(Pair pair) {
#if defined(__AVX512BF16__)
  // the lower half of a 32-bit word, or the upper
  alignas(64) static constexpr uint16_t kInterleave[32] = {0,  16, 1,  17, 2,  18, 3,  19, 4,  20, 5,
                                                           21, 6,  22, 7,  23, 8,  24, 9,  25, 10, 26,
                                                           11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh halves = _mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(pair.odd), reinterpret_cast<__m512>(pair.even));
  return reinterpret_cast<PairWords>(_mm512_permutexvar_epi16(_mm512_load_si512(kInterleave), (__m512i)halves));
#else
  const auto rounded = [](Vector<float> v) {
    const PairWords bits = reinterpret_cast<PairWords>(v);
    const PairWords nan = reinterpret_cast<PairWords>(v != v);
    return ((bits + 0x7fffu + (bits >> 16 & 1u)) & ~nan) | ((bits | 0x400000u) & nan);
  };
  return (rounded(pair.even) >> 16) | (rounded(pair.odd) & 0xffff0000u);
#endif
}

// Element i of chosen where bit i of bits is set, else of other.
inline PairWords select_words(uint32_t bits, PairWords chosen, PairWords other) {
#if defined(__AVX512BW__)
  return reinterpret_cast<PairWords>(
      _mm512_mask_mov_epi16(reinterpret_cast<__m512i>(other), bits, reinterpret_cast<__m512i>(chosen)));
#else
  PairLanes lane_bit;
  for (int i = 0; i < kPairWidth; ++i) lane_bit[i] = static_cast<uint16_t>(1u << i);
  const PairLanes all = static_cast<uint16_t>(bits) - PairLanes{};
  const PairWords keep = reinterpret_cast<PairWords>((all & lane_bit) == lane_bit);
  return (chosen & keep) | (other & ~keep);
#endif
}

// Rows of floats whose elements go from their order into that of pairs, or back: in every kPairWidth of them the even
// ones are before the odd ones.
template <bool ToPairs>
inline void reorder(float* data, int64_t ld, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) {
    for (float* block = data + r * ld; block < data + r * ld + columns; block += kPairWidth) {
      float copy[kPairWidth];
      memcpy(copy, block, sizeof copy);
      for (int i = 0; i < kWidth<float>; ++i) {
        block[ToPairs ? i : 2 * i] = copy[ToPairs ? 2 * i : i];
        block[ToPairs ? kWidth<float> + i : 2 * i + 1] = copy[ToPairs ? 2 * i + 1 : kWidth<float> + i];
      }
    }
  }
}

template <int... I>
struct Indices {};
template <int N, int... I>
struct UpTo : UpTo<N - 1, N - 1, I...> {};
template <int... I>
struct UpTo<0, I...> {
  using type = Indices<I...>;
};

// In every Count lanes: the sums of the halves of first, then those of second.
template <int Count, int... I>
PYFUSED_INLINE Vector<float> add_halves(Vector<float> first, Vector<float> second, Indices<I...>) {
  constexpr int kHalf = Count / 2;
  constexpr auto from = [](int i) { return i / Count * Count + i % kHalf + (i % Count < kHalf ? 0 : kWidth<float>); };
  return __builtin_shufflevector(first, second, from(I)...) +
         __builtin_shufflevector(first, second, from(I) + kHalf...);
}

// The sum of the lanes of each of W vectors, in one vector; added in the order of sum_lanes.
template <int Count = kWidth<float>>
PYFUSED_INLINE Vector<float> sum_each(const Vector<float>* vectors) {
  constexpr int kHalf = Count / 2;
  Vector<float> halves[kHalf];
#pragma GCC unroll 8
  for (int i = 0; i < kHalf; ++i) {
    halves[i] = add_halves<Count>(vectors[i], vectors[i + kHalf], typename UpTo<kWidth<float>>::type{});
  }
  if constexpr (kHalf == 1) {
    return halves[0];
  } else {
    return sum_each<kHalf>(halves);
  }
}

}  // namespace pyfused::PYFUSED_ISA
