// Both products of the bottleneck, back to back: out = residual + drop(scale (middle(x w1^T) w2^T + bias)), where the
// hidden values of a block's 64 rows stay in shared memory. In the forward x is the input, w1 is w_down, w2 is w_up; in
// the backward x is dy with dropout's mask, w1 is w_up^T, w2 is w_down^T, and the middle is the activation's
// derivative.
//
// The first product is lora_shrink's: eight warps are four groups of 16 rows times two that share the columns of a
// stage, the even and the odd tiles of 16. The second is lora_expand's: a step is 256 columns, 128 for each of the two.
// It walks the columns backwards, so that a residual which is x finds the end of x in the L2 cache. With as few blocks
// as there are multiprocessors, what keeps memory busy is what one block has under way: as many stages as fit, and the
// residual of a whole step.
#include <algorithm>

#include "activation.cuh"
#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kRows = kFusedRows;
constexpr int kColumns = philox::kBlockColumns;
constexpr int kStepColumns = 2 * kColumns;
constexpr int kTiles = kColumns / 8;

template <class TX, class TC>
struct Layout {
  using T = Compute<TX, TC>;
  static constexpr int kSize = static_cast<int>(sizeof(T));
  static constexpr int kHidden = is_16bit<T> ? 64 : 32;  // of the first product at a time
  static constexpr int NT = kHidden / 8;
  static constexpr int kStride = kColumns + kPadding;
  static constexpr int kXBytes = kRows * kStride * static_cast<int>(sizeof(TX));
  static constexpr int kStageBytes = kXBytes + kHidden * kStride * static_cast<int>(sizeof(TC));
  static constexpr int kChunk = is_16bit<T> ? 64 : 16;  // hidden values of the second product at a time
  static constexpr int kChunkStride = kChunk + kPadding;
  static constexpr int kChunkBytes = kStepColumns * kChunkStride * kSize;
  static constexpr int kExchangeBytes = 4 * NT * 4 * 32 * 4;
  // sums of x over the rows of each group, two stages; later the scale and bias of two steps
  static constexpr int kVectorBytes = 2 * 4 * kColumns * 4;
  static_assert(kVectorBytes >= 2 * 2 * kStepColumns * 4);
  static constexpr int kDownBytes = 4 * kHidden * 4;  // sums of dz over the rows of each group
  // What comes before the stages: the vectors, the sums, the hidden values.
  static constexpr int fixed_bytes(int padded) {
    return kVectorBytes + kDownBytes + kRows * (padded + kPadding) * kSize;
  }
  static constexpr int bytes(int padded, int stages) {
    return fixed_bytes(padded) + std::max({stages * kStageBytes, 2 * kChunkBytes, kExchangeBytes});
  }
};

PYFUSED_HOST_DEVICE inline int padded_hidden(int hidden) { return (hidden + 15) / 16 * 16; }

struct Aligned {
  bool x, w1, w2, out;
};

// The column of a lane's four sums over the rows of a fragment that sum_rows leaves it with, within 16 columns.
__device__ __forceinline__ int summed_column(int lane) { return (lane & 16) / 2 + 2 * (lane % 4) + (lane & 8) / 8; }

// Sums of a fragment's columns over its 16 rows: each lane halves what it adds for with every exchange.
template <class T>
__device__ __forceinline__ float sum_rows(const FragmentA<T>& a, int lane) {
  float columns[4];
  if constexpr (is_16bit<T>) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      Pair<T> low, high;
      memcpy(&low, &a.v[2 * i], sizeof low);
      memcpy(&high, &a.v[2 * i + 1], sizeof high);
      columns[2 * i] = convert<float>(low.low) + convert<float>(high.low);
      columns[2 * i + 1] = convert<float>(low.high) + convert<float>(high.high);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) columns[i] = a.v[i / 2 * 4 + i % 2] + a.v[i / 2 * 4 + 2 + i % 2];
  }
  const bool upper = lane & 16;
  const float kept0 = upper ? columns[2] : columns[0], kept1 = upper ? columns[3] : columns[1];
  const float two0 = kept0 + __shfl_xor_sync(0xffffffffu, upper ? columns[0] : columns[2], 16);
  const float two1 = kept1 + __shfl_xor_sync(0xffffffffu, upper ? columns[1] : columns[3], 16);
  const bool odd = lane & 8;
  const float one = (odd ? two1 : two0) + __shfl_xor_sync(0xffffffffu, odd ? two0 : two1, 8);
  return one + __shfl_xor_sync(0xffffffffu, one, 4);
}

template <class TX, class TC>
__global__ void __launch_bounds__(kThreads, 1) bottleneck_fused_kernel(BottleneckFused p, Aligned aligned, int stages) {
  using L = Layout<TX, TC>;
  using T = typename L::T;
  constexpr bool kExact = is_16bit<TX>;
  PF_DYN_SMEM(char, shared);
  float* vectors = reinterpret_cast<float*>(shared);
  float* down_sums = reinterpret_cast<float*>(shared + L::kVectorBytes);
  T* h_tile = reinterpret_cast<T*>(shared + L::kVectorBytes + L::kDownBytes);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int row_group = warp % 4, parity = warp / 4;
  const int padded = padded_hidden(p.hidden), h_stride = padded + kPadding;
  char* tiles = reinterpret_cast<char*>(h_tile + kRows * h_stride);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows;
  const bool backward = p.z_in != nullptr;

  // --- the first product, and the middle ---
  const TX* x = static_cast<const TX*>(p.x.data) + row * p.x.ld;
  const auto x_tile = [&](int stage) { return reinterpret_cast<TX*>(tiles + stage * L::kStageBytes); };
  const auto w_tile = [&](int stage) { return reinterpret_cast<TC*>(tiles + stage * L::kStageBytes + L::kXBytes); };
  const int steps = static_cast<int>((p.width + kColumns - 1) / kColumns);
  for (int first = 0; first < p.hidden; first += L::kHidden) {
    const bool sum_x = p.x_sums != nullptr && first == 0;
    const auto load = [&](int stage, int step) {
      const int64_t column = static_cast<int64_t>(step) * kColumns;
      copy_tile<kThreads>(x_tile(stage), L::kStride, x + column, p.x.ld, kRows, kColumns, p.rows - row,
                          p.width - column, aligned.x, thread);
      const TC* w = static_cast<const TC*>(p.w1.data) + first * p.w1.ld + column;
      copy_tile<kThreads>(w_tile(stage), L::kStride, w, p.w1.ld, L::kHidden, kColumns, p.hidden - first,
                          p.width - column, aligned.w1, thread);
    };
    float sums[L::NT][4] = {};
    const auto multiply = [&](int stage, int step) {
      const TX* tile = x_tile(stage) + row_group * 16 * L::kStride;
      const TC* w = w_tile(stage);
      const auto products = [&](int word, const FragmentA<T>& fragment) {
#pragma unroll
        for (int n = 0; n < L::NT; ++n) {
          const FragmentB<T> b = load_b<T>(w + n * 8 * L::kStride + (2 * word + parity) * 16, L::kStride, lane);
          multiply_add<kExact, T>(sums[n], fragment, b, p.types.allow_tf32);
        }
        if (sum_x) {
          const float sum = sum_rows(fragment, lane);
          float* to = vectors + ((step & 1) * 4 + row_group) * kColumns + (2 * word + parity) * 16;
          if (!(lane & 4)) to[summed_column(lane)] = sum;
        }
      };
      const TileMasks masks(p.x_dropout, row + row_group * 16 + g, step, parity, lane);
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        FragmentA<T> fragment = load_a<T>(tile + (2 * word + parity) * 16, L::kStride, lane);
        masks.apply(fragment, word);
        products(word, fragment);
      }
    };
    // what a step has left in shared memory, once all threads are past it
    const auto store_x_sums = [&](int step) {
      const int64_t column = static_cast<int64_t>(step) * kColumns + thread;
      if (!sum_x || step < 0 || thread >= kColumns || column >= p.width) return;
      const float* from = vectors + (step & 1) * 4 * kColumns + thread;
      const float sum = (from[0] + from[kColumns]) + (from[2 * kColumns] + from[3 * kColumns]);
      static_cast<float*>(p.x_sums)[static_cast<int64_t>(blockIdx.x) * p.width + column] = sum;
    };

    __syncthreads();  // the chunk before is done with the memory
    for_each_step(stages, steps, load, [&](int stage, int step) {
      store_x_sums(step - 1);
      multiply(stage, step);
    });
    __syncthreads();
    store_x_sums(steps - 1);

    // the two halves of the columns, always in the same order
    float* slot = reinterpret_cast<float*>(tiles) + row_group * L::NT * 4 * 32 + lane;
    if (parity == 1) {
#pragma unroll
      for (int i = 0; i < L::NT * 4; ++i) slot[i * 32] = sums[i / 4][i % 4];
    }
    __syncthreads();
    if (parity == 0) {
      const float dz_scale = backward ? scale_at<float>(p.dz_scale, 0) : 0.0f;
#pragma unroll
      for (int n = 0; n < L::NT; ++n) {
        float column_sums[2] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int local = row_group * 16 + g + i / 2 * 8, j = first + n * 8 + 2 * t + i % 2;
          const int64_t at = (row + local) * p.hidden + j;
          const bool inside = j < p.hidden && row + local < p.rows;
          float value = sums[n][i] + slot[(n * 4 + i) * 32];
          float slope, result = 0.0f;
          if (backward) {
            const float z = inside ? convert<float>(static_cast<const TC*>(p.z_in)[at]) : 0.0f;
            const float h = activate_at(p.activation, z, slope);
            if (inside) {
              result = value * dz_scale * slope;
              if (p.h != nullptr) static_cast<float*>(p.h)[at] = h;
              static_cast<float*>(p.dz)[at] = result;
              column_sums[i % 2] += result;
            }
          } else if (inside) {
            if (p.down_bias != nullptr) value += convert<float>(static_cast<const TC*>(p.down_bias)[j]);
            const TC z = convert<TC>(value);
            static_cast<TC*>(p.z)[at] = z;
            result = activate_at(p.activation, convert<float>(z), slope);
          }
          if (j < padded) h_tile[local * h_stride + j] = convert<T>(result);
        }
        if (p.down_sums != nullptr) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) {
              column_sums[i] += __shfl_xor_sync(0xffffffffu, column_sums[i], lanes);
            }
            if (g == 0) down_sums[row_group * L::kHidden + n * 8 + 2 * t + i] = column_sums[i];
          }
        }
      }
    }
    __syncthreads();
    if (p.down_sums != nullptr && thread < L::kHidden && first + thread < p.hidden) {
      const float* from = down_sums + thread;
      const float sum = (from[0] + from[L::kHidden]) + (from[2 * L::kHidden] + from[3 * L::kHidden]);
      static_cast<float*>(p.down_sums)[static_cast<int64_t>(blockIdx.x) * p.hidden + first + thread] = sum;
    }
  }
  if (p.out == nullptr) return;

  // --- the second product: columns are dealt to tiles as in lora_expand.cu ---
  const int chunks = (padded + L::kChunk - 1) / L::kChunk;
  const int blocks = static_cast<int>((p.width + kStepColumns - 1) / kStepColumns);
  const auto chunk_tile = [&](int turn) { return reinterpret_cast<TC*>(tiles + (turn & 1) * L::kChunkBytes); };
  const auto first_column = [&](int turn) { return static_cast<int64_t>(blocks - 1 - turn / chunks) * kStepColumns; };
  const auto load = [&](int turn) {
    const int64_t column = first_column(turn);
    const int chunk = turn % chunks * L::kChunk;
    const TC* w = static_cast<const TC*>(p.w2.data) + column * p.w2.ld + chunk;
    copy_tile<kThreads>(chunk_tile(turn), L::kChunkStride, w, p.w2.ld, kStepColumns, L::kChunk, p.width - column,
                        p.hidden - chunk, aligned.w2, thread,
                        [](int n) { return (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2; });
    if (chunk != 0) return;
    float* scale = vectors + (turn / chunks & 1) * 2 * kStepColumns;
    const int64_t d = column + thread;
    const float factor = d < p.width ? scale_at<float>(p.scale, d) : 0.0f;
    scale[thread] = factor;
    scale[kStepColumns + thread] = d < p.width && p.bias.data != nullptr ? load_as<float>(p.bias, d) * factor : 0.0f;
  };
  static_assert(kStepColumns == kThreads);
  float sums[kTiles][4] = {};
  load(0);
  cp_async_commit();
  for (int turn = 0; turn < blocks * chunks; ++turn) {
    const bool ends = turn % chunks == chunks - 1;  // the products over all hidden values
    const int64_t column = first_column(turn) + parity * kColumns;
    TX residual[2][4][8];  // all of it under way before the first of it is waited for
    if (ends && p.residual.data != nullptr) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int64_t m = row + row_group * 16 + g + i / 4 * 8, d = column + i % 4 * 32 + 8 * t;
        load_run(residual[i / 4][i % 4], static_cast<const TX*>(p.residual.data) + m * p.residual.ld + d,
                 m < p.rows ? p.width - d : 0, aligned.out);
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    if (turn + 1 < blocks * chunks) load(turn + 1);
    cp_async_commit();
    const int chunk = turn % chunks * L::kChunk;
    const TC* w = chunk_tile(turn) + parity * kColumns * L::kChunkStride;
#pragma unroll
    for (int j = 0; j < L::kChunk; j += 16) {
      if (chunk + j >= padded) break;
      const FragmentA<T> a = load_a<T>(h_tile + row_group * 16 * h_stride + chunk + j, h_stride, lane);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const FragmentB<T> b = load_b<T>(w + tile * 8 * L::kChunkStride + j, L::kChunkStride, lane);
        multiply_add<false, T>(sums[tile], a, b, p.types.allow_tf32);
      }
    }
    if (!ends) continue;

    const float* scale = vectors + (turn / chunks & 1) * 2 * kStepColumns + parity * kColumns;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t m = row + row_group * 16 + g + 8 * half;
      if (m >= p.rows) continue;
      uint32_t keep[4][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (p.out_dropout.threshold != 0) {
          keep_masks(keep[i], static_cast<uint64_t>(__ldg(p.out_dropout.seed)), p.out_dropout.threshold, m,
                     column / kColumns, 4 * t + i);
        }
      }
#pragma unroll
      for (int word = 0; word < 4; ++word) {
        const int within = 32 * word + 8 * t;
        const int64_t d = column + within, valid = p.width - d;
        if (valid <= 0) continue;
        float values[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          values[i] = p.residual.data != nullptr ? convert<float>(residual[half][word][i]) : 0.0f;
          const bool dropped = p.out_dropout.threshold != 0 && !(keep[i / 2][word] >> (i % 2 * 16) & 1u);
          const float u = sums[4 * word + i / 2][2 * half + i % 2];
          if (!dropped) values[i] += u * scale[within + i] + scale[kStepColumns + within + i];
        }
        store_run(values, static_cast<TX*>(p.out) + m * p.width + d, valid, aligned.out);
      }
    }
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) sums[i / 4][i % 4] = 0.0f;
  }
}

}  // namespace

void launch_bottleneck_fused(const BottleneckFused& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    if constexpr (std::is_same_v<TX, double>) {
      throw std::runtime_error("pyfused: no fused bottleneck kernel for fp64");
    } else {
      using L = Layout<TX, TC>;
      static_assert(L::bytes(kMaxFusedHidden, 1) <= kSharedLimit);
      const Aligned aligned{
          rows_aligned(call.x.data, call.x.ld, sizeof(TX)), rows_aligned(call.w1.data, call.w1.ld, sizeof(TC)),
          rows_aligned(call.w2.data, call.w2.ld, sizeof(TC)),
          rows_aligned(call.out, call.width, sizeof(TX)) &&
              (call.residual.data == nullptr || rows_aligned(call.residual.data, call.residual.ld, sizeof(TX)))};
      const int padded = padded_hidden(call.hidden);
      const int stages = stages_that_fit(call.shared_bytes - L::fixed_bytes(padded), L::kStageBytes, kMostStages);
      const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.rows, kRows)));
      PF_LAUNCH(grid, dim3(kThreads), L::bytes(padded, stages), stream, (bottleneck_fused_kernel<TX, TC>), call,
                aligned, stages);
    }
  });
}

}  // namespace pyfused
