// The instructions of platform.cuh as plain C++: tensor-core products, movmatrix, TF32 rounding, asynchronous copies.
//
// The products of one instruction and the fp32 sum that they go on top of are added exactly enough, then rounded toward
// zero, as tensor cores do (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"). Which
// bits they drop before that differs by generation, so results agree within rounding, not in every bit.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"

namespace pyfused {

namespace emulation {

inline void* const* all_lanes(void* const* operands, const char* instruction) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if (operands[i] == nullptr) fail(std::string(instruction) + " needs all 32 lanes of a warp");
  }
  return operands;
}

template <class T>
float widen(uint32_t pair, unsigned i) {
  const uint32_t bits = pair >> (16 * i) & 0xffffu;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return std::bit_cast<float>(bits << 16);
  } else {
    // the exponent is moved by a product, which is right for subnormal numbers too; infinity and NaN are put back
    const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
    const uint32_t special = (bits & 0x7c00u) == 0x7c00u ? 0x7f800000u : 0u;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | special | (bits & 0x8000u) << 16);
  }
}

template <class T>
struct MmaOperands {
  T* d;
  const uint32_t* a;
  const uint32_t* b;
};

template <class S>
S toward_zero(double value) {
  const S rounded = static_cast<S>(value);
  if constexpr (std::is_same_v<S, float>) {
    if (std::isfinite(value) && std::abs(static_cast<double>(rounded)) > std::abs(value)) {
      return std::nextafter(rounded, 0.0f);
    }
  }
  return rounded;
}

// d += a b for rows x k by k x 8 tiles, of which the lanes hold what the three functions say.
template <class S, int rows, int inner>
struct Tiles {
  S a[rows][inner], b[inner][8], d[rows][8];

  void multiply() {
    double sums[rows][8];
    for (int i = 0; i < rows; ++i) {
      for (int j = 0; j < 8; ++j) sums[i][j] = d[i][j];
      for (int k = 0; k < inner; ++k) {
        for (int j = 0; j < 8; ++j) sums[i][j] += static_cast<double>(a[i][k]) * static_cast<double>(b[k][j]);
      }
      for (int j = 0; j < 8; ++j) d[i][j] = toward_zero<S>(sums[i][j]);
    }
  }
};

// The 16 x 8 sums of a warp: lane 4 g + t holds rows g and g + 8 of columns 2 t and 2 t + 1.
template <int inner>
void load_sums(Tiles<float, 16, inner>& tiles, void* const* operands) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const float* d = static_cast<MmaOperands<float>*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) tiles.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = d[i];
  }
}
template <int inner>
void store_sums(const Tiles<float, 16, inner>& tiles, void* const* operands) {
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    float* d = static_cast<MmaOperands<float>*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) d[i] = tiles.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template <class T>
void compute_m16n8k16(void* const* operands) {
  all_lanes(operands, "mma_m16n8k16");
  Tiles<float, 16, 16> tiles;
  load_sums(tiles, operands);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& operand = *static_cast<MmaOperands<float>*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 2; ++i) {
      for (unsigned pair = 0; pair < 4; ++pair) {
        tiles.a[g + pair % 2 * 8][2 * t + pair / 2 * 8 + i] = widen<T>(operand.a[pair], i);
      }
      for (unsigned pair = 0; pair < 2; ++pair) tiles.b[2 * t + pair * 8 + i][g] = widen<T>(operand.b[pair], i);
    }
  }
  tiles.multiply();
  store_sums(tiles, operands);
}

inline void compute_m16n8k8_tf32(void* const* operands) {
  all_lanes(operands, "mma_m16n8k8_tf32");
  const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
  Tiles<float, 16, 8> tiles;
  load_sums(tiles, operands);
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& operand = *static_cast<MmaOperands<float>*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) tiles.a[g + i % 2 * 8][t + i / 2 * 4] = tf32(operand.a[i]);
    for (unsigned i = 0; i < 2; ++i) tiles.b[t + i * 4][g] = tf32(operand.b[i]);
  }
  tiles.multiply();
  store_sums(tiles, operands);
}

struct Fp64Operands {
  double* d;
  double a, b;
};

inline void compute_m8n8k4_f64(void* const* operands) {
  all_lanes(operands, "mma_m8n8k4_f64");
  Tiles<double, 8, 4> tiles;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const auto& operand = *static_cast<Fp64Operands*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    tiles.a[g][t] = operand.a;
    tiles.b[t][g] = operand.b;
    for (unsigned i = 0; i < 2; ++i) tiles.d[g][2 * t + i] = operand.d[i];
  }
  tiles.multiply();
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    double* d = static_cast<Fp64Operands*>(operands[lane])->d;
    for (unsigned i = 0; i < 2; ++i) d[i] = tiles.d[lane / 4][lane % 4 * 2 + i];
  }
}

inline void compute_movmatrix(void* const* operands) {
  all_lanes(operands, "movmatrix");
  uint16_t matrix[8][8];
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    std::memcpy(&matrix[lane / 4][lane % 4 * 2], operands[lane], sizeof(uint32_t));
  }
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    const uint32_t low = matrix[lane % 4 * 2][lane / 4], high = matrix[lane % 4 * 2 + 1][lane / 4];
    *static_cast<uint32_t*>(operands[lane]) = low | high << 16;
  }
}

}  // namespace emulation

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulation::Where where = emulation::Where::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emulation::MmaOperands<float> operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m16n8k16", where, &operands, emulation::compute_m16n8k16<T>, false);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const emulation::Where where = emulation::Where::current()) {
  emulation::MmaOperands<float> operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m16n8k8_tf32", where, &operands, emulation::compute_m16n8k8_tf32, false);
}

inline void mma_m8n8k4_f64(double (&d)[2], double a, double b,
                           const emulation::Where where = emulation::Where::current()) {
  emulation::Fp64Operands operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m8n8k4_f64", where, &operands, emulation::compute_m8n8k4_f64, false);
}

inline uint32_t movmatrix(uint32_t pair, const emulation::Where where = emulation::Where::current()) {
  emulation::Block::running->meet_warp("movmatrix", where, &pair, emulation::compute_movmatrix, false);
  return pair;
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fffe000u;  // NaN
  return (bits + 0x1000u) & 0xffffe000u;
}

// The copy is done when a wait covers it, never before; until then what it writes to is NaN, whatever was there.
inline void cp_async_16(void* shared, const void* global, int bytes) {
  const auto aligned = [](const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; };
  if (!aligned(shared) || !aligned(global)) emulation::fail("cp_async_16 takes addresses that are multiples of 16");
  if (bytes < 0 || bytes > 16) emulation::fail("cp_async_16 copies 0 to 16 bytes, got " + std::to_string(bytes));
  std::memset(shared, 0xff, 16);
  emulation::Thread& self = *emulation::Block::current;
  self.copies.push_back({shared, global, bytes, self.groups});
}

inline void cp_async_commit() { ++emulation::Block::current->groups; }

template <int N>
void cp_async_wait() {
  emulation::Thread& self = *emulation::Block::current;
  auto copy = self.copies.begin();
  for (; copy != self.copies.end() && copy->group < self.groups - N; ++copy) {
    std::memset(copy->to, 0, 16);
    std::memcpy(copy->to, copy->from, static_cast<size_t>(copy->bytes));
  }
  self.copies.erase(self.copies.begin(), copy);
}

}  // namespace pyfused
