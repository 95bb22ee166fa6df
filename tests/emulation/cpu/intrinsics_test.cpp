// Every intrinsic and tile instruction that kernels use against a plain formula, on random and on special numbers: here
// those that move lanes, numbers_test.cpp the others. Compiled twice: emulated, and with the real instructions for
// machines that have them, where the formulas, too, are shown to be right.
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>

#include "cases.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// ---- lanes and their places -----------------------------------------------------------------------------------------

void test_words() {
#define PF_WORDS(name, formula)                                                                                        \
  check_many(#name, [](const Random& r) {                                                                              \
    const auto a = r.a, b = r.b;                                                                                       \
    return same(lanes<uint32_t, 16>([&](int i) { return formula; }), _mm512_##name(r.va<__m512i>(), r.vb<__m512i>())); \
  })
  PF_WORDS(add_epi32, a[i] + b[i]);
  PF_WORDS(mullo_epi32, a[i] * b[i]);
  PF_WORDS(and_si512, a[i] & b[i]);
  PF_WORDS(or_si512, a[i] | b[i]);
  PF_WORDS(xor_si512, a[i] ^ b[i]);
  PF_WORDS(unpacklo_epi32, (i % 2 ? b : a)[i / 4 * 4 + i % 4 / 2]);
  PF_WORDS(unpackhi_epi32, (i % 2 ? b : a)[i / 4 * 4 + 2 + i % 4 / 2]);
#undef PF_WORDS
#define PF_DOUBLEWORDS(name, formula)                                                                                 \
  check_many(#name, [](const Random& r) {                                                                             \
    const auto a = as<U64>(r.a), b = as<U64>(r.b);                                                                    \
    return same(lanes<uint64_t, 8>([&](int i) { return formula; }), _mm512_##name(r.va<__m512i>(), r.vb<__m512i>())); \
  })
  PF_DOUBLEWORDS(add_epi64, a[i] + b[i]);
  PF_DOUBLEWORDS(mul_epu32, (a[i] & 0xffffffffu) * (b[i] & 0xffffffffu));
  PF_DOUBLEWORDS(unpacklo_epi64, (i % 2 ? b : a)[i / 2 * 2]);
  PF_DOUBLEWORDS(unpackhi_epi64, (i % 2 ? b : a)[i / 2 * 2 + 1]);
#undef PF_DOUBLEWORDS
#define PF_HALFWORDS(name, formula)                                                                                    \
  check_many(#name, [](const Random& r) {                                                                              \
    const auto a = as<U16>(r.a), b = as<U16>(r.b);                                                                     \
    return same(lanes<uint16_t, 32>([&](int i) { return formula; }), _mm512_##name(r.va<__m512i>(), r.vb<__m512i>())); \
  })
  PF_HALFWORDS(unpacklo_epi16, (i % 2 ? b : a)[i / 8 * 8 + i % 8 / 2]);
  PF_HALFWORDS(unpackhi_epi16, (i % 2 ? b : a)[i / 8 * 8 + 4 + i % 8 / 2]);
  PF_HALFWORDS(permutexvar_epi16, b[a[i] % 32]);
#undef PF_HALFWORDS
  check_many("slli_epi32, srli_epi32", [](const Random& r) {
    const __m512i a = r.va<__m512i>();
    return same(lanes<uint32_t, 16>([&](int i) { return r.a[i] << 16; }), _mm512_slli_epi32(a, 16)) &&
           same(lanes<uint32_t, 16>([&](int i) { return r.a[i] >> 3; }), _mm512_srli_epi32(a, 3));
  });
  check_many("ternarylogic_epi64", [](const Random& r) {
    const __m512i a = r.va<__m512i>(), b = r.vb<__m512i>(), c = r.vc<__m512i>();
    return same(lanes<uint32_t, 16>([&](int i) { return r.a[i] ^ r.b[i] ^ r.c[i]; }),
                _mm512_ternarylogic_epi64(a, b, c, 0x96)) &&
           same(lanes<uint32_t, 16>([&](int i) { return (r.a[i] & r.b[i]) | (~r.a[i] & r.c[i]); }),
                _mm512_ternarylogic_epi64(a, b, c, 0xca));
  });
  check_many("shuffle_epi32", [](const Random& r) {
    return same(lanes<uint32_t, 16>([&](int i) { return r.a[i ^ 1]; }),
                _mm512_shuffle_epi32(r.va<__m512i>(), _MM_PERM_CDAB));
  });
  check_many("shuffle_ps, unpacklo_ps, unpackhi_ps", [](const Random& r) {
    const __m512 a = r.va<__m512>(), b = r.vb<__m512>();
    const auto pick = [&](int order) {
      return lanes<uint32_t, 16>(
          [&](int i) { return (i % 4 < 2 ? r.a : r.b)[i / 4 * 4 + (order >> 2 * (i % 4) & 3)]; });
    };
    const auto interleave = [&](int from) {
      return lanes<uint32_t, 16>([&](int i) { return (i % 2 ? r.b : r.a)[i / 4 * 4 + from + i % 4 / 2]; });
    };
    return same(pick(0x44), _mm512_shuffle_ps(a, b, 0x44)) && same(pick(0x9e), _mm512_shuffle_ps(a, b, 0x9e)) &&
           same(interleave(0), _mm512_unpacklo_ps(a, b)) && same(interleave(2), _mm512_unpackhi_ps(a, b));
  });
  check_many("shuffle_i32x4, shuffle_i64x2", [](const Random& r) {
    const __m512i a = r.va<__m512i>(), b = r.vb<__m512i>();
    const auto pick = [&](int order) {
      return lanes<uint32_t, 16>([&](int i) { return (i < 8 ? r.a : r.b)[(order >> 2 * (i / 4) & 3) * 4 + i % 4]; });
    };
    return same(pick(0x88), _mm512_shuffle_i32x4(a, b, 0x88)) && same(pick(0xdd), _mm512_shuffle_i32x4(a, b, 0xdd)) &&
           same(pick(0xd8), _mm512_shuffle_i64x2(a, b, 0xd8));
  });
  check_many("permutexvar_epi64, permutex2var_epi64, permutex2var_ps", [](const Random& r) {
    const auto a = as<U64>(r.a), b = as<U64>(r.b), at = as<U64>(r.c);
    const __m512i va = r.va<__m512i>(), vb = r.vb<__m512i>(), index = r.vc<__m512i>();
    return same(lanes<uint64_t, 8>([&](int i) { return a[at[i] % 8]; }), _mm512_permutexvar_epi64(index, va)) &&
           same(lanes<uint64_t, 8>([&](int i) { return (at[i] / 8 % 2 ? b : a)[at[i] % 8]; }),
                _mm512_permutex2var_epi64(va, index, vb)) &&
           same(lanes<uint32_t, 16>([&](int i) { return (r.c[i] / 16 % 2 ? r.b : r.a)[r.c[i] % 16]; }),
                _mm512_permutex2var_ps(r.va<__m512>(), index, r.vb<__m512>()));
  });
}

void test_parts() {
  check_many("set, set1, setzero", [](const Random& r) {
    const auto a = r.a;
    const auto w = as<U64>(a);
    const auto n = [&](int i) { return static_cast<int32_t>(a[i]); };
    const auto d = [&](int i) { return static_cast<int64_t>(w[i]); };
    return same(a, _mm512_set_epi32(n(15), n(14), n(13), n(12), n(11), n(10), n(9), n(8), n(7), n(6), n(5), n(4), n(3),
                                    n(2), n(1), n(0))) &&
           same(a, _mm512_set_epi64(d(7), d(6), d(5), d(4), d(3), d(2), d(1), d(0))) &&
           same(lanes<uint16_t, 32>([&](int) { return a[0]; }), _mm512_set1_epi16(static_cast<int16_t>(a[0]))) &&
           same(lanes<uint32_t, 16>([&](int) { return a[0]; }), _mm512_set1_epi32(n(0))) &&
           same(lanes<uint64_t, 8>([&](int) { return w[0]; }), _mm512_set1_epi64(d(0))) &&
           same(U32{}, _mm512_setzero_si512()) && same(U32{}, _mm512_setzero_ps());
  });
  check_many("casts, broadcasts, parts taken out and put in", [](const Random& r) {
    const __m512i a = r.va<__m512i>(), b = r.vb<__m512i>();
    const __m512 floats = r.va<__m512>();
    struct Halves {
      __m256i part[2];
    };
    struct Quarters {
      __m128i part[4];
    };
    const auto halves = as<Halves>(r.a);
    const auto quarters = as<Quarters>(r.a), other = as<Quarters>(r.b);
    Quarters third = other;
    third.part[2] = quarters.part[1];
    const Quarters first{quarters.part[1], quarters.part[1], quarters.part[1], quarters.part[1]};
    return same(halves.part[0], _mm512_castsi512_si256(a)) && same(halves.part[1], _mm512_extracti64x4_epi64(a, 1)) &&
           same(quarters.part[0], _mm512_castps512_ps128(floats)) &&
           same(quarters.part[1], _mm512_extractf32x4_ps(floats, 1)) &&
           same(quarters.part[3], _mm512_extractf32x4_ps(floats, 3)) &&
           same(halves.part[0], _mm512_castsi512_si256(_mm512_castsi256_si512(halves.part[0]))) &&
           same(quarters.part[0],
                _mm512_castps512_ps128(_mm512_castsi512_ps(_mm512_castsi128_si512(quarters.part[0])))) &&
           same(third, _mm512_inserti32x4(b, quarters.part[1], 2)) &&
           same(Halves{{halves.part[0], halves.part[0]}}, _mm512_inserti64x4(a, halves.part[0], 1)) &&
           same(first, _mm512_broadcast_f32x4(_mm_castsi128_ps(quarters.part[1]))) &&
           same(Halves{{halves.part[1], halves.part[1]}},
                _mm512_castpd_ps(_mm512_broadcast_f64x4(_mm256_castsi256_pd(halves.part[1]))));
  });
}

// ---- masks and memory -----------------------------------------------------------------------------------------------

void test_masks() {
  check_many("cmp_ps_mask, cmpge_epu16_mask, _store_mask32", [](const Random& r) {
    const auto a = as<F32>(r.a), b = as<F32>(r.b);
    const auto low = as<U16>(r.a), high = as<U16>(r.b);
    uint32_t unordered = 0, unequal = 0, greater = 0, stored = 0;
    for (int i = 0; i < 16; ++i) {
      unordered |= static_cast<uint32_t>(std::isnan(a[i]) || std::isnan(b[i])) << i;
      unequal |= static_cast<uint32_t>(!(a[i] == b[i])) << i;
    }
    for (int i = 0; i < 32; ++i) greater |= static_cast<uint32_t>(low[i] >= high[i]) << i;
    const __mmask32 got = _mm512_cmpge_epu16_mask(r.va<__m512i>(), r.vb<__m512i>());
    _store_mask32(reinterpret_cast<__mmask32*>(&stored), got);
    return _mm512_cmp_ps_mask(r.va<__m512>(), r.vb<__m512>(), _CMP_UNORD_Q) == unordered &&
           _mm512_cmp_ps_mask(r.va<__m512>(), r.vb<__m512>(), _CMP_NEQ_UQ) == unequal && got == greater &&
           stored == greater;
  });
  check_many("mask_mov, maskz_mov, mask_blend, mask_or, maskz_permutexvar", [](const Random& r) {
    const __m512i a = r.va<__m512i>(), b = r.vb<__m512i>(), c = r.vc<__m512i>();
    const auto a16 = as<U16>(r.a), b16 = as<U16>(r.b);
    const auto a64 = as<U64>(r.a);
    const auto bit = [&](int i) { return r.mask >> i & 1; };
    const auto mask16 = static_cast<__mmask16>(r.mask);
    return same(lanes<uint16_t, 32>([&](int i) { return bit(i) ? b16[i] : a16[i]; }),
                _mm512_mask_mov_epi16(a, r.mask, b)) &&
           same(lanes<uint16_t, 32>([&](int i) { return bit(i) ? a16[i] : 0; }), _mm512_maskz_mov_epi16(r.mask, a)) &&
           same(lanes<uint32_t, 16>([&](int i) { return bit(i) ? r.a[i] : 0; }),
                _mm512_maskz_mov_ps(mask16, r.va<__m512>())) &&
           same(lanes<uint64_t, 8>([&](int i) { return bit(i) ? a64[i] : 0; }),
                _mm512_maskz_mov_pd(static_cast<__mmask8>(r.mask), r.va<__m512d>())) &&
           same(lanes<uint32_t, 16>([&](int i) { return bit(i) ? r.b[i] : r.a[i]; }),
                _mm512_mask_blend_epi32(mask16, a, b)) &&
           same(lanes<uint32_t, 16>([&](int i) { return bit(i) ? r.b[i] | r.c[i] : r.a[i]; }),
                _mm512_mask_or_epi32(a, mask16, b, c)) &&
           same(lanes<uint16_t, 32>([&](int i) { return bit(i) ? b16[a16[i] % 32] : 0; }),
                _mm512_maskz_permutexvar_epi16(r.mask, a, b));
  });
}

void test_memory() {
  check_many("loads and stores, with masks and without", [](const Random& r) {
    alignas(64) char from[128], to[128];
    memcpy(from, &r.a, 64);
    memcpy(from + 64, &r.b, 64);
    const __m512i v = r.vc<__m512i>();
    const auto bit = [&](int i) { return r.mask >> i & 1; };
    const auto mask16 = static_cast<__mmask16>(r.mask);
    U16 at2;
    memcpy(&at2, from + 2, sizeof at2);
    U32 at4;
    memcpy(&at4, from + 4, sizeof at4);
    bool good = same(r.a, _mm512_load_si512(from)) && same(at2, _mm512_loadu_si512(from + 2)) &&
                same(lanes<uint16_t, 32>([&](int i) { return bit(i) ? at2[i] : 0; }),
                     _mm512_maskz_loadu_epi16(r.mask, from + 2)) &&
                same(lanes<uint16_t, 16>([&](int i) { return bit(i) ? at2[i] : 0; }),
                     _mm256_maskz_loadu_epi16(mask16, from + 2)) &&
                same(lanes<uint16_t, 8>([&](int i) { return bit(i) ? at2[i] : 0; }),
                     _mm_maskz_loadu_epi16(static_cast<__mmask8>(r.mask), from + 2)) &&
                same(lanes<uint32_t, 16>([&](int i) { return bit(i) ? at4[i] : 0; }),
                     _mm512_maskz_loadu_ps(mask16, from + 4)) &&
                same(lanes<uint32_t, 16>([&](int i) { return bit(i) ? r.a[i] : r.c[i]; }),
                     _mm512_mask_load_ps(r.vc<__m512>(), mask16, from));
    // what a store leaves of `from`, `width` bytes a lane
    const auto stored = [&](int64_t offset, int count, int width) {
      char expected[128];
      memcpy(expected, from, sizeof expected);
      for (int i = 0; i < count; ++i) {
        if (bit(i)) memcpy(expected + offset + i * width, reinterpret_cast<const char*>(&r.c) + i * width, width);
      }
      return memcmp(expected, to, sizeof to) == 0;
    };
    memcpy(to, from, sizeof to);
    _mm512_mask_storeu_epi16(to + 2, r.mask, v);
    good = good && stored(2, 32, 2);
    memcpy(to, from, sizeof to);
    _mm256_mask_storeu_epi16(to + 2, mask16, _mm512_castsi512_si256(v));
    good = good && stored(2, 16, 2);
    memcpy(to, from, sizeof to);
    _mm512_mask_storeu_ps(to + 4, mask16, r.vc<__m512>());
    good = good && stored(4, 16, 4);
    _mm512_store_si512(to, v);
    good = good && memcmp(to, &r.c, 64) == 0;
    _mm512_storeu_si512(to + 2, v);
    return good && memcmp(to + 2, &r.c, 64) == 0;
  });
  check_many("gathers and scatters", [](const Random& r) {
    uint32_t table[64], to[64] = {}, expected[64] = {};
    for (int i = 0; i < 64; ++i) table[i] = r.a[i % 16] + static_cast<uint32_t>(i);
    const auto index = lanes<int32_t, 16>([&](int i) { return static_cast<int32_t>(r.b[i] % 64) - 32; });
    const __m512i at = as<__m512i>(index);
    const uint32_t* middle = table + 32;
    const auto mask16 = static_cast<__mmask16>(r.mask);
    for (int i = 0; i < 16; ++i) expected[index[i] + 32] = r.c[i];
    _mm512_i32scatter_epi32(to + 32, at, r.vc<__m512i>(), 4);
    const auto gathered = lanes<uint32_t, 16>([&](int i) { return middle[index[i]]; });
    return memcmp(to, expected, sizeof to) == 0 && same(gathered, _mm512_i32gather_epi32(at, middle, 4)) &&
           same(gathered, _mm512_i32gather_ps(at, middle, 4)) &&
           same(lanes<uint32_t, 16>([&](int i) { return mask16 >> i & 1 ? middle[index[i]] : r.c[i]; }),
                _mm512_mask_i32gather_ps(r.vc<__m512>(), mask16, at, middle, 4));
  });
  // Of two pages the second may not be touched; the first ends after nine lanes.
  const int64_t size = sysconf(_SC_PAGESIZE);
  void* pages =
      mmap(nullptr, static_cast<size_t>(2 * size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  check(pages != MAP_FAILED, "memory for it");
  char* end = static_cast<char*>(pages) + size;
  mprotect(end, static_cast<size_t>(size), PROT_NONE);
  _mm512_mask_storeu_epi16(end - 18, 0x1ff, _mm512_maskz_loadu_epi16(0x1ff, end - 18));
  _mm512_mask_storeu_ps(end - 36, 0x1ff, _mm512_maskz_loadu_ps(0x1ff, end - 36));
  check(true, "lanes that are masked out are neither read nor written");
}

}  // namespace

int run() {
#if !defined(PYFUSED_EMULATE_CPU)
  syscall(SYS_arch_prctl, 0x1023, 18);  // Linux wants to be asked for tiles
#endif
  test_words();
  test_parts();
  test_masks();
  test_memory();
  test_numbers();
  return exit_status();
}

}  // namespace pyfused::PYFUSED_ISA

int main() { return pyfused::PYFUSED_ISA::run(); }
