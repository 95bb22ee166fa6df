// Dropout's CPU loop as the host sees it: one per ISA level and data type.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"
#include "../../common/philox.h"

namespace pyfused {

struct DropoutKernels {
  // dst[m][k] = x[m][k] * scale where the mask keeps it, else 0, for rows [row_begin, row_end); rows of x have unit
  // stride and are ld_x elements apart, those of dst follow one another.
  void (*drop)(const void* x, int64_t ld_x, void* dst, int64_t row_begin, int64_t row_end, int64_t columns,
               Dropout dropout, double scale);
};

namespace DEFAULT {
const DropoutKernels& dropout_kernels(Dtype dtype);
}
namespace AVX2 {
const DropoutKernels& dropout_kernels(Dtype dtype);
}
namespace AVX512 {
const DropoutKernels& dropout_kernels(Dtype dtype);
}
namespace AVX512_BF16 {
const DropoutKernels& dropout_kernels(Dtype dtype);
}

}  // namespace pyfused
