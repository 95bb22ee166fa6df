// lora_linear_shared with its gradient.
#include "ops.h"

namespace pyfused {
namespace {

using Optionals = c10::List<Optional>;

// One call; entries of a projection without an adapter are None.
struct Projections {
  const std::vector<Tensor>& weights;
  const std::vector<Optional>&biases, &a, &b, &scale_vectors;
  const std::vector<double>&scales, &dropout_ps;
  const std::vector<Optional>& seeds;
  bool allow_tf32;

  size_t count() const { return weights.size(); }
};

using SharedResults = std::tuple<std::vector<Tensor>, std::vector<Tensor>>;
SharedResults raw_shared_forward(const Tensor& x, const Projections& call) {
  static const RawOp<SharedResults(const Tensor&, at::TensorList, const Optionals&, const Optionals&, const Optionals&,
                                   const Optionals&, at::ArrayRef<double>, at::ArrayRef<double>, const Optionals&,
                                   bool)>
      op("pyfused::_lora_linear_shared_forward");
  return op(x, call.weights, Optionals(call.biases), Optionals(call.a), Optionals(call.b),
            Optionals(call.scale_vectors), call.scales, call.dropout_ps, Optionals(call.seeds), call.allow_tf32);
}

using SharedGradients = std::tuple<Tensor, std::vector<Tensor>>;
SharedGradients raw_shared_backward(at::TensorList grad_y, const Optional& x, const Optionals& weights,
                                    const Optionals& a, const Optionals& b, const Optionals& s,
                                    const Optionals& scale_vectors, at::ArrayRef<double> scales,
                                    at::ArrayRef<double> dropout_ps, const Optionals& seeds, at::IntArrayRef needs,
                                    bool allow_tf32) {
  static const RawOp<decltype(raw_shared_backward)> op("pyfused::_lora_linear_shared_backward");
  return op(grad_y, x, weights, a, b, s, scale_vectors, scales, dropout_ps, seeds, needs, allow_tf32);
}

// The tensors that may get a gradient and that there are: x, then those of each projection, in this order.
tensor_list trainable(const Tensor& x, const Projections& call) {
  tensor_list tensors{x};
  for (size_t i = 0; i < call.count(); ++i) {
    for (const auto* column : {&call.biases, &call.a, &call.b, &call.scale_vectors}) {
      if ((*column)[i].has_value()) tensors.push_back(*(*column)[i]);
    }
  }
  return tensors;
}

struct LoraLinearShared : torch::autograd::Function<LoraLinearShared> {
  // What is saved for each projection, behind x.
  enum Saved { kWeight, kA, kB, kS, kVector, kSeed, kSavedFields };

  static tensor_list forward(AutogradContext* ctx, at::TensorList trained, const Projections& call) {
    const Tensor& x = trained[0];
    auto [y, s] = raw_shared_forward(x, call);
    bool need_any_a = false;
    tensor_list saved(1);
    c10::List<bool> biases;
    for (size_t i = 0; i < call.count(); ++i) {
      need_any_a = need_any_a || needs_gradient(call.a[i]);
      const bool need_s = needs_gradient(call.b[i]) || needs_gradient(call.scale_vectors[i]);
      for (const Tensor& tensor :
           {when(x.requires_grad(), call.weights[i]), tensor_or_none(call.a[i]), tensor_or_none(call.b[i]),
            when(need_s, s[i]), tensor_or_none(call.scale_vectors[i]), tensor_or_none(call.seeds[i])}) {
        saved.push_back(tensor);
      }
      biases.push_back(call.biases[i].has_value());
    }
    saved[0] = when(need_any_a, x);
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    ctx->saved_data["biases"] = std::move(biases);
    ctx->saved_data["scales"] = call.scales;
    ctx->saved_data["dropout_ps"] = call.dropout_ps;
    ctx->saved_data["allow_tf32"] = call.allow_tf32;
    return y;
  }

  static tensor_list backward(AutogradContext* ctx, tensor_list grad_y) {
    refuse_double_backward("lora_linear_shared", "pyfused.reference.lora.lora_linear");
    const tensor_list saved = ctx->get_saved_variables();
    auto& data = ctx->saved_data;
    const auto biases = data["biases"].toBoolList();
    const auto scales = data["scales"].toDoubleList(), dropout_ps = data["dropout_ps"].toDoubleList();

    Asked asked(ctx);
    const bool need_x = asked.next();
    tensor_list dys;
    Optionals columns[kSavedFields];
    std::vector<double> used_scales, used_ps;
    std::vector<int64_t> needs;
    // where each gradient of the used projections goes, or -1
    std::vector<int64_t> places;
    int64_t place = 1;
    for (size_t i = 0; i < grad_y.size(); ++i) {
      const Tensor* fields = &saved[1 + i * kSavedFields];
      const bool has[] = {fields[kA].defined(), fields[kB].defined(), fields[kVector].defined(), biases[i]};
      const bool need_bias = asked.next(has[3]), need_a = asked.next(has[0]), need_b = asked.next(has[1]);
      const bool need_scale = asked.next(has[2]);
      const int64_t bias_place = place, a_place = bias_place + has[3], b_place = a_place + has[0];
      const int64_t scale_place = b_place + has[1];
      place = scale_place + has[2];
      const int64_t bits =
          need_x * kNeedX | need_a * kNeedA | need_b * kNeedB | need_scale * kNeedScale | need_bias * kNeedBias;
      // A result that nothing was computed from has no gradient and no share.
      if (!grad_y[i].defined() || bits == 0) continue;
      dys.push_back(grad_y[i]);
      for (int field = 0; field < kSavedFields; ++field) columns[field].push_back(optional(fields[field]));
      used_scales.push_back(scales[i]);
      used_ps.push_back(dropout_ps[i]);
      needs.push_back(bits);
      const auto to = [](bool need, int64_t where) { return need ? where : -1; };
      for (const int64_t where :
           {to(need_a, a_place), to(need_b, b_place), to(need_scale, scale_place), to(need_bias, bias_place)}) {
        places.push_back(where);
      }
    }

    tensor_list grads(static_cast<size_t>(place) + 1);
    if (dys.empty()) return grads;
    auto [grad_x, found] =
        raw_shared_backward(dys, optional(saved[0]), columns[kWeight], columns[kA], columns[kB], columns[kS],
                            columns[kVector], used_scales, used_ps, columns[kSeed], needs, data["allow_tf32"].toBool());
    if (need_x) grads[0] = grad_x;
    for (size_t i = 0; i < places.size(); ++i) {
      if (places[i] >= 0) grads[static_cast<size_t>(places[i])] = found[i];
    }
    return grads;
  }
};

}  // namespace

std::vector<Tensor> lora_linear_shared(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Optional>& biases, const std::vector<Optional>& a,
                                       const std::vector<Optional>& b, const std::vector<Optional>& scale_vectors,
                                       const std::vector<double>& scales, const std::vector<double>& dropout_ps,
                                       const std::vector<Optional>& seeds, bool allow_tf32) {
  const Projections call{weights, biases, a, b, scale_vectors, scales, dropout_ps, seeds, allow_tf32};
  for (const size_t size :
       {biases.size(), a.size(), b.size(), scale_vectors.size(), scales.size(), dropout_ps.size(), seeds.size()}) {
    TORCH_CHECK(size == weights.size(), "lora_linear_shared: lists must have one length, got ", weights.size(), " and ",
                size);
  }
  const tensor_list trained = trainable(x, call);
  bool record = false;
  for (const Tensor& tensor : trained) record = record || tensor.requires_grad();
  if (record && at::GradMode::is_enabled()) return LoraLinearShared::apply(at::TensorList(trained), call);
  return std::get<0>(raw_shared_forward(x, call));
}

}  // namespace pyfused
