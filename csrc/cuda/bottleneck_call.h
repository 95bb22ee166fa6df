// A bottleneck call on CUDA: its arguments checked, its operands in the types and layouts that kernels and the vendor's
// GEMM want, and the sums of parts that end a backward.
#pragma once

#include <optional>

#include "../common/bottleneck.h"
#include "bottleneck.h"
#include "bottleneck_path.h"
#include "sums.h"
#include "tensor.h"

namespace pyfused {

// A call with its small operands.
struct Bottleneck : BottleneckArguments {
  DeviceScope scope;
  KernelTypes types;
  DropoutSource dropout;
  std::optional<Tensor> scale_vector, b_up;  // contiguous

  Bottleneck(const char* op, const Tensor& rows, const char* name, const Tensor& w_down,
             const std::optional<Tensor>& b_down, const Tensor& w_up, const std::optional<Tensor>& b_up,
             const std::optional<Tensor>& scale_vector, int64_t activation, double factor, double dropout_p,
             const std::optional<Tensor>& seed, bool allow_tf32)
      : BottleneckArguments(op, gpu_of(rows, op, name), rows, name, w_down, b_down, w_up, b_up, scale_vector,
                            activation, factor, dropout_p, seed),
        scope(device),
        types{dtype, product, allow_tf32},
        dropout{threshold == 0 ? nullptr : static_cast<const int64_t*>(seed->const_data_ptr()), threshold},
        scale_vector(contiguous(scale_vector)),
        b_up(contiguous(b_up)) {}

  bool fused() const { return choose_bottleneck_path(dtype, M, H, scope.multiprocessors()) == BottleneckPath::kFused; }
  bool wide() const { return product != dtype; }
  bool is_double() const { return accumulator == Dtype::kFloat64; }
  bool has_channels() const { return scale_vector.has_value() && scale_vector->numel() != 1; }
  Tensor memory(int64_t rows, int64_t columns, Dtype type) const {
    return empty({rows, columns}, scalar_type(type), device);
  }
  int64_t range_rows(int64_t columns) const { return bottleneck_range_rows(M, columns, scope.multiprocessors()); }

  ConstVector vector(const std::optional<Tensor>& of) const {
    if (!of.has_value()) return {};
    return {of->const_data_ptr(), dtype_of(*of, op, "vector")};
  }
  BottleneckScale one() const { return {1.0, {}, 1}; }
  // What is added to the residual, times this.
  BottleneckScale scale() const {
    return {factor * dropout_scale, vector(scale_vector), has_channels() ? D : int64_t{1}};
  }
  // The same where the channels' own factors are in w_up already.
  BottleneckScale uniform_scale() const { return has_channels() ? BottleneckScale{scale().factor, {}, 1} : scale(); }

  // A tensor in another type; itself where it has it.
  Tensor in_type(const Tensor& tensor, Dtype type) const {
    if (dtype_of(tensor, op, "tensor") == type) return tensor;
    const auto sizes = tensor.sizes();
    Tensor cast = empty(sizes.data(), sizes.size() - 1, sizes[sizes.size() - 1], scalar_type(type), device);
    return torch::stable::copy_(cast, tensor);
  }
  Tensor matrix_in_type(const Tensor& tensor, Dtype type) const { return in_type(as_matrix(tensor, M, D), type); }
  std::optional<Tensor> down_bias(const std::optional<Tensor>& b_down) const {
    return b_down.has_value() ? std::optional(in_type(torch::stable::contiguous(*b_down), product)) : b_down;
  }
  // w_up for the backward: its rows times the channels' factors.
  Tensor scaled_rows(const Tensor& w_up) const {
    if (!has_channels()) return in_type(w_up, product);
    const Tensor wide = torch::stable::contiguous(in_type(w_up, accumulator)), scaled = memory(D, H, product);
    PartSum call = sum_of(wide, 1, D * H, scaled, op);
    scale_by(call, scale_vector, H);
    call.factor = 1.0;
    launch_sums({&call, 1}, is_double(), scope.stream());
    return scaled;
  }

  // A sum of parts times the scale, whose vector has a factor for each `run` elements, or one for all.
  void scale_by(PartSum& sum, const std::optional<Tensor>& of, int64_t run) const {
    sum.factor = factor * dropout_scale;
    sum.vector = vector(of);
    sum.vector_run = run;
    sum.vector_size = of.has_value() ? of->numel() : 1;
  }
  void launch(const PartSum& sum) const { launch_sums({&sum, 1}, is_double(), scope.stream()); }

 private:
  static std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
    return tensor.has_value() ? std::optional(torch::stable::contiguous(*tensor)) : tensor;
  }
};

}  // namespace pyfused
