// Tensor-core fragments that every kernel shares, and their products.
//
// A warp works on 16 x 16 tiles of an activation (operand A) against 16 x 8 tiles of a small matrix (operand B), with
// 16 x 8 sums. With g = lane / 4 and t = lane % 4 a lane holds
//
//   A  rows g, g + 8   columns 2t, 2t + 1, 2t + 8, 2t + 9, as pairs 0 (g, 2t), 1 (g + 8, 2t), 2 (g, 2t + 8),
//                      3 (g + 8, 2t + 8)
//   B  column g        rows 2t, 2t + 1, 2t + 8, 2t + 9
//   D  rows g, g + 8   columns 2t, 2t + 1, as d[0], d[1] (row g), d[2], d[3] (row g + 8)
//
// for every type: bf16 and fp16 by one mma.m16n8k16, fp32 by two mma.m16n8k8 in TF32 (or six, see below), fp64 by eight
// mma.m8n8k4. The latter two take the products over k in another order than the columns, the same for A and B.
#pragma once

#include <cstdint>
#include <type_traits>

#include "platform.cuh"
#include "types.h"

namespace pyfused {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
inline constexpr bool is_16bit = sizeof(T) == 2;

// The type that products are formed in, from x's type and the adapter's; and the type that they are summed in.
template <class TX, class TC>
using Compute = std::conditional_t<is_16bit<TX> && std::is_same_v<TX, TC>, TX,
                                   std::conditional_t<std::is_same_v<TX, double>, double, float>>;
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// --- conversions ---

template <class To, class From>
__device__ __forceinline__ To convert(From value) {
  if constexpr (std::is_same_v<To, From>) {
    return value;
  } else if constexpr (std::is_same_v<To, bf16>) {
    return __float2bfloat16(static_cast<float>(value));
  } else if constexpr (std::is_same_v<To, fp16>) {
    return __float2half(static_cast<float>(value));
  } else if constexpr (std::is_same_v<From, bf16>) {
    return static_cast<To>(__bfloat162float(value));
  } else if constexpr (std::is_same_v<From, fp16>) {
    return static_cast<To>(__half2float(value));
  } else {
    return static_cast<To>(value);
  }
}

// An element whose type is known at run time only; for a vector [R], not for loops over M.
template <class T>
__device__ __forceinline__ T load_as(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kBFloat16:
      return convert<T>(static_cast<const bf16*>(data)[i]);
    case Dtype::kFloat16:
      return convert<T>(static_cast<const fp16*>(data)[i]);
    case Dtype::kFloat64:
      return convert<T>(static_cast<const double*>(data)[i]);
    default:
      return convert<T>(static_cast<const float*>(data)[i]);
  }
}
template <class T>
__device__ __forceinline__ T load_as(const ConstVector& vector, int64_t i) {
  return load_as<T>(vector.data, vector.dtype, i);
}
template <class T>
__device__ __forceinline__ void store_as(void* data, Dtype dtype, int64_t i, T value) {
  switch (dtype) {
    case Dtype::kBFloat16:
      static_cast<bf16*>(data)[i] = convert<bf16>(value);
      break;
    case Dtype::kFloat16:
      static_cast<fp16*>(data)[i] = convert<fp16>(value);
      break;
    case Dtype::kFloat64:
      static_cast<double*>(data)[i] = convert<double>(value);
      break;
    default:
      static_cast<float*>(data)[i] = convert<float>(value);
  }
}

template <class T>
struct alignas(2 * sizeof(T)) Pair {
  T low, high;
};

// Two 16-bit numbers in one register, and back.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const Pair<T> pair{convert<T>(low), convert<T>(high)};
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}

// --- fragments ---

template <class T>
struct FragmentA {  // fp32 and fp64: pair i is v[2 i], v[2 i + 1]
  T v[8];
};
template <>
struct FragmentA<bf16> {
  uint32_t v[4];
};
template <>
struct FragmentA<fp16> {
  uint32_t v[4];
};
template <class T>
struct FragmentB {
  T v[4];
};
template <>
struct FragmentB<bf16> {
  uint32_t v[2];
};
template <>
struct FragmentB<fp16> {
  uint32_t v[2];
};

template <class T, class Value>
__device__ __forceinline__ void set_pair(FragmentA<T>& a, int pair, Value low, Value high) {
  if constexpr (is_16bit<T>) {
    a.v[pair] = pack<T>(low, high);
  } else {
    a.v[2 * pair] = convert<T>(low);
    a.v[2 * pair + 1] = convert<T>(high);
  }
}
template <class T, class Value>
__device__ __forceinline__ void set_pair(FragmentB<T>& b, int pair, Value low, Value high) {
  if constexpr (is_16bit<T>) {
    b.v[pair] = pack<T>(low, high);
  } else {
    b.v[2 * pair] = convert<T>(low);
    b.v[2 * pair + 1] = convert<T>(high);
  }
}

// From a tile of memory with rows of unit stride, stride elements apart; for B the rows are its columns.
template <class T, class From>
__device__ __forceinline__ FragmentA<T> load_a(const From* tile, int stride, int lane) {
  FragmentA<T> a;
  const From* at = tile + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const From* from = at + (i & 1) * 8 * stride + (i >> 1) * 8;
    if constexpr (is_16bit<T>) {
      static_assert(std::is_same_v<T, From>);
      a.v[i] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      const Pair<From> pair = *reinterpret_cast<const Pair<From>*>(from);
      set_pair(a, i, convert<T>(pair.low), convert<T>(pair.high));
    }
  }
  return a;
}
template <class T, class From>
__device__ __forceinline__ FragmentB<T> load_b(const From* tile, int stride, int lane) {
  FragmentB<T> b;
  const From* at = tile + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (is_16bit<T>) {
      static_assert(std::is_same_v<T, From>);
      b.v[i] = *reinterpret_cast<const uint32_t*>(at + i * 8);
    } else {
      const Pair<From> pair = *reinterpret_cast<const Pair<From>*>(at + i * 8);
      set_pair(b, i, convert<T>(pair.low), convert<T>(pair.high));
    }
  }
  return b;
}
// The same from a tile as it is, with rows along k: 16-bit types.
template <class T>
__device__ __forceinline__ FragmentB<T> load_b_transposed(const T* tile, int stride, int lane) {
  static_assert(is_16bit<T>);
  FragmentB<T> b;
  const T* at = tile + lane / 4 * stride + lane % 4 * 2;
#pragma unroll
  for (int i = 0; i < 2; ++i) b.v[i] = movmatrix(*reinterpret_cast<const uint32_t*>(at + i * 8 * stride));
  return b;
}

// A 16 x 16 tile with rows and columns exchanged, within registers.
template <class T>
__device__ __forceinline__ FragmentA<T> transposed(const FragmentA<T>& a, int lane) {
  FragmentA<T> out;
  if constexpr (is_16bit<T>) {
    out.v[0] = movmatrix(a.v[0]);
    out.v[1] = movmatrix(a.v[2]);
    out.v[2] = movmatrix(a.v[1]);
    out.v[3] = movmatrix(a.v[3]);
  } else {
    // the lane with row 2t + j and columns 2 (g / 2), 2 (g / 2) + 1 has what this one needs in its column g
    const int g = lane / 4, t = lane % 4;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int from = (i & 1) << 1 | i >> 1;
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int source = (2 * t + j) * 4 + g / 2;
        const T low = __shfl_sync(0xffffffffu, a.v[2 * from], source);
        const T high = __shfl_sync(0xffffffffu, a.v[2 * from + 1], source);
        out.v[2 * i + j] = g % 2 ? high : low;
      }
    }
  }
  return out;
}

// --- products ---

// A number as a sum of two that TF32 holds: 22 of fp32's 24 bits. Infinity and NaN have no second part, and none in the
// products with another number's second part either, where 0 times infinity would make a NaN.
struct Split {
  uint32_t big, small, finite;  // finite: big, or 0
  __device__ __forceinline__ explicit Split(float value) {
    const uint32_t bits = __float_as_uint(value);
    const bool is_finite = (bits & kExponent) != kExponent;
    big = to_tf32(value);
    if (is_finite && (big & kExponent) == kExponent) big = bits & 0xffffe000u;  // it would round up to infinity
    finite = is_finite ? big : 0u;
    small = is_finite ? to_tf32(value - __uint_as_float(finite)) : 0u;
  }
  static constexpr uint32_t kExponent = 0x7f800000u;
};

// d += a b. fp32 numbers are cut into two TF32 terms each, unless tf32 says that one will do; a_is_exact says that a's
// numbers come from 16 bits and are their first term. A tensor core rounds its sums toward zero, and over a long row
// these errors add up to more than fp32's: so the running sum is added outside of it (Ootomo, Yokota 2022, "Recovering
// single precision accuracy from Tensor Cores while surpassing the FP32 theoretical peak performance").
template <bool a_is_exact, class T>
__device__ __forceinline__ void multiply_add(Sum<T> (&d)[4], const FragmentA<T>& a, const FragmentB<T>& b, bool tf32) {
  if constexpr (is_16bit<T>) {
    mma_m16n8k16<T>(d, a.v, b.v);
  } else if constexpr (std::is_same_v<T, float>) {
    float sums[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float values[4] = {a.v[4 * half], a.v[4 * half + 2], a.v[4 * half + 1], a.v[4 * half + 3]};
      uint32_t a_big[4], a_small[4], a_finite[4], b_big[2], b_small[2], b_finite[2];
      if (tf32) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a_big[i] = to_tf32(values[i]);
#pragma unroll
        for (int i = 0; i < 2; ++i) b_big[i] = to_tf32(b.v[2 * half + i]);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (a_is_exact) {
            a_big[i] = __float_as_uint(values[i]);
            a_finite[i] = (a_big[i] & Split::kExponent) == Split::kExponent ? 0u : a_big[i];
          } else {
            const Split split(values[i]);
            a_big[i] = split.big;
            a_small[i] = split.small;
            a_finite[i] = split.finite;
          }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Split split(b.v[2 * half + i]);
          b_big[i] = split.big;
          b_small[i] = split.small;
          b_finite[i] = split.finite;
        }
        if constexpr (!a_is_exact) mma_m16n8k8_tf32(sums, a_small, b_finite);
        mma_m16n8k8_tf32(sums, a_finite, b_small);
      }
      mma_m16n8k8_tf32(sums, a_big, b_big);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] += sums[i];
  } else {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      double rows[2] = {d[2 * row], d[2 * row + 1]};
#pragma unroll
      for (int i = 0; i < 4; ++i) mma_m8n8k4_f64(rows, a.v[4 * (i / 2) + 2 * row + i % 2], b.v[i]);
      d[2 * row] = rows[0];
      d[2 * row + 1] = rows[1];
    }
  }
}

}  // namespace pyfused
