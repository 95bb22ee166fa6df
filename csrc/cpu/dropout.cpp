// Dropout on CPU: LoRA's mask on a tensor of its own, made again from the seed for the gradient.
#include "kernels/dropout.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "../common/dropout.h"
#include "levels.h"
#include "matrix.h"

namespace pyfused {
namespace {

// Multiply-adds that take as long as an element and its bit.
constexpr int64_t kElementWork = 8;

const DropoutKernels& kernels_for(Dtype dtype){PF_RETURN_AT_LEVEL(dropout_kernels(dtype))}

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const DropoutCall call("dropout", Device::cpu(), x, p, seed);
  Tensor y = empty_rows(x, call.columns, Device::cpu());
  if (y.numel() == 0) return y;
  const Matrix source(x);
  Dropout mask{0, call.threshold};
  std::memcpy(&mask.seed, seed.const_data_ptr(), sizeof mask.seed);
  const DropoutKernels& kernels = kernels_for(call.dtype);
  const void* from = source.tensor.const_data_ptr();
  void* to = y.mutable_data_ptr();
  const RowRanges ranges = RowRanges::independent(call.rows);
  parallel(ranges.count, call.rows * call.columns * kElementWork, [&](int64_t range) {
    kernels.drop(from, source.ld, to, ranges.begin(range), ranges.end(range), call.columns, mask, call.scale);
  });
  return y;
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) { m.impl("_dropout", TORCH_BOX(&pyfused::dropout)); }
