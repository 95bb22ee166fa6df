// Which rows are whose: a stable sort of the batch by adapter, on the GPU and in one launch. A warp per adapter reads
// the whole index: once for how many rows come before its own, once more to write them down.
#include "multi_lora.cuh"

namespace pyfused {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kAtOnce = 4;  // entries that a lane reads before it looks at the first
constexpr int kNone = 0x7fffffff;
constexpr int kTableChunk = 32;

// visit(entry) for all entries, in their order, 32 lanes at a time.
template <class F>
__device__ __forceinline__ void for_each_entry(const MultiLoraGroups& p, int lane, const F& visit) {
  for (int64_t first = 0; first < p.entries; first += 32 * kAtOnce) {
    Entry entries[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) entries[j] = entry_at(p, first + 32 * j + lane);
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      if (first + 32 * j + lane < p.entries) check(p, first + 32 * j + lane, entries[j]);
      visit(static_cast<int>(entries[j].id), static_cast<int>(entries[j].begin),
            static_cast<int>(entries[j].end - entries[j].begin));
    }
  }
}

template <class F>
__device__ __forceinline__ int over_warp(int value, const F& combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, lanes));
  return value;
}

// Cuts a group's rows into tiles of so many, and writes empty ones after them up to the `count`th.
__device__ void write_tiles(RowTile* to, int64_t count, int rows, int adapter, RowGroup group, int lane) {
  for (int64_t i = lane; i < count; i += 32) {
    const int64_t first = i * rows, left = group.count - first;
    to[i] = {adapter, static_cast<int>(group.begin + first),
             static_cast<int>(left < 0      ? 0
                              : left < rows ? left
                                            : rows),
             static_cast<int>(first)};
  }
}

__global__ void __launch_bounds__(kThreads) multi_lora_groups_kernel(MultiLoraGroups p) {
  const int lane = threadIdx.x % 32;
  const int adapter = static_cast<int>(blockIdx.x) * kWarps + static_cast<int>(threadIdx.x) / 32;
  if (adapter >= p.adapters && adapter > 0) return;
  int before = 0, own = 0, next = kNone;
  for_each_entry(p, lane, [&](int id, int, int length) {
    if (length == 0) return;
    before += id >= 0 && id < adapter ? length : 0;
    own += id == adapter ? length : 0;
    next = id > adapter && id < next ? id : next;
  });
  const auto add = [](int a, int b) { return a + b; };
  const RowGroup group{over_warp(before, add), over_warp(own, add)};
  next = over_warp(next, [](int a, int b) { return a < b ? a : b; });
  if (p.adapters == 0) return;  // an empty table: the index was looked at
  if (lane == 0) p.groups[adapter] = group;
  // the tiles before the first group's are none; where nobody has rows, adapter 0 says so
  if (group.count > 0 || (adapter == 0 && next == kNone)) {
    const auto place = [](int64_t id, int64_t begin) { return begin / kTileRows + (id < begin ? id : begin); };
    const int64_t start = place(adapter, group.begin);
    const int64_t end = next == kNone ? place(p.adapters, p.m) : place(next, group.begin + group.count);
    write_tiles(p.tiles + start, end - start, kTileRows, adapter, group, lane);
  }
  if (p.parts != nullptr) {
    const int64_t start = group.begin / p.part_rows + adapter;
    const int64_t after = adapter == p.adapters - 1 ? p.m : group.begin + group.count;
    write_tiles(p.parts + start, after / p.part_rows + adapter + 1 - start, p.part_rows, adapter, group, lane);
  }
  if (group.count == 0) return;

  int to = group.begin;
  for_each_entry(p, lane, [&](int id, int begin, int length) {
    const bool mine = id == adapter && length > 0;
    const unsigned all = __ballot_sync(0xffffffffu, mine);
    if (__ballot_sync(0xffffffffu, mine && length > 1) == 0) {
      if (mine) p.rows[to + __popc(all & ((1u << lane) - 1u))] = begin;
      to += __popc(all);
      return;
    }
    for (unsigned left = all; left != 0; left &= left - 1) {
      const int source = __ffs(left) - 1;
      const int first = __shfl_sync(0xffffffffu, begin, source), count = __shfl_sync(0xffffffffu, length, source);
      for (int i = lane; i < count; i += 32) p.rows[to + i] = first + i;
      to += count;
    }
  });
}

struct TableChunk {
  MultiAdapter adapters[kTableChunk];
};
static_assert(sizeof(TableChunk) < 4000, "kernel arguments have 4 KB");

__global__ void __launch_bounds__(kTableChunk) multi_lora_table_kernel(TableChunk chunk, int count, MultiAdapter* to) {
  const int i = threadIdx.x;
  if (i < count) to[i] = chunk.adapters[i];
}

}  // namespace

void launch_multi_lora_groups(const MultiLoraGroups& call, cudaStream_t stream) {
  const int warps = call.adapters > 0 ? call.adapters : 1;
  PF_LAUNCH(dim3(static_cast<unsigned>(divide_up_to(warps, kWarps))), dim3(kThreads), 0, stream,
            multi_lora_groups_kernel, call);
}

void launch_multi_lora_table(const MultiAdapter* host, int64_t count, MultiAdapter* device, cudaStream_t stream) {
  for (int64_t first = 0; first < count; first += kTableChunk) {
    TableChunk chunk{};
    const int64_t these = std::min<int64_t>(count - first, kTableChunk);
    std::copy(host + first, host + first + these, chunk.adapters);
    PF_LAUNCH(dim3(1), dim3(kTableChunk), 0, stream, multi_lora_table_kernel, chunk, static_cast<int>(these),
              device + first);
  }
}

}  // namespace pyfused
