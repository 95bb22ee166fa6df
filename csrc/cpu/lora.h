// LoRA's passes on CPU: what the ops on one projection (lora.cpp) and on several that share x (lora_shared.cpp) have in
// common. Work is cut by shape alone, never by the number of threads, so results do not depend on it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "../common/lora.h"
#include "kernels/lora.h"
#include "matrix.h"

namespace pyfused {

const LoraKernels& lora_kernels_for(Dtype dtype);

// A call with its small operands.
struct Lora : LoraArguments {
  const LoraKernels& kernels;
  Dropout dropout;
  std::vector<double> scale;  // per rank, factor included; empty where the scale is the factor alone

  Lora(const char* op, const Tensor& activation, const char* name, const Tensor& a, const Tensor& b,
       const std::optional<Tensor>& scale_vector, double factor, double dropout_p, const std::optional<Tensor>& seed)
      : LoraArguments(op, Device::cpu(), activation, name, a, b, scale_vector, factor, dropout_p, seed),
        kernels(lora_kernels_for(dtype)),
        dropout{0, threshold} {
    if (threshold != 0) std::memcpy(&dropout.seed, seed->const_data_ptr(), sizeof dropout.seed);
    if (scale_vector.has_value()) read_scale(*scale_vector);
  }

  int64_t ld_a() const { return round_up(K, kPackedColumns); }
  int64_t ld_bt() const { return round_up(N, kPackedColumns); }

  // a as [R, ld] and b transposed as [R, ld], in the accumulation type.
  Operand pack_a(const Tensor& a) const {
    if (K % kPackedColumns == 0 && a.stride(1) == 1 && dtype_of(a, op, "a") == accumulator) {
      return {std::nullopt, a.const_data_ptr(), a.stride(0)};
    }
    return pack(a, R, K, a.stride(0), a.stride(1));
  }
  Operand pack_bt(const Tensor& b) const { return pack(b, R, N, b.stride(1), b.stride(0)); }

  // Factor per rank.
  std::vector<double> factors() const {
    return scale.empty() ? std::vector<double>(static_cast<size_t>(R), factor) : scale;
  }

  // destination[m][r] = source[m][r] * scale[r] * extra; may be the same memory.
  void scale_rows(const void* source, void* destination, double extra) const {
    with_accumulator([&](auto zero) {
      using Acc = decltype(zero);
      const Acc* from = static_cast<const Acc*>(source);
      Acc* to = static_cast<Acc*>(destination);
      if (scale.empty()) {
        const Acc uniform = static_cast<Acc>(factor * extra);
        for (int64_t i = 0; i < M * R; ++i) to[i] = from[i] * uniform;
        return;
      }
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t r = 0; r < R; ++r) to[m * R + r] = from[m * R + r] * static_cast<Acc>(scale[r] * extra);
      }
    });
  }

  template <class F>
  void with_accumulator(const F& run) const {
    accumulator == Dtype::kFloat64 ? run(0.0) : run(0.0f);
  }

 private:
  void read_scale(const Tensor& vector) {
    const int64_t padded = round_up(R, kPackedColumns);
    scale.resize(static_cast<size_t>(padded));
    lora_kernels_for(Dtype::kFloat64)
        .pack[static_cast<int>(dtype_of(vector, op, "scale_vector"))](vector.const_data_ptr(), 0, vector.stride(0), 1,
                                                                      R, scale.data(), padded);
    scale.resize(static_cast<size_t>(R));
    for (double& value : scale) value *= factor;
  }

  Operand pack(const Tensor& source, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride) const {
    const int64_t ld = round_up(columns, kPackedColumns);
    Scratch packed(rows, ld, accumulator);
    void* to = packed.at(0);
    kernels.pack[static_cast<int>(dtype_of(source, op, "adapter"))](source.const_data_ptr(), row_stride, column_stride,
                                                                    rows, columns, to, ld);
    return {std::move(packed), to, ld};
  }
};

// s = drop(x) a^T for every call, in one pass over x [M, K].
struct Shrink {
  const Lora& lora;
  const Tensor& a;
  void* s;
};
void shrink(std::span<const Shrink> calls, const Matrix& x);

// out = y + (s * scale) b^T; out may be y.
void expand(const Lora& lora, const Matrix& y, const Tensor& out, const void* s, const Tensor& b);

// One pass over dY, which must not be empty: the gradients of b, scale_vector and bias that needs names, and
// ds [M, R] = scale * dY b with the kept elements' factor, where x or a needs it.
std::optional<Scratch> backward_dy(const Lora& lora, const Tensor& grad_y, const Tensor& b,
                                   const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector,
                                   int64_t needs, LoraGradients& grad);

// da = ds^T drop(x) for every call that has a grad_a, and dX (+)= sum mask (ds a) where grad_x is given: one pass over
// x and dX. x is read for the gradients of a alone. Each call's share is rounded to dX's dtype in turn.
struct BackwardX {
  const Lora& lora;
  const Tensor& a;
  const void* ds;
  Tensor* grad_a;
};
void backward_x(std::span<const BackwardX> calls, const std::optional<Tensor>& x, Tensor* grad_x, bool accumulate);

}  // namespace pyfused
