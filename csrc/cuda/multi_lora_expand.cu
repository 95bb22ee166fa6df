// y += (scale s) b^T for the rows of many adapters, or dx = the sum over slices of drop(ds a): lora_expand.cu's pass
// with gathered rows, and its order of columns. A block takes a tile of one adapter's rows x 64 columns, a warp 16
// rows: half of what it is there, since each adapter's sums are masked before they are added up.
#include "copy.cuh"
#include "dropout.cuh"
#include "multi_lora.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = philox::kBlockColumns / 2;
constexpr int kRanks = 64;  // of the factor in shared memory at a time
constexpr int kTiles = kColumns / 8;
static_assert(kTileRows == kThreads / 32 * 16);

template <class TX, class TC>
__global__ void __launch_bounds__(kThreads, 1) multi_lora_expand_kernel(MultiLoraExpand p) {
  using T = Compute<TX, TC>;
  using S = Sum<T>;
  constexpr int kStride = kRanks + kPadding;
  constexpr int kAtOnce = is_16bit<T> ? kTiles : kTiles / 2;  // tiles: as many as there are registers for
  PF_DYN_SMEM(T, c_tile);                                     // [the columns, in the order of the tiles][ranks]
  T* s_tile = c_tile + kColumns * kStride;                    // [rows][ranks]
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int g = lane / 4, t = lane % 4;
  const RowTile tile = p.pass.tiles[blockIdx.x];
  const int64_t N = p.n[blockIdx.z], column = static_cast<int64_t>(blockIdx.y) * kColumns;
  if (tile.count == 0 || column >= N) return;
  const MultiAdapter* adapters = p.pass.table + (p.first_slice + blockIdx.z) * p.pass.adapters + tile.adapter;
  const Dtype products = p.backward ? adapters->products_x : adapters->products;
  if ((!p.backward && adapters->r == 0) || products != p.pass.types.adapter) return;
  const int row = warp * 16 + g, padded_rows = (tile.count + 15) / 16 * 16;  // in the tile

  S sums[kTiles][4] = {};
#pragma unroll 1
  for (int slice = 0; slice < (p.backward ? p.slices : 1); ++slice) {
    const int place = p.backward ? slice : p.first_slice + static_cast<int>(blockIdx.z);
    const MultiAdapter& adapter = adapters[slice * p.pass.adapters];
    const int r_all = adapter.r;
    const Factor factor(adapter, !p.backward);

    // s of a row of the tile, with its factors
    const S* parts = static_cast<const S*>(p.parts) +
                     (static_cast<int64_t>(place) * p.splits * p.pass.m + tile.begin) * p.pass.max_rank;
    const S dropout_scale = static_cast<S>(adapter.dropout_scale);
    const S scale = p.backward ? S(1) : static_cast<S>(adapter.scale);
    const auto scaled = [&](int m, int r) -> S {
      if (m >= tile.count || r >= r_all) return S(0);
      const S* from = parts + static_cast<int64_t>(m) * p.pass.max_rank + r;
      S sum = from[0];
      if (p.splits > 1) {
        for (int part = 1; part < p.splits; ++part) sum += from[part * p.pass.m * p.pass.max_rank];
        sum *= dropout_scale;
        if (p.s != nullptr && blockIdx.y == 0) {
          static_cast<S*>(p.s)[(place * p.pass.m + tile.begin + m) * p.pass.max_rank + r] = sum;
        }
      }
      return sum * scale;
    };

    // Bit 16 half + 2 tile + h: whether dropout keeps what sums[tile][2 half + h] is added to.
    uint32_t kept = ~0u;
    if (p.backward && adapter.dropout.threshold != 0) {
      const uint64_t seed = static_cast<uint64_t>(__ldg(adapter.dropout.seed));
      const bool odd = blockIdx.y % 2 != 0;  // the second half of dropout's block
      kept = 0;
#pragma unroll 1  // many at once would take the registers
      for (int i = 0; i < 8; ++i) {
        uint32_t keep[4];
        keep_masks(keep, seed, adapter.dropout.threshold, tile.first + row + i / 4 * 8, blockIdx.y / 2, 4 * t + i % 4);
#pragma unroll
        for (int w = 0; w < 2; ++w) {
          const uint32_t word = odd ? keep[w + 2] : keep[w];
          kept |= ((word & 1u) | (word >> 31 << 1)) << (i / 4 * 16 + 8 * w + i % 4 * 2);
        }
      }
    }

#pragma unroll 1
    for (int first_rank = 0; first_rank < r_all; first_rank += kRanks) {
      const int ranks = r_all - first_rank < kRanks ? r_all - first_rank : kRanks;
      const int padded = (ranks + 15) / 16 * 16;
      __syncthreads();  // all are done with the ranks before
      factor.for_each<kThreads, T, TC>(first_rank, column, padded, kColumns, ranks, N - column, thread,
                                       [&](int r, int n, T value) {
                                         const int slot = (n / 32 * 4 + n % 8 / 2) * 8 + n % 32 / 8 * 2 + n % 2;
                                         c_tile[slot * kStride + r] = value;
                                       });
      for (int i = thread; i < padded_rows * padded; i += kThreads) {
        const int m = i / padded, r = i % padded;
        s_tile[m * kStride + r] = convert<T>(scaled(m, first_rank + r));
      }
      __syncthreads();
      if (warp * 16 >= tile.count) continue;
#pragma unroll
      for (int first_tile = 0; first_tile < kTiles; first_tile += kAtOnce) {
        S part[kAtOnce][4] = {};  // each adapter's sums are masked before they are added
        for (int r = 0; r < padded; r += 16) {
          const FragmentA<T> a = load_a<T>(s_tile + warp * 16 * kStride + r, kStride, lane);
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            const FragmentB<T> b = load_b<T>(c_tile + (first_tile + i) * 8 * kStride + r, kStride, lane);
            multiply_add<false, T>(part[i], a, b, false);
          }
        }
#pragma unroll
        for (int i = 0; i < kAtOnce * 4; ++i) {
          const int at = first_tile + i / 4;
          if (kept >> (i % 4 / 2 * 16 + 2 * at + i % 2) & 1u) sums[at][i % 4] += part[i / 4][i % 4];
        }
      }
    }
  }

  const int64_t ld = p.ld_out[blockIdx.z];
  TX* out = static_cast<TX*>(p.out[blockIdx.z]);
  const bool aligned = reinterpret_cast<uintptr_t>(out) % 16 == 0 && ld * sizeof(TX) % 16 == 0;
  TX before[2][kColumns / 32][8];  // all of it under way before the first of it is waited for
  TX* to[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool exists = row + 8 * half < tile.count;
    to[half] = out + (exists ? p.pass.rows[tile.begin + row + 8 * half] * ld : 0) + column + 8 * t;
    if (p.backward) continue;
#pragma unroll
    for (int w = 0; w < kColumns / 32; ++w) {
      load_run(before[half][w], to[half] + 32 * w, exists ? N - column - 32 * w - 8 * t : 0, aligned);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if (row + 8 * half >= tile.count) continue;
#pragma unroll
    for (int w = 0; w < kColumns / 32; ++w) {
      const int64_t valid = N - column - 32 * w - 8 * t;
      if (valid <= 0) continue;
      S values[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        values[i] = (p.backward ? S(0) : convert<S>(before[half][w][i])) + sums[4 * w + i / 2][2 * half + i % 2];
      }
      store_run(values, to[half] + 32 * w, valid, aligned);
    }
  }
}

}  // namespace

void launch_multi_lora_expand(const MultiLoraExpand& call, cudaStream_t stream) {
  const int outputs = call.backward ? 1 : call.slices;
  const int64_t widest = *std::max_element(call.n, call.n + outputs);
  with_types(call.pass.types, [&](auto types) {
    using TX = typename decltype(types)::Data;
    using TC = typename decltype(types)::Adapter;
    constexpr int kBytes = (kColumns + kTileRows) * (kRanks + kPadding) * static_cast<int>(sizeof(Compute<TX, TC>));
    static_assert(kBytes <= kSharedLimit);
    const dim3 grid(static_cast<unsigned>(call.pass.tile_count),
                    static_cast<unsigned>(divide_up_to<int64_t>(widest, kColumns)), static_cast<unsigned>(outputs));
    PF_LAUNCH(grid, dim3(kThreads), kBytes, stream, (multi_lora_expand_kernel<TX, TC>), call);
  });
}

}  // namespace pyfused
