// One LoRA call on CUDA: its arguments checked, its adapter in a form that the kernels take.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "../common/lora.h"
#include "lora.h"
#include "lora_update.h"
#include "sums.h"
#include "tensor.h"

namespace pyfused {

struct Lora : LoraArguments {
  const DeviceScope& scope;  // of the whole op
  KernelTypes types;
  Matrix a, b;  // [R, K], [N, R] with rows of unit stride
  DropoutSource dropout;
  ConstVector vector{};

  Lora(const char* op, const Tensor& activation, const char* name, const Tensor& a, const Tensor& b,
       const std::optional<Tensor>& scale_vector, double factor, double dropout_p, const std::optional<Tensor>& seed,
       bool allow_tf32, const DeviceScope& scope)
      : LoraArguments(op, scope.device, activation, name, a, b, scale_vector, factor, dropout_p, seed),
        scope(scope),
        types{dtype, adapter_dtype(a, b), allow_tf32},
        a(in_dtype(a)),
        b(in_dtype(b)),
        dropout{threshold == 0 ? nullptr : static_cast<const int64_t*>(seed->const_data_ptr()), threshold} {
    if (!scale_vector.has_value()) return;
    vector_ = torch::stable::contiguous(*scale_vector);
    vector = {vector_->const_data_ptr(), dtype_of(*vector_, op, "scale_vector")};
  }

  bool is_double() const { return accumulator == Dtype::kFloat64; }
  int rank() const { return static_cast<int>(R); }
  Tensor sums(std::initializer_list<int64_t> shape) const { return empty(shape, accumulator_type(), device); }
  LoraUpdate update(int64_t contraction, const Tensor& weight) const {
    const bool is_16bit = types.data == Dtype::kBFloat16 || types.data == Dtype::kFloat16;
    const bool has_rows = weight.stride(1) == 1 && weight.stride(0) >= K;
    return choose_lora_update(M, contraction, is_16bit && types.adapter == types.data && has_rows);
  }

 private:
  // The data's own type, or fp32 (fp64): few mixtures have kernels, and the adapter is small.
  Dtype adapter_dtype(const Tensor& of_a, const Tensor& of_b) const {
    const Dtype first = dtype_of(of_a, op, "a"), second = dtype_of(of_b, op, "b");
    return first == second && types_supported(dtype, first) ? first : accumulator;
  }
  Matrix in_dtype(const Tensor& tensor) const {
    if (dtype_of(tensor, op, "adapter") == types.adapter) return Matrix(tensor);
    Tensor cast = empty({tensor.size(0), tensor.size(1)}, scalar_type(types.adapter), device);
    return Matrix(torch::stable::copy_(cast, tensor));
  }

  std::optional<Tensor> vector_;  // keeps it alive
};

inline ConstRows rows_of(const Matrix& matrix) { return {matrix.tensor.const_data_ptr(), matrix.ld}; }

// The sum of parts of `size` elements each, for a vector that has a factor for each rank.
inline PartSum sum_of(const Lora& lora, const Tensor& parts, int64_t count, int64_t size, const Tensor& out) {
  PartSum sum = sum_of(parts, count, size, out, lora.op);
  sum.vector_run = 1;
  sum.vector_size = lora.R;
  return sum;
}

}  // namespace pyfused
