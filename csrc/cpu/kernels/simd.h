// One vector of the accumulation type at the width of the ISA level that this file is compiled for: GCC's vector
// extensions for arithmetic, intrinsics only for what they cannot say (16-bit conversions, mask bits).
//
// Everything is in the level's own namespace: two levels never share an inline function, so the linker cannot pick an
// AVX-512 copy for an older CPU. For the same reason nothing of std is used here but memcpy.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
// GCC 12's own headers initialise "undefined" operands with themselves (GCC PR 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

// What is inlined decides about registers in blocked products, and the compiler's own choice changes with unrelated
// code: the loop of an outer product must melt into its caller's finish, a dot product keeps all accumulators in
// registers only on its own.
#define PYFUSED_INLINE_LAMBDA __attribute__((always_inline))
#define PYFUSED_INLINE inline __attribute__((always_inline))

namespace pyfused::PYFUSED_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

// Sums are kept in fp32, in fp64 where the data is fp64.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};
template <class Acc>
using Vector = typename VectorOf<Acc>::type;
template <class Acc>
constexpr int kWidth = kVectorBytes / static_cast<int>(sizeof(Acc));

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Constants as arguments of generic lambdas.
template <int V>
struct Int {
  static constexpr int value = V;
};
template <bool V>
struct Bool {
  static constexpr bool value = V;
};

// The compiler may not read v from memory again for each use. Not where registers are few.
inline void keep_in_register([[maybe_unused]] Vector<float>& v) {
#if defined(__AVX512F__) && !defined(PYFUSED_EMULATE_CPU)
  asm("" : "+v"(v));
#endif
}

template <class Acc>
inline void clear(Acc* c, int64_t ld_c, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r) memset(c + r * ld_c, 0, static_cast<size_t>(columns) * sizeof(Acc));
}

// ---- one element ----------------------------------------------------------------------------------------------------

inline float to_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float load_one(const float* p) { return *p; }
inline double load_one(const double* p) { return *p; }
inline float load_one(const bf16* p) { return to_float(static_cast<uint32_t>(p->bits) << 16); }
inline float load_one(const fp16* p) {
#if defined(__F16C__)
  return _cvtsh_ss(p->bits);
#elif defined(__aarch64__)
  __fp16 value;
  memcpy(&value, &p->bits, sizeof value);
  return static_cast<float>(value);
#else
  const uint32_t sign = static_cast<uint32_t>(p->bits & 0x8000u) << 16;
  const uint32_t magnitude = p->bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return to_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);  // infinity, NaN
  if (magnitude >= 0x0400u) return to_float(sign | ((magnitude << 13) + 0x38000000u));
  const float subnormal = static_cast<float>(magnitude) * 0x1p-24f;
  return to_float(sign | to_bits(subnormal));
#endif
}

inline void store_one(float* p, float value) { *p = value; }
inline void store_one(double* p, double value) { *p = value; }
inline void store_one(float* p, double value) { *p = static_cast<float>(value); }
inline void store_one(bf16* p, float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) {  // NaN: rounding could turn it into infinity
    p->bits = static_cast<uint16_t>(bits >> 16 | 0x40u);
  } else {
    p->bits = static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
  }
}
inline void store_one(fp16* p, float value) {
#if defined(__F16C__)
  p->bits = static_cast<uint16_t>(_cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  const __fp16 half = static_cast<__fp16>(value);
  memcpy(&p->bits, &half, sizeof half);
#else
  const uint32_t bits = to_bits(value);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | (magnitude >> 13 & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: adding 0.5 lets the FPU round at the right bit
    half = to_bits(to_float(magnitude) + 0.5f) - 0x3f000000u;
  }
  p->bits = static_cast<uint16_t>(sign | half);
#endif
}

// fp64 sums go into narrow adapter gradients by way of fp32.
inline void store_one(bf16* p, double value) { store_one(p, static_cast<float>(value)); }
inline void store_one(fp16* p, double value) { store_one(p, static_cast<float>(value)); }

// ---- one vector -----------------------------------------------------------------------------------------------------

template <class Acc>
inline Vector<Acc> splat(Acc value) {
  return value - Vector<Acc>{};
}

template <class T>
inline Vector<Accumulator<T>> load(const T* p) {
  Vector<Accumulator<T>> v;
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    memcpy(&v, p, sizeof v);
  } else {
    for (int i = 0; i < kWidth<float>; ++i) v[i] = load_one(p + i);
  }
  return v;
}

template <class T>
inline void store(T* p, Vector<Accumulator<T>> v) {
  if constexpr (sizeof(T) == sizeof(Accumulator<T>)) {
    memcpy(p, &v, sizeof v);
  } else {
    for (int i = 0; i < kWidth<float>; ++i) store_one(p + i, v[i]);
  }
}

#if defined(__AVX512F__)
template <>
inline Vector<float> load(const bf16* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vector<float>>(_mm512_slli_epi32(wide, 16));
}
template <>
inline Vector<float> load(const fp16* p) {
  return reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
template <>
inline void store(bf16* p, Vector<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh(reinterpret_cast<__m512>(v));
  memcpy(p, &half, sizeof half);
#else
  const __m512i bits = reinterpret_cast<__m512i>(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(v), _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#endif
}
template <>
inline void store(fp16* p, Vector<float> v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
template <>
inline Vector<float> load(const bf16* p) {
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return reinterpret_cast<Vector<float>>(_mm256_slli_epi32(wide, 16));
}
template <>
inline Vector<float> load(const fp16* p) {
  return reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
template <>
inline void store(bf16* p, Vector<float> v) {
  const __m256i bits = reinterpret_cast<__m256i>(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 nan = _mm256_cmp_ps(reinterpret_cast<__m256>(v), reinterpret_cast<__m256>(v), _CMP_UNORD_Q);
  rounded = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
  const __m256i high = _mm256_srli_epi32(rounded, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
template <>
inline void store(fp16* p, Vector<float> v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#endif

template <class T>
inline Vector<Accumulator<T>> load_first(const T* p, int count) {
  Vector<Accumulator<T>> v{};
  for (int i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}

template <class T>
inline void store_first(T* p, Vector<Accumulator<T>> v, int count) {
  for (int i = 0; i < count; ++i) store_one(p + i, v[i]);
}

// a * b + c: one rounding where the level has an instruction for it, wherever it is inlined. The compiler's own choice
// to fuse `a * b + c` differs from place to place, which matters where two loops are to give the same bits.
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<float>>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<float>>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  for (int i = 0; i < kWidth<float>; ++i) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}
inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vector<double>>(
      _mm512_fmadd_pd(reinterpret_cast<__m512d>(a), reinterpret_cast<__m512d>(b), reinterpret_cast<__m512d>(c)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vector<double>>(
      _mm256_fmadd_pd(reinterpret_cast<__m256d>(a), reinterpret_cast<__m256d>(b), reinterpret_cast<__m256d>(c)));
#elif defined(__aarch64__)
  for (int i = 0; i < kWidth<double>; ++i) c[i] = __builtin_fma(a[i], b[i], c[i]);
  return c;
#else
  return a * b + c;
#endif
}

// sum += a * b. Of the instruction's forms this is the one that leaves the sum in its register: with sums in 12 of 16
// the compiler's choice moves some of them, to memory too.
template <class V>
PYFUSED_INLINE void multiply_add_to(V& sum, V a, V b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(sum[0]) == sizeof(float)) {
    asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  } else {
    asm("vfmadd231pd %2, %1, %0" : "+x"(sum) : "x"(a), "x"(b));
  }
#else
  sum = multiply_add(a, b, sum);
#endif
}

// Sum of all lanes, pairwise from the widest half down.
inline float sum_lanes(float __attribute__((vector_size(16))) v) { return (v[0] + v[2]) + (v[1] + v[3]); }
inline double sum_lanes(double __attribute__((vector_size(16))) v) { return v[0] + v[1]; }
#if defined(__AVX2__)
inline float sum_lanes(float __attribute__((vector_size(32))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
inline double sum_lanes(double __attribute__((vector_size(32))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1) + __builtin_shufflevector(v, v, 2, 3));
}
#endif
#if defined(__AVX512F__)
inline float sum_lanes(float __attribute__((vector_size(64))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15));
}
inline double sum_lanes(double __attribute__((vector_size(64))) v) {
  return sum_lanes(__builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7));
}
#endif

// Lane i of the result is the sum of all lanes of the i-th of four, in the order of sum_lanes.
typedef float Quad __attribute__((vector_size(16)));
inline Quad sum_quads(Quad a, Quad b, Quad c, Quad d) {
  const Quad ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
  const Quad cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
  return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
}

// totals[i] = sum_lanes(vectors[i]), four at a time where they are fp32.
template <int Count>
inline void sum_lanes(const double* vectors, double* totals) {
  for (int i = 0; i < Count; ++i) totals[i] = sum_lanes(load(vectors + i * kWidth<double>));
}
template <int Count>
inline void sum_lanes(const float* vectors, float* totals) {
  const auto quad = [&](int i, int q) {
    Quad lanes;
    memcpy(&lanes, vectors + i * kWidth<float> + 4 * q, sizeof lanes);
    return lanes;
  };
  const auto folded = [&](int i) {
    if constexpr (kWidth<float> == 16) return (quad(i, 0) + quad(i, 2)) + (quad(i, 1) + quad(i, 3));
    if constexpr (kWidth<float> == 8) return quad(i, 0) + quad(i, 1);
    return quad(i, 0);
  };
  constexpr int kInFours = Count / 4 * 4;
  for (int i = 0; i < kInFours; i += 4) {
    const Quad sums = sum_quads(folded(i), folded(i + 1), folded(i + 2), folded(i + 3));
    memcpy(totals + i, &sums, sizeof sums);
  }
  for (int i = kInFours; i < Count; ++i) totals[i] = sum_lanes(load(vectors + i * kWidth<float>));
}

// Lane i of v where bit i of bits is set, else 0.
template <class Acc>
inline Vector<Acc> select(uint32_t bits, Vector<Acc> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(Acc) == 4) {
    return reinterpret_cast<Vector<Acc>>(
        _mm512_maskz_mov_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(v)));
  } else {
    return reinterpret_cast<Vector<Acc>>(
        _mm512_maskz_mov_pd(static_cast<__mmask8>(bits), reinterpret_cast<__m512d>(v)));
  }
#else
  using Mask = typename VectorOf<Acc>::mask;
  Mask lane_bit;
  for (int i = 0; i < kWidth<Acc>; ++i) lane_bit[i] = 1 << i;
  const Mask all = static_cast<int32_t>(bits) - Mask{};
  const Mask keep = (all & lane_bit) == lane_bit;
  return reinterpret_cast<Vector<Acc>>(reinterpret_cast<Mask>(v) & keep);
#endif
}

}  // namespace pyfused::PYFUSED_ISA
