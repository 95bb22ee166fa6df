// LoRA's passes on CUDA, for one adapter or several on the same x: allocation, the vendor's GEMM for the base product,
// and which kernels of lora.h run in what order. Nothing here waits for the GPU; memory comes from torch, so all of it
// can be captured in a CUDA graph. What an adapter's sums are cut into depends on its own call alone, so its results
// have the same bits in any company.
#pragma once

#include <optional>
#include <span>

#include "lora_call.h"

namespace pyfused {

// An adapter of the forward: s = drop(x) a^T and out = base + (scale s) b^T, where base is y or x weight^T + bias.
// Nothing is empty.
struct LoraForward {
  const Lora& lora;
  const Tensor* y;
  const Tensor* weight;  // null where y is given
  const Tensor* bias;    // may be null
  const Tensor &out, &s;
};
// All adapters of one x, in one pass over it as far as that is the faster way.
void lora_forward(std::span<const LoraForward> calls, const Tensor& x);

// An adapter of the backward and the gradients that needs asks of it. Nothing is empty.
struct LoraBackward {
  const Lora& lora;
  const Tensor& grad_y;
  const Matrix& dy;  // the same
  const std::optional<Tensor>& s;
  int64_t needs;
  LoraGradients& gradients;
};
// dY W of one projection.
struct BaseProduct {
  Tensor dy;  // [M, N]
  const Tensor& weight;
};
// Their sum in out [M, K], or on top of it.
void add_products(std::span<const BaseProduct> products, const Tensor& out, bool on_top);
// All adapters of one x, likewise. Where grad_x is given it becomes the sum of the products and of the shares of the
// calls, one of which there is at least: rounded after each product, and once after all shares that go in one pass.
// x is read for the gradients of a alone.
void lora_backward(std::span<const LoraBackward> calls, std::span<const BaseProduct> products,
                   const std::optional<Tensor>& x, const Tensor* grad_x);

}  // namespace pyfused
