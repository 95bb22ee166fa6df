// Many LoRA adapters in one batch on CPU: which rows are whose, how work is cut, registration. The forward's loops are
// those of kernels/multi_lora.cpp; the backward runs lora_passes.cpp's passes on the rows of one adapter after the
// other, so that nothing in it depends on the other rows.
//
// What a row gets does not depend on the cut, so rows are cut as suits the batch.
#include "kernels/multi_lora.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/multi_lora.h"
#include "levels.h"
#include "lora.h"
#include "multi_lora_tasks.h"

namespace pyfused {

const MultiLoraKernels& multi_lora_kernels_for(Dtype dtype) {
#if defined(PYFUSED_HAVE_AMX)
  if (dtype == Dtype::kBFloat16 && chosen_capability() == Capability::AMX) {
    static const MultiLoraKernels kernels = AMX::multi_lora_in_tiles(AVX512_BF16::multi_lora_kernels(dtype));
    return kernels;
  }
#endif
  PF_RETURN_AT_LEVEL(multi_lora_kernels(dtype))
}

namespace {

// Rows of one task: few enough to keep all threads busy.
constexpr int64_t kTaskRowsMin = 4, kTaskRowsMax = 64, kTasksWanted = 16;

// Entry i of a table, checked for rows of `like`.
std::optional<Lora> lora_of(const AdapterTensors& table, int64_t i, const Tensor& like, const char* name,
                            const char* op) {
  if (!table.a[i].has_value()) return std::nullopt;
  return std::optional<Lora>(std::in_place, op, like, name, *table.a[i], table.b_of(i, op), std::nullopt,
                             table.scales[i], table.dropout_ps[i], table.seeds[i]);
}

Adapter adapter_of(const AdapterTensors& table, int64_t i, const Tensor& x, const char* op) {
  const std::optional<Lora> checked = lora_of(table, i, x, "x", op);
  if (!checked.has_value()) return {};
  return {TableEntry(*table.a[i], *table.b[i], table.scales[i], op), *checked};
}

// The rows that have an adapter, by adapter; each one's in the order of the batch.
struct Groups {
  struct Group {
    int64_t adapter, begin, count;  // rows[begin], ...
  };
  std::vector<int64_t> rows;
  std::vector<Group> groups;

  // index[i] is for the rows from starts[i] to starts[i + 1], or each for as many rows as the next.
  Groups(const Tensor& index, const std::optional<Tensor>& starts, int64_t M, int64_t adapters, const char* op) {
    const std::vector<int64_t> ids = integers(index, index.numel(), op, "index");
    const int64_t count = static_cast<int64_t>(ids.size());
    std::vector<int64_t> bounds;
    if (starts.has_value()) {
      bounds = integers(*starts, starts->numel(), op, "segments");
      PF_CHECK(static_cast<int64_t>(bounds.size()) == count + 1, op, "segments",
               "have " + std::to_string(count + 1) + " entries, one more than index", bounds.size());
      PF_CHECK(bounds.front() == 0 && bounds.back() == M && std::is_sorted(bounds.begin(), bounds.end()), op,
               "segments", "ascend from 0 to the number of rows, " + std::to_string(M), "others");
    } else {
      PF_CHECK(count == 0 ? M == 0 : M % count == 0, op, "index", "have an entry for each of the rows or parts of x",
               count);
    }
    group(ids, bounds, M, adapters, op);
  }
  // The first M entries of index are for a row each.
  Groups(const Tensor& index, int64_t M, int64_t adapters, const char* op) {
    group(integers(index, M, op, "index"), {}, M, adapters, op);
  }

  bool contiguous(const Group& group) const {
    return rows[group.begin + group.count - 1] - rows[group.begin] == group.count - 1;
  }

 private:
  void group(const std::vector<int64_t>& ids, const std::vector<int64_t>& bounds, int64_t M, int64_t adapters,
             const char* op) {
    const int64_t count = static_cast<int64_t>(ids.size());
    const auto begin = [&](int64_t i) { return bounds.empty() ? i * (M / count) : bounds[i]; };

    std::vector<int64_t> next(static_cast<size_t>(adapters), 0);
    for (int64_t i = 0; i < count; ++i) {
      PF_CHECK(ids[i] >= -1 && ids[i] < adapters, op, "index",
               "be from -1 to " + std::to_string(adapters - 1) + ", the last adapter of the table", ids[i]);
      if (ids[i] >= 0) next[ids[i]] += begin(i + 1) - begin(i);
    }
    int64_t total = 0;
    for (int64_t adapter = 0; adapter < adapters; ++adapter) {
      const int64_t of_adapter = next[adapter];
      if (of_adapter > 0) groups.push_back({adapter, total, of_adapter});
      next[adapter] = total;
      total += of_adapter;
    }
    rows.resize(static_cast<size_t>(total));
    for (int64_t i = 0; i < count; ++i) {
      if (ids[i] < 0) continue;
      for (int64_t row = begin(i); row < begin(i + 1); ++row) rows[next[ids[i]]++] = row;
    }
  }

  // The first of them.
  static std::vector<int64_t> integers(const Tensor& tensor, int64_t count, const char* op, const char* argument) {
    check_device(tensor, Device::cpu(), op, argument);
    const Tensor packed = torch::stable::contiguous(tensor);
    switch (packed.scalar_type()) {
      case ScalarType::Long: {
        const auto* from = static_cast<const int64_t*>(packed.const_data_ptr());
        return {from, from + count};
      }
      case ScalarType::Int: {
        const auto* from = static_cast<const int32_t*>(packed.const_data_ptr());
        return {from, from + count};
      }
      default:
        fail(op, argument, "be int32 or int64", "another dtype");
    }
  }
};

// One of several results of the same x: y in place, and who may be added to it.
struct Slice {
  Matrix y;
  int64_t N;
  std::vector<Adapter> adapters;  // those of groups, in their order
};

// y += (scale drop(x) a^T) b^T for all groups and slices. s: where drop(x) a^T goes, [slices, M, ld_s] in the
// accumulation type, a group's rows packed to its rank; null where nobody wants it. skip_zeros: rows to which 0 would
// be added are left as they are.
template <class Acc>
void forward(const std::vector<Slice>& slices, const Matrix& x, Dtype dtype, int64_t M, int64_t K, const Groups& groups,
             Acc* s, int64_t ld_s, bool skip_zeros) {
  const MultiLoraKernels& kernels = multi_lora_kernels_for(dtype);
  const int64_t wanted = divide_up(static_cast<int64_t>(groups.rows.size()), kTasksWanted);
  const int64_t step = std::clamp(round_up(wanted, kTaskRowsMin), kTaskRowsMin, kTaskRowsMax);
  std::vector<Task> tasks;
  int64_t largest_panel = 0, largest_s = 0;
  for (size_t g = 0; g < groups.groups.size(); ++g) {
    const Groups::Group& group = groups.groups[g];
    for (int64_t first = 0; first < group.count; first += step) {
      for (size_t slice = 0; slice < slices.size(); ++slice) {
        const Adapter& adapter = slices[slice].adapters[g];
        const Task task{slice, group.begin, first, std::min(step, group.count - first), &adapter};
        if (adapter.R == 0 || adapter.N == 0) continue;
        tasks.push_back(task);
        largest_panel = std::max(largest_panel, round_up(adapter.R, kPanelRanks) * kPanelElements);
        largest_s = std::max(largest_s, task.count * adapter.R);
      }
    }
  }
  if (tasks.empty()) return;
  Parts(tasks).run([&](const auto& each) {
    const Scratch memory(largest_panel + largest_s, 1, int64_t{sizeof(Acc)});
    Acc* panel = static_cast<Acc*>(memory.at(0));
    Acc* scaled = static_cast<Acc*>(memory.at(largest_panel));
    each([&](const Task& task) {
      const Adapter& adapter = *task.adapter;
      const Matrix& y = slices[task.slice].y;
      const int64_t* rows = groups.rows.data() + task.group_begin + task.first;
      const int64_t R = adapter.R, N = adapter.N;
      Acc* own = scaled;
      if (s != nullptr) own = s + (static_cast<int64_t>(task.slice) * M + task.group_begin) * ld_s + task.first * R;
      kernels.shrink[static_cast<int>(adapter.dtype_a)](x.tensor.const_data_ptr(), x.ld, rows, task.count, K, R,
                                                        adapter.a, adapter.ld_a, adapter.dropout, task.first,
                                                        adapter.dropout_scale, own);
      const Acc scale = static_cast<Acc>(adapter.scale);
      for (int64_t j = 0; j < task.count * R; ++j) scaled[j] = own[j] * scale;
      int64_t count = task.count, some[kTaskRowsMax];
      if (skip_zeros) {
        count = drop_zeros(rows, scaled, task.count, R, some);
        rows = some;
      }
      if (count == 0) return;
      kernels.expand[static_cast<int>(adapter.dtype_b)](y.tensor.mutable_data_ptr(), y.ld, rows, count, N, R, scaled,
                                                        adapter.b, adapter.ld_b, panel);
    });
  });
}

void forward(const std::vector<Slice>& slices, const Tensor& x, const Groups& groups, const Tensor* s, const char* op,
             bool skip_zeros = false) {
  const Dtype dtype = dtype_of(x, op, "x");
  const int64_t M = rows_of(x), K = x.size(x.dim() - 1);
  for (const Slice& slice : slices) {
    for (const Adapter& adapter : slice.adapters) adapter.check(dtype, K, slice.N, op);
  }
  if (groups.rows.empty() || K == 0) return;
  const Matrix matrix(x);
  void* kept = s != nullptr ? s->mutable_data_ptr() : nullptr;
  const int64_t ld_s = s != nullptr ? s->size(2) : 0;
  if (dtype == Dtype::kFloat64) {
    forward(slices, matrix, dtype, M, K, groups, static_cast<double*>(kept), ld_s, skip_zeros);
  } else {
    forward(slices, matrix, dtype, M, K, groups, static_cast<float*>(kept), ld_s, skip_zeros);
  }
}

void multi_lora_in_place(const Tensors& y, const Tensor& x, const Tensors& tables, const Tensor& index,
                         const std::optional<Tensor>& segments) {
  const char* op = "multi_lora_";
  check_xy(y, x, Device::cpu(), op);
  const int64_t count = check_tables(tables, y.size(), op);
  const Groups groups(index, segments, rows_of(x), count, op);
  if (groups.rows.empty()) return;
  std::vector<Slice> slices;
  slices.reserve(y.size());
  for (size_t i = 0; i < y.size(); ++i) {
    Slice& slice = slices.emplace_back(Slice{Matrix(y[i]), y[i].size(y[i].dim() - 1), {}});
    const auto* rows = static_cast<const int64_t*>(tables[i].const_data_ptr());
    for (const Groups::Group& group : groups.groups) slice.adapters.emplace_back(rows + group.adapter * kFields, op);
  }
  forward(slices, x, groups, nullptr, op);
  for (size_t i = 0; i < y.size(); ++i) {
    if (slices[i].y.tensor.const_data_ptr() == y[i].const_data_ptr()) continue;
    Tensor out = y[i];
    torch::stable::copy_(out, slices[i].y.tensor);  // y has no form of a matrix
  }
}

void multi_lora_stacked(const Tensor& y, const Tensor& x, const Tensors& a, const Tensors& b, double scale,
                        const Tensor& index) {
  const char* op = "multi_lora_stacked_";
  const int64_t slots = check_stacks(y, x, a, b, index, Device::cpu(), op), M = x.size(0);
  const Groups groups(index, M, slots, op);
  if (groups.rows.empty()) return;
  const Matrix whole(y);
  const View columns(whole.tensor.const_data_ptr(), M, y.size(1), whole.ld, dtype_of(y, op, "y"));
  std::vector<Slice> slices;
  slices.reserve(a.size());
  int64_t column = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const int64_t N = b[i].size(b[i].dim() - 2);
    Slice& slice = slices.emplace_back(Slice{Matrix(columns.some_columns(column, N).tensor()), N, {}});
    for (const Groups::Group& group : groups.groups) {
      slice.adapters.emplace_back(stacked_entry(a[i], b[i], group.adapter, scale, op));
    }
    column += N;
  }
  forward(slices, x, groups, nullptr, op, true);
  if (whole.tensor.const_data_ptr() == y.const_data_ptr()) return;
  Tensor out = y;
  torch::stable::copy_(out, whole.tensor);  // y has no form of a matrix
}

std::tuple<Tensors, Tensor> multi_lora_forward(const Tensors& y, const Tensor& x, const OptionalTensors& a,
                                               const OptionalTensors& b, const std::vector<double>& scales,
                                               const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
                                               const Tensor& index, const std::optional<Tensor>& segments) {
  const char* op = "multi_lora";
  check_xy(y, x, Device::cpu(), op);
  const AdapterTensors table(a, b, scales, dropout_ps, seeds, y.size(), op);
  const int64_t M = rows_of(x);
  const Groups groups(index, segments, M, table.count, op);
  int64_t ld_s = 0;
  for (const std::optional<Tensor>& one : a)
    ld_s = std::max(ld_s, one.has_value() && one->dim() > 0 ? one->size(0) : 0);
  const bool wide = dtype_of(x, op, "x") == Dtype::kFloat64;
  Tensor s = empty({table.slices, M, ld_s}, wide ? ScalarType::Double : ScalarType::Float, Device::cpu());
  torch::stable::zero_(s);  // what no group fills, too, so that a call's results are a function of its arguments
  Tensors out;
  std::vector<Slice> slices;
  for (int64_t i = 0; i < table.slices; ++i) {
    const int64_t N = y[i].size(y[i].dim() - 1);
    Tensor& copy = out.emplace_back(empty_rows(y[i], N, Device::cpu()));
    torch::stable::copy_(copy, y[i]);
    Slice& slice = slices.emplace_back(Slice{Matrix(copy), N, {}});
    for (const Groups::Group& group : groups.groups) {
      slice.adapters.push_back(adapter_of(table, i * table.count + group.adapter, x, op));
    }
  }
  forward(slices, x, groups, &s, op);
  return {out, s};
}

// A group's rows of a matrix: the matrix's own where they lie beside each other, else a copy.
Tensor rows_of_group(const Matrix& matrix, const Groups& groups, const Groups::Group& group, int64_t columns,
                     Dtype dtype, bool copy) {
  const int64_t size = size_of(dtype);
  const char* from = static_cast<const char*>(matrix.tensor.const_data_ptr());
  const int64_t* rows = groups.rows.data() + group.begin;
  if (groups.contiguous(group)) {
    return View(from + rows[0] * matrix.ld * size, group.count, columns, matrix.ld, dtype).tensor();
  }
  Tensor out = empty({group.count, columns}, scalar_type(dtype), Device::cpu());
  char* to = static_cast<char*>(out.mutable_data_ptr());
  for (int64_t i = 0; copy && i < group.count; ++i) {
    std::memcpy(to + i * columns * size, from + rows[i] * matrix.ld * size, static_cast<size_t>(columns * size));
  }
  return out;
}

std::tuple<Tensor, Tensors> multi_lora_backward(const Tensors& grad_y, const Tensor& x, const OptionalTensors& a,
                                                const OptionalTensors& b, const std::vector<double>& scales,
                                                const std::vector<double>& dropout_ps, const OptionalTensors& seeds,
                                                const Tensor& index, const std::optional<Tensor>& segments,
                                                const Tensor& s, const std::vector<int64_t>& needs) {
  const char* op = "multi_lora_backward";
  check_xy(grad_y, x, Device::cpu(), op);
  const AdapterTensors table(a, b, scales, dropout_ps, seeds, grad_y.size(), op);
  PF_CHECK(needs.size() == a.size(), op, "needs", "be a list of a's length", needs.size());
  const int64_t M = rows_of(x), K = x.size(x.dim() - 1);
  const Dtype dtype = dtype_of(x, op, "x");
  const Dtype accumulator = dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const Groups groups(index, segments, M, table.count, op);
  bool need_x = false;
  for (const int64_t bits : needs) need_x = need_x || bits & kNeedX;
  PF_CHECK(s.is_cpu() && s.scalar_type() == scalar_type(accumulator) && s.is_contiguous(), op, "s",
           "be contiguous in the accumulation type on the CPU", "another");
  PF_CHECK(s.dim() == 3 && s.size(0) == table.slices && s.size(1) == M, op, "s", "have shape [slices, M, rank]",
           shape_of(s));

  Tensor grad_x = need_x ? empty_rows(x, K, Device::cpu()) : empty({0}, x.scalar_type(), Device::cpu());
  if (need_x) torch::stable::zero_(grad_x);
  Tensors grads(2 * a.size());
  for (size_t i = 0; i < a.size(); ++i) {
    for (const auto& [of, place, bit] : {std::tuple{&a[i], 2 * i, kNeedA}, std::tuple{&b[i], 2 * i + 1, kNeedB}}) {
      const bool needed = of->has_value() && needs[i] & bit;
      PF_CHECK(!needed || (*of)->dim() == 2, op, "a and b", "be matrices", shape_of(**of));
      grads[place] = needed ? empty({(*of)->size(0), (*of)->size(1)}, (*of)->scalar_type(), Device::cpu())
                            : empty({0}, x.scalar_type(), Device::cpu());
      torch::stable::zero_(grads[place]);
    }
  }
  if (groups.rows.empty() || K == 0) return {grad_x, grads};

  const Matrix x_rows(x);
  std::optional<Matrix> dx_rows;
  if (need_x) dx_rows.emplace(grad_x);
  std::vector<Matrix> dy_rows;
  for (const Tensor& dy : grad_y) dy_rows.emplace_back(dy);
  const int64_t size = size_of(dtype), size_s = size_of(accumulator), ld_s = s.size(2);
  for (const Groups::Group& group : groups.groups) {
    const Tensor x_group = rows_of_group(x_rows, groups, group, K, dtype, true);
    const Tensor dx_group = need_x ? rows_of_group(*dx_rows, groups, group, K, dtype, false) : grad_x;
    // what the calls refer to
    std::vector<std::optional<Lora>> loras;
    std::vector<LoraGradients> found;
    Tensors dy;
    OptionalTensors s_group;
    std::vector<int64_t> places;
    for (int64_t slice = 0; slice < table.slices; ++slice) {
      const int64_t place = slice * table.count + group.adapter, N = grad_y[slice].size(grad_y[slice].dim() - 1);
      if (!a[place].has_value() || N == 0) continue;
      dy.push_back(rows_of_group(dy_rows[slice], groups, group, N, dtype, true));
      loras.push_back(lora_of(table, place, dy.back(), "grad_y", op));
      loras.back()->check_x(x);
      loras.back()->check_grad_y(dy.back());
      PF_CHECK(loras.back()->R <= ld_s, op, "s", "have the largest rank as last dimension", ld_s);
      const char* own = static_cast<const char*>(s.const_data_ptr()) + (slice * M + group.begin) * ld_s * size_s;
      s_group.push_back(View(own, group.count, loras.back()->R, loras.back()->R, accumulator).tensor());
      found.emplace_back(*loras.back(), dy.back(), *a[place], *b[place], std::nullopt,
                         needs[place] & (kNeedA | kNeedB));
      places.push_back(place);
    }
    const std::optional<Tensor> no_vector;
    std::vector<LoraBackward> calls;
    for (size_t i = 0; i < places.size(); ++i) {
      const size_t place = static_cast<size_t>(places[i]);
      const int64_t asked = need_x ? needs[place] | kNeedX : needs[place];
      calls.push_back({*loras[i], dy[i], *a[place], *b[place], s_group[i], no_vector, asked, found[i]});
    }
    if (calls.empty()) continue;
    lora_backward(calls, x_group, need_x ? &dx_group : nullptr, false);
    for (size_t i = 0; i < places.size(); ++i) {
      if (needs[places[i]] & kNeedA) grads[2 * places[i]] = found[i].a;
      if (needs[places[i]] & kNeedB) grads[2 * places[i] + 1] = found[i].b;
    }
    if (!need_x || groups.contiguous(group)) continue;
    const char* from = static_cast<const char*>(dx_group.const_data_ptr());
    char* to = static_cast<char*>(dx_rows->tensor.mutable_data_ptr());
    for (int64_t i = 0; i < group.count; ++i) {
      std::memcpy(to + groups.rows[group.begin + i] * dx_rows->ld * size, from + i * K * size,
                  static_cast<size_t>(K * size));
    }
  }
  return {grad_x, grads};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_multi_lora_", TORCH_BOX(&pyfused::multi_lora_in_place));
  m.impl("_multi_lora_stacked_", TORCH_BOX(&pyfused::multi_lora_stacked));
  m.impl("_multi_lora_forward", TORCH_BOX(&pyfused::multi_lora_forward));
  m.impl("_multi_lora_backward", TORCH_BOX(&pyfused::multi_lora_backward));
}
