// The intrinsics of AVX-512 and AVX512_BF16 that kernels use, in AVX2: to the bit what the instructions compute.
// Written after Intel's manuals; intrinsics_test.cpp holds each to a plain formula.
//
// They are in the level's namespace, where they hide the compiler's own of the same names: a kernel that uses another
// one does not compile ("target specific option mismatch") until it is here. What an instruction leaves undefined is
// kUndefined here, and an address that is not aligned as it must be ends the program, as it does there.
#pragma once

#include "lanes.h"

namespace pyfused::PYFUSED_ISA {

// ---- each half as AVX2 has it ---------------------------------------------------------------------------------------

#define PF_HALVES(Vector, name)                                                        \
  PF_INLINE Vector _mm512_##name(Vector a, Vector b) {                                 \
    const auto x = emulated::halves(a), y = emulated::halves(b);                       \
    return emulated::join(_mm256_##name(x.low, y.low), _mm256_##name(x.high, y.high)); \
  }
PF_HALVES(__m512i, add_epi32)
PF_HALVES(__m512i, add_epi64)
PF_HALVES(__m512i, mullo_epi32)
PF_HALVES(__m512i, mul_epu32)
PF_HALVES(__m512i, unpacklo_epi16)
PF_HALVES(__m512i, unpackhi_epi16)
PF_HALVES(__m512i, unpacklo_epi32)
PF_HALVES(__m512i, unpackhi_epi32)
PF_HALVES(__m512i, unpacklo_epi64)
PF_HALVES(__m512i, unpackhi_epi64)
PF_HALVES(__m512, unpacklo_ps)
PF_HALVES(__m512, unpackhi_ps)
#undef PF_HALVES

#define PF_HALVES(Vector, name)                                                                       \
  PF_INLINE Vector _mm512_##name(Vector a, Vector b, Vector c) {                                      \
    const auto x = emulated::halves(a), y = emulated::halves(b), z = emulated::halves(c);             \
    return emulated::join(_mm256_##name(x.low, y.low, z.low), _mm256_##name(x.high, y.high, z.high)); \
  }
PF_HALVES(__m512, fmadd_ps)
PF_HALVES(__m512d, fmadd_pd)
#undef PF_HALVES

PF_INLINE __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
PF_INLINE __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
PF_INLINE __m512i _mm512_xor_si512(__m512i a, __m512i b) { return a ^ b; }
PF_INLINE __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
  const auto x = emulated::halves(a);
  return emulated::join(_mm256_slli_epi32(x.low, static_cast<int>(count)),
                        _mm256_slli_epi32(x.high, static_cast<int>(count)));
}
PF_INLINE __m512i _mm512_srli_epi32(__m512i a, unsigned count) {
  const auto x = emulated::halves(a);
  return emulated::join(_mm256_srli_epi32(x.low, static_cast<int>(count)),
                        _mm256_srli_epi32(x.high, static_cast<int>(count)));
}
// By a macro: through the type of the order, which is the compiler's, a call would find the compiler's function too.
namespace emulated {
PF_INLINE __m512i shuffle_words(__m512i a, int order) {
  const auto x = halves(a);
  return join(_mm256_shuffle_epi32(x.low, order), _mm256_shuffle_epi32(x.high, order));
}
}  // namespace emulated
#define _mm512_shuffle_epi32(a, order) emulated::shuffle_words(a, order)
PF_INLINE __m512 _mm512_shuffle_ps(__m512 a, __m512 b, int order) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  return emulated::join(_mm256_shuffle_ps(x.low, y.low, order), _mm256_shuffle_ps(x.high, y.high, order));
}

// Bit i of the result is bit 4 a_i + 2 b_i + c_i of the table.
PF_INLINE __m512i _mm512_ternarylogic_epi64(__m512i a, __m512i b, __m512i c, int table) {
  __m512i result = a ^ a;
#pragma GCC unroll 8
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}

// ---- constants and casts --------------------------------------------------------------------------------------------

PF_INLINE __m512i _mm512_setzero_si512() { return __m512i{}; }
PF_INLINE __m512 _mm512_setzero_ps() { return __m512{}; }
PF_INLINE __m512i _mm512_set1_epi16(int16_t v) { return emulated::join(_mm256_set1_epi16(v), _mm256_set1_epi16(v)); }
PF_INLINE __m512i _mm512_set1_epi32(int32_t v) { return emulated::join(_mm256_set1_epi32(v), _mm256_set1_epi32(v)); }
PF_INLINE __m512i _mm512_set1_epi64(int64_t v) { return emulated::join(_mm256_set1_epi64x(v), _mm256_set1_epi64x(v)); }
PF_INLINE __m512i _mm512_set_epi64(int64_t v7, int64_t v6, int64_t v5, int64_t v4, int64_t v3, int64_t v2, int64_t v1,
                                   int64_t v0) {
  return emulated::join(_mm256_set_epi64x(v3, v2, v1, v0), _mm256_set_epi64x(v7, v6, v5, v4));
}
PF_INLINE __m512i _mm512_set_epi32(int32_t v15, int32_t v14, int32_t v13, int32_t v12, int32_t v11, int32_t v10,
                                   int32_t v9, int32_t v8, int32_t v7, int32_t v6, int32_t v5, int32_t v4, int32_t v3,
                                   int32_t v2, int32_t v1, int32_t v0) {
  return emulated::join(_mm256_set_epi32(v7, v6, v5, v4, v3, v2, v1, v0),
                        _mm256_set_epi32(v15, v14, v13, v12, v11, v10, v9, v8));
}

PF_INLINE __m512 _mm512_castsi512_ps(__m512i v) { return reinterpret_cast<__m512>(v); }
PF_INLINE __m512i _mm512_castps_si512(__m512 v) { return reinterpret_cast<__m512i>(v); }
PF_INLINE __m512 _mm512_castpd_ps(__m512d v) { return reinterpret_cast<__m512>(v); }
PF_INLINE __m128 _mm512_castps512_ps128(__m512 v) { return _mm256_castps256_ps128(emulated::halves(v).low); }
PF_INLINE __m256i _mm512_castsi512_si256(__m512i v) { return emulated::halves(v).low; }
PF_INLINE __m512i _mm512_castsi256_si512(__m256i v) {
  return emulated::join(v, _mm256_set1_epi32(emulated::kUndefined));
}
PF_INLINE __m512i _mm512_castsi128_si512(__m128i v) {
  const __m256i undefined = _mm256_set1_epi32(emulated::kUndefined);
  return emulated::join(_mm256_inserti128_si256(undefined, v, 0), undefined);
}

// ---- parts of a vector ----------------------------------------------------------------------------------------------

PF_INLINE __m128 _mm512_extractf32x4_ps(__m512 v, int part) {
  return _mm_castsi128_ps(emulated::cast<emulated::Quarters>(v).part[part & 3]);
}
PF_INLINE __m256i _mm512_extracti64x4_epi64(__m512i v, int part) {
  return part & 1 ? emulated::halves(v).high : emulated::halves(v).low;
}
PF_INLINE __m512i _mm512_inserti32x4(__m512i v, __m128i quarter, int part) {
  auto quarters = emulated::cast<emulated::Quarters>(v);
  quarters.part[part & 3] = quarter;
  return emulated::cast<__m512i>(quarters);
}
PF_INLINE __m512i _mm512_inserti64x4(__m512i v, __m256i half, int part) {
  return part & 1 ? emulated::join(emulated::halves(v).low, half) : emulated::join(half, emulated::halves(v).high);
}
PF_INLINE __m512 _mm512_broadcast_f32x4(__m128 v) {
  const __m256 twice = _mm256_broadcast_ps(&v);
  return emulated::join(twice, twice);
}
PF_INLINE __m512d _mm512_broadcast_f64x4(__m256d v) { return emulated::join(v, v); }

PF_INLINE __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int order) {
  const auto x = emulated::cast<emulated::Quarters>(a), y = emulated::cast<emulated::Quarters>(b);
  const emulated::Quarters result{x.part[order & 3], x.part[order >> 2 & 3], y.part[order >> 4 & 3],
                                  y.part[order >> 6 & 3]};
  return emulated::cast<__m512i>(result);
}
PF_INLINE __m512i _mm512_shuffle_i64x2(__m512i a, __m512i b, int order) { return _mm512_shuffle_i32x4(a, b, order); }

// ---- any lane to any place ------------------------------------------------------------------------------------------

namespace emulated {
// Lane i is that of number index[i] among those of a and then of b.
template <class Lanes, class Vector>
PF_INLINE Vector permute(Vector a, __m512i index, Vector b) {
  constexpr unsigned kCount = sizeof(Lanes) / sizeof(Lanes{}[0]);
  const Lanes from_a = cast<Lanes>(a), from_b = cast<Lanes>(b), at = cast<Lanes>(index);
  Lanes to;
  for (unsigned i = 0; i < kCount; ++i) to[i] = (at[i] & kCount ? from_b : from_a)[at[i] % kCount];
  return cast<Vector>(to);
}
}  // namespace emulated
PF_INLINE __m512i _mm512_permutexvar_epi16(__m512i index, __m512i v) {
  return emulated::permute<emulated::Halfwords>(v, index, v);
}
PF_INLINE __m512i _mm512_permutexvar_epi64(__m512i index, __m512i v) {
  return emulated::permute<emulated::Doublewords>(v, index, v);
}
PF_INLINE __m512i _mm512_permutex2var_epi64(__m512i a, __m512i index, __m512i b) {
  return emulated::permute<emulated::Doublewords>(a, index, b);
}
PF_INLINE __m512 _mm512_permutex2var_ps(__m512 a, __m512i index, __m512 b) {
  return emulated::permute<emulated::Words>(a, index, b);
}

// ---- masks ----------------------------------------------------------------------------------------------------------

PF_INLINE __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(x.low, y.low, predicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(x.high, y.high, predicate));
  return static_cast<__mmask16>(low | high << 8);
}
PF_INLINE __mmask32 _mm512_cmpge_epu16_mask(__m512i a, __m512i b) {
  const auto x = emulated::halves(a), y = emulated::halves(b);
  const __m256i low = _mm256_cmpeq_epi16(_mm256_max_epu16(x.low, y.low), x.low);
  const __m256i high = _mm256_cmpeq_epi16(_mm256_max_epu16(x.high, y.high), x.high);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);
  return static_cast<__mmask32>(_mm256_movemask_epi8(bytes));
}
PF_INLINE void _store_mask32(__mmask32* to, __mmask32 mask) { memcpy(to, &mask, sizeof mask); }

PF_INLINE __m512i _mm512_mask_mov_epi16(__m512i other, __mmask32 mask, __m512i v) {
  return emulated::blend(emulated::mask_of_16(mask), v, other);
}
PF_INLINE __m512i _mm512_mask_blend_epi32(__mmask16 mask, __m512i other, __m512i v) {
  return emulated::blend(emulated::mask_of_32(mask), v, other);
}
PF_INLINE __m512i _mm512_mask_or_epi32(__m512i other, __mmask16 mask, __m512i a, __m512i b) {
  return emulated::blend(emulated::mask_of_32(mask), a | b, other);
}
PF_INLINE __m512i _mm512_maskz_mov_epi16(__mmask32 mask, __m512i v) { return v & emulated::mask_of_16(mask); }
PF_INLINE __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 v) {
  return reinterpret_cast<__m512>(reinterpret_cast<__m512i>(v) & emulated::mask_of_32(mask));
}
PF_INLINE __m512d _mm512_maskz_mov_pd(__mmask8 mask, __m512d v) {
  return reinterpret_cast<__m512d>(reinterpret_cast<__m512i>(v) & emulated::mask_of_64(mask));
}
PF_INLINE __m512 _mm512_maskz_sub_ps(__mmask16 mask, __m512 a, __m512 b) {
  auto x = emulated::halves(a), y = emulated::halves(b);
  asm("" : "+x"(x.low), "+x"(x.high), "+x"(y.low), "+x"(y.high));  // or the compiler fuses it with a product before it
  return _mm512_maskz_mov_ps(mask, emulated::join(_mm256_sub_ps(x.low, y.low), _mm256_sub_ps(x.high, y.high)));
}
PF_INLINE __m512i _mm512_maskz_permutexvar_epi16(__mmask32 mask, __m512i index, __m512i v) {
  return _mm512_maskz_mov_epi16(mask, _mm512_permutexvar_epi16(index, v));
}

// ---- memory ---------------------------------------------------------------------------------------------------------

PF_INLINE __m512i _mm512_loadu_si512(const void* p) {
  __m512i v;
  memcpy(&v, p, sizeof v);
  return v;
}
PF_INLINE __m512i _mm512_load_si512(const void* p) {
  emulated::require_aligned(p);
  return _mm512_loadu_si512(p);
}
PF_INLINE void _mm512_storeu_si512(void* p, __m512i v) { memcpy(p, &v, sizeof v); }
PF_INLINE void _mm512_store_si512(void* p, __m512i v) {
  emulated::require_aligned(p);
  _mm512_storeu_si512(p, v);
}

PF_INLINE __m512i _mm512_maskz_loadu_epi16(__mmask32 mask, const void* p) {
  __m512i v{};
  emulated::copy_lanes<uint16_t>(mask, 32, p, &v);
  return v;
}
PF_INLINE __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* p) {
  __m256i v{};
  emulated::copy_lanes<uint16_t>(mask, 16, p, &v);
  return v;
}
PF_INLINE __m128i _mm_maskz_loadu_epi16(__mmask8 mask, const void* p) {
  __m128i v{};
  emulated::copy_lanes<uint16_t>(mask, 8, p, &v);
  return v;
}
PF_INLINE __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* p) {
  __m512 v{};
  emulated::copy_lanes<float>(mask, 16, p, &v);
  return v;
}
PF_INLINE __m512 _mm512_mask_load_ps(__m512 other, __mmask16 mask, const void* p) {
  emulated::require_aligned(p);
  emulated::copy_lanes<float>(mask, 16, p, &other);
  return other;
}
PF_INLINE void _mm512_mask_storeu_epi16(void* p, __mmask32 mask, __m512i v) {
  emulated::copy_lanes<uint16_t>(mask, 32, &v, p);
}
PF_INLINE void _mm256_mask_storeu_epi16(void* p, __mmask16 mask, __m256i v) {
  emulated::copy_lanes<uint16_t>(mask, 16, &v, p);
}
PF_INLINE void _mm512_mask_storeu_ps(void* p, __mmask16 mask, __m512 v) {
  emulated::copy_lanes<float>(mask, 16, &v, p);
}

PF_INLINE __m512 _mm512_mask_i32gather_ps(__m512 other, __mmask16 mask, __m512i index, const void* p, int scale) {
  const auto at = emulated::cast<emulated::Array<int32_t, 16>>(index);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) {
      float lane;
      memcpy(&lane, static_cast<const char*>(p) + int64_t{at[i]} * scale, sizeof lane);
      other[i] = lane;
    }
  }
  return other;
}
PF_INLINE __m512 _mm512_i32gather_ps(__m512i index, const void* p, int scale) {
  return _mm512_mask_i32gather_ps(__m512{}, 0xffff, index, p, scale);
}
PF_INLINE __m512i _mm512_i32gather_epi32(__m512i index, const void* p, int scale) {
  return _mm512_castps_si512(_mm512_i32gather_ps(index, p, scale));
}
// From the lowest lane up: of two in one place the later stays.
PF_INLINE void _mm512_i32scatter_epi32(void* p, __m512i index, __m512i v, int scale) {
  const auto at = emulated::cast<emulated::Array<int32_t, 16>>(index);
  const auto from = emulated::cast<emulated::Words>(v);
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(p) + int64_t{at[i]} * scale, &from.lane[i], sizeof(uint32_t));
}

// ---- conversions ----------------------------------------------------------------------------------------------------

PF_INLINE __m512i _mm512_cvtepu16_epi32(__m256i v) {
  return emulated::join(_mm256_cvtepu16_epi32(_mm256_castsi256_si128(v)),
                        _mm256_cvtepu16_epi32(_mm256_extracti128_si256(v, 1)));
}
PF_INLINE __m256i _mm512_cvtepi32_epi16(__m512i v) {
  return emulated::narrow_words(emulated::halves(v).low, emulated::halves(v).high);
}
PF_INLINE __m512 _mm512_cvtph_ps(__m256i v) {
  return emulated::join(_mm256_cvtph_ps(_mm256_castsi256_si128(v)), _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)));
}
PF_INLINE __m256i _mm512_cvtps_ph(__m512 v, int rounding) {
  const auto x = emulated::halves(v);
  return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm256_cvtps_ph(x.low, rounding)),
                                 _mm256_cvtps_ph(x.high, rounding), 1);
}
PF_INLINE __m256bh _mm512_cvtneps_pbh(__m512 v) { return reinterpret_cast<__m256bh>(emulated::to_bf16(v)); }
// The lower half from the second argument.
PF_INLINE __m512bh _mm512_cvtne2ps_pbh(__m512 high, __m512 low) {
  return reinterpret_cast<__m512bh>(emulated::join(emulated::to_bf16(low), emulated::to_bf16(high)));
}
PF_INLINE __m512 _mm512_dpbf16_ps(__m512 c, __m512bh a, __m512bh b) {
  const auto z = emulated::halves(c);
  const auto x = emulated::halves(reinterpret_cast<__m512i>(a)), y = emulated::halves(reinterpret_cast<__m512i>(b));
  return emulated::join(emulated::add_pairs(z.low, x.low, y.low), emulated::add_pairs(z.high, x.high, y.high));
}

}  // namespace pyfused::PYFUSED_ISA

#undef PF_INLINE
