// AMX tiles: 16 rows of 64 bytes each, eight of them, and c += a b for bf16 with fp32 sums, where b holds pairs of
// rows:
//   c[i][j] += sum_p a[i][2p] b[p][2j] + a[i][2p + 1] b[p][2j + 1],  16 x 16 results of 32 products each.
//
// Written as assembly because the compilers' intrinsics take registers as literals and, in GCC before 14, do not say
// that they read and write memory. With PYFUSED_EMULATE_CPU the instructions are those of tests/emulation/cpu.
#pragma once

#include <cstdint>

#if defined(PYFUSED_EMULATE_CPU)
#include "tiles.h"
#endif

namespace pyfused::PYFUSED_ISA {

constexpr int kTileRows = 16;
constexpr int kTileBytes = 1024;

// ---- the instructions -----------------------------------------------------------------------------------------------

#if !defined(PYFUSED_EMULATE_CPU)

template <class Sizes>
inline __attribute__((always_inline)) void tile_configure(const Sizes& sizes) {
  asm volatile("ldtilecfg %0" ::"m"(sizes));
}
inline __attribute__((always_inline)) void tile_release() { asm volatile("tilerelease"); }
template <int Tile>
inline __attribute__((always_inline)) void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
inline __attribute__((always_inline)) void tile_load(const void* from, int64_t row_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}
// The same for what is not read again soon: it leaves the first-level cache to others.
template <int Tile>
inline __attribute__((always_inline)) void tile_load_once(const void* from, int64_t row_bytes) {
  asm volatile("tileloaddt1 (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int Tile>
inline __attribute__((always_inline)) void tile_store(void* to, int64_t row_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(row_bytes), "i"(Tile) : "memory");
}
template <int C, int A, int B>
inline __attribute__((always_inline)) void tile_multiply() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
}

#endif

// ---- their sizes ----------------------------------------------------------------------------------------------------

// Sizes of the tiles, up to 16 rows of 64 bytes; a tile without a size cannot be used.
struct TileSizes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t count, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(count);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  void load() const { tile_configure(*this); }
};

// For the life of one, all tiles of this thread have their full size; they are given back to the system at its end.
class Tiles {
 public:
  Tiles() {
    TileSizes sizes;
    for (int tile = 0; tile < 8; ++tile) sizes.set(tile, kTileRows, 64);
    sizes.load();
  }
  ~Tiles() { tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

}  // namespace pyfused::PYFUSED_ISA
