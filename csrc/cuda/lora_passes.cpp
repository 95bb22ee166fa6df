#include "lora_passes.h"

#include <map>
#include <utility>

#include "lora_concat.h"

namespace pyfused {
namespace {

// s, or its parts over K that lora_expand adds up.
struct Parts {
  Tensor tensor;
  int64_t count;
};

// s of all adapters: those whose types and cuts are the same in one pass.
std::vector<Parts> shrink(std::span<const LoraForward> calls, const Matrix& x) {
  std::vector<Parts> parts;
  std::map<std::pair<Dtype, int>, std::vector<LoraShrink::Adapter>> groups;
  for (const LoraForward& call : calls) {
    const Lora& lora = call.lora;
    const int splits = lora_shrink_splits(lora.M, lora.K, lora.rank(), lora.scope.multiprocessors());
    parts.push_back({splits == 1 ? call.s : lora.sums({splits, lora.M, lora.R}), splits});
    groups[{lora.types.adapter, splits}].push_back(
        {lora.rank(), rows_of(lora.a), lora.dropout, lora.dropout_scale, parts.back().tensor.mutable_data_ptr()});
  }
  for (const auto& [key, adapters] : groups) {
    const Lora& lora = calls[0].lora;
    LoraShrink call{};
    call.types = {lora.types.data, key.first, lora.types.allow_tf32};
    call.m = lora.M;
    call.k = lora.K;
    call.x = rows_of(x);
    call.splits = key.second;
    call.adapters = adapters;
    launch_lora_shrink(call, lora.scope.stream());
  }
  return parts;
}

// out = source + bias + (scale s) b^T
void expand(const LoraForward& forward, const Parts& parts, const Matrix* source, const Tensor* bias) {
  const Lora& lora = forward.lora;
  LoraExpand::Adapter adapter{};
  adapter.r = lora.rank();
  adapter.parts = parts.tensor.const_data_ptr();
  adapter.part_count = parts.count;
  adapter.part_stride = lora.M * lora.R;
  adapter.s = parts.count > 1 ? forward.s.mutable_data_ptr() : nullptr;
  adapter.factor = lora.factor;
  adapter.vector = lora.vector;
  adapter.c = lora.b.tensor.const_data_ptr();
  adapter.c_column_stride = lora.b.ld;
  adapter.c_rank_stride = 1;
  LoraExpand call{};
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.N;
  call.adapters = {&adapter, 1};
  if (source != nullptr) call.source = rows_of(*source);
  if (bias != nullptr) call.bias = bias->const_data_ptr();
  call.out = forward.out.mutable_data_ptr();
  call.ld_out = lora.N;
  launch_lora_expand(call, lora.scope.stream());
}

bool decodes(const Lora& lora) {
  return lora.threshold == 0 && lora_decode_fits(lora.types, lora.M, lora.K, lora.N, lora.rank());
}

// All that decode: those of one type in one call.
void decode(std::span<const LoraForward> calls, const Matrix& x) {
  std::vector<Matrix> sources;  // alive until they are read
  std::map<Dtype, std::vector<LoraDecode::Adapter>> groups;
  for (const LoraForward& forward : calls) {
    const Lora& lora = forward.lora;
    LoraDecode::Adapter& adapter = groups[lora.types.adapter].emplace_back();
    adapter.n = lora.N;
    adapter.r = lora.rank();
    adapter.a = rows_of(lora.a);
    adapter.b = lora.b.tensor.const_data_ptr();
    adapter.b_row_stride = lora.b.ld;
    adapter.factor = lora.factor;
    adapter.vector = lora.vector;
    adapter.s = forward.s.mutable_data_ptr();
    adapter.source = rows_of(sources.emplace_back(forward.y == nullptr ? forward.out : *forward.y));
    adapter.out = forward.out.mutable_data_ptr();
    adapter.ld_out = lora.N;
  }
  const Lora& first = calls[0].lora;
  for (const auto& [type, adapters] : groups) {
    const KernelTypes types{first.types.data, type, first.types.allow_tf32};
    launch_lora_decode({types, first.M, first.K, rows_of(x), adapters}, first.scope.stream());
  }
}

// out = x weight^T + bias, or out += x weight^T
void base_product(const LoraForward& call, const Matrix& x, bool on_top) {
  const Lora& lora = call.lora;
  const Tensor out = as_matrix(call.out, lora.M, lora.N);  // one object, or a product on top of itself would copy it
  matmul_out(out, as_matrix(x.tensor, lora.M, lora.K), torch::stable::transpose(*call.weight, 0, 1),
             on_top ? &out : call.bias);
}

// Partial sums of a pass over dy or x, and how many.
struct Reduced {
  std::optional<Tensor> rows, columns;
  int64_t row_parts = 0, column_parts = 0;
};

// dy against b and s (both or one of them).
Reduced reduce_dy(const Lora& lora, const Matrix& dy, const Tensor* s, bool need_u) {
  Reduced reduced;
  const bool fused = need_u && s != nullptr && lora.R <= kMaxFusedRank;
  if (need_u && !fused) {  // u = dy b is a skinny product like the forward's
    Tensor bt = empty({lora.R, lora.N}, scalar_type(lora.types.adapter), lora.device);
    torch::stable::copy_(bt, torch::stable::transpose(lora.b.tensor, 0, 1));
    LoraShrink skinny{};
    skinny.types = lora.types;
    skinny.m = lora.M;
    skinny.k = lora.N;
    skinny.x = rows_of(dy);
    skinny.splits = lora_shrink_splits(lora.M, lora.N, lora.rank(), lora.scope.multiprocessors());
    reduced.row_parts = skinny.splits;
    reduced.rows = lora.sums({skinny.splits, lora.M, lora.R});
    const LoraShrink::Adapter adapter{
        lora.rank(), {bt.const_data_ptr(), lora.N}, {}, 1.0, reduced.rows->mutable_data_ptr()};
    skinny.adapters = {&adapter, 1};
    launch_lora_shrink(skinny, lora.scope.stream());
  }
  if (s == nullptr) return reduced;
  LoraReduce call{};
  call.types = lora.types;
  call.m = lora.M;
  call.n = lora.N;
  call.x = rows_of(dy);
  if (fused) {
    reduced.row_parts = divide_up(lora.N, lora_slab_columns(call.types, lora.rank()));
    reduced.rows = lora.sums({reduced.row_parts, lora.M, lora.R});
    call.rows_parts = reduced.rows->mutable_data_ptr();
    call.c = lora.b.tensor.const_data_ptr();
    call.c_column_stride = lora.b.ld;
    call.c_rank_stride = 1;
  }
  call.range_rows = lora_range_rows(call.types, call.m, call.n, lora.rank(), fused, lora.scope.multiprocessors());
  reduced.column_parts = divide_up(lora.M, call.range_rows);
  reduced.columns = lora.sums({reduced.column_parts, lora.N, lora.R});
  const LoraReduce::Adapter adapter{
      lora.rank(), s->const_data_ptr(), {}, reduced.columns->mutable_data_ptr(), lora.R, 1};
  call.adapters = {&adapter, 1};
  launch_lora_reduce(call, lora.scope.stream());
  return reduced;
}

// ds of each call that needs it, from its pass over dy; db and the gradient of the scale on the way. rounded: an
// operand that ds of the only call is wanted as too, or null.
std::vector<std::optional<Tensor>> backward_dy(std::span<const LoraBackward> calls,
                                               std::optional<RoundedSum>* rounded) {
  std::vector<std::optional<Tensor>> ds(calls.size()), u(calls.size());
  std::vector<Reduced> parts;  // alive until they are added up
  std::vector<PartSum> sums;
  for (size_t i = 0; i < calls.size(); ++i) {
    const auto& [lora, grad_y, dy, s, needs, grad] = calls[i];
    const bool need_b = needs & kNeedB, need_scale = needs & kNeedScale && lora.vector.data != nullptr;
    const bool need_u = needs & (kNeedX | kNeedA) || need_scale;
    if (needs & kNeedBias) grad.bias = LoraGradients::sum_rows(grad_y, lora.M, lora.N);
    if (!need_u && !need_b) continue;
    const Reduced& reduced = parts.emplace_back(reduce_dy(lora, dy, need_b ? &*s : nullptr, need_u));
    if (need_u) {
      ds[i] = lora.sums({lora.M, lora.R});
      PartSum& sum = sums.emplace_back(sum_of(lora, *reduced.rows, reduced.row_parts, lora.M * lora.R, *ds[i]));
      sum.factor = lora.factor * lora.dropout_scale;  // the kept elements' factor, for both of its uses
      sum.vector = lora.vector;
      if (need_scale) {
        u[i] = lora.sums({lora.M, lora.R});
        sum.unscaled = u[i]->mutable_data_ptr();
      }
      if (rounded != nullptr) {
        const PartSum operand = rounded->emplace(lora, sum).sum;
        sums.push_back(operand);
      }
    }
    if (need_b) {
      PartSum& sum = sums.emplace_back(sum_of(lora, *reduced.columns, reduced.column_parts, lora.N * lora.R, grad.b));
      sum.factor = lora.factor;
      sum.vector = lora.vector;
    }
  }
  const Lora& first = calls[0].lora;
  launch_sums(sums, first.is_double(), first.scope.stream());
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!u[i].has_value()) continue;
    const Lora& lora = calls[i].lora;
    launch_lora_scale_gradient(calls[i].s->const_data_ptr(), u[i]->const_data_ptr(), lora.M, lora.rank(), lora.factor,
                               calls[i].gradients.scale.mutable_data_ptr(), lora.vector.dtype, lora.is_double(),
                               lora.scope.stream());
  }
  return ds;
}

// How the shares of dx meet the base products. The first of these is the one that reads what was written before it.
LoraUpdate update_of_x(std::span<const LoraBackward> calls, std::span<const BaseProduct> products) {
  if (products.empty()) return LoraUpdate::kAfter;
  const auto& [dy, weight] = products[0];
  const LoraUpdate update = calls[0].lora.update(dy.size(1), weight);
  // one product has room for one share
  return update == LoraUpdate::kConcat && calls.size() + products.size() > 2 ? LoraUpdate::kBefore : update;
}

// dx = sum of dy w + sum of drop(ds a)
void gradient_of_x(std::span<const LoraBackward> calls, std::span<const BaseProduct> products,
                   std::span<const std::optional<Tensor>> ds, bool before, const Tensor& grad_x) {
  const Lora& first = calls[0].lora;
  const Tensor out = as_matrix(grad_x, first.M, first.K);  // one object, as in base_product
  bool written = !before && !products.empty();
  if (!before) add_products(products, out, false);

  std::map<Dtype, std::vector<LoraExpand::Adapter>> groups;
  for (size_t i = 0; i < calls.size(); ++i) {
    const Lora& lora = calls[i].lora;
    LoraExpand::Adapter& adapter = groups[lora.types.adapter].emplace_back();
    adapter.r = lora.rank();
    adapter.parts = ds[i]->const_data_ptr();
    adapter.part_count = 1;
    adapter.factor = 1.0;
    adapter.c = lora.a.tensor.const_data_ptr();
    adapter.c_column_stride = 1;
    adapter.c_rank_stride = lora.a.ld;
    adapter.dropout = lora.dropout;
  }
  for (const auto& [type, adapters] : groups) {
    LoraExpand call{};
    call.types = {first.types.data, type, first.types.allow_tf32};
    call.m = first.M;
    call.n = first.K;
    call.adapters = adapters;
    call.out = grad_x.mutable_data_ptr();
    call.ld_out = first.K;
    if (written) call.source = {call.out, call.ld_out};
    launch_lora_expand(call, first.scope.stream());
    written = true;
  }
  if (before) add_products(products, out, true);
}

// da = ds^T drop(x) of all adapters that need it: those whose types and cuts are the same in one pass.
void gradients_of_a(std::span<const LoraBackward> calls, std::span<const std::optional<Tensor>> ds, const Matrix& x) {
  std::vector<Tensor> parts;  // alive until they are added up
  std::vector<PartSum> sums;
  std::map<std::pair<Dtype, int64_t>, std::vector<LoraReduce::Adapter>> groups;
  for (size_t i = 0; i < calls.size(); ++i) {
    if (!(calls[i].needs & kNeedA)) continue;
    const Lora& lora = calls[i].lora;
    const int64_t range_rows =
        lora_range_rows(lora.types, lora.M, lora.K, lora.rank(), false, lora.scope.multiprocessors());
    const int64_t count = divide_up(lora.M, range_rows);
    parts.push_back(lora.sums({count, lora.R, lora.K}));
    sums.push_back(sum_of(lora, parts.back(), count, lora.R * lora.K, calls[i].gradients.a));
    groups[{lora.types.adapter, range_rows}].push_back(
        {lora.rank(), ds[i]->const_data_ptr(), lora.dropout, parts.back().mutable_data_ptr(), 1, lora.K});
  }
  const Lora& first = calls[0].lora;
  for (const auto& [key, adapters] : groups) {
    LoraReduce call{};
    call.types = {first.types.data, key.first, first.types.allow_tf32};
    call.m = first.M;
    call.n = first.K;
    call.x = rows_of(x);
    call.range_rows = key.second;
    call.adapters = adapters;
    launch_lora_reduce(call, first.scope.stream());
  }
  launch_sums(sums, first.is_double(), first.scope.stream());
}

}  // namespace

void lora_forward(std::span<const LoraForward> calls, const Tensor& x) {
  const Matrix rows(x);
  std::vector<LoraForward> few_rows, passes;
  for (const LoraForward& call : calls) {
    const bool fits = decodes(call.lora);
    (fits ? few_rows : passes).push_back(call);
    if (fits && call.y == nullptr) base_product(call, rows, false);
  }
  if (!few_rows.empty()) decode(few_rows, rows);
  if (passes.empty()) return;
  const std::vector<Parts> parts = shrink(passes, rows);
  for (size_t i = 0; i < passes.size(); ++i) {
    const LoraForward& call = passes[i];
    const LoraUpdate update = call.y == nullptr ? call.lora.update(call.lora.K, *call.weight) : LoraUpdate::kAfter;
    if (update == LoraUpdate::kAfter) {
      if (call.y == nullptr) base_product(call, rows, false);
      const Matrix source(call.y == nullptr ? call.out : *call.y);
      expand(call, parts[i], &source, nullptr);
      continue;
    }
    std::optional<Tensor> bias;
    if (call.bias != nullptr) bias = torch::stable::contiguous(*call.bias);
    const Tensor* vector = or_null(bias);
    if (update == LoraUpdate::kBefore) {
      expand(call, parts[i], nullptr, vector);
      base_product(call, rows, true);
    } else {
      const Matrix s = scaled_s(call.lora, parts[i].tensor, parts[i].count, call.s);
      concat(call.lora, rows, *call.weight, s, call.lora.b, false, vector, call.out);
    }
  }
}

void add_products(std::span<const BaseProduct> products, const Tensor& out, bool on_top) {
  for (const BaseProduct& product : products) {
    matmul_out(out, product.dy, product.weight, on_top ? &out : nullptr);
    on_top = true;
  }
}

void lora_backward(std::span<const LoraBackward> calls, std::span<const BaseProduct> products,
                   const std::optional<Tensor>& x, const Tensor* grad_x) {
  const LoraUpdate update = grad_x == nullptr ? LoraUpdate::kAfter : update_of_x(calls, products);
  const bool in_one = update == LoraUpdate::kConcat;
  std::optional<RoundedSum> rounded;
  const std::vector<std::optional<Tensor>> ds = backward_dy(calls, in_one ? &rounded : nullptr);
  if (in_one) {
    const LoraBackward& call = calls[0];
    concat(call.lora, call.dy, products[0].weight, rounded->matrix, call.lora.a, true, nullptr, *grad_x);
  } else if (grad_x != nullptr) {
    gradient_of_x(calls, products, ds, update == LoraUpdate::kBefore, *grad_x);
  }
  bool need_a = false;
  for (const LoraBackward& call : calls) need_a = need_a || call.needs & kNeedA;
  if (need_a) gradients_of_a(calls, ds, Matrix(*x));
}

}  // namespace pyfused
