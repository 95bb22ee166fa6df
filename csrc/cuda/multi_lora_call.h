// One multi_lora call, checked: its tables and rows, on the host and on the GPU.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "../common/multi_lora.h"
#include "multi_lora.h"
#include "tensor.h"

namespace pyfused {

inline ConstRows rows_of(const Matrix& matrix) { return {matrix.tensor.const_data_ptr(), matrix.ld}; }

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

  // Sorts the rows and takes the table to the GPU; with_parts: for sums over rows too.
  void upload(bool with_parts = false) {
    if (groups.entries == 0) return;
    static_assert(alignof(MultiAdapter) == 8 && sizeof(RowTile) == 16 && sizeof(RowGroup) == 8);
    const int64_t adapters = static_cast<int64_t>(table.size() * sizeof(MultiAdapter)) / 8;
    const int64_t parts = with_parts ? row_parts(M, count, kPartRows) : 0;
    const int64_t size = adapters + 2 * (pass.tile_count + parts) + count + divide_up(M, 2);
    memory_ = empty({size}, ScalarType::Long, scope.device);
    int64_t* words = static_cast<int64_t*>(memory_->mutable_data_ptr());
    MultiAdapter* device_table = reinterpret_cast<MultiAdapter*>(words);
    groups.tiles = reinterpret_cast<RowTile*>(words += adapters);
    if (with_parts) groups.parts = groups.tiles + pass.tile_count;
    groups.part_rows = kPartRows;
    groups.groups = reinterpret_cast<RowGroup*>(words += 2 * (pass.tile_count + parts));
    groups.rows = reinterpret_cast<int*>(words += count);
    pass.table = device_table;
    pass.tiles = groups.tiles;
    pass.groups = groups.groups;
    pass.parts = groups.parts;
    pass.part_rows = groups.part_rows;
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

}  // namespace pyfused
