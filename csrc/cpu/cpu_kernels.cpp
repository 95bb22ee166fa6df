// Where _autograd finds the kernels that it calls by address.
#include "../common/cpu_kernels.h"

#include <torch/csrc/stable/library.h>

#include "lora.h"

namespace pyfused {
namespace {

int64_t address_of_cpu_kernels() {
  cpu_kernels.keeps_masks = lora_kernels_for(Dtype::kBFloat16, kAmxMinRows, kAmxMinRows, 1).keeps_mask;
  return reinterpret_cast<int64_t>(&cpu_kernels);
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CompositeExplicitAutograd, m) {
  m.impl("_cpu_kernels", TORCH_BOX(&pyfused::address_of_cpu_kernels));
}
