// Many LoRA adapters in one batch on CUDA: tables and rows on the GPU, which passes run, registration. The host never
// learns who has which rows: it launches for as many tiles as there can be, and never waits.
#include "multi_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/multi_lora.h"
#include "tensor.h"

namespace pyfused {
namespace {

ConstRows rows_of(const Matrix& matrix) { return {matrix.tensor.const_data_ptr(), matrix.ld}; }

// One call: its adapters, and its rows sorted by adapter in memory of the GPU.
struct Batch {
  const char* op;
  DeviceScope scope;
  Dtype dtype, accumulator;
  int64_t M, K, slices, count;  // count: adapters of a slice
  std::vector<MultiAdapter> table;
  MultiLoraPass pass{};
  MultiLoraGroups groups{};

  Batch(const char* op, const Tensor& x, size_t slices, int64_t count)
      : op(op),
        scope(gpu_of(x, op, "x")),
        dtype(dtype_of(x, op, "x")),
        accumulator(dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32),
        M(pyfused::rows_of(x)),
        K(x.size(x.dim() - 1)),
        slices(static_cast<int64_t>(slices)),
        count(count) {
    constexpr int64_t kMost = int64_t{1} << 30;  // places and tiles are of 32 bits
    PF_CHECK(M < kMost && this->slices * count < kMost, op, "x and table", "have less than 2^30 rows and adapters", M);
  }

  // The next adapter of the table.
  MultiAdapter& add(const TableEntry& entry, int64_t columns_y) {
    entry.check(dtype, K, columns_y, op);
    MultiAdapter& adapter = table.emplace_back();
    adapter.products = adapter.products_x = dtype;
    adapter.dropout_scale = 1.0;
    if (entry.R == 0 || columns_y == 0) return adapter;
    PF_CHECK(entry.R < (1 << 20), op, "table", "have ranks below 2^20", entry.R);
    const bool same = entry.dtype_a == entry.dtype_b && types_supported(dtype, entry.dtype_a);
    adapter.a = entry.a;
    adapter.b = entry.b;
    adapter.ld_a = entry.ld_a;
    adapter.ld_b = entry.ld_b;
    adapter.type_a = entry.dtype_a;
    adapter.type_b = entry.dtype_b;
    adapter.products = same ? entry.dtype_a : accumulator;
    adapter.scale = entry.scale;
    adapter.r = static_cast<int>(entry.R);
    return adapter;
  }
  MultiAdapter& add(const AdapterTensors& tensors, const Tensor& x, int64_t columns_y) {
    const size_t i = table.size();
    if (!tensors.a[i].has_value()) return add(TableEntry(), columns_y);
    const Tensor &a = *tensors.a[i], &b = tensors.b_of(i, op);
    const LoraArguments checked(op, scope.device, x, "x", a, b, std::nullopt, tensors.scales[i], tensors.dropout_ps[i],
                                tensors.seeds[i]);
    MultiAdapter& adapter = add(TableEntry(a, b, tensors.scales[i], op), columns_y);
    adapter.dropout_scale = checked.dropout_scale;
    if (checked.threshold != 0) {
      adapter.dropout = {static_cast<const int64_t*>(tensors.seeds[i]->const_data_ptr()), checked.threshold};
    }
    return adapter;
  }

  // The table is complete: whose the rows are.
  void set_index(const Tensor& index, const std::optional<Tensor>& segments) {
    set_products_of_x();
    const Tensor ids = integers(index, "index");
    groups.entries = ids.numel();
    if (segments.has_value()) {
      bounds_ = integers(*segments, "segments");
      PF_CHECK(bounds_->numel() == groups.entries + 1, op, "segments",
               "have " + std::to_string(groups.entries + 1) + " entries, one more than index", bounds_->numel());
      groups.segments = bounds_->const_data_ptr();
      groups.wide_segments = bounds_->scalar_type() == ScalarType::Long;
    } else {
      PF_CHECK(groups.entries == 0 || M % groups.entries == 0, op, "index",
               "have an entry for each of the rows or parts of x", groups.entries);
    }
    PF_CHECK(groups.entries > 0 || M == 0, op, "index", "have an entry for each of the rows or parts of x", 0);
    ids_ = ids;
    groups.index = ids.const_data_ptr();
    groups.wide_index = ids.scalar_type() == ScalarType::Long;
    groups.m = M;
    groups.adapters = static_cast<int>(count);
    pass.m = M;
    pass.adapters = groups.adapters;
    pass.tile_count = groups.entries == 0 ? 0 : row_tiles(M, count);
    for (const MultiAdapter& adapter : table) pass.max_rank = std::max(pass.max_rank, adapter.r);
  }

  // Sorts the rows and takes the table to the GPU.
  void upload() {
    if (groups.entries == 0) return;
    static_assert(alignof(MultiAdapter) == 8 && sizeof(RowTile) == 16 && sizeof(RowGroup) == 8);
    const int64_t adapters = static_cast<int64_t>(table.size() * sizeof(MultiAdapter)) / 8;
    memory_ = empty({adapters + 2 * pass.tile_count + count + divide_up(M, 2)}, ScalarType::Long, scope.device);
    int64_t* words = static_cast<int64_t*>(memory_->mutable_data_ptr());
    MultiAdapter* device_table = reinterpret_cast<MultiAdapter*>(words);
    groups.tiles = reinterpret_cast<RowTile*>(words += adapters);
    groups.groups = reinterpret_cast<RowGroup*>(words += 2 * pass.tile_count);
    groups.rows = reinterpret_cast<int*>(words += count);
    pass.table = device_table;
    pass.tiles = groups.tiles;
    pass.groups = groups.groups;
    pass.rows = groups.rows;
    launch_multi_lora_groups(groups, scope.stream());
    if (!is_empty()) {
      launch_multi_lora_table(table.data(), static_cast<int64_t>(table.size()), device_table, scope.stream());
    }
  }

  // Nothing to add to any row.
  bool is_empty() const { return pass.tile_count == 0 || pass.max_rank == 0 || K == 0; }

  Tensor sums(int64_t first, int64_t rows, int64_t columns) const {
    return empty({first, rows, columns}, scalar_type(accumulator), scope.device);
  }

  // run(pass) for the adapter types that slices first to last have products in.
  template <class F>
  void for_each_type(Dtype MultiAdapter::* products, int64_t first, int64_t last, const F& run) const {
    for (const Dtype type : {dtype, accumulator}) {
      const auto has = [&](const MultiAdapter& adapter) { return adapter.r > 0 && adapter.*products == type; };
      if (std::any_of(table.begin() + first * count, table.begin() + last * count, has)) {
        MultiLoraPass of_type = pass;
        of_type.types = {dtype, type, false};
        run(of_type);
      }
      if (dtype == accumulator) return;
    }
  }

 private:
  // dx is written once: all slices of an adapter form it in one type.
  void set_products_of_x() {
    for (int64_t adapter = 0; adapter < count; ++adapter) {
      Dtype common = dtype;
      for (int64_t slice = 0; slice < slices; ++slice) {
        const MultiAdapter& one = table[slice * count + adapter];
        if (one.r > 0 && one.products != dtype) common = accumulator;
      }
      for (int64_t slice = 0; slice < slices; ++slice) table[slice * count + adapter].products_x = common;
    }
  }

  Tensor integers(const Tensor& tensor, const char* argument) const {
    check_device(tensor, scope.device, op, argument);
    const bool fits = tensor.scalar_type() == ScalarType::Long || tensor.scalar_type() == ScalarType::Int;
    PF_CHECK(fits, op, argument, "be int32 or int64", "another dtype");
    return torch::stable::contiguous(tensor);
  }

  std::optional<Tensor> memory_, ids_, bounds_;  // alive until the kernels are launched
};

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
  batch.upload();
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
      MultiLoraReduce call{pass, false, static_cast<int>(slice), N, rows_of(dy), of_s + slice * size};
      if (needed & kNeedB) launch_multi_lora_reduce(call, stream);
      call = {pass, true, static_cast<int>(slice), batch.K, rows_of(x_rows), ds + slice * size};
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
  m.impl("_multi_lora_forward", TORCH_BOX(&pyfused::multi_lora_forward));
  m.impl("_multi_lora_backward", TORCH_BOX(&pyfused::multi_lora_backward));
}
