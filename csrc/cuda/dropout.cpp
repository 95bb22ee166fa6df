// Dropout on CUDA: one launch, here and for the gradient; the seed stays on the GPU, so nothing waits for it.
#include "dropout.h"

#include <torch/csrc/stable/library.h>

#include "../common/dropout.h"
#include "tensor.h"

namespace pyfused {
namespace {

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  const DeviceScope scope(gpu_of(x, "dropout", "x"));
  const DropoutCall call("dropout", scope.device, x, p, seed);
  Tensor y = empty_rows(x, call.columns, scope.device);
  if (y.numel() == 0) return y;
  const Matrix source(x);
  DropoutPass pass{};
  pass.dtype = call.dtype;
  pass.rows = call.rows;
  pass.columns = call.columns;
  pass.x = {source.tensor.const_data_ptr(), source.ld};
  pass.dropout = {static_cast<const int64_t*>(seed.const_data_ptr()), call.threshold};
  pass.scale = call.scale;
  pass.out = y.mutable_data_ptr();
  launch_dropout(pass, scope.stream());
  return y;
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) { m.impl("_dropout", TORCH_BOX(&pyfused::dropout)); }
