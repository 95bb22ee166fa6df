// The loops of multi_lora on CPU as the host sees them: LoRA for rows of a batch that share an adapter and need not lie
// beside each other. Names of sizes and types as in lora.h.
//
// What is computed for a row depends on that row and its adapter alone: neither on the other rows of the call nor on
// where it is among them.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/philox.h"
#include "tile.h"

namespace pyfused {

// An expand's scratch memory: elements for each rank, of which there is a multiple of kPanelRanks.
inline constexpr int64_t kPanelRanks = 16, kPanelElements = 2 * kPackedColumns;

// s[i][r] = factor * sum_k keep(first_row + i, k) x[rows[i]][k] a[r][k] for i in [0, count). s [count, R] contiguous,
// Acc; a [R, K] as it is, rows of unit stride.
using MultiLoraShrink = void (*)(const void* x, int64_t ld_x, const int64_t* rows, int64_t count, int64_t K, int64_t R,
                                 const void* a, int64_t ld_a, Dropout dropout, int64_t first_row, double factor,
                                 void* s);

// y[rows[i]][n] += sum_r s[i][r] b[n][r]. s [count, R] contiguous, Acc; b [N, R] as it is, rows of unit stride. panel
// is scratch memory in Acc, kPanelElements for each of R ranks rounded up to kPanelRanks, aligned to 64 bytes.
using MultiLoraExpand = void (*)(void* y, int64_t ld_y, const int64_t* rows, int64_t count, int64_t N, int64_t R,
                                 const void* s, const void* b, int64_t ld_b, void* panel);

// Indexed by the adapter's dtype; null for fp64 adapters of other data.
struct MultiLoraKernels {
  MultiLoraShrink shrink[kDtypes];
  MultiLoraExpand expand[kDtypes];
};

namespace DEFAULT {
const MultiLoraKernels& multi_lora_kernels(Dtype dtype);
}
namespace AVX2 {
const MultiLoraKernels& multi_lora_kernels(Dtype dtype);
}
namespace AVX512 {
const MultiLoraKernels& multi_lora_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const MultiLoraKernels& multi_lora_kernels(Dtype dtype);
}
namespace AMX {
// The kernels for bf16 data, with those for bf16 adapters in tiles.
MultiLoraKernels multi_lora_in_tiles(MultiLoraKernels kernels);
}  // namespace AMX

}  // namespace pyfused
