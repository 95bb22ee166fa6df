// Many LoRA adapters in one batch on CUDA: which passes run, registration. The host never learns who has which rows: it
// launches for as many tiles as there can be, and never waits.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "multi_lora_call.h"

namespace pyfused {
namespace {

// y += (scale drop(x) a^T) b^T for all slices, in place. s [slices, M, rank] takes drop(x) a^T, or is null.
void forward(const Batch& batch, const Tensor& x, const std::vector<Matrix>& y, const Tensor* s) {
  if (batch.is_empty()) return;
  const Matrix rows(x);
  // Blocks of their own for parts of x's columns where there are few rows.
  const bool fills = batch.pass.tile_count * batch.slices >= 2 * batch.scope.multiprocessors();
  const int splits = fills ? 1 : multi_lora_splits(batch.K);
  std::optional<Tensor> own;
  if (s == nullptr || splits > 1) own = batch.sums(batch.slices * splits, batch.M, batch.pass.max_rank);
  const Tensor& parts = own.has_value() ? *own : *s;
  batch.for_each_type(&MultiAdapter::products, 0, batch.slices, [&](const MultiLoraPass& pass) {
    MultiLoraShrink call{};
    call.pass = pass;
    call.slices = static_cast<int>(batch.slices);
    call.k = batch.K;
    call.x = rows_of(rows);
    call.splits = splits;
    call.parts = parts.mutable_data_ptr();
    launch_multi_lora_shrink(call, batch.scope.stream());
  });
  for (int64_t first = 0; first < batch.slices; first += kMaxSlices) {
    const int64_t last = std::min<int64_t>(first + kMaxSlices, batch.slices);
    batch.for_each_type(&MultiAdapter::products, first, last, [&](const MultiLoraPass& pass) {
      MultiLoraExpand call{};
      call.pass = pass;
      call.first_slice = static_cast<int>(first);
      call.slices = static_cast<int>(last - first);
      call.parts = parts.const_data_ptr();
      call.splits = splits;
      call.s = s == nullptr ? nullptr : s->mutable_data_ptr();
      for (int64_t i = first; i < last; ++i) {
        call.n[i - first] = y[i].tensor.size(y[i].tensor.dim() - 1);
        call.out[i - first] = y[i].tensor.mutable_data_ptr();
        call.ld_out[i - first] = y[i].ld;
      }
      launch_multi_lora_expand(call, batch.scope.stream());
    });
  }
}

// The same for a few rows in one launch, where all adapters are of one type; else false.
bool decode(const Batch& batch, const Tensor& x, const std::vector<Matrix>& y) {
  if (batch.is_empty()) return false;
  MultiLoraDecode call{};
  std::optional<Dtype> type;
  const auto fits_int = [](int64_t value) { return value <= std::numeric_limits<int>::max(); };
  for (const MultiAdapter& adapter : batch.table) {
    if (adapter.r == 0) continue;
    if (!type.has_value()) type = adapter.products;
    const bool same = adapter.type_a == *type && adapter.type_b == *type && adapter.products == *type;
    if (!same || !fits_int(adapter.ld_a) || !fits_int(adapter.ld_b)) return false;
  }
  call.types = {batch.dtype, *type, false};
  call.slices = static_cast<int>(batch.slices);
  if (!multi_lora_decode_fits(call.types, batch.M, batch.K, batch.groups.entries,
                              static_cast<int64_t>(batch.table.size()), call.slices, batch.pass.max_rank)) {
    return false;
  }
  const Matrix rows(x);
  call.batch = batch.groups;
  call.k = batch.K;
  call.x = rows_of(rows);
  for (size_t i = 0; i < y.size(); ++i) {
    call.n[i] = y[i].tensor.size(y[i].tensor.dim() - 1);
    call.out[i] = y[i].tensor.mutable_data_ptr();
    call.ld_out[i] = y[i].ld;
  }
  for (size_t i = 0; i < batch.table.size(); ++i) {
    const MultiAdapter& adapter = batch.table[i];
    call.adapters[i] = {adapter.a, adapter.b,    static_cast<int>(adapter.ld_a), static_cast<int>(adapter.ld_b),
                        adapter.r, adapter.scale};
  }
  launch_multi_lora_decode(call, batch.scope.stream());
  return true;
}

// To each y, whose matrix is `out`.
void add(Batch& batch, const Tensors& y, const std::vector<Matrix>& out, const Tensor& x) {
  if (!decode(batch, x, out)) {
    batch.upload();
    forward(batch, x, out, nullptr);
  }
  for (size_t i = 0; i < y.size(); ++i) {
    if (out[i].tensor.const_data_ptr() == y[i].const_data_ptr()) continue;
    Tensor target = y[i];
    torch::stable::copy_(target, out[i].tensor);  // y has no form of a matrix
  }
}

void multi_lora_in_place(const Tensors& y, const Tensor& x, const Tensors& tables, const Tensor& index,
                         const std::optional<Tensor>& segments) {
  const char* op = "multi_lora_";
  check_xy(y, x, gpu_of(x, op, "x"), op);
  Batch batch(op, x, y.size(), check_tables(tables, y.size(), op));
  std::vector<Matrix> out;
  for (size_t i = 0; i < y.size(); ++i) {
    out.emplace_back(y[i]);
    const auto* rows = static_cast<const int64_t*>(tables[i].const_data_ptr());
    for (int64_t j = 0; j < batch.count; ++j) batch.add(TableEntry(rows + j * kFields, op), y[i].size(y[i].dim() - 1));
  }
  batch.set_index(index, segments);
  add(batch, y, out, x);
}

void multi_lora_stacked(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b, double scale,
                        const Tensor& index) {
  const char* op = "multi_lora_stacked_";
  const int64_t slots = check_stacks(y, x, a, b, index, gpu_of(x, op, "x"), op);
  Batch batch(op, x, a.size(), slots);
  Tensor whole = y, indices = index;  // the same memory: narrow asks for no const
  Tensors slices;
  std::vector<Matrix> out;
  int64_t column = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t N = b[i].size(b[i].dim() - 2);
    out.emplace_back(slices.emplace_back(torch::stable::narrow(whole, 1, column, N)));
    // whether a slot is empty is not asked: for that the GPU would have to be waited for
    for (int64_t slot = 0; slot < slots; ++slot) batch.add(stacked_entry(a[i], b[i], slot, scale, op), N);
    column += N;
  }
  batch.set_index(torch::stable::narrow(indices, 0, 0, x.size(0)), std::nullopt);
  add(batch, slices, out, x);
}

std::tuple<Tensors, Tensor> multi_lora_forward(const Tensors& y, const Tensor& x, const OptionalTensors& a,
                                               const OptionalTensors& b, const std::vector<double>& scales,
                                               const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
                                               const Tensor& index, const std::optional<Tensor>& segments) {
  const char* op = "multi_lora";
  check_xy(y, x, gpu_of(x, op, "x"), op);
  const AdapterTensors tensors(a, b, scales, dropout_ps, seeds, y.size(), op);
  Batch batch(op, x, y.size(), tensors.count);
  int64_t largest = 0;
  for (const std::optional<Tensor>& one : a) {
    largest = std::max(largest, one.has_value() && one->dim() > 0 ? one->size(0) : 0);
  }
  Tensor s = batch.sums(batch.slices, batch.M, largest);
  torch::stable::zero_(s);  // what no row fills, too, so that a call's results are a function of its arguments
  Tensors out;
  std::vector<Matrix> matrices;
  for (int64_t slice = 0; slice < batch.slices; ++slice) {
    const int64_t N = y[slice].size(y[slice].dim() - 1);
    Tensor& copy = out.emplace_back(empty_rows(y[slice], N, batch.scope.device));
    torch::stable::copy_(copy, y[slice]);
    matrices.emplace_back(copy);
    for (int64_t j = 0; j < batch.count; ++j) batch.add(tensors, x, N);
  }
  batch.set_index(index, segments);
  batch.upload();
  batch.pass.max_rank = batch.pass.max_rank > 0 ? static_cast<int>(largest) : 0;  // the distance of rows of s
  forward(batch, x, matrices, &s);
  return {out, s};
}

std::tuple<Tensor, Tensors> multi_lora_backward(const Tensors& grad_y, const Tensor& x, const OptionalTensors& a,
                                                const OptionalTensors& b, const std::vector<double>& scales,
                                                const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
                                                const Tensor& index, const std::optional<Tensor>& segments,
                                                const Tensor& s, const std::vector<int64_t>& needs) {
  const char* op = "multi_lora_backward";
  check_xy(grad_y, x, gpu_of(x, op, "x"), op);
  const AdapterTensors tensors(a, b, scales, dropout_ps, seeds, grad_y.size(), op);
  PF_CHECK(needs.size() == a.size(), op, "needs", "be a list of a's length", needs.size());
  Batch batch(op, x, grad_y.size(), tensors.count);
  const Device& device = batch.scope.device;
  check_device(s, device, op, "s");
  PF_CHECK(s.scalar_type() == scalar_type(batch.accumulator) && s.is_contiguous(), op, "s",
           "be contiguous in the accumulation type", "another dtype or layout");
  PF_CHECK(s.dim() == 3 && s.size(0) == batch.slices && s.size(1) == batch.M, op, "s", "have shape [slices, M, rank]",
           shape_of(s));

  int64_t any = 0;
  for (const int64_t bits : needs) any |= bits;
  const bool need_x = any & kNeedX;
  Tensor grad_x = need_x ? empty_rows(x, batch.K, device) : empty({0}, x.scalar_type(), device);
  if (need_x) torch::stable::zero_(grad_x);
  Tensors grads;
  for (size_t i = 0; i < a.size(); ++i) {
    const Tensor& dy = grad_y[i / static_cast<size_t>(std::max<int64_t>(batch.count, 1))];
    MultiAdapter& adapter = batch.add(tensors, x, dy.size(dy.dim() - 1));
    PF_CHECK(adapter.r <= s.size(2), op, "s", "have the largest rank as last dimension", s.size(2));
    for (const auto& [of, bit, to] :
         {std::tuple{&a[i], kNeedA, &MultiAdapter::grad_a}, std::tuple{&b[i], kNeedB, &MultiAdapter::grad_b}}) {
      const bool needed = of->has_value() && needs[i] & bit;
      Tensor& grad = grads.emplace_back(needed ? empty({(*of)->size(0), (*of)->size(1)}, (*of)->scalar_type(), device)
                                               : empty({0}, x.scalar_type(), device));
      if (needed && adapter.r > 0) adapter.*to = grad.mutable_data_ptr();
    }
  }
  batch.set_index(index, segments);
  batch.upload(any & (kNeedA | kNeedB));
  for (size_t i = 0; i < grads.size(); ++i) {
    const MultiAdapter& adapter = batch.table[i / 2];
    if (batch.is_empty() || adapter.r == 0) torch::stable::zero_(grads[i]);
  }
  if (batch.is_empty()) return {grad_x, grads};
  batch.pass.max_rank = static_cast<int>(s.size(2));

  const cudaStream_t stream = batch.scope.stream();
  const int64_t size = batch.M * s.size(2) * size_of(batch.accumulator);  // of a slice's s
  const char* of_s = static_cast<const char*>(s.const_data_ptr());
  std::optional<Tensor> sums;
  if (any & (kNeedX | kNeedA)) sums = batch.sums(batch.slices, batch.M, s.size(2));
  char* ds = sums.has_value() ? static_cast<char*>(sums->mutable_data_ptr()) : nullptr;
  std::optional<Tensor> part_sums;
  if (batch.M > kPartRows && any & (kNeedA | kNeedB)) {
    int64_t columns = any & kNeedA ? batch.K : 0;
    for (const Tensor& dy : grad_y) columns = std::max(columns, any & kNeedB ? dy.size(dy.dim() - 1) : 0);
    part_sums = batch.sums(part_slots(batch.M, kPartRows), s.size(2), columns);
  }
  void* of_parts = part_sums.has_value() ? part_sums->mutable_data_ptr() : nullptr;
  const Matrix x_rows(x);
  for (int64_t slice = 0; slice < batch.slices; ++slice) {
    const Matrix dy(grad_y[slice]);
    const int64_t N = grad_y[slice].size(grad_y[slice].dim() - 1);
    int64_t needed = 0;
    for (int64_t j = 0; j < batch.count; ++j) needed |= needs[slice * batch.count + j];
    batch.for_each_type(&MultiAdapter::products, slice, slice + 1, [&](const MultiLoraPass& pass) {
      if (ds != nullptr) {
        MultiLoraShrink call{};
        call.pass = pass;
        call.backward = true;
        call.first_slice = static_cast<int>(slice);
        call.slices = 1;
        call.k = N;
        call.x = rows_of(dy);
        call.splits = 1;
        call.parts = ds + slice * size;
        launch_multi_lora_shrink(call, stream);
      }
      MultiLoraReduce call{pass, false, static_cast<int>(slice), N, rows_of(dy), of_s + slice * size, of_parts};
      if (needed & kNeedB) launch_multi_lora_reduce(call, stream);
      call = {pass, true, static_cast<int>(slice), batch.K, rows_of(x_rows), ds + slice * size, of_parts};
      if (needed & kNeedA) launch_multi_lora_reduce(call, stream);
    });
  }
  if (!need_x) return {grad_x, grads};
  batch.for_each_type(&MultiAdapter::products_x, 0, batch.slices, [&](const MultiLoraPass& pass) {
    MultiLoraExpand call{};
    call.pass = pass;
    call.backward = true;
    call.slices = static_cast<int>(batch.slices);
    call.parts = ds;
    call.splits = 1;
    call.n[0] = call.ld_out[0] = batch.K;
    call.out[0] = grad_x.mutable_data_ptr();
    launch_multi_lora_expand(call, stream);
  });
  return {grad_x, grads};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, PYFUSED_CUDA_KEY, m) {
  m.impl("_multi_lora_", TORCH_BOX(&pyfused::multi_lora_in_place));
  m.impl("_multi_lora_stacked_", TORCH_BOX(&pyfused::multi_lora_stacked));
  m.impl("_multi_lora_forward", TORCH_BOX(&pyfused::multi_lora_forward));
  m.impl("_multi_lora_backward", TORCH_BOX(&pyfused::multi_lora_backward));
}
