// Dropout's mask as LoRA's passes have it, for a tile of rows and columns at a time.
#pragma once

#include "lora.h"
#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

// The bits of tiles of so many rows and columns: in the mask's memory, or, where it has none, in memory of the pass.
template <int64_t Rows, int64_t Columns>
struct MaskTile {
  const Mask& mask;
  int64_t ld;  // words
  uint32_t own[Rows * Columns / 32];

  PYFUSED_INLINE explicit MaskTile(const Mask& mask) : mask(mask), ld(mask.bits != nullptr ? mask.ld : Columns / 32) {}

  // Of the tile whose first element is this one of x; columns in whole words.
  PYFUSED_INLINE uint32_t* at(int64_t row, int64_t column) {
    return mask.bits != nullptr ? mask.bits + row * mask.ld + column / 32 : own;
  }
};

}  // namespace
}  // namespace pyfused::PYFUSED_ISA
