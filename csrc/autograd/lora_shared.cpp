// lora_linear_shared with its gradient.
#include <array>

#include "node.h"
#include "ops.h"

namespace pyfused {
namespace {

using Optionals = std::vector<Optional>;
using Doubles = std::vector<double>;

using SharedResults = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;
SharedResults raw_shared_forward(const Tensor& x, const std::vector<Tensor>& weights, const Optionals& biases,
                                 const Optionals& a, const Optionals& b, const Optionals& scale_vectors,
                                 const Doubles& scales, const Doubles& dropout_ps, const Optionals& seeds,
                                 bool allow_tf32) {
  static const RawOp<decltype(raw_shared_forward)> op("pyfused::_lora_linear_shared_forward");
  return op.by_address(&CpuKernels::lora_linear_shared_forward, x, weights, biases, a, b, scale_vectors, scales,
                       dropout_ps, seeds, allow_tf32);
}

// Dropout's masks as well.
std::tuple<std::vector<Tensor>, std::vector<Tensor>, std::vector<Tensor>> raw_shared_forward_with_masks(
    const Tensor& x, const std::vector<Tensor>& weights, const Optionals& biases, const Optionals& a,
    const Optionals& b, const Optionals& scale_vectors, const Doubles& scales, const Doubles& dropout_ps,
    const Optionals& seeds) {
  static const RawOp<decltype(raw_shared_forward_with_masks)> op("pyfused::_lora_linear_shared_forward_with_masks");
  return op.by_address(&CpuKernels::lora_linear_shared_forward_with_masks, x, weights, biases, a, b, scale_vectors,
                       scales, dropout_ps, seeds);
}

using SharedGradients = std::tuple<Tensor, std::vector<Tensor>>;
SharedGradients raw_shared_backward(const std::vector<Tensor>& grad_y, const Optional& x, const Optionals& weights,
                                    const Optionals& a, const Optionals& b, const Optionals& s,
                                    const Optionals& scale_vectors, const Doubles& scales, const Doubles& dropout_ps,
                                    const Optionals& seeds, const std::vector<int64_t>& needs, bool allow_tf32) {
  static const RawOp<decltype(raw_shared_backward)> op("pyfused::_lora_linear_shared_backward");
  return op.by_address(&CpuKernels::lora_linear_shared_backward, grad_y, x, weights, a, b, s, scale_vectors, scales,
                       dropout_ps, seeds, needs, allow_tf32);
}

// Connected: x, then a, b, scale_vector and bias of each projection. Saved: x, then the Fields of each projection.
class LoraLinearSharedBackward final : public GradientNode {
 public:
  LoraLinearSharedBackward(const Doubles& scales, const Doubles& dropout_ps, bool allow_tf32)
      : GradientNode("LoraLinearSharedBackward", "lora_linear_shared", "pyfused.reference.lora.lora_linear"),
        scales_(scales),
        dropout_ps_(dropout_ps),
        allow_tf32_(allow_tf32) {
    reserve(1 + kNeeds.size() * scales.size(), 1 + kFields * scales.size());
  }

 protected:
  tensor_list gradients(tensor_list grad_y) override {
    const int64_t need_x = needed(0, kNeedX);
    const size_t count = grad_y.size();
    std::vector<size_t> used;
    std::vector<Tensor> dys;
    Optionals columns[kFields];
    Doubles scales, dropout_ps;
    std::vector<int64_t> needs;
    for (size_t i = 0; i < count; ++i) {
      int64_t bits = need_x;
      for (size_t j = 0; j < kNeeds.size(); ++j) bits |= needed(edge(i, j), kNeeds[j]);
      // A result that nothing was computed from has no gradient and no share.
      if (!grad_y[i].defined() || bits == 0) continue;
      used.push_back(i);
      dys.push_back(grad_y[i]);
      for (size_t field = 0; field < kFields; ++field) columns[field].push_back(saved(1 + i * kFields + field));
      scales.push_back(scales_[i]);
      dropout_ps.push_back(dropout_ps_[i]);
      needs.push_back(bits);
    }
    tensor_list grads(num_outputs());
    if (used.empty()) return grads;
    auto [grad_x, found] =
        raw_shared_backward(dys, saved(0), columns[kWeight], columns[kA], columns[kB], columns[kS], columns[kVector],
                            scales, dropout_ps, columns[kSeedOrMask], needs, allow_tf32_);
    grads[0] = when(need_x, grad_x);
    for (size_t i = 0; i < used.size(); ++i) {
      for (size_t j = 0; j < kNeeds.size(); ++j) {
        grads[edge(used[i], j)] = when(needs[i] & kNeeds[j], found[i * kNeeds.size() + j]);
      }
    }
    return grads;
  }
  void collect_options(CompiledNodeArgs& args) const override {
    args.collect(scales_);
    args.collect(dropout_ps_);
    args.collect(allow_tf32_);
  }

 private:
  enum Field { kWeight, kA, kB, kS, kVector, kSeedOrMask, kFields };
  // In the order of the raw op's gradients.
  static constexpr std::array kNeeds = {kNeedA, kNeedB, kNeedScale, kNeedBias};
  static size_t edge(size_t projection, size_t need) { return 1 + projection * kNeeds.size() + need; }

  Doubles scales_, dropout_ps_;
  bool allow_tf32_;
};

}  // namespace

std::vector<Tensor> lora_linear_shared(const Tensor& x, const std::vector<Tensor>& weights, const Optionals& biases,
                                       const Optionals& a, const Optionals& b, const Optionals& scale_vectors,
                                       const Doubles& scales, const Doubles& dropout_ps, const Optionals& seeds,
                                       bool allow_tf32) {
  const size_t count = weights.size();
  for (const size_t size :
       {biases.size(), a.size(), b.size(), scale_vectors.size(), scales.size(), dropout_ps.size(), seeds.size()}) {
    TORCH_CHECK(size == count, "lora_linear_shared: lists must have one length, got ", count, " and ", size);
  }
  const auto forward = [&] {
    return raw_shared_forward(x, weights, biases, a, b, scale_vectors, scales, dropout_ps, seeds, allow_tf32);
  };
  if (!any_needs_gradient(x, biases, a, b, scale_vectors)) return std::get<0>(forward());
  const auto node = make_node<LoraLinearSharedBackward>(scales, dropout_ps, allow_tf32);
  node->connect(x);
  for (size_t i = 0; i < count; ++i) node->connect(a[i], b[i], scale_vectors[i], biases[i]);
  std::vector<Tensor> y, s;
  Optionals seeds_or_masks = seeds;
  bool keep_masks = false;
  for (size_t i = 0; i < count; ++i) keep_masks = keep_masks || may_keep_mask(x, a[i], dropout_ps[i]);
  if (keep_masks) {
    std::vector<Tensor> masks;
    std::tie(y, s, masks) =
        raw_shared_forward_with_masks(x, weights, biases, a, b, scale_vectors, scales, dropout_ps, seeds);
    for (size_t i = 0; i < count; ++i) {
      if (masks[i].numel() > 0) seeds_or_masks[i] = masks[i];
    }
  } else {
    std::tie(y, s) = forward();
  }
  node->save(when(needs_gradient(a), x));
  for (size_t i = 0; i < count; ++i) {
    const bool need_s = needs_gradient(b[i]) || needs_gradient(scale_vectors[i]);
    node->save(when(x.requires_grad(), weights[i]), a[i], b[i], when(need_s, s[i]), scale_vectors[i],
               seeds_or_masks[i]);
  }
  torch::autograd::set_history(y, node);
  return y;
}

}  // namespace pyfused
