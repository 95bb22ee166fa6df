// LoRA's passes on CPU, for one adapter or several on the same x. What is summed is cut by shape alone, never by the
// number of threads, so results do not depend on it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <span>
#include <vector>

#include "../common/lora.h"
#include "kernels/linear_vectors.h"
#include "kernels/lora.h"
#include "kernels/multi_lora.h"
#include "matrix.h"

namespace pyfused {

const LoraKernels& lora_kernels_for(Dtype dtype, int64_t rows, int64_t columns, int64_t rank);
const MultiLoraKernels& multi_lora_kernels_for(Dtype dtype);

// A call with its small operands.
struct Lora : LoraArguments {
  const LoraKernels& kernels;
  Mask mask;
  std::vector<double> scale;  // per rank, factor included; empty where the scale is the factor alone

  Lora(const char* op, const Tensor& activation, const char* name, const Tensor& a, const Tensor& b,
       const std::optional<Tensor>& scale_vector, double factor, double dropout_p, const std::optional<Tensor>& seed,
       bool takes_mask = false)
      : LoraArguments(op, Device::cpu(), activation, name, a, b, scale_vector, factor, dropout_p, seed, takes_mask),
        kernels(lora_kernels_for(dtype, M, std::min(K, N), R)),
        mask{{0, threshold}, nullptr, mask_words(), has_mask} {
    if (has_mask) {
      mask.bits = const_cast<uint32_t*>(static_cast<const uint32_t*>(seed->const_data_ptr()));  // no loop writes it
    } else if (threshold != 0) {
      std::memcpy(&mask.dropout.seed, seed->const_data_ptr(), sizeof mask.dropout.seed);
    }
    if (scale_vector.has_value()) read_scale(*scale_vector);
  }

  int64_t ld_a() const { return round_up(K, kPackedColumns); }
  int64_t ld_b() const { return round_up(N, kPackedColumns); }
  int64_t accumulator_size() const { return accumulator == Dtype::kFloat64 ? 8 : 4; }
  int64_t element_size() const { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

  // Whether the base product is made before the adapter's share is added, or is added to it: lora_passes.cpp says why.
  bool base_first() const { return element_size() == 2; }

  // For dropout's mask where the backward is to find it, else an empty tensor.
  Tensor empty_mask() const {
    return empty({kernels.keeps_mask && threshold != 0 ? M : 0, mask_words()}, ScalarType::Int, device);
  }

  // Factor per rank.
  std::vector<double> factors() const {
    return scale.empty() ? std::vector<double>(static_cast<size_t>(R), factor) : scale;
  }

  // destination[m][r] = source[m][r] * scale[r] * extra; may be the same memory.
  void scale_rows(const void* source, void* destination, int64_t row_begin, int64_t row_end, double extra) const {
    with_accumulator([&](auto zero) {
      using Acc = decltype(zero);
      const Acc* from = static_cast<const Acc*>(source);
      Acc* to = static_cast<Acc*>(destination);
      if (scale.empty()) {
        const Acc uniform = static_cast<Acc>(factor * extra);
        for (int64_t i = row_begin * R; i < row_end * R; ++i) to[i] = from[i] * uniform;
        return;
      }
      for (int64_t m = row_begin; m < row_end; ++m) {
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
    const LoraKernels& kernels = lora_kernels_for(Dtype::kFloat64, 1, 1, 1);
    const Dtype source = dtype_of(vector, op, "scale_vector");
    scale.resize(static_cast<size_t>(kernels.packed_bytes(SumOver::kColumns, source, 1, R)) / sizeof(double));
    kernels.pack(SumOver::kColumns, source, vector.const_data_ptr(), 0, vector.stride(0), 1, R, scale.data());
    scale.resize(static_cast<size_t>(R));
    for (double& value : scale) value *= factor;
  }
};

// An adapter's matrix as the loops want it: packed, or the tensor itself where that is as good.
struct PackedOperand {
  std::optional<Scratch> memory;
  LoraOperand data;

  // From rows r and columns l of tensor at the strides given. Loops that leave its product out ask for its dtype alone.
  PackedOperand(const Lora& lora, const LoraKernels& kernels, SumOver product, const Tensor& tensor,
                const char* argument, int64_t rank_stride, int64_t column_stride, int64_t columns, bool needed) {
    const Dtype source = dtype_of(tensor, lora.op, argument);
    if (!needed) {
      data = {nullptr, 0, source};
      return;
    }
    if (kernels.plain && columns % kPackedColumns == 0 && column_stride == 1 && source == lora.accumulator) {
      data = {tensor.const_data_ptr(), rank_stride, source};
      return;
    }
    memory.emplace(1, kernels.packed_bytes(product, source, lora.R, columns), 1);
    data = kernels.pack(product, source, tensor.const_data_ptr(), rank_stride, column_stride, lora.R, columns,
                        memory->at(0));
  }
  static PackedOperand of_a(const Lora& lora, SumOver product, const Tensor& a, bool needed = true) {
    return {lora, lora.kernels, product, a, "a", a.stride(0), a.stride(1), lora.K, needed};
  }
  static PackedOperand of_b(const Lora& lora, SumOver product, const Tensor& b, bool needed = true) {
    return {lora, lora.kernels, product, b, "b", b.stride(1), b.stride(0), lora.N, needed};
  }
  // Rows of fp32 in their order, for a base product on vectors that has the adapter's share in it.
  static PackedOperand rows_of_a(const Lora& lora, const Tensor& a) {
    return {lora, f32_rows(), SumOver::kRanks, a, "a", a.stride(0), a.stride(1), lora.K, true};
  }
  static PackedOperand rows_of_b(const Lora& lora, const Tensor& b) {
    return {lora, f32_rows(), SumOver::kRanks, b, "b", b.stride(1), b.stride(0), lora.N, true};
  }
  LinearProduct::Update update_by(const Scratch& rows, int64_t R) const {
    return {static_cast<const float*>(rows.at(0)), R, static_cast<const float*>(data.data), data.ld, R};
  }

 private:
  static const LoraKernels& f32_rows() { return lora_kernels_for(Dtype::kFloat32, 1, 1, 1); }
};

// An adapter of the forward: s = drop(x) a^T and out = base + (scale s) b^T, where base is y or x weight^T + bias.
// Nothing is empty.
struct LoraForward {
  const Lora& lora;
  const Tensor &a, &b;
  const Tensor* y;
  const Tensor* weight;  // null where y is given
  const Tensor* bias;    // may be null
  const Tensor &out, &s;
  const Tensor* mask = nullptr;  // of Lora::empty_mask, gets dropout's mask

  Mask dropout() const {
    Mask kept = lora.mask;
    if (mask != nullptr && mask->numel() > 0) kept.bits = static_cast<uint32_t*>(mask->mutable_data_ptr());
    return kept;
  }
};
// All adapters of one x, in one pass over it.
void lora_forward(std::span<const LoraForward> calls, const Tensor& x);
// The same for up to so many rows, to which lora_forward turns for them.
inline constexpr int64_t kDecodeRows = 16;
void lora_decode(std::span<const LoraForward> calls, const Tensor& x);
// The same in AMX tiles of which the base product's are ours as well, for calls that they serve.
bool served_by_tiles(const LoraForward& call, const Tensor& x_rows);
void lora_forward_in_tiles(std::span<const LoraForward> calls, const Tensor& x);

struct ShareOfDx;

// An adapter of the backward and the gradients that needs asks of it, but for x's. Nothing is empty.
struct LoraBackward {
  const Lora& lora;
  const Tensor& grad_y;
  const Tensor &a, &b;
  const std::optional<Tensor>&s, &scale_vector;
  int64_t needs;
  LoraGradients& gradients;
  const Tensor* weight = nullptr;    // of the base product, where it may be one of ours
  const ShareOfDx* share = nullptr;  // gets the share of dX for that product instead of grad_x
};
// What a base product of ours needs for the adapter's share of dX beside a: ds [M, R], and the bits of dropout's mask.
struct ShareOfDx {
  Scratch ds;
  Mask mask;
  std::optional<Scratch> bits;  // where the mask is yet to be made

  explicit ShareOfDx(const Lora& lora) : ds(lora.M, lora.R, lora.accumulator_size()), mask(lora.mask) {
    if (lora.threshold == 0 || mask.made) return;
    bits.emplace(lora.M, mask.ld, int64_t{sizeof(uint32_t)});
    mask.bits = static_cast<uint32_t*>(bits->at(0));
  }
  ShareOfDx(ShareOfDx&&) = default;
  virtual ~ShareOfDx() = default;
  // For what else is to be made of rows of ds, once they are there.
  virtual void take_rows(int64_t /*row_begin*/, int64_t /*row_end*/) const {}
};

// All adapters of one x, in one pass over their grad_y, x and grad_x. Where grad_x is given it becomes, or grows by,
// the sum of the shares of the calls whose needs has x's bit, each rounded to its dtype in turn. x is read for the
// gradients of a alone.
void lora_backward(std::span<const LoraBackward> calls, const std::optional<Tensor>& x, const Tensor* grad_x, bool add);
// All adapters of one x with base products of ours that have the shares of dX in them: grad_x = grad_y weight + its
// share for the first of the calls, each of the others is added to what grad_x has then. False, and nothing done, where
// they do not serve one of them.
bool lora_backward_in_products(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x);
// The same in AMX panels, and on vectors.
bool lora_backward_in_panels(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x);
bool lora_backward_in_vectors(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x);

}  // namespace pyfused
