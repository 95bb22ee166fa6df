// exp, tanh and the normal distribution on one vector: fp32 by polynomials (a few units in the last place), fp64 lane
// by lane from the C library, whose functions are no inline code and so bring no instructions of their own.
//
// The polynomials are least-squares fits at Chebyshev points of what their comments say.
#pragma once

#include "simd.h"

namespace pyfused::PYFUSED_ISA {

template <class Acc>
struct VectorMath;

template <>
struct VectorMath<float> {
  using V = Vector<float>;
  using Bits = VectorOf<float>::mask;

  static V constant(double value) { return splat<float>(static_cast<float>(value)); }
  static V where_positive(V z, V a, V b) { return z <= constant(0.0) ? b : a; }

  static V exp(V x) {
    x = x > constant(89.0) ? constant(89.0) : x;  // infinity comes from the scaling; a NaN stays one
    x = x < constant(-104.0) ? constant(-104.0) : x;
    const V magic = constant(12582912.0);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
    const V shifted = x * constant(1.44269504088896341) + magic;
    const V n = shifted - magic;
    const V r = (x - n * constant(0.693359375)) - n * constant(-2.12194440054690583e-4);  // ln 2 in two parts
    V p = constant(1.3933643931522965e-3);                                                // (exp(r) - 1 - r) / r^2
    p = p * r + constant(8.363175205886364e-3);
    p = p * r + constant(4.166646674275398e-2);
    p = p * r + constant(1.6666576266288757e-1);
    p = p * r + constant(0.5);
    p = p * r * r + r + constant(1.0);
    // 2^n in two factors: n goes beyond the exponents of normal numbers on both sides
    const Bits whole = reinterpret_cast<Bits>(shifted) - reinterpret_cast<Bits>(magic);
    const Bits half = whole >> 1;
    return p * power_of_two(half) * power_of_two(whole - half);
  }

  // rest is 1 - sigmoid(z), not by subtraction where it is small
  static V sigmoid(V z, V& rest) {
    const V e = exp(-z);
    const V s = constant(1.0) / (constant(1.0) + e);
    rest = where_positive(z, e * s, constant(1.0) - s);
    return s;
  }

  static V tanh(V z) {
    const Bits sign = reinterpret_cast<Bits>(z) & reinterpret_cast<Bits>(constant(-0.0));
    const V a = reinterpret_cast<V>(reinterpret_cast<Bits>(z) ^ sign);
    const V square = a * a;
    V p = constant(-6.276390049606562e-3);  // (tanh(a) / a - 1) / a^2 for a < 0.6
    p = p * square + constant(2.1116215735673904e-2);
    p = p * square + constant(-5.3875137120485306e-2);
    p = p * square + constant(1.3332924246788025e-1);
    p = p * square + constant(-3.333333134651184e-1);
    const V e = exp(constant(-2.0) * a);
    const V far = (constant(1.0) - e) / (constant(1.0) + e);
    const V value = a < constant(0.6) ? a + a * square * p : far;
    return reinterpret_cast<V>(reinterpret_cast<Bits>(value) | sign);
  }

  static V normal(V z, V& density) {
    const V a = z < constant(0.0) ? -z : z;
    const V t = constant(1.0) / (constant(1.0) + a * constant(0.4 * 0.70710678118654752));
    V p = constant(-2.9378540813922882e-2);  // erfc(x) exp(x^2) / t with x = a / sqrt(2), t = 1 / (1 + 0.4 x)
    p = p * t + constant(1.412786990404129e-1);
    p = p * t + constant(-2.373339831829071e-1);
    p = p * t + constant(1.397441327571869e-1);
    p = p * t + constant(-4.849911853671074e-2);
    p = p * t + constant(8.465249836444855e-2);
    p = p * t + constant(1.1879995465278625e-1);
    p = p * t + constant(1.7177382111549377e-1);
    p = p * t + constant(2.0761072635650635e-1);
    p = p * t + constant(2.2567597031593323e-1);
    p = p * t + constant(2.2567583620548248e-1);
    const V e = exp(constant(-0.5) * a * a);
    density = e * constant(0.39894228040143268);
    const V tail = constant(0.5) * e * t * p;
    return where_positive(z, constant(1.0) - tail, tail);
  }

 private:
  static V power_of_two(Bits n) { return reinterpret_cast<V>((n + 127) << 23); }
};

template <>
struct VectorMath<double> {
  using V = Vector<double>;

  static V constant(double value) { return splat<double>(value); }
  static V where_positive(V z, V a, V b) { return z <= constant(0.0) ? b : a; }
  static V sigmoid(V z, V& rest) {
    for (int i = 0; i < kWidth<double>; ++i) {
      rest[i] = 1.0 / (1.0 + __builtin_exp(z[i]));
      z[i] = 1.0 / (1.0 + __builtin_exp(-z[i]));
    }
    return z;
  }
  static V tanh(V z) {
    for (int i = 0; i < kWidth<double>; ++i) z[i] = __builtin_tanh(z[i]);
    return z;
  }
  static V normal(V z, V& density) {
    for (int i = 0; i < kWidth<double>; ++i) {
      density[i] = 0.39894228040143268 * __builtin_exp(-0.5 * z[i] * z[i]);
      z[i] = 0.5 * __builtin_erfc(-0.70710678118654752 * z[i]);
    }
    return z;
  }
};

}  // namespace pyfused::PYFUSED_ISA
