// IA3's CUDA launchers: raw pointers and a stream, see lora.h. Sums are fp32, for fp64 data fp64.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace pyfused {

// Without parts: out[m][n] = (source[m][n] + shift[n]) * scale[n]. With parts, in one pass over source and z:
//   out[m][n] = source[m][n] * scale[n], where out is given
//   parts[range][n] = sum over the range's rows of source[m][n] (z[m][n] + shift[n])
// out has rows of `columns` elements and may be source.
struct Ia3Columns {
  Dtype dtype;
  int64_t rows, columns;
  ConstRows source, z;
  ConstVector scale, shift;  // shift may be none
  void* out;
  void* parts;
  int64_t range_rows;
};
void launch_ia3_columns(const Ia3Columns& call, cudaStream_t stream);
// Rows of a range: enough blocks for the GPU, parts that stay small beside the data.
int64_t ia3_range_rows(Dtype dtype, int64_t rows, int64_t columns, int multiprocessors);

// The same where the elements of a row share a factor, on contiguous [rows, columns]; row r has scale[r % period], and
// parts[run][r] are the sums over the row's runs of `run_columns`.
struct Ia3Rows {
  Dtype dtype;
  int64_t rows, columns, period, run_columns;
  const void* source;
  const void* z;
  ConstVector scale;
  void* out;
  void* parts;
};
void launch_ia3_rows(const Ia3Rows& call, cudaStream_t stream);
int64_t ia3_run_columns(int64_t columns);

// out = (x w^T + bias) * scale in one product, for bf16 and fp16; base = x w^T + bias, where it is given. Both have
// rows of n elements.
struct Ia3Linear {
  Dtype dtype;
  int64_t m, n, k;
  ConstRows x, w;    // [M, K], [N, K]
  const void* bias;  // [N] of dtype, or null
  ConstVector scale;
  void* out;
  void* base;
  int capability, multiprocessors;  // of the GPU: 90 for an H100
};
void launch_ia3_linear(const Ia3Linear& call, cudaStream_t stream);
// csrc/cuda/cutlass/ia3_linear.cu, where the build has CUTLASS: for capability 90 and calls that TMA can copy.
void launch_ia3_linear_sm90(const Ia3Linear& call, cudaStream_t stream);

}  // namespace pyfused
