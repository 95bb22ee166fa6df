// A bottleneck's activations on one number, the activation known at run time only: they are applied to M x H elements.
// And its scale.
#pragma once

#include <cmath>

#include "bottleneck.h"
#include "fragments.cuh"

namespace pyfused {

// The Math of common/activation.h. CUDA's own functions, a few units in the last place.
template <class S>
struct DeviceMath {
  static PYFUSED_HOST_DEVICE S constant(double value) { return static_cast<S>(value); }
  static PYFUSED_HOST_DEVICE S where_positive(S z, S a, S b) { return z <= S(0) ? b : a; }
  static PYFUSED_HOST_DEVICE S exponential(S z) {
    if constexpr (sizeof(S) == 8) return exp(z);
    return expf(z);
  }
  static PYFUSED_HOST_DEVICE S sigmoid(S z, S& rest) {
    const S e = exponential(-z);
    const S s = S(1) / (S(1) + e);
    rest = z <= S(0) ? S(1) - s : e * s;
    return s;
  }
  static PYFUSED_HOST_DEVICE S tanh(S z) {
    if constexpr (sizeof(S) == 8) return ::tanh(z);
    return ::tanhf(z);
  }
  static PYFUSED_HOST_DEVICE S normal(S z, S& density) {
    density = static_cast<S>(0.39894228040143268) * exponential(S(-0.5) * z * z);
    const S argument = static_cast<S>(-0.70710678118654752) * z;
    if constexpr (sizeof(S) == 8) return S(0.5) * erfc(argument);
    return S(0.5) * erfcf(argument);
  }
};

// The activation at z, its derivative in slope.
template <class S>
__device__ __forceinline__ S activate_at(Activation activation, S z, S& slope) {
  S value;
  switch (activation) {
    case Activation::kRelu:
      slope = activation_gradient<Activation::kRelu, DeviceMath<S>>(z, value);
      break;
    case Activation::kLeakyRelu:
      slope = activation_gradient<Activation::kLeakyRelu, DeviceMath<S>>(z, value);
      break;
    case Activation::kTanh:
      slope = activation_gradient<Activation::kTanh, DeviceMath<S>>(z, value);
      break;
    case Activation::kSilu:
      slope = activation_gradient<Activation::kSilu, DeviceMath<S>>(z, value);
      break;
    case Activation::kGelu:
      slope = activation_gradient<Activation::kGelu, DeviceMath<S>>(z, value);
      break;
    case Activation::kGeluTanh:
      slope = activation_gradient<Activation::kGeluTanh, DeviceMath<S>>(z, value);
      break;
    default:
      slope = activation_gradient<Activation::kIdentity, DeviceMath<S>>(z, value);
  }
  return value;
}

template <class S>
__device__ __forceinline__ S scale_at(const BottleneckScale& scale, int64_t i) {
  const S factor = static_cast<S>(scale.factor);
  if (scale.vector.data == nullptr) return factor;
  return factor * load_as<S>(scale.vector, scale.size == 1 ? 0 : i);
}

}  // namespace pyfused
