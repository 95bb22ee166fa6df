// out = source + bias + drop(s c^T): the rank-r update of y, and of dx. Bound by the bytes of source and out. A block
// takes 64 rows x 128 columns, a warp 16 rows.
//
// The columns of a block are dealt to the tensor cores' tiles so that a lane ends up with eight neighbours of each 32:
// tile 4 w + i has, as its column 2 t + h, column 32 w + 8 t + 2 i + h. Loads and stores are then of 16 bytes, and the
// lane's columns of all w take their mask from the same four random numbers.
#include "dispatch.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kColumns = philox::kBlockColumns;
constexpr int kRanks = 64;  // of c in shared memory at a time
constexpr int kTiles = kColumns / 8;

struct Arguments {
  int64_t m, n;
  int r;
  const void* parts;
  int64_t part_count, part_stride;
  void* s;
  double factor;
  ConstVector vector;
  const void* c;
  int64_t c_column_stride, c_rank_stride;
  const int64_t* seed;
  uint32_t threshold;
  const void* source;
  int64_t ld_source;
  const void* bias;
  void* out;
  int64_t ld_out;
  bool aligned, tf32;
};

template <class TX, class TC>
__global__ void __launch_bounds__(kThreads) lora_expand_kernel(Arguments p) {
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kStride = kRanks + kPadding;
  PF_DYN_SMEM(T, c_tile);  // [the columns, in the order of the tiles][ranks]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + warp * 16 + g;
  const TC* c = static_cast<const TC*>(p.c);

  // s of row m, rank r, with its factor
  const auto scaled = [&](int64_t m, int r) -> S {
    if (m >= p.m || r >= p.r) return S(0);
    const S* from = static_cast<const S*>(p.parts) + m * p.r + r;
    S sum = from[0];
    for (int64_t part = 1; part < p.part_count; ++part) sum += from[part * p.part_stride];
    if (p.s != nullptr && blockIdx.y == 0) static_cast<S*>(p.s)[m * p.r + r] = sum;
    S scale = static_cast<S>(p.factor);
    if (p.vector.data != nullptr) scale *= load_as<S>(p.vector, r);
    return sum * scale;
  };

  S sums[kTiles][4] = {};
  for (int first_rank = 0; first_rank < p.r; first_rank += kRanks) {
    const int ranks = p.r - first_rank < kRanks ? p.r - first_rank : kRanks;
    const int padded = (ranks + 15) / 16 * 16;
    if (first_rank > 0) __syncthreads();
    for (int i = thread; i < padded * kColumns; i += kThreads) {
      const bool by_rank = p.c_rank_stride == 1;
      const int r = by_rank ? i % padded : i / kColumns;
      const int n = by_rank ? i / padded : i % kColumns;
      const int slot = (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2;
      const bool valid = r < ranks && column + n < p.n;
      c_tile[slot * kStride + r] =
          valid ? convert<T>(c[(column + n) * p.c_column_stride + (first_rank + r) * p.c_rank_stride])
                : convert<T>(0.0f);
    }
    __syncthreads();
    for (int r = 0; r < padded; r += 16) {
      FragmentA<T> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = row + (i & 1) * 8;
        const int rank = first_rank + r + 2 * t + (i >> 1) * 8;
        set_pair(a, i, scaled(m, rank), scaled(m, rank + 1));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const FragmentB<T> b = load_b<T>(c_tile + tile * 8 * kStride + r, kStride, lane);
        multiply_add<false, T>(sums[tile], a, b, p.tf32);
      }
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = row + 8 * half;
    if (m >= p.m) continue;
    uint32_t keep[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.threshold != 0) {
        keep_masks(keep[i], static_cast<uint64_t>(__ldg(p.seed)), p.threshold, m, blockIdx.y, 4 * t + i);
      }
    }
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int64_t n = column + 32 * w + 8 * t;
      const int64_t valid = p.n - n;
      if (valid <= 0) continue;
      S values[8] = {};
      if (p.source != nullptr) {
        load_run(values, static_cast<const TX*>(p.source) + m * p.ld_source + n, valid, p.aligned);
      }
      if (p.bias != nullptr) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          if (i < valid) values[i] += convert<S>(static_cast<const TX*>(p.bias)[n + i]);
        }
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const bool dropped = p.threshold != 0 && !(keep[i / 2][w] >> (i % 2 * 16) & 1u);
        if (!dropped) values[i] += sums[4 * w + i / 2][2 * half + i % 2];
      }
      store_run(values, static_cast<TX*>(p.out) + m * p.ld_out + n, valid, p.aligned);
    }
  }
}

}  // namespace

void launch_lora_expand(const LoraExpand& call, cudaStream_t stream) {
  with_types(call.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    Arguments p{};
    p.m = call.m;
    p.n = call.n;
    p.r = call.r;
    p.parts = call.parts;
    p.part_count = call.part_count;
    p.part_stride = call.part_stride;
    p.s = call.s;
    p.factor = call.factor;
    p.vector = call.vector;
    p.c = call.c;
    p.c_column_stride = call.c_column_stride;
    p.c_rank_stride = call.c_rank_stride;
    p.seed = call.dropout.seed;
    p.threshold = call.dropout.threshold;
    p.source = call.source.data;
    p.ld_source = call.source.ld;
    p.bias = call.bias;
    p.out = call.out;
    p.ld_out = call.ld_out;
    p.aligned = rows_aligned(call.out, call.ld_out, sizeof(TX)) &&
                (call.source.data == nullptr || rows_aligned(call.source.data, call.source.ld, sizeof(TX)));
    p.tf32 = call.types.allow_tf32;
    const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.m, kRows)),
                    static_cast<unsigned>(divide_up_to<int64_t>(call.n, kColumns)));
    constexpr int kBytes = kColumns * (kRanks + kPadding) * static_cast<int>(sizeof(Compute<TX, TC>));
    static_assert(kBytes <= kSharedLimit);
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_expand_kernel<TX, TC>), p);
  });
}

}  // namespace pyfused
