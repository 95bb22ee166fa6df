// Element types as host and kernels name them, without torch's headers.
#pragma once

namespace pyfused {

enum class Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };
inline constexpr int kDtypes = 4;

// Bytes of one element.
inline constexpr int size_of(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

}  // namespace pyfused
