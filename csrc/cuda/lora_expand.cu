// out = source + bias + drop(s c^T), summed over adapters: the rank-r update of y, and of dx. Bound by the bytes of
// source and out. A block takes 64 rows x 128 columns, a warp 16 rows.
//
// The columns of a block are dealt to the tensor cores' tiles so that a lane ends up with eight neighbours of each 32:
// tile 4 w + i has, as its column 2 t + h, column 32 w + 8 t + 2 i + h. Loads and stores are then of 16 bytes, and the
// lane's columns of all w take their mask from the same four random numbers.
#include "copy.cuh"
#include "dispatch.cuh"
#include "dropout.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kThreads = 128;
constexpr int kRows = 64;
constexpr int kColumns = philox::kBlockColumns;
constexpr int kRanks = 64;  // of c in shared memory at a time
constexpr int kTiles = kColumns / 8;

constexpr int kMaxAdapters = 3;  // of one pass

struct Arguments {
  int64_t m, n;
  LoraExpand::Adapter adapters[kMaxAdapters];
  int count;
  const void* source;
  int64_t ld_source;
  const void* bias;
  void* out;
  int64_t ld_out;
  bool aligned, tf32;
};

// STACKED: more than one adapter.
template <class TX, class TC, bool STACKED>
__global__ void __launch_bounds__(kThreads) lora_expand_kernel(Arguments p) {
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kStride = kRanks + kPadding;
  PF_DYN_SMEM(T, c_tile);  // [the columns, in the order of the tiles][ranks]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const int64_t column = static_cast<int64_t>(blockIdx.y) * kColumns;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + warp * 16 + g;

  // s of row m, rank r, with its factor
  const auto scaled = [&](const LoraExpand::Adapter& adapter, int64_t m, int r) -> S {
    if (m >= p.m || r >= adapter.r) return S(0);
    const S* from = static_cast<const S*>(adapter.parts) + m * adapter.r + r;
    S sum = from[0];
    for (int64_t part = 1; part < adapter.part_count; ++part) sum += from[part * adapter.part_stride];
    if (adapter.s != nullptr && blockIdx.y == 0) static_cast<S*>(adapter.s)[m * adapter.r + r] = sum;
    S scale = static_cast<S>(adapter.factor);
    if (adapter.vector.data != nullptr) scale *= load_as<S>(adapter.vector, r);
    return sum * scale;
  };

  // c of up to kRanks ranks, in the order of the tiles
  const auto load_c = [&](const LoraExpand::Adapter& adapter, int first_rank, int padded) {
    const TC* c = static_cast<const TC*>(adapter.c);
    __syncthreads();  // all are done with the c before
    for (int i = thread; i < padded * kColumns; i += kThreads) {
      const bool by_rank = adapter.c_rank_stride == 1;
      const int r = by_rank ? i % padded : i / kColumns;
      const int n = by_rank ? i / padded : i % kColumns;
      const int slot = (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2;
      const bool valid = first_rank + r < adapter.r && column + n < p.n;
      c_tile[slot * kStride + r] =
          valid ? convert<T>(c[(column + n) * adapter.c_column_stride + (first_rank + r) * adapter.c_rank_stride])
                : convert<T>(0.0f);
    }
    __syncthreads();
  };

  // Bit 2 tile + h: whether dropout keeps what sums[tile][2 half + h] is added to.
  const auto kept = [&](const DropoutSource& dropout, int half) {
    if (dropout.threshold == 0) return ~0u;
    const uint64_t seed = static_cast<uint64_t>(__ldg(dropout.seed));
    uint32_t bits = 0;
#pragma unroll 1  // many at once would take the registers
    for (int i = 0; i < 4; ++i) {
      uint32_t keep[4];
      keep_masks(keep, seed, dropout.threshold, row + 8 * half, blockIdx.y, 4 * t + i);
#pragma unroll
      for (int w = 0; w < 4; ++w) bits |= ((keep[w] & 1u) | (keep[w] >> 31 << 1)) << (8 * w + 2 * i);
    }
    return bits;
  };

  // sums += s c^T for the ranks of c_tile and the tiles from first_tile on
  const auto add_products = [&](const LoraExpand::Adapter& adapter, int first_rank, int padded, int first_tile,
                                auto& sums) {
    constexpr int kCount = static_cast<int>(sizeof(sums) / sizeof(sums[0]));
    for (int r = 0; r < padded; r += 16) {
      FragmentA<T> a;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t m = row + (i & 1) * 8;
        const int rank = first_rank + r + 2 * t + (i >> 1) * 8;
        set_pair(a, i, scaled(adapter, m, rank), scaled(adapter, m, rank + 1));
      }
#pragma unroll
      for (int tile = 0; tile < kCount; ++tile) {
        const FragmentB<T> b = load_b<T>(c_tile + (first_tile + tile) * 8 * kStride + r, kStride, lane);
        multiply_add<false, T>(sums[tile], a, b, p.tf32);
      }
    }
  };

  S sums[kTiles][4] = {};
#pragma unroll 1
  for (int i = 0; i < (STACKED ? p.count : 1); ++i) {
    const LoraExpand::Adapter& adapter = p.adapters[i];
    uint32_t kept_of[2];
    if constexpr (STACKED) kept_of[0] = kept(adapter.dropout, 0), kept_of[1] = kept(adapter.dropout, 1);
    for (int first_rank = 0; first_rank < adapter.r; first_rank += kRanks) {
      const int ranks = adapter.r - first_rank < kRanks ? adapter.r - first_rank : kRanks;
      const int padded = (ranks + 15) / 16 * 16;
      load_c(adapter, first_rank, padded);
      if constexpr (STACKED) {  // half of the tiles at a time: each adapter's sums are masked before they are added
        constexpr int kHalf = kTiles / 2;
#pragma unroll
        for (int first_tile = 0; first_tile < kTiles; first_tile += kHalf) {
          S part[kHalf][4] = {};
          add_products(adapter, first_rank, padded, first_tile, part);
#pragma unroll
          for (int j = 0; j < kHalf * 4; ++j) {
            const int tile = first_tile + j / 4;
            if (kept_of[j % 4 / 2] >> (2 * tile + j % 2) & 1u) sums[tile][j % 4] += part[j / 4][j % 4];
          }
        }
      } else {
        add_products(adapter, first_rank, padded, 0, sums);
      }
    }
  }
  if constexpr (!STACKED) {
    const uint32_t kept_of[2] = {kept(p.adapters[0].dropout, 0), kept(p.adapters[0].dropout, 1)};
#pragma unroll
    for (int j = 0; j < kTiles * 4; ++j) {
      if (!(kept_of[j % 4 / 2] >> (2 * (j / 4) + j % 2) & 1u)) sums[j / 4][j % 4] = S(0);
    }
  }

#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int64_t m = row + 8 * half;
    if (m >= p.m) continue;
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
      for (int i = 0; i < 8; ++i) values[i] += sums[4 * w + i / 2][2 * half + i % 2];
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
    p.source = call.source.data;
    p.ld_source = call.source.ld;
    p.bias = call.bias;
    p.out = call.out;
    p.ld_out = call.ld_out;
    p.tf32 = call.types.allow_tf32;
    const dim3 grid(static_cast<unsigned>(divide_up_to<int64_t>(call.m, kRows)),
                    static_cast<unsigned>(divide_up_to<int64_t>(call.n, kColumns)));
    constexpr int kBytes = kColumns * (kRanks + kPadding) * static_cast<int>(sizeof(Compute<TX, TC>));
    static_assert(kBytes <= kSharedLimit);
    // fp32 and fp64 data gain nothing from a common pass that is worth as many kernels again
    for_each_part(call.adapters, is_16bit<TX> ? kMaxAdapters : 1, [&](std::span<const LoraExpand::Adapter> adapters) {
      std::copy(adapters.begin(), adapters.end(), p.adapters);
      p.count = static_cast<int>(adapters.size());
      p.aligned = rows_aligned(p.out, p.ld_out, sizeof(TX)) &&
                  (p.source == nullptr || rows_aligned(p.source, p.ld_source, sizeof(TX)));
      if constexpr (is_16bit<TX>) {
        if (p.count > 1) PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_expand_kernel<TX, TC, true>), p);
      }
      if (p.count == 1) PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (lora_expand_kernel<TX, TC, false>), p);
      p.source = p.out;  // the next come on top
      p.ld_source = p.ld_out;
      p.bias = nullptr;
    });
  });
}

}  // namespace pyfused
