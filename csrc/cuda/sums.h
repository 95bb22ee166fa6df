// The second stage of every split sum.
#pragma once

#include <cuda_runtime_api.h>

#include <span>

#include "types.h"

namespace pyfused {

// out[i] = factor * vector[i / vector_run % vector_size] * sum_p parts[p][i], the parts of fp32 (fp64 where is_double)
// in their order and in fp64.
struct PartSum {
  const void* parts;
  int64_t part_count, part_stride, count;
  void* out;
  Dtype out_dtype;
  double factor;
  ConstVector vector;
  int64_t vector_run, vector_size;
  int64_t out_columns, out_ld;  // out in rows of so many elements, ld apart; 0: without gaps
  void* unscaled;               // the plain sum too, in the parts' type; or null
};
// Sums of one type, a few of them in one launch.
void launch_sums(std::span<const PartSum> sums, bool is_double, cudaStream_t stream);

}  // namespace pyfused
