// The arguments of a multi_lora call: what every device checks before it follows an address of a table.
#pragma once

#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "lora.h"

namespace pyfused {

// Columns of a table's descriptor, int64 [adapters, kFields]; pyfused/ops/lora_table.py writes it.
enum Field : int { kA, kB, kRank, kIn, kOut, kStrideA, kStrideB, kDtypeA, kDtypeB, kScale, kFields };

// One adapter of a table; rank 0: none.
struct TableEntry {
  const void *a = nullptr, *b = nullptr;
  int64_t R = 0, K = 0, N = 0, ld_a = 0, ld_b = 0;
  Dtype dtype_a = Dtype::kFloat32, dtype_b = Dtype::kFloat32;
  double scale = 1.0;

  TableEntry() = default;
  TableEntry(const int64_t* row, const char* op)
      : a(reinterpret_cast<const void*>(row[kA])),
        b(reinterpret_cast<const void*>(row[kB])),
        R(row[kRank]),
        K(row[kIn]),
        N(row[kOut]),
        ld_a(row[kStrideA]),
        ld_b(row[kStrideB]),
        dtype_a(static_cast<Dtype>(row[kDtypeA])),
        dtype_b(static_cast<Dtype>(row[kDtypeB])) {
    std::memcpy(&scale, &row[kScale], sizeof scale);
    for (const Field field : {kDtypeA, kDtypeB}) {
      PF_CHECK(row[field] >= 0 && row[field] < kDtypes, op, "table", "name a dtype by 0 to 3", row[field]);
    }
    PF_CHECK(R >= 0, op, "table", "have no negative rank", R);
    const bool has_addresses = (a != nullptr || R * K == 0) && (b != nullptr || R * N == 0);  // empty: no memory
    PF_CHECK(has_addresses, op, "table", "have addresses", "null");
  }
  // a [R, K] and b [N, R], which LoraArguments checked.
  TableEntry(const Tensor& a, const Tensor& b, double scale, const char* op)
      : a(a.const_data_ptr()),
        b(b.const_data_ptr()),
        R(a.size(0)),
        K(a.size(1)),
        N(b.size(0)),
        ld_a(a.stride(0)),
        ld_b(b.stride(0)),
        dtype_a(dtype_of(a, op, "a")),
        dtype_b(dtype_of(b, op, "b")),
        scale(scale) {
    for (const Tensor* matrix : {&a, &b}) {
      PF_CHECK(matrix->size(1) <= 1 || matrix->stride(1) == 1, op, "a and b", "have rows of unit stride", "another");
    }
  }

  void check(Dtype dtype, int64_t columns_x, int64_t columns_y, const char* op) const {
    if (R == 0) return;
    PF_CHECK(K == columns_x, op, "table", "have adapters for x's " + std::to_string(columns_x) + " columns", K);
    PF_CHECK(N == columns_y, op, "table", "have adapters for y's " + std::to_string(columns_y) + " columns", N);
    const bool wide = dtype_a == Dtype::kFloat64 || dtype_b == Dtype::kFloat64;
    PF_CHECK(!wide || dtype == Dtype::kFloat64, op, "table", "not be float64 where x is not", "float64");
  }
};

// A table that comes as tensors, slice after slice.
struct AdapterTensors {
  const OptionalTensors &a, &b;
  const std::vector<double>&scales, &dropout_ps;
  const OptionalTensors& seeds;
  int64_t slices, count;  // adapters of a slice

  AdapterTensors(const OptionalTensors& a, const OptionalTensors& b, const std::vector<double>& scales,
                 const std::vector<double>& dropout_ps, const OptionalTensors& seeds, size_t slices, const char* op)
      : a(a), b(b), scales(scales), dropout_ps(dropout_ps), seeds(seeds), slices(static_cast<int64_t>(slices)) {
    PF_CHECK(slices > 0 && a.size() % slices == 0, op, "a", "have an entry for each adapter of each slice", a.size());
    for (const size_t got : {b.size(), scales.size(), dropout_ps.size(), seeds.size()}) {
      PF_CHECK(got == a.size(), op, "b", "be a list of a's length, as scales, dropout_ps and seeds are", got);
    }
    count = static_cast<int64_t>(a.size() / slices);
  }

  // The b of an entry that has an a.
  const Tensor& b_of(int64_t i, const char* op) const {
    PF_CHECK(b[i].has_value(), op, "b", "be given where its counterpart is", "None");
    return *b[i];
  }
};

inline void check_xy(const Tensors& y, const Tensor& x, const Device& device, const char* op) {
  check_device(x, device, op, "x");
  PF_CHECK(x.dim() >= 1, op, "x", "have at least one dimension", "a scalar");
  PF_CHECK(!y.empty(), op, "y", "have at least one tensor", "none");
  for (const Tensor& one : y) {
    check_device(one, device, op, "y");
    PF_CHECK(one.scalar_type() == x.scalar_type(), op, "y", "have x's dtype", "another dtype");
    bool same = one.dim() == x.dim();
    for (int64_t i = 0; same && i < x.dim() - 1; ++i) same = one.size(i) == x.size(i);
    PF_CHECK(same, op, "y", "have x's leading dimensions", shape_of(one));
  }
}

// The tables of the slices, on the host; how many adapters each has.
inline int64_t check_tables(const Tensors& tables, size_t slices, const char* op) {
  PF_CHECK(tables.size() == slices, op, "tables", "have one entry for each y", tables.size());
  const int64_t count = tables[0].dim() == 2 ? tables[0].size(0) : 0;
  for (const Tensor& table : tables) {
    check_device(table, Device::cpu(), op, "table");
    PF_CHECK(table.scalar_type() == ScalarType::Long && table.is_contiguous(), op, "table", "be contiguous int64",
             "another dtype or layout");
    check_shape(table, {count, kFields}, op, "table");
  }
  return count;
}

// Adapters stacked by slot, and y with the slices of all stacks side by side; how many slots there are.
inline int64_t check_stacks(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b, const Tensor& index,
                            const Device& device, const char* op) {
  check_device(x, device, op, "x");
  check_device(y, device, op, "y");
  PF_CHECK(x.dim() == 2, op, "x", "have shape [rows, K]", shape_of(x));
  PF_CHECK(y.dim() == 2 && y.size(0) == x.size(0), op, "y", "have shape [rows, N] with x's rows", shape_of(y));
  PF_CHECK(y.scalar_type() == x.scalar_type(), op, "y", "have x's dtype", "another dtype");
  PF_CHECK(!a.empty() && a.size() == b.size(), op, "b", "be a list of a's length, one or more", b.size());
  PF_CHECK(index.dim() == 1 && index.size(0) >= x.size(0), op, "index", "have an entry for each row of x",
           shape_of(index));
  int64_t slots = -1, columns = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    for (const Tensor* stack : {&a[i], &b[i]}) {
      check_device(*stack, device, op, "a and b");
      PF_CHECK(stack->dim() >= 2 && stack->is_contiguous(), op, "a and b", "be contiguous matrices or stacks of them",
               shape_of(*stack));
      if (stack->dim() == 2) continue;
      const int64_t rows = stack->size(stack->dim() - 2), width = stack->size(stack->dim() - 1);
      const bool fits = stack->numel() == stack->size(0) * rows * width && (slots < 0 || stack->size(0) == slots);
      PF_CHECK(fits, op, "a and b", "have a matrix for each slot, as many slots as the others", shape_of(*stack));
      slots = stack->size(0);
    }
    PF_CHECK(a[i].size(a[i].dim() - 2) == b[i].size(b[i].dim() - 1), op, "b", "have a's rank", shape_of(b[i]));
    columns += b[i].size(b[i].dim() - 2);
  }
  PF_CHECK(slots >= 0, op, "a and b", "have a stack among them", "matrices alone");
  PF_CHECK(columns <= y.size(1), op, "y", "have the columns of all slices", y.size(1));
  return slots;
}

// A slot's adapter of stacks that were checked.
inline TableEntry stacked_entry(const Tensor& a, const Tensor& b, int64_t slot, double scale, const char* op) {
  const auto matrix = [&](const Tensor& stack, Dtype dtype) -> const void* {
    const int64_t rows = stack.size(stack.dim() - 2), columns = stack.size(stack.dim() - 1);
    const int64_t offset = stack.dim() == 2 ? 0 : slot * rows * columns * size_of(dtype);
    return static_cast<const char*>(stack.const_data_ptr()) + offset;
  };
  TableEntry entry;
  entry.dtype_a = dtype_of(a, op, "a");
  entry.dtype_b = dtype_of(b, op, "b");
  entry.a = matrix(a, entry.dtype_a);
  entry.b = matrix(b, entry.dtype_b);
  entry.R = entry.ld_b = b.size(b.dim() - 1);
  entry.K = entry.ld_a = a.size(a.dim() - 1);
  entry.N = b.size(b.dim() - 2);
  entry.scale = scale;
  return entry;
}

}  // namespace pyfused
