// multi_lora_, which records no gradient: what pyfused/ops/multi_lora.py does for a call of the raw op. In a decoding
// step weights fill the caches from one call to the next, so that each function a call goes through is read from
// memory.
#include "ops.h"

namespace pyfused {
namespace {

void raw_multi_lora_(at::TensorList y, const Tensor& x, at::TensorList tables, const Tensor& index,
                     const Optional& segments) {
  static const RawOp<decltype(raw_multi_lora_)> op("pyfused::_multi_lora_");
  op(y, x, tables, index, segments);
}

}  // namespace

void multi_lora_(const std::vector<Tensor>& y, const Tensor& x, const std::vector<Tensor>& tables, const Tensor& index,
                 const Optional& segments) {
  if (!segments.has_value()) {
    const at::IntArrayRef lead = x.sizes().slice(0, x.dim() > 0 ? x.dim() - 1 : 0);
    const size_t dims = static_cast<size_t>(index.dim());
    TORCH_CHECK(dims <= lead.size() && (dims > 0 || lead.empty()) && index.sizes() == lead.slice(0, dims),
                "multi_lora_: index must have the shape of x's first dimensions");
  }
  raw_multi_lora_(y, x, tables, index, segments);
  // A saved y that has changed is to be an error in a backward; the raw op does not say that it wrote.
  for (const Tensor& one : y) {
    if (!one.is_inference()) one.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace pyfused
