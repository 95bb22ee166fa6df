// Kernels of _ops that _autograd calls by address, past the dispatcher and the stable ABI's boxed calls, each of which
// costs a small call microseconds. Both libraries are of one build.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

namespace pyfused {

struct CpuKernels {
  using Tensor = torch::stable::Tensor;
  using Optional = std::optional<Tensor>;
  using Tensors = std::vector<Tensor>;
  using Optionals = std::vector<Optional>;

  bool keeps_masks;  // whether some LoRA forward leaves dropout's mask to its backward

  std::tuple<Tensor, Tensor> (*lora_linear_forward)(const Tensor&, const Tensor&, const Optional&, const Tensor&,
                                                    const Tensor&, const Optional&, double, double, const Optional&,
                                                    bool);
  std::tuple<Tensor, Tensor, Tensor> (*lora_linear_forward_with_mask)(const Tensor&, const Tensor&, const Optional&,
                                                                      const Tensor&, const Tensor&, const Optional&,
                                                                      double, double, const Optional&);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> (*lora_backward)(const Tensor&, const Optional&, const Optional&,
                                                                      const Tensor&, const Tensor&, const Optional&,
                                                                      const Optional&, double, double, const Optional&,
                                                                      int64_t, bool);
  std::tuple<Tensors, Tensors> (*lora_linear_shared_forward)(const Tensor&, const Tensors&, const Optionals&,
                                                             const Optionals&, const Optionals&, const Optionals&,
                                                             const std::vector<double>&, const std::vector<double>&,
                                                             const Optionals&, bool);
  std::tuple<Tensors, Tensors, Tensors> (*lora_linear_shared_forward_with_masks)(
      const Tensor&, const Tensors&, const Optionals&, const Optionals&, const Optionals&, const Optionals&,
      const std::vector<double>&, const std::vector<double>&, const Optionals&);
  std::tuple<Tensor, Tensors> (*lora_linear_shared_backward)(const Tensors&, const Optional&, const Optionals&,
                                                             const Optionals&, const Optionals&, const Optionals&,
                                                             const Optionals&, const std::vector<double>&,
                                                             const std::vector<double>&, const Optionals&,
                                                             const std::vector<int64_t>&, bool);

  std::tuple<Tensor, Tensor> (*ia3_linear_forward)(const Tensor&, const Tensor&, const Optional&, const Tensor&, bool,
                                                   bool);
  std::tuple<Tensor, Tensor> (*ia3_linear_backward)(const Tensor&, const Optional&, const Optional&, const Optional&,
                                                    const Tensor&, bool, int64_t);
  Tensor (*ia3_scale_forward)(const Tensor&, const Tensor&, int64_t);
  std::tuple<Tensor, Tensor> (*ia3_scale_backward)(const Tensor&, const Optional&, const Tensor&, int64_t, int64_t);

  std::tuple<Tensor, Tensor> (*bottleneck_forward)(const Tensor&, const Optional&, const Tensor&, const Optional&,
                                                   const Tensor&, const Optional&, const Optional&, int64_t, double,
                                                   double, const Optional&, bool);
  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> (*bottleneck_backward)(
      const Tensor&, const Optional&, const Tensor&, const Tensor&, const Optional&, const Optional&, const Tensor&,
      const Optional&, int64_t, double, double, const Optional&, int64_t, bool);
};

// In _ops filled where it registers its kernels; in _autograd a copy, from the op _cpu_kernels. Null: through the
// dispatcher.
inline CpuKernels cpu_kernels;

}  // namespace pyfused
