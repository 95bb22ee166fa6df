// CUDA C++ for a C++ compiler: with this header, csrc/cuda/*.cu runs on the CPU, one thread block after another and
// every CUDA thread as a fiber (block.h). What it finds beside wrong results: threads that wait for ever, threads that
// meet at different places, warp operations on lanes that are gone, reads of shared memory that nothing was written to
// (NaN) or that a cp.async still fills, and under the sanitizers races within a block and accesses out of bounds.
//
// What it cannot find: whatever depends on the memory model between blocks, on timing, on ptxas or on the hardware's
// own roundings. Static __shared__ memory keeps what the block before left there; only PF_DYN_SMEM is filled with NaN.
#pragma once

#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>

#include "block.h"
#include "tensor_core.h"

#undef __shared__
#define __shared__ static
#undef __launch_bounds__
#define __launch_bounds__(...)

#define threadIdx (::pyfused::emulation::Block::current->index)
#define blockIdx (::pyfused::emulation::Block::running->block_index)
#define blockDim (::pyfused::emulation::Block::running->block_dim)
#define gridDim (::pyfused::emulation::Block::running->grid_dim)

#define PF_LAUNCH(grid, block, shared_bytes, stream, kernel, ...) \
  ::pyfused::emulation::launch_kernel(#kernel, grid, block, shared_bytes, stream, kernel, __VA_ARGS__)
#define PF_REQUIRE(condition, message) ((condition) ? void() : ::pyfused::emulation::fail(message))
#define PF_DYN_SMEM(T, name) T* name = reinterpret_cast<T*>(::pyfused::emulation::Block::running->shared())

namespace pyfused::emulation {

template <class... Parameters>
void launch_kernel(const char* name, dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t,
                   void (*kernel)(Parameters...), std::type_identity_t<Parameters>... arguments) {
  run_grid(name, grid, block, shared_bytes, [=] { kernel(arguments...); });
}

inline unsigned lane() { return Block::current->linear % kWarp; }

inline void check_full(const char* operation, unsigned mask) {
  if (mask != 0xffffffffu)
    fail(std::string(operation) + " is emulated for whole warps only, not for a part of the lanes");
}

template <class T>
struct Shuffle {
  T value, result;
  unsigned source;
};

template <class T>
void compute_shuffle(void* const* operands) {
  for (unsigned i = 0; i < kWarp; ++i) {
    auto* to = static_cast<Shuffle<T>*>(operands[i]);
    if (to == nullptr) continue;
    const auto* from = static_cast<Shuffle<T>*>(operands[to->source]);
    if (from == nullptr) fail("a shuffle reads lane " + std::to_string(to->source) + ", which the block does not have");
    to->result = from->value;
  }
}

template <class T>
T shuffle(const char* operation, unsigned mask, T value, unsigned source, int width, const Where& where) {
  static_assert(std::is_arithmetic_v<T>);
  check_full(operation, mask);
  if (width != static_cast<int>(kWarp)) fail(std::string(operation) + " is emulated for a width of 32 only");
  Shuffle<T> operand{value, value, source};
  Block::running->meet_warp(operation, where, &operand, compute_shuffle<T>, false);
  return operand.result;
}

struct Vote {
  bool own;
  unsigned all;
};

inline void compute_vote(void* const* operands) {
  unsigned all = 0;
  for (unsigned i = 0; i < kWarp; ++i) {
    if (operands[i] != nullptr && static_cast<Vote*>(operands[i])->own) all |= 1u << i;
  }
  for (unsigned i = 0; i < kWarp; ++i) {
    if (operands[i] != nullptr) static_cast<Vote*>(operands[i])->all = all;
  }
}

template <class T>
T add_atomically(T* address, T value) {
  T before, after;
  __atomic_load(address, &before, __ATOMIC_RELAXED);
  do {
    after = before + value;
  } while (!__atomic_compare_exchange(address, &before, &after, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return before;
}

}  // namespace pyfused::emulation

// --- barriers and warp operations; the last parameter is where they are called ---

inline void __syncthreads(const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  pyfused::emulation::Block::running->meet_all("__syncthreads", where);
}
inline void __syncwarp(unsigned mask = 0xffffffffu,
                       const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  pyfused::emulation::check_full("__syncwarp", mask);
  pyfused::emulation::Block::running->meet_warp("__syncwarp", where, nullptr, nullptr, true);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32,
              const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  return pyfused::emulation::shuffle("__shfl_sync", mask, value, static_cast<unsigned>(source) % 32, width, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32,
                  const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  const unsigned source = (pyfused::emulation::lane() ^ static_cast<unsigned>(lanes)) % 32;
  return pyfused::emulation::shuffle("__shfl_xor_sync", mask, value, source, width, where);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                   const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  const unsigned own = pyfused::emulation::lane(), source = own + lanes < 32 ? own + lanes : own;
  return pyfused::emulation::shuffle("__shfl_down_sync", mask, value, source, width, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32,
                 const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  const unsigned own = pyfused::emulation::lane(), source = own >= lanes ? own - lanes : own;
  return pyfused::emulation::shuffle("__shfl_up_sync", mask, value, source, width, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate,
                              const pyfused::emulation::Where where = pyfused::emulation::Where::current()) {
  pyfused::emulation::check_full("__ballot_sync", mask);
  pyfused::emulation::Vote vote{predicate != 0, 0};
  pyfused::emulation::Block::running->meet_warp("__ballot_sync", where, &vote, pyfused::emulation::compute_vote, false);
  return vote.all;
}

// --- arithmetic and memory ---

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T atomicAdd(T* address, T value) {
  return pyfused::emulation::add_atomically(address, value);
}
inline void __threadfence() {}
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return std::countr_zero(bits) % 32 + (bits != 0); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
// All bits of each 16-bit half in which a >= b.
inline unsigned __vcmpgeu2(unsigned a, unsigned b) {
  return ((a & 0xffffu) >= (b & 0xffffu) ? 0xffffu : 0u) | (a >> 16 >= b >> 16 ? 0xffff0000u : 0u);
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __expf(float value) { return std::exp(value); }
inline float __fdividef(float a, float b) { return a / b; }
