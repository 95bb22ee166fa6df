// Kernels of _ops that _autograd calls by address, past the dispatcher and the stable ABI's boxed calls, each of which
// costs a small call microseconds. Both libraries are of one build.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace pyfused {

struct CpuKernels {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;

  std::tuple<Tensor, Tensor> (*lora_linear_forward)(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                                                    const Tensor&, const Optional&, double, double, const Optional&,
                                                    bool);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> (*lora_backward)(const Tensor&, const Optional&, const Optional&,
                                                                      const Tensor&, const Tensor&, const Optional&,
                                                                      const Optional&, double, double, const Optional&,
                                                                      int64_t, bool);
};

// In _ops filled where it registers its kernels; in _autograd a copy, from the op _cpu_kernels. Null: through the
// dispatcher.
inline CpuKernels cpu_kernels;

}  // namespace pyfused
