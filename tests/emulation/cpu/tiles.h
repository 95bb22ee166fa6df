// The instructions of AMX that kernels use, see csrc/cpu/kernels/amx.h, on tiles in memory. What a processor refuses,
// such as a size that does not fit or a tile without one, ends the program with a sentence.
#pragma once

#include <cstdint>

namespace pyfused::emulated_tiles {

void configure(const void* sizes);
void release();
void zero(int tile);
void load(int tile, const void* from, int64_t row_bytes);
void store(int tile, void* to, int64_t row_bytes);
void multiply(int c, int a, int b);

}  // namespace pyfused::emulated_tiles

namespace pyfused::PYFUSED_ISA {

template <class Sizes>
inline void tile_configure(const Sizes& sizes) {
  static_assert(sizeof sizes == 64);
  emulated_tiles::configure(&sizes);
}
inline void tile_release() { emulated_tiles::release(); }

template <int Tile>
inline void tile_zero() {
  emulated_tiles::zero(Tile);
}
template <int Tile>
inline void tile_load(const void* from, int64_t row_bytes) {
  emulated_tiles::load(Tile, from, row_bytes);
}
template <int Tile>
inline void tile_load_once(const void* from, int64_t row_bytes) {
  emulated_tiles::load(Tile, from, row_bytes);
}
template <int Tile>
inline void tile_store(void* to, int64_t row_bytes) {
  emulated_tiles::store(Tile, to, row_bytes);
}
template <int C, int A, int B>
inline void tile_multiply() {
  emulated_tiles::multiply(C, A, B);
}

}  // namespace pyfused::PYFUSED_ISA
