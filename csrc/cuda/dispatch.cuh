// From run-time types to template arguments.
#pragma once

#include <algorithm>
#include <span>
#include <stdexcept>

#include "fragments.cuh"
#include "types.h"

namespace pyfused {

template <class TX, class TC>
struct Types {
  using Data = TX;
  using Adapter = TC;
};

// Programs under a sanitizer leave out the products of fp16: they are bf16's with another instruction and conversion.
#if defined(PYFUSED_WITHOUT_FP16)
inline constexpr bool kHasFp16 = false;
#else
inline constexpr bool kHasFp16 = true;
#endif

// Calls run with the Types of a call.
template <class F>
void with_types(KernelTypes types, const F& run) {
  const auto is = [&](Dtype data, Dtype adapter) { return types.data == data && types.adapter == adapter; };
  if (is(Dtype::kBFloat16, Dtype::kBFloat16)) return run(Types<bf16, bf16>{});
  if (is(Dtype::kBFloat16, Dtype::kFloat32)) return run(Types<bf16, float>{});
  if constexpr (kHasFp16) {
    if (is(Dtype::kFloat16, Dtype::kFloat16)) return run(Types<fp16, fp16>{});
    if (is(Dtype::kFloat16, Dtype::kFloat32)) return run(Types<fp16, float>{});
  }
  if (is(Dtype::kFloat32, Dtype::kFloat32)) return run(Types<float, float>{});
  if (is(Dtype::kFloat64, Dtype::kFloat64)) return run(Types<double, double>{});
  throw std::runtime_error("pyfused: no kernel for these types");
}

// Calls run with one value of a dtype's type.
template <class F>
void with_dtype(Dtype dtype, const F& run) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return run(bf16{});
    case Dtype::kFloat16:
      return run(fp16{});
    case Dtype::kFloat64:
      return run(double{});
    default:
      return run(float{});
  }
}

// Calls run with up to `most` neighbours of a list at a time.
template <class T, class F>
void for_each_part(std::span<const T> all, size_t most, const F& run) {
  for (size_t first = 0; first < all.size(); first += most) {
    run(all.subspan(first, std::min(most, all.size() - first)));
  }
}

// Whether rows can be copied 16 bytes at a time.
inline bool rows_aligned(const void* data, int64_t ld, int element_size) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && ld * element_size % 16 == 0;
}

template <class T>
T divide_up_to(T n, T d) {
  return (n + d - 1) / d;
}

}  // namespace pyfused
