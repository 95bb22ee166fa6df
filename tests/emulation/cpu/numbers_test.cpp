// Conversions, arithmetic and tiles against Intel's manuals' pseudo code in plain C++. fp32 fused multiply-adds are
// made in fp64, where a product of two fp32 numbers is exact, and rounded to odd before they are rounded to fp32: so no
// number is rounded twice.
#include <cmath>

#include "cases.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// Numbers of a size that sums of them are numbers; now and then zero or close to the subnormal ones.
uint32_t moderate_bits() {
  if (word() % 16 == 0) return (word() & 0x80000000u) | word() % 3 << 22;
  const uint32_t exponent = word() % 8 == 0 ? 1 + word() % 60 : 110 + word() % 30;
  return (word() & 0x807fffffu) | exponent << 23;
}

// ---- numbers --------------------------------------------------------------------------------------------------------

uint16_t to_bf16(uint32_t bits) {
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);
  if (magnitude < 0x00800000u) return static_cast<uint16_t>(bits >> 16 & 0x8000u);
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

void test_conversions() {
  check_many("cvtneps_pbh, cvtne2ps_pbh", [](const Random& r) {
    return same(lanes<uint16_t, 16>([&](int i) { return to_bf16(r.a[i]); }), _mm512_cvtneps_pbh(r.va<__m512>())) &&
           same(lanes<uint16_t, 32>([&](int i) { return to_bf16(i < 16 ? r.b[i] : r.a[i - 16]); }),
                _mm512_cvtne2ps_pbh(r.va<__m512>(), r.vb<__m512>()));
  });
  check_many("cvtepu16_epi32, cvtepi32_epi16", [](const Random& r) {
    const auto halfwords = as<U16>(r.a);
    const __m256i half = _mm512_castsi512_si256(r.va<__m512i>());
    return same(lanes<uint32_t, 16>([&](int i) { return halfwords[i]; }), _mm512_cvtepu16_epi32(half)) &&
           same(lanes<uint16_t, 16>([&](int i) { return r.a[i]; }), _mm512_cvtepi32_epi16(r.va<__m512i>()));
  });
  check_many("cvtph_ps, cvtps_ph", [](const Random& r) {
    const auto halfwords = as<U16>(r.a);
    const __m256i half = _mm512_castsi512_si256(r.va<__m512i>());
    return same(lanes<float, 16>([&](int i) { return _cvtsh_ss(halfwords[i]); }), _mm512_cvtph_ps(half)) &&
           same(lanes<uint16_t, 16>([&](int i) { return _cvtss_sh(as<F32>(r.a)[i], _MM_FROUND_TO_NEAREST_INT); }),
                _mm512_cvtps_ph(r.va<__m512>(), _MM_FROUND_TO_NEAREST_INT));
  });
}

// a b + c with one rounding to the nearest, subnormal numbers being zero.
float flushed(float v) { return std::fabs(v) < 0x1p-126f ? std::copysign(0.0f, v) : v; }
float multiply_add_once(float a, float b, float c) {
  const double product = static_cast<double>(flushed(a)) * flushed(b), addend = flushed(c), sum = product + addend;
  // what rounding to fp64 dropped, by Knuth's sum of two
  const double part = sum - product, rest = (product - (sum - part)) + (addend - part);
  double odd = sum;
  if (rest != 0 && std::isfinite(sum) && (as<uint64_t>(sum) & 1) == 0) {
    odd = std::nextafter(sum, (rest > 0) ? HUGE_VAL : -HUGE_VAL);
  }
  // tininess is told after rounding to 24 bits without a limit of the exponent
  const double magnitude = std::fabs(odd);
  if (magnitude != 0 && magnitude < 0x1p-126 && static_cast<float>(odd * 0x1p64) != std::copysign(0x1p-62f, odd)) {
    return std::copysign(0.0f, static_cast<float>(odd));
  }
  return static_cast<float>(odd);
}
float add_once(float a, float b) { return multiply_add_once(a, 1.0f, b); }
float from_bf16(uint16_t bits) { return as<float>(static_cast<uint32_t>(bits) << 16); }

void test_arithmetic() {
  bool fma = true, pairs = true;
  for (int round = 0; round < kRounds; ++round) {
    const Random r(moderate_bits);
    const auto a = as<F32>(r.a), b = as<F32>(r.b), c = as<F32>(r.c);
    const auto x = as<F64>(r.a), y = as<F64>(r.b), z = as<F64>(r.c);
    fma = fma && same(lanes<float, 16>([&](int i) { return std::fma(a[i], b[i], c[i]); }),
                      _mm512_fmadd_ps(r.va<__m512>(), r.vb<__m512>(), r.vc<__m512>()));
    fma = fma && same(lanes<double, 8>([&](int i) { return std::fma(x[i], y[i], z[i]); }),
                      _mm512_fmadd_pd(r.va<__m512d>(), r.vb<__m512d>(), r.vc<__m512d>()));
    fma = fma && same(lanes<float, 16>([&](int i) { return r.mask >> i & 1 ? a[i] - b[i] : 0.0f; }),
                      _mm512_maskz_sub_ps(static_cast<__mmask16>(r.mask), r.va<__m512>(), r.vb<__m512>()));
    const auto draw = [](int) { return moderate_bits() >> 16; };
    const auto left = lanes<uint16_t, 32>(draw), right = lanes<uint16_t, 32>(draw);
    const auto add = [&](int at, float to) { return multiply_add_once(from_bf16(left[at]), from_bf16(right[at]), to); };
    pairs = pairs && same(lanes<float, 16>([&](int i) { return add(2 * i, add(2 * i + 1, c[i])); }),
                          _mm512_dpbf16_ps(r.vc<__m512>(), as<__m512bh>(left), as<__m512bh>(right)));
  }
  check(fma, "fmadd_ps, fmadd_pd, maskz_sub_ps");
  check(pairs, "dpbf16_ps");
}

// ---- tiles ----------------------------------------------------------------------------------------------------------

void test_tiles() {
  bool products = true, outside = true;
  for (int round = 0; round < 200; ++round) {
    const int rows = 1 + static_cast<int>(word() % 16), columns = 1 + static_cast<int>(word() % 16);
    const int pairs = 1 + static_cast<int>(word() % 16);
    uint16_t a[16][40], b[16][40];
    float c[16][20], expected[16][20];
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 40; ++j) {
        a[i][j] = static_cast<uint16_t>(moderate_bits() >> 16);
        b[i][j] = static_cast<uint16_t>(moderate_bits() >> 16);
      }
      for (int j = 0; j < 20; ++j) c[i][j] = expected[i][j] = as<float>(moderate_bits());
    }
    for (int m = 0; m < rows; ++m) {
      for (int n = 0; n < columns; ++n) {
        float even = 0, odd = 0;
        for (int k = 0; k < pairs; ++k) {
          even = multiply_add_once(from_bf16(a[m][2 * k]), from_bf16(b[k][2 * n]), even);
          odd = multiply_add_once(from_bf16(a[m][2 * k + 1]), from_bf16(b[k][2 * n + 1]), odd);
        }
        expected[m][n] = add_once(c[m][n], add_once(even, odd));
      }
    }
    TileSizes sizes;
    sizes.set(0, rows, columns * 4);
    sizes.set(1, rows, pairs * 4);
    sizes.set(2, pairs, columns * 4);
    sizes.load();
    tile_load<0>(c, sizeof c[0]);
    tile_load<1>(a, sizeof a[0]);
    round % 2 ? tile_load<2>(b, sizeof b[0]) : tile_load_once<2>(b, sizeof b[0]);
    tile_multiply<0, 1, 2>();
    tile_store<0>(c, sizeof c[0]);
    products = products && same(expected, c);
    tile_zero<0>();
    tile_store<0>(c, sizeof c[0]);
    for (int m = 0; m < 16; ++m) {
      for (int n = 0; n < 20; ++n) {
        outside = outside && (m < rows && n < columns ? as<uint32_t>(c[m][n]) == 0 : same(expected[m][n], c[m][n]));
      }
    }
    tile_release();
  }
  check(products, "tiles of any size: load, multiply, store");
  check(outside, "tiles: zero, and nothing beyond their rows and columns");
}

}  // namespace

void test_numbers() {
  test_conversions();
  test_arithmetic();
  test_tiles();
}

}  // namespace pyfused::PYFUSED_ISA
