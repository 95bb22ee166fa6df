// multi_lora_, which records no gradient: what pyfused/ops/multi_lora.py does for a call of the raw op. In a decoding
// step weights fill the caches from one call to the next, so that each function a call goes through is read from
// memory.
#include <ATen/TensorSubclassLikeUtils.h>

#include <algorithm>

#include "ops.h"

namespace pyfused {
namespace {

void raw_multi_lora_(at::TensorList y, const Tensor& x, at::TensorList tables, const Tensor& index,
                     const Optional& segments) {
  static const RawOp<decltype(raw_multi_lora_)> op("pyfused::_multi_lora_");
  op(y, x, tables, index, segments);
}

// Whether no row of this call has an adapter: a step of which each sample is the base model's alone is to cost no more
// than that. What the raw op would refuse is left to it, but for the adapters of the tables, which nobody reads.
bool changes_nothing(const std::vector<Tensor>& y, const Tensor& x, const std::vector<Tensor>& tables,
                     const Tensor& index) {
  if (!x.is_cpu() || !index.is_cpu() || at::isTensorSubclassLike(index)) return false;
  if (index.scalar_type() != at::kLong || !index.is_contiguous()) return false;
  const int64_t* places = index.const_data_ptr<int64_t>();
  if (!std::all_of(places, places + index.numel(), [](int64_t place) { return place == -1; })) return false;
  if (y.empty() || y.size() != tables.size()) return false;
  for (size_t i = 0; i < y.size(); ++i) {
    const bool fits = y[i].is_cpu() && y[i].scalar_type() == x.scalar_type() && y[i].dim() == x.dim() &&
                      y[i].sizes().slice(0, x.dim() - 1) == x.sizes().slice(0, x.dim() - 1);
    if (!fits || tables[i].sizes() != tables[0].sizes()) return false;
  }
  return at::isFloatingType(x.scalar_type());
}

}  // namespace

void multi_lora_(const std::vector<Tensor>& y, const Tensor& x, const std::vector<Tensor>& tables, const Tensor& index,
                 const Optional& segments) {
  if (!segments.has_value()) {
    const at::IntArrayRef lead = x.sizes().slice(0, x.dim() > 0 ? x.dim() - 1 : 0);
    const size_t dims = static_cast<size_t>(index.dim());
    TORCH_CHECK(dims <= lead.size() && (dims > 0 || lead.empty()) && index.sizes() == lead.slice(0, dims),
                "multi_lora_: index must have the shape of x's first dimensions");
    if (x.dim() > 0 && changes_nothing(y, x, tables, index)) return;
  }
  raw_multi_lora_(y, x, tables, index, segments);
  // A saved y that has changed is to be an error in a backward; the raw op does not say that it wrote.
  for (const Tensor& one : y) {
    if (!one.is_inference()) one.unsafeGetTensorImpl()->bump_version();
  }
}

}  // namespace pyfused
