// Arguments that the launchers of several ops share: raw pointers and element types, no torch headers.
#pragma once

#include <cstdint>

#include "../common/dtype.h"

namespace pyfused {

// The type of the activations and their gradients, and of the small matrices that they are multiplied with: equal, or
// fp32 matrices on 16-bit data.
struct KernelTypes {
  Dtype data, adapter;
  bool allow_tf32;  // one TF32 product for fp32 numbers instead of three
};
inline constexpr bool types_supported(Dtype data, Dtype adapter) {
  return data == adapter || (adapter == Dtype::kFloat32 && data != Dtype::kFloat64);
}

// Rows of unit stride, ld elements apart.
struct ConstRows {
  const void* data;
  int64_t ld;
};

// A vector of unit stride; null data: there is none.
struct ConstVector {
  const void* data;
  Dtype dtype;
};

// Where the mask comes from: one int64 on the device, and the number of 16-bit values that drop; 0 where none.
struct DropoutSource {
  const int64_t* seed;
  uint32_t threshold;
};

}  // namespace pyfused
