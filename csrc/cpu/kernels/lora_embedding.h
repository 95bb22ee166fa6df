// The loops that LoRA on an embedding has besides LoRA's own, as the host sees them: a's columns by token. Names as in
// lora.h; V tokens there are. No level has faster ones, so there is one table per Acc, compiled once per level.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace pyfused {

struct LoraEmbeddingKernels {
  // s[m][r] = a[r * rank_stride + ids[m] * token_stride] for rows [row_begin, row_end); a row whose id is not in [0, V)
  // gets zeros, and the result is false. s [M, R], Acc. Indexed by a's dtype.
  bool (*gather[kDtypes])(const void* a, int64_t rank_stride, int64_t token_stride, int64_t V, const int64_t* ids,
                          int64_t row_begin, int64_t row_end, int64_t R, void* s);

  // da[v] = scale * the sum of u[m * R] over the M rows whose token is v, in the order of the rows; 0 for the token
  // skip, which may be none. One rank's row [V] of da; sums [V] is memory in Acc, and may be da itself. Indexed by da's
  // dtype.
  void (*scatter[kDtypes])(const void* u, int64_t R, const int64_t* ids, int64_t M, int64_t skip, double scale,
                           int64_t V, void* sums, void* da);
};

// For data of this dtype.
namespace DEFAULT {
const LoraEmbeddingKernels& lora_embedding_kernels(Dtype dtype);
}
namespace AVX2 {
const LoraEmbeddingKernels& lora_embedding_kernels(Dtype dtype);
}
namespace AVX512 {
const LoraEmbeddingKernels& lora_embedding_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const LoraEmbeddingKernels& lora_embedding_kernels(Dtype dtype);
}

}  // namespace pyfused
