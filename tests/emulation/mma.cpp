// The products of one instruction and the fp32 sum that they go on top of are added exactly enough, then rounded toward
// zero, as tensor cores do (Fasi, Higham, Mikaitis, Pranesh 2021, "Numerical behavior of NVIDIA tensor cores"). Which
// bits they drop before that differs by generation, so results agree within rounding, not in every bit.
#include "mma.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace pyfused::emulation {
namespace {

constexpr unsigned kLanes = 32;

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

// The float that is nearest among those no larger in magnitude; of a double that is none, itself.
float toward_zero(double value) {
  const float rounded = static_cast<float>(value);
  const bool is_larger = std::abs(static_cast<double>(rounded)) > std::abs(value);  // never for NaN and infinity
  return std::bit_cast<float>(std::bit_cast<uint32_t>(rounded) - is_larger);
}

// d += a b for rows x k by k x 8 tiles, of which the lanes hold what the functions below say.
template <int rows, int inner>
struct Tiles {
  double a[rows][inner], b[inner][8], d[rows][8];

  void multiply() {
    for (int i = 0; i < rows; ++i) {
      double sums[8];
      for (int j = 0; j < 8; ++j) sums[j] = d[i][j];
      for (int k = 0; k < inner; ++k) {
        for (int j = 0; j < 8; ++j) sums[j] += a[i][k] * b[k][j];
      }
      for (int j = 0; j < 8; ++j) d[i][j] = sums[j];
    }
  }
};

// The 16 x 8 sums of a warp: lane 4 g + t holds rows g and g + 8 of columns 2 t and 2 t + 1.
template <int inner>
void load_sums(Tiles<16, inner>& tiles, void* const* operands) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const float* d = static_cast<MmaOperands<float>*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) tiles.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2] = d[i];
  }
}
template <int inner>
void store_sums(const Tiles<16, inner>& tiles, void* const* operands) {
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    float* d = static_cast<MmaOperands<float>*>(operands[lane])->d;
    for (unsigned i = 0; i < 4; ++i) d[i] = toward_zero(tiles.d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
  }
}

}  // namespace

template <class T>
void compute_m16n8k16(void* const* operands) {
  Tiles<16, 16> tiles;
  load_sums(tiles, operands);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
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
template void compute_m16n8k16<__nv_bfloat16>(void* const* operands);
template void compute_m16n8k16<__half>(void* const* operands);

void compute_m16n8k8_tf32(void* const* operands) {
  const auto tf32 = [](uint32_t bits) { return std::bit_cast<float>(bits & 0xffffe000u); };
  Tiles<16, 8> tiles;
  load_sums(tiles, operands);
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& operand = *static_cast<MmaOperands<float>*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    for (unsigned i = 0; i < 4; ++i) tiles.a[g + i % 2 * 8][t + i / 2 * 4] = tf32(operand.a[i]);
    for (unsigned i = 0; i < 2; ++i) tiles.b[t + i * 4][g] = tf32(operand.b[i]);
  }
  tiles.multiply();
  store_sums(tiles, operands);
}

void compute_m8n8k4_f64(void* const* operands) {
  Tiles<8, 4> tiles;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const auto& operand = *static_cast<Fp64Operands*>(operands[lane]);
    const unsigned g = lane / 4, t = lane % 4;
    tiles.a[g][t] = operand.a;
    tiles.b[t][g] = operand.b;
    for (unsigned i = 0; i < 2; ++i) tiles.d[g][2 * t + i] = operand.d[i];
  }
  tiles.multiply();
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    double* d = static_cast<Fp64Operands*>(operands[lane])->d;
    for (unsigned i = 0; i < 2; ++i) d[i] = tiles.d[lane / 4][lane % 4 * 2 + i];
  }
}

void compute_movmatrix(void* const* operands) {
  uint16_t matrix[8][8];
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    std::memcpy(&matrix[lane / 4][lane % 4 * 2], operands[lane], sizeof(uint32_t));
  }
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    const uint32_t low = matrix[lane % 4 * 2][lane / 4], high = matrix[lane % 4 * 2 + 1][lane / 4];
    *static_cast<uint32_t*>(operands[lane]) = low | high << 16;
  }
}

}  // namespace pyfused::emulation
