// LoRA's CUDA launchers: raw pointers and a stream, no torch headers. Everything is enqueued, nothing waits, nothing is
// allocated. Sizes and leading dimensions are in elements.
//
// Names of sizes: M rows, K input features, N output features, R rank. Sums ("parts", s, ds) are fp32, for fp64 data
// fp64. A launcher throws std::runtime_error where CUDA refuses the launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>

#include "types.h"

namespace pyfused {

// parts[split][m][r] = factor * sum over the split's columns of drop(x)[m][k] a[r][k], for each adapter with its own
// mask. 16-bit x is read once for up to three adapters.
struct LoraShrink {
  struct Adapter {
    int r;
    ConstRows a;  // [R, K]
    DropoutSource dropout;
    double factor;
    void* parts;  // [splits, M, R]
  };
  KernelTypes types;
  int64_t m, k;
  ConstRows x;
  int splits;  // parts over K; 1 writes the result itself
  std::span<const Adapter> adapters;
};
void launch_lora_shrink(const LoraShrink& call, cudaStream_t stream);
// Splits over K that fill a GPU of this many multiprocessors.
int lora_shrink_splits(int64_t m, int64_t k, int r, int multiprocessors);

// One pass over a matrix x [M, N], or dy, that reduces it both ways:
//   rows_parts[slab][m][r] = sum over the slab's columns of x[m][n] c(n, r), where given: for one adapter, R <= 32
//   columns_parts[range][n][r] = sum over the range's rows of drop(x)[m][n] s[m][r], for each adapter with its own
//   mask.
// x is read from memory once, or not much more often: 16-bit x by one block for up to three adapters of up to 16 ranks,
// for two where they are in fp32; else by up to eight adapters' blocks, which run next to each other and find it in L2.
struct LoraReduce {
  struct Adapter {
    int r;
    const void* s;  // [M, R]
    DropoutSource dropout;
    void* columns_parts;
    int64_t column_stride, rank_stride;  // element (n, r) of a part
  };
  KernelTypes types;
  int64_t m, n;
  ConstRows x;
  int64_t range_rows;  // rows of one range
  std::span<const Adapter> adapters;
  void* rows_parts;  // [slabs, M, R], or null
  const void* c;     // element (n, r) is c[n * c_column_stride + r * c_rank_stride]
  int64_t c_column_stride, c_rank_stride;
};
void launch_lora_reduce(const LoraReduce& call, cudaStream_t stream);
// Up to this rank one pass is the faster way to both; beyond it dy would be read once per 32 ranks all the same, and
// the parts over its columns grow.
inline constexpr int kMaxFusedRank = 32;
// Columns of one slab of rows_parts.
int64_t lora_slab_columns(KernelTypes types, int r);
// Rows of a range: enough blocks for the GPU, partial sums that stay small beside x.
int64_t lora_range_rows(KernelTypes types, int64_t m, int64_t n, int r, bool with_rows, int multiprocessors);

// out[r] = factor * sum_m s[m][r] u[m][r]
void launch_lora_scale_gradient(const void* s, const void* u, int64_t m, int r, double factor, void* out,
                                Dtype out_dtype, bool is_double, cudaStream_t stream);

// out[m][n] = source[m][n] + bias[n] + sum over adapters of drop(sum_r factor * vector[r] * s[m][r] c(n, r)), each with
// its own mask and s the sum of its parts. 16-bit out is written once for up to three adapters, and rounded once.
struct LoraExpand {
  struct Adapter {
    int r;
    const void* parts;
    int64_t part_count, part_stride;
    void* s;  // where the sum of more than one part goes, or null
    double factor;
    ConstVector vector;
    const void* c;  // element (n, r) is c[n * c_column_stride + r * c_rank_stride]
    int64_t c_column_stride, c_rank_stride;
    DropoutSource dropout;
  };
  KernelTypes types;
  int64_t m, n;
  std::span<const Adapter> adapters;
  ConstRows source;  // null data: nothing; may be out
  const void* bias;  // or null
  void* out;
  int64_t ld_out;
};
void launch_lora_expand(const LoraExpand& call, cudaStream_t stream);

// out = bias + drop(s c^T) + x w^T in one product over R and K ("K-concat"), for bf16 and fp16 throughout.
struct LoraConcat {
  Dtype type;
  int64_t m, n, k;  // out is [M, N], x [M, K]: in a backward these are dx and dy
  int r;
  ConstRows x, s;
  ConstRows w, c;  // [N, K] and [N, R]; transposed: [K, N] and [R, N]
  bool transposed;
  DropoutSource dropout;
  const void* bias;  // or null
  void* out;
  int64_t ld_out;
  int capability, multiprocessors;  // of the GPU: 90 for an H100
};
void launch_lora_concat(const LoraConcat& call, cudaStream_t stream);
// csrc/cuda/cutlass/lora_concat.cu, where the build has CUTLASS: for capability 90 and calls that TMA can copy.
void launch_lora_concat_sm90(const LoraConcat& call, cudaStream_t stream);

// Both halves for a few rows in one launch, for all adapters of up to 16 ranks, and in another for those with more:
// s = x a^T, out = source + factor * vector * s b^T. No dropout.
struct LoraDecode {
  struct Adapter {
    int64_t n;
    int r;
    ConstRows a;    // [R, K]
    const void* b;  // [N, R], element (n, r) is b[n * b_row_stride + r]
    int64_t b_row_stride;
    double factor;
    ConstVector vector;
    void* s;
    ConstRows source;  // may be out
    void* out;
    int64_t ld_out;
  };
  KernelTypes types;
  int64_t m, k;
  ConstRows x;
  std::span<const Adapter> adapters;
};
// Of one adapter, whatever company it has.
bool lora_decode_fits(KernelTypes types, int64_t m, int64_t k, int64_t n, int r);
void launch_lora_decode(const LoraDecode& call, cudaStream_t stream);

}  // namespace pyfused
