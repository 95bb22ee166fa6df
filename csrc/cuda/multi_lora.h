// multi_lora's CUDA launchers: LoRA's passes for the rows of many adapters in one batch. Who has which rows is found on
// the GPU; the host knows upper bounds. Nothing waits, nothing is allocated.
//
// What a row gets depends on itself and its adapter alone: sums are cut by the shape of one adapter, never by the
// batch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "types.h"

namespace pyfused {

// One adapter of a slice, in device memory; r 0: there is none. a [R, K] and b [N, R], rows of unit stride.
struct MultiAdapter {
  const void *a, *b;
  int64_t ld_a, ld_b;
  double scale, dropout_scale;
  DropoutSource dropout;
  Dtype type_a, type_b;  // as they are in memory
  Dtype products;        // the adapter type of the kernels that take it: KernelTypes::adapter of a pass
  Dtype products_x;      // likewise for the gradient of x, in which all slices of an adapter are added up
  int r;
  void *grad_a, *grad_b;  // contiguous, in the types of a and b; or null
};

// The rows of one adapter: rows[begin], ..., in the order of the batch.
struct RowGroup {
  int begin, count;
};
// Up to kTileRows rows of a group, or up to part_rows; count 0: nothing to do.
struct RowTile {
  int adapter, begin, count;
  int first;  // begin's place within the group: dropout counts from there
};

inline constexpr int kTileRows = 64;
inline constexpr int kPartRows = 1024;  // of a part of the sums over an adapter's rows: a multiple of kTileRows

// As many as tiles can be: a group's first is no. begin / kTileRows + min(adapter, begin).
inline int64_t row_tiles(int64_t m, int64_t adapters) { return m / kTileRows + (adapters < m ? adapters : m); }

// As many as parts can be, of which each adapter has one, without rows if need be: its first is no.
// begin / part_rows + adapter.
inline int64_t row_parts(int64_t m, int64_t adapters, int part_rows) { return m / part_rows + adapters; }
// As many as there can be of adapters that have several: such a one's first is no. 2 * begin / part_rows.
inline int64_t part_slots(int64_t m, int part_rows) { return 2 * m / part_rows; }

// Index and segments of a call, on the GPU. What in them does not fit is an assertion there.
struct MultiLoraIndex {
  const void *index, *segments;    // segments: null, or entries + 1 numbers
  bool wide_index, wide_segments;  // int64, else int32
  int64_t entries, m;
  int adapters;
};

// The same sorted.
struct MultiLoraGroups : MultiLoraIndex {
  int* rows;         // [M]
  RowGroup* groups;  // [adapters]
  RowTile* tiles;    // [row_tiles(m, adapters)]
  RowTile* parts;    // [row_parts(m, adapters, part_rows)], or null; an adapter without rows has first 0 in one
  int part_rows;
};
void launch_multi_lora_groups(const MultiLoraGroups& call, cudaStream_t stream);

// Copies descriptors to device memory through kernel arguments, so that a CUDA graph holds them.
void launch_multi_lora_table(const MultiAdapter* host, int64_t count, MultiAdapter* device, cudaStream_t stream);

// What all passes have in common. types.adapter: only adapters whose `products` it is are looked at.
struct MultiLoraPass {
  KernelTypes types;
  int64_t m;
  const int* rows;
  const RowGroup* groups;
  const RowTile* tiles;
  int64_t tile_count;
  const MultiAdapter* table;  // slice after slice
  int adapters;               // of a slice
  int max_rank;               // the s of two places in `rows` lie this far apart
  const RowTile* parts;       // for sums over rows
  int part_rows;
};

inline constexpr int kSplitColumns = 512;
inline int multi_lora_splits(int64_t k) { return static_cast<int>((k + kSplitColumns - 1) / kSplitColumns); }

// parts[slice][split][place][r] = the split's share of drop(x) a^T, or of dy b where `backward`; place: the row's in
// `rows`. With one split the whole, times the dropout's scale, in a backward times the adapter's too.
struct MultiLoraShrink {
  MultiLoraPass pass;
  bool backward;
  int first_slice, slices;  // which share x
  int64_t k;                // columns of x, or of dy
  ConstRows x;
  int splits;   // 1, or multi_lora_splits(k); the sums are the same to the bit
  void* parts;  // of the first slice
};
void launch_multi_lora_shrink(const MultiLoraShrink& call, cudaStream_t stream);

inline constexpr int kMaxSlices = 8;  // of one pass

// out[slice][row] += scale * s b^T, s the sum of its parts; where `backward` dx[row] = the sum over slices of
// drop(ds a), into out[0].
struct MultiLoraExpand {
  MultiLoraPass pass;
  bool backward;
  int first_slice, slices;
  const void* parts;  // of slice 0
  int splits;
  void* s;  // [slices, M, max_rank] from slice 0 on, where the sum of more than one part goes; or null
  int64_t n[kMaxSlices];
  void* out[kMaxSlices];
  int64_t ld_out[kMaxSlices];
};
void launch_multi_lora_expand(const MultiLoraExpand& call, cudaStream_t stream);

// Of each adapter of one slice grad_b = scale * dy^T s [N, R], or grad_a = ds^T drop(x) [R, K] where `of_a`; zeros
// where it has no rows.
struct MultiLoraReduce {
  MultiLoraPass pass;
  bool of_a;
  int slice;
  int64_t n;  // columns of x, or of dy
  ConstRows x;
  const void* s;    // [M, max_rank]
  void* part_sums;  // [part_slots(m, part_rows), max_rank * n]: of adapters of several parts, laid out as the gradient
};
void launch_multi_lora_reduce(const MultiLoraReduce& call, cudaStream_t stream);

// y += (scale x a^T) b^T for a few rows in one launch, in inference.
inline constexpr int kMaxDecodeRows = 64;
inline constexpr int kMaxDecodeAdapters = 80;  // of all slices: they are kernel arguments, which have 4 KB
struct MultiLoraDecode {
  struct Adapter {  // a and b in types.adapter; r 0: there is none
    const void *a, *b;
    int ld_a, ld_b;
    int r;
    double scale;
  };
  KernelTypes types;
  MultiLoraIndex batch;
  int64_t k;
  ConstRows x;
  int slices;
  int64_t n[kMaxSlices];
  void* out[kMaxSlices];
  int64_t ld_out[kMaxSlices];
  Adapter adapters[kMaxDecodeAdapters];  // slice after slice
};
static_assert(sizeof(MultiLoraDecode) <= 4000);
bool multi_lora_decode_fits(KernelTypes types, int64_t m, int64_t k, int64_t entries, int64_t descriptors, int slices,
                            int max_rank);
void launch_multi_lora_decode(const MultiLoraDecode& call, cudaStream_t stream);

}  // namespace pyfused
