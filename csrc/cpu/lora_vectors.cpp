// LoRA's backward where the base product is one of ours on vectors: the adapter's share of dX is more columns of dY and
// rows of the weight, first in the sums, where dropout's mask is applied to it. So nothing writes or reads dX before.
#include <span>
#include <vector>

#include "linear_vectors.h"
#include "lora.h"

namespace pyfused {
namespace {

// Rows of ds multiply a.
struct ShareInVectors : ShareOfDx {
  PackedOperand a;

  explicit ShareInVectors(const LoraBackward& call)
      : ShareOfDx(call.lora), a(PackedOperand::rows_of_a(call.lora, call.a)) {}
};

}  // namespace

bool lora_backward_in_vectors(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x) {
  const int64_t M = calls[0].lora.M, K = calls[0].lora.K;
  const Dtype dtype = calls[0].lora.dtype;
  if (!has_linear_product(dtype, M, ProductFor::kBackward)) return false;
  for (const LoraBackward& call : calls) {
    if (call.lora.N > max_product_depth(dtype)) return false;
  }
  const Tensor dx = as_matrix(grad_x, M, K);
  std::vector<Tensor> rows;  // some may be copies
  std::vector<LinearProduct> products;
  for (const LoraBackward& call : calls) {
    const Tensor& dy = rows.emplace_back(as_matrix(call.grad_y, M, call.lora.N));
    const std::optional<LinearProduct> product = linear_product(dx, dy, *call.weight, nullptr, ProductFor::kBackward);
    if (!product.has_value()) return false;
    products.push_back(*product);
  }
  std::vector<ShareInVectors> shares;
  shares.reserve(calls.size());
  for (LoraBackward& call : calls) call.share = &shares.emplace_back(call);
  lora_backward(calls, x, nullptr, false);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ShareInVectors& share = shares[i];
    LinearProduct& product = products[i];
    product.update = share.a.update_by(share.ds, calls[i].lora.R);
    product.keep = share.mask.bits;
    product.ld_keep = share.mask.ld;
    product.add = i > 0;
    multiply(product);
  }
  return true;
}

}  // namespace pyfused
