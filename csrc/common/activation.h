// A bottleneck's activations and their derivatives, for every device. Where exp, tanh and the normal distribution come
// from differs and is the Math argument: static functions on V, a number or a vector of them.
#pragma once

#include <cstdint>

#include "philox.h"  // PYFUSED_HOST_DEVICE

namespace pyfused {

// pyfused/ops/bottleneck.py has the same numbers.
enum class Activation : int64_t { kIdentity, kRelu, kLeakyRelu, kTanh, kSilu, kGelu, kGeluTanh };
inline constexpr int64_t kActivations = 7;

inline constexpr double kLeakySlope = 0.01;
// gelu(z) ~ z / 2 (1 + tanh(a (z + b z^3))), Hendrycks and Gimpel 2016, which is z sigmoid(2 a (z + b z^3)).
inline constexpr double kGeluTanhFactor = 0.79788456080286535588;  // sqrt(2 / pi)
inline constexpr double kGeluTanhCube = 0.044715;

// Math::constant(double), sigmoid(z, rest) with 1 - sigmoid(z) in rest, tanh(z), where_positive(z, a, b): b where z <=
// 0, else a (so also where z is NaN); normal(z, pdf): the standard normal distribution function, its density in pdf.
template <Activation A, class Math, class V>
PYFUSED_HOST_DEVICE inline V activate(V z) {
  if constexpr (A == Activation::kRelu) return Math::where_positive(z, z, Math::constant(0.0));
  if constexpr (A == Activation::kLeakyRelu) return Math::where_positive(z, z, z * Math::constant(kLeakySlope));
  if constexpr (A == Activation::kTanh) return Math::tanh(z);
  if constexpr (A == Activation::kSilu) {
    V rest;
    return z * Math::sigmoid(z, rest);
  }
  if constexpr (A == Activation::kGelu) {
    V density;
    return z * Math::normal(z, density);
  }
  if constexpr (A == Activation::kGeluTanh) {
    const V cubic = z + Math::constant(kGeluTanhCube) * z * z * z;
    V rest;
    return z * Math::sigmoid(Math::constant(2 * kGeluTanhFactor) * cubic, rest);
  }
  return z;
}

// The derivative at z; the activation itself in value.
template <Activation A, class Math, class V>
PYFUSED_HOST_DEVICE inline V activation_gradient(V z, V& value) {
  const V one = Math::constant(1.0);
  if constexpr (A == Activation::kTanh) {
    value = Math::tanh(z);
    return one - value * value;
  }
  if constexpr (A == Activation::kSilu) {
    V rest;
    const V s = Math::sigmoid(z, rest);
    value = z * s;
    return s * (one + z * rest);
  }
  if constexpr (A == Activation::kGelu) {
    V density;
    const V below = Math::normal(z, density);
    value = z * below;
    return below + z * density;
  }
  if constexpr (A == Activation::kGeluTanh) {
    const V square = z * z;
    const V cubic = z + Math::constant(kGeluTanhCube) * square * z;
    V rest;
    const V s = Math::sigmoid(Math::constant(2 * kGeluTanhFactor) * cubic, rest);
    const V inner = Math::constant(2 * kGeluTanhFactor) * (one + Math::constant(3 * kGeluTanhCube) * square);
    value = z * s;
    return s + value * rest * inner;
  }
  value = activate<A, Math>(z);
  if constexpr (A == Activation::kRelu) return Math::where_positive(z, one, Math::constant(0.0));
  if constexpr (A == Activation::kLeakyRelu) return Math::where_positive(z, one, Math::constant(kLeakySlope));
  return one;
}

}  // namespace pyfused
