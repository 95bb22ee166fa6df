// Rows of multi_lora's b as the columns of a panel, transposed in registers.
#pragma once

#include "multi_lora.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Adapters lie in memory that the base product has pushed out of the caches. The prefetchers of the hardware stop at
// each page and start anew at each row, so cold rows are asked for this many bytes before they are read.
constexpr int kAheadBytes = 1024;

// Rows of b become columns of a panel kBlockRows at a time, a few ranks of each: a row's 16 bytes are one lane of a
// vector, and the lanes of four vectors are transposed as 4 x 4 words.
constexpr int kLanes = kVectorBytes / 16;
constexpr int kBlockRows = 4 * kLanes;
template <class A>
constexpr int kLaneRanks = 16 / static_cast<int>(sizeof(A));

#if defined(__AVX512F__)
using Words = __m512i;
inline Words low_words(Words a, Words b) { return _mm512_unpacklo_epi32(a, b); }
inline Words high_words(Words a, Words b) { return _mm512_unpackhi_epi32(a, b); }
inline Words low_pairs(Words a, Words b) { return _mm512_unpacklo_epi64(a, b); }
inline Words high_pairs(Words a, Words b) { return _mm512_unpackhi_epi64(a, b); }
// Halves of each word as fp32.
inline void widen(Words v, const bf16*, Vector<float>* even_odd) {
  even_odd[0] = reinterpret_cast<Vector<float>>(_mm512_slli_epi32(v, 16));
  even_odd[1] = reinterpret_cast<Vector<float>>(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline void widen(Words v, const fp16*, Vector<float>* even_odd) {
  even_odd[0] = reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(v)));
  even_odd[1] = reinterpret_cast<Vector<float>>(_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(v, 16))));
}
#elif defined(__AVX2__)
using Words = __m256i;
inline Words low_words(Words a, Words b) { return _mm256_unpacklo_epi32(a, b); }
inline Words high_words(Words a, Words b) { return _mm256_unpackhi_epi32(a, b); }
inline Words low_pairs(Words a, Words b) { return _mm256_unpacklo_epi64(a, b); }
inline Words high_pairs(Words a, Words b) { return _mm256_unpackhi_epi64(a, b); }
inline void widen(Words v, const bf16*, Vector<float>* even_odd) {
  even_odd[0] = reinterpret_cast<Vector<float>>(_mm256_slli_epi32(v, 16));
  even_odd[1] = reinterpret_cast<Vector<float>>(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// The first `bytes` of 16, by words and a half of one.
inline __m128i load_part(const void* p, int bytes) {
  const __m128i whole = _mm_cmpgt_epi32(_mm_set1_epi32(bytes / 4), _mm_setr_epi32(0, 1, 2, 3));
  const __m128i words = _mm_maskload_epi32(static_cast<const int*>(p), whole);
  if (bytes % 4 == 0) return words;
  int16_t last;
  memcpy(&last, static_cast<const char*>(p) + bytes - 2, sizeof last);
  const __m128i place =
      _mm_cmpeq_epi16(_mm_set1_epi16(static_cast<int16_t>(bytes / 2 - 1)), _mm_setr_epi16(0, 1, 2, 3, 4, 5, 6, 7));
  return _mm_or_si128(words, _mm_and_si128(place, _mm_set1_epi16(last)));
}
inline __m128i low_halves(Words v) {
  const Words low = _mm256_and_si256(v, _mm256_set1_epi32(0xffff));
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08));
}
inline void widen(Words v, const fp16*, Vector<float>* even_odd) {
  even_odd[0] = reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(low_halves(v)));
  even_odd[1] = reinterpret_cast<Vector<float>>(_mm256_cvtph_ps(low_halves(_mm256_srli_epi32(v, 16))));
}
#else
typedef uint32_t Words __attribute__((vector_size(16)));
inline Words low_words(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
inline Words high_words(Words a, Words b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
inline Words low_pairs(Words a, Words b) { return __builtin_shufflevector(a, b, 0, 1, 4, 5); }
inline Words high_pairs(Words a, Words b) { return __builtin_shufflevector(a, b, 2, 3, 6, 7); }
template <class A>
inline void widen(Words v, const A*, Vector<float>* even_odd) {
  for (int i = 0; i < 4; ++i) {
    const A low{static_cast<uint16_t>(v[i])}, high{static_cast<uint16_t>(v[i] >> 16)};
    even_odd[0][i] = load_one(&low);
    even_odd[1][i] = load_one(&high);
  }
}
#endif

// The first 16 bytes, or `bytes` of them and zeros, of rows that are ld elements apart. Nothing else is read.
template <class A>
PYFUSED_INLINE Words load_lanes(const A* p, int64_t ld, int bytes) {
#if defined(__AVX512F__)
  const auto lane = [&](int j) PYFUSED_INLINE_LAMBDA {
    return bytes == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * ld))
                       : _mm_maskz_loadu_epi16(static_cast<__mmask8>((1 << bytes / 2) - 1), p + j * ld);
  };
  const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
  const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(lane(2)), lane(3), 1);
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
#elif defined(__AVX2__)
  const auto lane = [&](int j) PYFUSED_INLINE_LAMBDA {
    return bytes == 16 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + j * ld)) : load_part(p + j * ld, bytes);
  };
  return _mm256_inserti128_si256(_mm256_castsi128_si256(lane(0)), lane(1), 1);
#else
  Words words{};
  for (int j = 0; j < kLanes; ++j) {
    char* to = reinterpret_cast<char*>(&words) + 16 * j;
    if (bytes == 16) {
      memcpy(to, p + j * ld, 16);
    } else {
      memcpy(to, p + j * ld, static_cast<size_t>(bytes));
    }
  }
  return words;
#endif
}

// The 4 x 4 words of each lane transposed.
PYFUSED_INLINE void transpose_words(const Words (&row)[4], Words (&words)[4]) {
  const Words low01 = low_words(row[0], row[1]), low23 = low_words(row[2], row[3]);
  const Words high01 = high_words(row[0], row[1]), high23 = high_words(row[2], row[3]);
  words[0] = low_pairs(low01, low23);
  words[1] = high_pairs(low01, low23);
  words[2] = low_pairs(high01, high23);
  words[3] = high_pairs(high01, high23);
}

// The same, widened: column[r] has rank r of the rows.
template <class A>
PYFUSED_INLINE void transpose_lanes(const Words (&row)[4], Vector<float> (&column)[kLaneRanks<A>]) {
  Words words[4];
  transpose_words(row, words);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(A) == 2) {
      widen(words[i], static_cast<const A*>(nullptr), column + 2 * i);
    } else {
      column[i] = reinterpret_cast<Vector<float>>(words[i]);
    }
  }
}

// column[r][j] = b[j][r] for kBlockRows rows and the ranks of a lane, of which there are `ranks`; 0 for the others.
template <class A>
PYFUSED_INLINE void transpose_block(const A* b, int64_t ld, int ranks, Vector<float> (&column)[kLaneRanks<A>]) {
  Words row[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) row[i] = load_lanes(b + i * ld, 4 * ld, ranks * static_cast<int>(sizeof(A)));
  transpose_lanes<A>(row, column);
}

#if defined(__AVX512F__)
// The same for rows that lie beside each other and are a lane each, as those of rank 8 in 16 bits: whole vectors are
// loaded, and the rows come out in another order, which in_order() puts right.
template <class A>
PYFUSED_INLINE void transpose_packed(const A* b, Vector<float> (&column)[kLaneRanks<A>]) {
  const Words row[4] = {_mm512_loadu_si512(b), _mm512_loadu_si512(b + 4 * kLaneRanks<A>),
                        _mm512_loadu_si512(b + 8 * kLaneRanks<A>), _mm512_loadu_si512(b + 12 * kLaneRanks<A>)};
  transpose_lanes<A>(row, column);
}
inline Vector<float> in_order(Vector<float> v) {
  return __builtin_shufflevector(v, v, 0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
}
#endif

// panel[r][j] = b[j][r] for kBlockRows rows and the ranks of a lane.
template <class A>
PYFUSED_INLINE void pack_block(const A* b, int64_t ld, int ranks, float* panel) {
  Vector<float> column[kLaneRanks<A>];
  transpose_block(b, ld, ranks, column);
#pragma GCC unroll 8
  for (int r = 0; r < kLaneRanks<A>; ++r) store(panel + r * kPackedColumns, column[r]);
}

// Before kBlockRows rows are read.
template <class A>
PYFUSED_INLINE void ask_ahead(const A* rows, int64_t ld_b, int64_t R) {
  if (ld_b != R) return;
  const char* ahead = reinterpret_cast<const char*>(rows + kBlockRows * R) + kAheadBytes;
  for (int64_t i = 0; i < kBlockRows * R * static_cast<int64_t>(sizeof(A)); i += 64) __builtin_prefetch(ahead + i);
}

// panel[r][j] = b[j][r] for j in [0, columns), 0 from there on.
template <class Acc, class A>
void pack_panel(const A* b, int64_t ld_b, int64_t columns, int64_t R, Acc* panel) {
  if (columns < kPackedColumns) memset(panel, 0, static_cast<size_t>(R * kPackedColumns) * sizeof(Acc));
  int64_t j = 0;
  if constexpr (sizeof(Acc) == sizeof(float)) {
    for (; j + kBlockRows <= columns; j += kBlockRows) {
      const A* rows = b + j * ld_b;
      ask_ahead(rows, ld_b, R);
      int64_t r = 0;
      for (; r + kLaneRanks<A> <= R; r += kLaneRanks<A>) {
        pack_block(rows + r, ld_b, kLaneRanks<A>, panel + r * kPackedColumns + j);
      }
      if (r < R) pack_block(rows + r, ld_b, static_cast<int>(R - r), panel + r * kPackedColumns + j);
    }
  }
  for (; j < columns; ++j) {
    for (int64_t r = 0; r < R; ++r) panel[r * kPackedColumns + j] = static_cast<Acc>(load_one(b + j * ld_b + r));
  }
}

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
