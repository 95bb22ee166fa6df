// Dropout's CUDA launcher: raw pointers and a stream, see lora.h.
#pragma once

#include <cuda_runtime_api.h>

#include "types.h"

namespace pyfused {

// out[m][k] = x[m][k] * scale where the mask keeps it, else 0; out has rows of `columns` elements.
struct DropoutPass {
  Dtype dtype;
  int64_t rows, columns;
  ConstRows x;
  DropoutSource dropout;
  double scale;
  void* out;
};
void launch_dropout(const DropoutPass& call, cudaStream_t stream);

}  // namespace pyfused
