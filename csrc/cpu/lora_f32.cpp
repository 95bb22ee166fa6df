// LoRA's backward where the base product is an fp32 one of ours: the adapter's share of dX is more columns of dY and
// rows of the weight, first in the sums, where dropout's mask is applied to it. So nothing writes or reads dX before.
#include <span>
#include <vector>

#include "linear_f32.h"
#include "lora.h"

namespace pyfused {

ShareInF32::ShareInF32(const LoraBackward& call)
    : ds(call.lora.M, call.lora.R, Dtype::kFloat32),
      a(PackedOperand::of_a(call.lora, SumOver::kRanks, call.a)),
      keep(call.lora) {}

bool lora_backward_in_f32(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x) {
  const int64_t M = calls[0].lora.M, K = calls[0].lora.K;
  if (calls[0].lora.dtype != Dtype::kFloat32 || M < f32_rows()) return false;
  for (const LoraBackward& call : calls) {
    if (call.lora.N > f32_max_depth()) return false;
  }
  const Tensor dx = as_matrix(grad_x, M, K);
  std::vector<Tensor> rows;  // some may be copies
  std::vector<F32Product> products;
  for (const LoraBackward& call : calls) {
    const Tensor& dy = rows.emplace_back(as_matrix(call.grad_y, M, call.lora.N));
    const std::optional<F32Product> product = f32_product(dx, dy, *call.weight, nullptr, f32_rows());
    if (!product.has_value()) return false;
    products.push_back(*product);
  }
  std::vector<ShareInF32> shares;
  shares.reserve(calls.size());
  for (LoraBackward& call : calls) call.share_in_f32 = &shares.emplace_back(call);
  lora_backward(calls, x, nullptr, false);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ShareInF32& share = shares[i];
    const int64_t R = calls[i].lora.R;
    const auto* ds = static_cast<const float*>(share.ds.at(0));
    F32Product& product = products[i];
    product.update = {ds, R, static_cast<const float*>(share.a.data.data), share.a.data.ld, 1, R};
    product.keep = share.keep.data();
    product.ld_keep = share.keep.ld;
    product.add = i > 0;
    multiply(product);
  }
  return true;
}

}  // namespace pyfused
