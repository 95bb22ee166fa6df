// AMX tiles after Intel's manuals: sizes, instructions, the order and the rounding of sums.
#include "tiles.h"

#include <immintrin.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace pyfused::emulated_tiles {
namespace {

constexpr int kTiles = 8, kMaxRows = 16, kMaxRowBytes = 64;

// What ldtilecfg reads.
struct Configuration {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(Configuration) == 64);

// Of one thread. Beyond a tile's rows and bytes of a row it is zero.
struct State {
  alignas(64) char tiles[kTiles][kMaxRows][kMaxRowBytes];
  Configuration configuration;
};
thread_local State state;

void require(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "emulated AMX: %s\n", what);
  std::abort();
}

int rows_of(int tile) { return state.configuration.rows[tile]; }
int bytes_of(int tile) { return state.configuration.row_bytes[tile]; }
void require_size(int tile) { require(rows_of(tile) != 0 && bytes_of(tile) != 0, "a tile without a size is used"); }

// The 16 pairs of a row as fp32, those of even place and those of odd place.
struct Widened {
  alignas(32) float even[kMaxRows][16], odd[kMaxRows][16];

  explicit Widened(const char (&tile)[kMaxRows][kMaxRowBytes]) {
    for (int row = 0; row < kMaxRows; ++row) {
      for (int i = 0; i < 16; i += 8) {
        const __m256i pairs = _mm256_load_si256(reinterpret_cast<const __m256i*>(&tile[row][4 * i]));
        _mm256_store_si256(reinterpret_cast<__m256i*>(&even[row][i]), _mm256_slli_epi32(pairs, 16));
        _mm256_store_si256(reinterpret_cast<__m256i*>(&odd[row][i]),
                           _mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
      }
    }
  }
};

// c[m][n] += a[m] b[.][n]: the products of even place in one chain of fused multiply-adds from zero, those of odd place
// in another, then the sum of both is added to c. Not inlined: the arithmetic is between the changes of mode.
__attribute__((noinline)) void multiply_all(char (&c)[kMaxRows][kMaxRowBytes], const Widened& a, const Widened& b,
                                            int rows, int pairs) {
  for (int m = 0; m < rows; m += 2) {  // rows beyond the last one are zero and stay it
    __m256 even[2][2] = {}, odd[2][2] = {};
    for (int k = 0; k < pairs; ++k) {
      for (int i = 0; i < 2; ++i) {
        const __m256 even_a = _mm256_broadcast_ss(&a.even[m + i][k]), odd_a = _mm256_broadcast_ss(&a.odd[m + i][k]);
        for (int half = 0; half < 2; ++half) {
          even[i][half] = _mm256_fmadd_ps(even_a, _mm256_load_ps(&b.even[k][8 * half]), even[i][half]);
          odd[i][half] = _mm256_fmadd_ps(odd_a, _mm256_load_ps(&b.odd[k][8 * half]), odd[i][half]);
        }
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int half = 0; half < 2; ++half) {
        float* to = reinterpret_cast<float*>(c[m + i]) + 8 * half;
        _mm256_store_ps(to, _mm256_add_ps(_mm256_load_ps(to), _mm256_add_ps(even[i][half], odd[i][half])));
      }
    }
  }
}

}  // namespace

void configure(const void* sizes) {
  Configuration wanted;
  std::memcpy(&wanted, sizes, sizeof wanted);
  bool good = wanted.palette == 1 && wanted.start_row == 0;
  for (uint8_t byte : wanted.reserved) good = good && byte == 0;
  for (int tile = 0; tile < 16; ++tile) {
    const int rows = wanted.rows[tile], bytes = wanted.row_bytes[tile];
    good = good && rows <= kMaxRows && bytes <= kMaxRowBytes && (rows == 0) == (bytes == 0);
    good = good && (tile < kTiles || rows == 0);
  }
  require(good, "ldtilecfg of sizes that are none");
  std::memset(&state, 0, sizeof state);
  state.configuration = wanted;
}

void release() { std::memset(&state, 0, sizeof state); }

void zero(int tile) {
  require_size(tile);
  std::memset(state.tiles[tile], 0, sizeof state.tiles[tile]);
}

void load(int tile, const void* from, int64_t row_bytes) {
  zero(tile);
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(state.tiles[tile][row], static_cast<const char*>(from) + row * row_bytes,
                static_cast<size_t>(bytes_of(tile)));
  }
}

void store(int tile, void* to, int64_t row_bytes) {
  require_size(tile);
  for (int row = 0; row < rows_of(tile); ++row) {
    std::memcpy(static_cast<char*>(to) + row * row_bytes, state.tiles[tile][row], static_cast<size_t>(bytes_of(tile)));
  }
}

void multiply(int c, int a, int b) {
  require_size(c);
  require_size(a);
  require_size(b);
  require(c != a && c != b && a != b, "tdpbf16ps of a tile with itself");
  require(bytes_of(c) % 4 == 0 && bytes_of(a) % 4 == 0 && rows_of(a) == rows_of(c) && bytes_of(b) == bytes_of(c) &&
              rows_of(b) == bytes_of(a) / 4,
          "tdpbf16ps of tiles whose sizes do not fit");
  const Widened left(state.tiles[a]), right(state.tiles[b]);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0);  // to the nearest, subnormal numbers are zero, no exceptions
  multiply_all(state.tiles[c], left, right, rows_of(c), bytes_of(a) / 4);
  _mm_setcsr(before);
}

}  // namespace pyfused::emulated_tiles
