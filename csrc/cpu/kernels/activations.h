// Activations on vectors of the level.
#pragma once

#include "../../common/activation.h"
#include "simd.h"
#include "vector_math.h"

namespace pyfused::PYFUSED_ISA {

// Calls run with the activation as a template argument.
template <class F>
inline void with_activation(Activation activation, const F& run) {
  switch (activation) {
    case Activation::kRelu:
      return run.template operator()<Activation::kRelu>();
    case Activation::kLeakyRelu:
      return run.template operator()<Activation::kLeakyRelu>();
    case Activation::kTanh:
      return run.template operator()<Activation::kTanh>();
    case Activation::kSilu:
      return run.template operator()<Activation::kSilu>();
    case Activation::kGelu:
      return run.template operator()<Activation::kGelu>();
    case Activation::kGeluTanh:
      return run.template operator()<Activation::kGeluTanh>();
    default:
      return run.template operator()<Activation::kIdentity>();
  }
}

}  // namespace pyfused::PYFUSED_ISA
