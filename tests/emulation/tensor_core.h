// The instructions of platform.cuh as plain C++: tensor-core products, movmatrix, TF32 rounding, asynchronous copies.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "block.h"
#include "mma.h"

namespace pyfused {

namespace emulation {

template <void (*compute)(void* const*)>
void for_all_lanes(void* const* operands) {
  for (unsigned i = 0; i < kWarp; ++i) {
    if (operands[i] == nullptr) fail("a tensor-core instruction needs all 32 lanes of a warp");
  }
  compute(operands);
}

}  // namespace emulation

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                  const emulation::Where where = emulation::Where::current()) {
  static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half>);
  emulation::MmaOperands<float> operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m16n8k16", where, &operands,
                                       emulation::for_all_lanes<emulation::compute_m16n8k16<T>>, false);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             const emulation::Where where = emulation::Where::current()) {
  emulation::MmaOperands<float> operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m16n8k8_tf32", where, &operands,
                                       emulation::for_all_lanes<emulation::compute_m16n8k8_tf32>, false);
}

inline void mma_m8n8k4_f64(double (&d)[2], double a, double b,
                           const emulation::Where where = emulation::Where::current()) {
  emulation::Fp64Operands operands{d, a, b};
  emulation::Block::running->meet_warp("mma_m8n8k4_f64", where, &operands,
                                       emulation::for_all_lanes<emulation::compute_m8n8k4_f64>, false);
}

inline uint32_t movmatrix(uint32_t pair, const emulation::Where where = emulation::Where::current()) {
  emulation::Block::running->meet_warp("movmatrix", where, &pair,
                                       emulation::for_all_lanes<emulation::compute_movmatrix>, false);
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

// Reads a byte, so that a sanitizer sees an address outside.
inline void prefetch_l2(const void* global) { static_cast<void>(*static_cast<const volatile char*>(global)); }
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
