// Every function of csrc/cuda/platform.cuh against naive loops. Compiled by nvcc it tests the GPU's instructions, with
// PYFUSED_EMULATE_CUDA the emulation of them: what holds for both is what kernels may count on.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "checks.h"
#include "device_array.h"
#include "platform.cuh"

namespace pyfused {
namespace {

bool close(double got, double expected, double tolerance) {
  return std::abs(got - expected) <= tolerance * std::fmax(1.0, std::abs(expected));
}

// Small numbers with few bits, which every type here holds exactly.
double sample(int i) { return ((i * 37 + 11) % 61 - 30) / 16.0; }

// --- products: one warp, a [rows, inner] and b [inner, 8] row-major in global memory ---

template <class T>
__device__ uint32_t pair_of(const T* low, const T* high) {
  union {
    T values[2];
    uint32_t bits;
  } pair;
  pair.values[0] = *low;
  pair.values[1] = *high;
  return pair.bits;
}

template <class T>
__global__ void multiply_16bit(const T* a, const T* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) {
    const T* at = a + (g + i % 2 * 8) * 16 + 2 * t + i / 2 * 8;
    fragment_a[i] = pair_of(at, at + 1);
  }
  for (int i = 0; i < 2; ++i) {
    const T* at = b + (2 * t + i * 8) * 8 + g;
    fragment_b[i] = pair_of(at, at + 8);
  }
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k16<T>(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

__global__ void multiply_tf32(const float* a, const float* b, float* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  uint32_t fragment_a[4], fragment_b[2];
  for (int i = 0; i < 4; ++i) fragment_a[i] = __float_as_uint(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]) | 0x1fffu;
  for (int i = 0; i < 2; ++i) fragment_b[i] = to_tf32(b[(t + i * 4) * 8 + g]);
  float sums[4];
  for (int i = 0; i < 4; ++i) sums[i] = d[(g + i / 2 * 8) * 8 + 2 * t + i % 2];
  mma_m16n8k8_tf32(sums, fragment_a, fragment_b);
  for (int i = 0; i < 4; ++i) d[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = sums[i];
}

__global__ void multiply_fp64(const double* a, const double* b, double* d) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  double sums[2] = {d[g * 8 + 2 * t], d[g * 8 + 2 * t + 1]};
  mma_m8n8k4_f64(sums, a[g * 4 + t], b[t * 8 + g]);
  for (int i = 0; i < 2; ++i) d[g * 8 + 2 * t + i] = sums[i];
}

template <class T, class S>
void test_product(const char* name, void (*kernel)(const T*, const T*, S*), int rows, int inner) {
  DeviceArray<T> a(rows * inner), b(inner * 8);
  DeviceArray<S> d(rows * 8);
  for (int i = 0; i < rows * inner; ++i) a.host[i] = static_cast<T>(static_cast<float>(sample(i)));
  for (int i = 0; i < inner * 8; ++i) b.host[i] = static_cast<T>(static_cast<float>(sample(i + 7)));
  for (int i = 0; i < rows * 8; ++i) d.host[i] = static_cast<S>(sample(i + 3));
  PF_LAUNCH(dim3(1), dim3(32), 0, nullptr, kernel, a.to_device(), b.to_device(), d.to_device());
  d.to_host();
  bool right = true;
  for (int i = 0; i < rows * 8; ++i) {
    double sum = sample(i + 3);
    for (int k = 0; k < inner; ++k) sum += sample(i / 8 * inner + k) * sample(k * 8 + i % 8 + 7);
    right = right && close(static_cast<double>(d.host[i]), sum, 1e-6);
  }
  check(right, name);
}

// --- rounding and movmatrix ---

__global__ void round_all(const float* values, uint32_t* out) { out[threadIdx.x] = to_tf32(values[threadIdx.x]); }

void test_rounding() {
  const float inf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<float, float>> cases = {
      {0.0f, 0.0f},
      {1.0f, 1.0f},
      {1.0f + 0x1p-11f, 1.0f + 0x1p-10f},        // a tie goes away from zero
      {-1.0f - 0x1p-11f, -1.0f - 0x1p-10f},      //
      {1.0f + 0x3p-11f, 1.0f + 0x4p-11f},        // also from an odd neighbour
      {1.0f + 0x1p-11f - 0x1p-23f, 1.0f},        // just below a tie
      {2.0f - 0x1p-23f, 2.0f},                   // into the next binade
      {0x1p-126f, 0x1p-126f},                    // the smallest normal number
      {0x1p-136f, 0x1p-136f},                    // a subnormal number that TF32 holds
      {std::numeric_limits<float>::max(), inf},  //
      {inf, inf},
      {-inf, -inf},
  };
  DeviceArray<float> values(32);
  DeviceArray<uint32_t> bits(32);
  for (size_t i = 0; i < 32; ++i) values.host[i] = i < cases.size() ? cases[i].first : NAN;
  PF_LAUNCH(dim3(1), dim3(32), 0, nullptr, round_all, values.to_device(), bits.to_device());
  bits.to_host();
  bool right = true, low_bits_zero = true;
  for (size_t i = 0; i < 32; ++i) {
    float got;
    std::memcpy(&got, &bits.host[i], sizeof got);
    right = right && (i < cases.size() ? got == cases[i].second : std::isnan(got));
    low_bits_zero = low_bits_zero && bits.host[i] % 0x2000u == 0;
  }
  check(right, "to_tf32: ties away from zero, NaN, infinity");
  check(low_bits_zero, "to_tf32: the low 13 bits are zero");
}

__global__ void transpose(uint32_t* pairs) { pairs[threadIdx.x] = movmatrix(pairs[threadIdx.x]); }

void test_movmatrix() {
  DeviceArray<uint32_t> pairs(32);  // the matrix 10 row + column
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t first = lane / 4 * 10 + lane % 4 * 2;
    pairs.host[lane] = first | (first + 1) << 16;
  }
  PF_LAUNCH(dim3(1), dim3(32), 0, nullptr, transpose, pairs.to_device());
  pairs.to_host();
  bool right = true;
  for (uint32_t lane = 0; lane < 32; ++lane) {
    const uint32_t first = lane % 4 * 2 * 10 + lane / 4;
    right = right && pairs.host[lane] == (first | (first + 10) << 16);
  }
  check(right, "movmatrix");
}

// --- shuffles, votes, comparison of halves ---

__global__ void exchange(double* out) {
  const int lane = threadIdx.x % 32;
  const double own = 1000.0 * (threadIdx.x / 32) + lane;
  double* row = out + threadIdx.x * 6;
  row[0] = __shfl_sync(0xffffffffu, own, (lane * 5 + 3) % 32);
  row[1] = __shfl_xor_sync(0xffffffffu, own, 5);
  row[2] = __shfl_down_sync(0xffffffffu, own, 7u);
  row[3] = __shfl_up_sync(0xffffffffu, own, 7u);
  row[4] = static_cast<double>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  row[5] = static_cast<double>(__vcmpgeu2(0x80000001u + static_cast<unsigned>(lane), 0x80000010u));
}

void test_exchange() {
  DeviceArray<double> out(64 * 6);
  PF_LAUNCH(dim3(1), dim3(64), 0, nullptr, exchange, out.to_device());
  out.to_host();
  double votes = 0;
  for (int lane = 0; lane < 32; lane += 3) votes += std::ldexp(1.0, lane);
  bool shuffles = true, ballots = true, halves = true;
  for (int thread = 0; thread < 64; ++thread) {
    const int lane = thread % 32;
    const double warp = 1000.0 * (thread / 32);
    const double* row = &out.host[static_cast<size_t>(thread) * 6];
    shuffles = shuffles && row[0] == warp + (lane * 5 + 3) % 32 && row[1] == warp + (lane ^ 5) &&
               row[2] == warp + (lane + 7 < 32 ? lane + 7 : lane) && row[3] == warp + (lane >= 7 ? lane - 7 : lane);
    ballots = ballots && row[4] == votes;
    halves = halves && row[5] == (lane + 1 >= 16 ? 4294967295.0 : 4294901760.0);
  }
  check(shuffles, "__shfl_sync, _xor, _down, _up");
  check(ballots, "__ballot_sync");
  check(halves, "__vcmpgeu2");
}

// --- shared memory: a pipeline of asynchronous copies over a row that ends inside a copy ---

constexpr int kThreads = 64, kStages = 3;

__global__ void sum_rows(const float* x, int columns, int ld, float* sums) {
  PF_DYN_SMEM(float, shared);
  __shared__ float partial[kThreads / 32];
  const int thread = threadIdx.x;
  const float* row = x + static_cast<int64_t>(blockIdx.x) * ld;
  constexpr int kChunk = kThreads * 4;
  const int steps = (columns + kChunk - 1) / kChunk;
  const auto load = [&](int step) {
    const int first = step * kChunk + thread * 4, valid = columns - first;
    const int bytes = step >= steps || valid < 0 ? 0 : (valid < 4 ? valid : 4) * 4;
    if (step < steps) cp_async_16(shared + step % kStages * kChunk + thread * 4, bytes ? row + first : row, bytes);
    cp_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) load(step);
  float sum = 0.0f;
  for (int step = 0; step < steps; ++step) {
    cp_async_wait<kStages - 2>();
    __syncthreads();
    load(step + kStages - 1);
    for (int i = 0; i < 4; ++i) sum += shared[step % kStages * kChunk + (thread + 1) % kThreads * 4 + i];
  }
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
  if (thread % 32 == 0) partial[thread / 32] = sum;
  __syncthreads();
  if (thread == 0) sums[blockIdx.x] = partial[0] + partial[1];
}

void test_copies() {
  constexpr int rows = 5, columns = 1403, ld = 1404;
  DeviceArray<float> x(rows * ld), sums(rows);
  for (int i = 0; i < rows * ld; ++i) x.host[i] = i % ld < columns ? static_cast<float>(sample(i)) : NAN;
  PF_LAUNCH(dim3(rows), dim3(kThreads), kStages * kThreads * 16, nullptr, sum_rows, x.to_device(), columns, ld,
            sums.to_device());
  sums.to_host();
  bool right = true;
  for (int row = 0; row < rows; ++row) {
    double sum = 0;
    for (int column = 0; column < columns; ++column) sum += sample(row * ld + column);
    right = right && close(sums.host[row], sum, 1e-5);
  }
  check(right, "cp_async_16 in a pipeline, a row that ends in a copy");
}

// --- launches ---

template <int first, class T>
__global__ void fill(T* out, T value) {
  PF_DYN_SMEM(T, shared);
  const unsigned at = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = threadIdx.y * blockDim.x + threadIdx.x;
  shared[thread] = value + static_cast<T>(first + thread);
  __syncthreads();
  out[at * blockDim.x * blockDim.y + thread] = shared[blockDim.x * blockDim.y - 1 - thread];
}

void test_launch() {
  DeviceArray<int> out(3 * 2 * 2 * 40);
  PF_LAUNCH(dim3(3, 2, 2), dim3(8, 5), 96 * 1024, nullptr, (fill<2, int>), out.to_device(), 5);
  out.to_host();
  bool right = true;
  for (int i = 0; i < 12 * 40; ++i) right = right && out.host[i] == 5 + 2 + 39 - i % 40;
  check(right, "PF_LAUNCH: 96 KiB of shared memory, three dimensions");
  bool refused = false;
  try {
    PF_LAUNCH(dim3(1), dim3(2048), 0, nullptr, (fill<2, int>), out.to_device(), 5);
  } catch (const std::runtime_error& error) {
    refused = std::string(error.what()).find("fill<2, int>") != std::string::npos;
  }
  check(refused, "PF_LAUNCH: a block that is too large is an error");
}

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  test_product<__nv_bfloat16, float>("mma_m16n8k16, bf16", multiply_16bit<__nv_bfloat16>, 16, 16);
  test_product<__half, float>("mma_m16n8k16, fp16", multiply_16bit<__half>, 16, 16);
  test_product<float, float>("mma_m16n8k8_tf32", multiply_tf32, 16, 8);
  test_product<double, double>("mma_m8n8k4_f64", multiply_fp64, 8, 4);
  test_rounding();
  test_movmatrix();
  test_exchange();
  test_copies();
  test_launch();
  return exit_status();
}
