// A dropout call on any device, checked before memory is touched.
#pragma once

#include "philox.h"
#include "tensor.h"

namespace pyfused {

struct DropoutCall {
  Dtype dtype;
  int64_t rows, columns;
  uint32_t threshold;
  double scale;  // of what is kept

  DropoutCall(const char* op, const Device& device, const Tensor& x, double p, const Tensor& seed)
      : dtype(dtype_of(x, op, "x")) {
    check_device(x, device, op, "x");
    PF_CHECK(x.dim() >= 1, op, "x", "have at least one dimension", "a scalar");
    PF_CHECK(p >= 0.0 && p < 1.0, op, "p", "be in [0, 1)", p);
    check_seed(seed, device, op);
    rows = rows_of(x);
    columns = x.size(x.dim() - 1);
    threshold = drop_threshold(p);
    scale = keep_scale(threshold);
  }
};

}  // namespace pyfused
