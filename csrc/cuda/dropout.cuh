// Dropout's mask, made from its seed in the layout of the fragments of an activation.
#pragma once

#include <cstdint>

#include "../common/philox.h"
#include "fragments.cuh"

namespace pyfused {

// Philox-4x32-7 for one row and counter: pyfused/reference/dropout.py says which bits belong to which element.
__device__ __forceinline__ uint4 philox4(uint64_t seed, uint32_t counter, int64_t row) {
  uint32_t c0 = counter, c1 = static_cast<uint32_t>(row), c2 = static_cast<uint32_t>(row >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < philox::kRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(philox::kMultiplier0) * c0;
    const uint64_t product1 = static_cast<uint64_t>(philox::kMultiplier1) * c2;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
    c1 = static_cast<uint32_t>(product1);
    c3 = static_cast<uint32_t>(product0);
    k0 += philox::kWeyl0;
    k1 += philox::kWeyl1;
  }
  return make_uint4(c0, c1, c2, c3);
}

// keep[w] has 16 one bits for each of the two columns 128 block + 32 w + 2 pair (low half) and the next (high half) of
// this row that dropout keeps.
__device__ __forceinline__ void keep_masks(uint32_t (&keep)[4], uint64_t seed, uint32_t threshold, int64_t row,
                                           int64_t block, int pair) {
  const uint32_t counter = static_cast<uint32_t>(block) * philox::kBlockCounters + static_cast<uint32_t>(pair);
  const uint4 words = philox4(seed, counter, row);
  const uint32_t both = threshold | threshold << 16;
  keep[0] = __vcmpgeu2(words.x, both);
  keep[1] = __vcmpgeu2(words.y, both);
  keep[2] = __vcmpgeu2(words.z, both);
  keep[3] = __vcmpgeu2(words.w, both);
}

// Sets what the mask drops to zero; not by a product, so that a dropped infinity is gone.
template <class T>
__device__ __forceinline__ void drop(FragmentA<T>& a, int pair, uint32_t keep) {
  if constexpr (is_16bit<T>) {
    a.v[pair] &= keep;
  } else {
    if (!(keep & 0xffffu)) a.v[2 * pair] = T(0);
    if (!(keep >> 16)) a.v[2 * pair + 1] = T(0);
  }
}

// The masks of a lane's rows g, g + 8 and its columns in the 16-column tiles 2 w + parity, w = 0..3, of one 128-column
// block of dropout.
struct TileMasks {
  uint32_t keep[4][4];  // [pair of the fragment][w]
  // With dropout off they keep all: one loop serves both, where two would be twice the code.
  __device__ __forceinline__ TileMasks(const DropoutSource& dropout, int64_t row, int64_t block, int parity, int lane) {
    if (dropout.threshold == 0) {
#pragma unroll
      for (int i = 0; i < 16; ++i) keep[i / 4][i % 4] = ~0u;
      return;
    }
    const uint64_t seed = static_cast<uint64_t>(__ldg(dropout.seed));
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      keep_masks(keep[i], seed, dropout.threshold, row + (i & 1) * 8, block, lane % 4 + 8 * parity + 4 * (i >> 1));
    }
  }
  template <class T>
  __device__ __forceinline__ void apply(FragmentA<T>& a, int w) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) drop(a, i, keep[i][w]);
  }
};

}  // namespace pyfused
