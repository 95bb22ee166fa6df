// LoRA's passes on CPU: the base product, and how the loops of kernels/lora.cpp are spread over threads.
//
// Where the base product is one of ours (lora_amx.cpp, lora_vectors.cpp), the adapter's share is in it. Else, in fp32
// and fp64 the adapter's share of y and dX is written first, and the GEMM adds the base product to it (beta = 1): so
// nothing reads what the GEMM wrote, and a bias, which addmm would write on its own, costs nothing. In 16 bits the base
// product comes first. y is then within one rounding of what other implementations have, and vendors' 16-bit GEMMs pay
// more for adding to their result than the loops do.
#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "levels.h"
#include "linear.h"
#include "linear_vectors.h"
#include "lora.h"

namespace pyfused {

const LoraKernels& lora_kernels_for(Dtype dtype, int64_t rows, int64_t columns, int64_t rank) {
#if defined(PYFUSED_HAVE_AMX)
  if (chosen_capability() == Capability::AMX) return AMX::lora_kernels(dtype, rows, columns, rank);
#endif
  PF_RETURN_AT_LEVEL(lora_kernels(dtype, rows, columns, rank))
}

namespace {

// What out has before the adapter's share is added.
enum class Base { kY, kOut, kBias };

// What the tasks of a forward need of one call.
struct ForwardPass {
  const Lora& lora;
  PackedOperand a;
  std::optional<Matrix> y;
  std::optional<Tensor> bias;
  const Tensor* weight;
  Mask mask;
  Scratch scaled;
  std::optional<LinearProduct> product;  // ours, the update in it: more columns of x and rows of the weight
  PackedOperand b;
  void *s, *out;

  ForwardPass(const LoraForward& call, const Tensor& x_rows)
      : lora(call.lora),
        a(PackedOperand::of_a(lora, SumOver::kColumns, call.a)),
        weight(call.weight),
        mask(call.dropout()),
        scaled(lora.M, lora.R, lora.accumulator_size()),
        product(base_product(call, x_rows)),
        b(product.has_value() ? PackedOperand::rows_of_b(lora, call.b)
                              : PackedOperand::of_b(lora, SumOver::kRanks, call.b)),
        s(call.s.mutable_data_ptr()),
        out(call.out.mutable_data_ptr()) {
    if (call.y != nullptr) y.emplace(*call.y);
    if (product.has_value()) product->update = b.update_by(scaled, lora.R);
  }

  void shrink(const Matrix& x, int64_t row_begin, int64_t row_end) const {
    // the kept elements' factor is the same for all: it is cheaper on M x R than on M x K
    lora.kernels.shrink(x.tensor.const_data_ptr(), x.ld, row_begin, row_end, lora.K, lora.R, a.data, mask,
                        lora.dropout_scale, s);
    lora.scale_rows(s, scaled.at(0), row_begin, row_end, 1.0);
  }

  void expand(Base base, int64_t row_begin, int64_t row_end) const {
    const void* from = base == Base::kY ? y->tensor.const_data_ptr() : base == Base::kOut ? out : nullptr;
    const int64_t ld = base == Base::kY ? y->ld : lora.N;
    const void* bias_row = base == Base::kBias && bias.has_value() ? bias->const_data_ptr() : nullptr;
    lora.kernels.expand(from, ld, bias_row, out, lora.N, row_begin, row_end, lora.N, lora.R, scaled.at(0), b.data);
  }

  // What addmm does with a bias before it adds the product, here while other threads are awake.
  void write_bias(int64_t row_begin, int64_t row_end) const {
    const size_t bytes = static_cast<size_t>(lora.N * lora.element_size());
    for (int64_t m = row_begin; m < row_end; ++m) {
      std::memcpy(static_cast<char*>(out) + static_cast<size_t>(m) * bytes, bias->const_data_ptr(), bytes);
    }
  }

 private:
  std::optional<LinearProduct> base_product(const LoraForward& call, const Tensor& x_rows) {
    if (call.bias != nullptr) bias = torch::stable::contiguous(*call.bias);
    if (weight == nullptr) return std::nullopt;
    const Tensor y_rows = as_matrix(call.out, lora.M, lora.N);
    return linear_product(y_rows, x_rows, transposed(*weight), or_null(bias), ProductFor::kForward);
  }
};

// What the tasks of a backward need of one call, and the parts of sums over rows that they leave.
struct BackwardPass {
  const Lora& lora;
  const LoraBackward& call;
  bool need_x, need_a, need_b, need_scale, need_bias, need_u;
  Matrix dy;
  PackedOperand a, b;
  Scratch u, ds, da, dbt, dbias;

  BackwardPass(const LoraBackward& call, bool grad_x, const RowRanges& ranges)
      : lora(call.lora),
        call(call),
        need_x((grad_x || call.share != nullptr) && (call.needs & kNeedX)),
        need_a(call.needs & kNeedA),
        need_b(call.needs & kNeedB),
        need_scale((call.needs & kNeedScale) && call.scale_vector.has_value()),
        need_bias(call.needs & kNeedBias),
        need_u(need_x || need_a || need_scale),
        dy(call.grad_y),
        a(PackedOperand::of_a(lora, SumOver::kRanks, call.a, need_x && call.share == nullptr)),
        b(PackedOperand::of_b(lora, SumOver::kColumns, call.b, need_u)),
        u(need_u ? lora.M : 0, lora.R, lora.accumulator_size()),
        ds((need_x || need_a) && call.share == nullptr ? lora.M : 0, lora.R, lora.accumulator_size()),
        da(need_a ? ranges.count : 0, lora.R * lora.ld_a(), lora.accumulator_size()),
        dbt(need_b ? ranges.count : 0, lora.R * lora.ld_b(), lora.accumulator_size()),
        dbias(need_bias ? ranges.count : 0, lora.ld_b(), lora.accumulator_size()) {}

  void run(const std::optional<Matrix>& x, void* dx, bool add_to_dx, int64_t task, int64_t row_begin,
           int64_t row_end) const {
    const int64_t R = lora.R;
    lora.kernels.backward_dy(dy.tensor.const_data_ptr(), dy.ld, row_begin, row_end, lora.N, R, b.data,
                             need_b ? call.s->const_data_ptr() : nullptr, need_u ? u.at(0) : nullptr,
                             need_b ? dbt.at(task * R * lora.ld_b()) : nullptr, lora.ld_b(),
                             need_bias ? dbias.at(task * lora.ld_b()) : nullptr);
    if (!need_x && !need_a) return;
    // u = dy b, then ds = u * scale with the kept elements' factor for both of its uses
    const Scratch& ds_rows = call.share != nullptr ? call.share->ds : ds;
    lora.scale_rows(u.at(0), ds_rows.at(0), row_begin, row_end, lora.dropout_scale);
    void* sums = need_a ? da.at(task * R * lora.ld_a()) : nullptr;
    const void* x_rows = need_a ? x->tensor.const_data_ptr() : nullptr;
    const int64_t ld_x = need_a ? x->ld : 0;
    if (call.share == nullptr) {
      return lora.kernels.backward_x(x_rows, ld_x, need_x ? dx : nullptr, lora.K, add_to_dx, row_begin, row_end, lora.K,
                                     R, a.data, ds.at(0), lora.mask, sums, lora.ld_a());
    }
    call.share->take_rows(row_begin, row_end);
    const Mask& mask = call.share->mask;
    if (sums == nullptr && (lora.threshold == 0 || mask.made)) return;
    lora.kernels.sum_x(x_rows, ld_x, row_begin, row_end, lora.K, R, a.data.source, ds_rows.at(0), mask, sums,
                       lora.ld_a());
  }

  // sum_m s[m][r] u[m][r] per rank, times the factor that is not part of the vector.
  void finish_scale() const {
    std::vector<double> sums(static_cast<size_t>(lora.R), 0.0);
    lora.with_accumulator([&](auto zero) {
      const auto* left = static_cast<const decltype(zero)*>(call.s->const_data_ptr());
      const auto* right = static_cast<const decltype(zero)*>(u.at(0));
      for (int64_t m = 0; m < lora.M; ++m) {
        for (int64_t r = 0; r < lora.R; ++r) {
          sums[r] += static_cast<double>(left[m * lora.R + r]) * right[m * lora.R + r];
        }
      }
    });
    for (double& value : sums) value *= lora.factor;
    Tensor& out = call.gradients.scale;
    lora_kernels_for(Dtype::kFloat64, 1, 1, 1)
        .unpack[static_cast<int>(dtype_of(out, lora.op, "scale_vector"))](sums.data(), 1, lora.R, lora.R, 1, 0, lora.R,
                                                                          nullptr, out.mutable_data_ptr(), lora.R, 1);
  }
};

// A gradient out of its parts, a range of columns in each task.
struct Finish {
  const Lora& lora;
  const Scratch& parts;
  int64_t part_count, rows, columns;
  bool transposed;  // out is [columns, rows]
  std::vector<double> scale;
  LoraUnpack unpack;
  void* out;

  Finish(const Lora& lora, const Scratch& parts, int64_t part_count, int64_t rows, int64_t columns, bool transposed,
         std::vector<double> scale, Tensor& out, const char* argument)
      : lora(lora),
        parts(parts),
        part_count(part_count),
        rows(rows),
        columns(columns),
        transposed(transposed),
        scale(std::move(scale)),
        unpack(lora.kernels.unpack[static_cast<int>(dtype_of(out, lora.op, argument))]),
        out(out.mutable_data_ptr()) {}

  int64_t tasks() const { return divide_up(columns, kFinishColumns); }
  int64_t work() const { return part_count * rows * columns; }
  void run(int64_t task) const {
    const int64_t ld = round_up(columns, kPackedColumns);
    unpack(parts.at(0), part_count, rows * ld, ld, rows, task * kFinishColumns,
           std::min((task + 1) * kFinishColumns, columns), scale.empty() ? nullptr : scale.data(), out,
           transposed ? 1 : columns, transposed ? rows : 1);
  }
};

}  // namespace

void lora_forward(std::span<const LoraForward> calls, const Tensor& x) {
  if (calls[0].lora.M <= kDecodeRows) return lora_decode(calls, x);
  const Tensor x_rows = as_matrix(x, calls[0].lora.M, calls[0].lora.K);
#if defined(PYFUSED_HAVE_AMX)
  std::vector<LoraForward> in_tiles, others;
  for (const LoraForward& call : calls) (served_by_tiles(call, x_rows) ? in_tiles : others).push_back(call);
  if (!in_tiles.empty()) lora_forward_in_tiles(in_tiles, x);
  if (others.empty()) return;
  calls = others;
#endif
  const Matrix rows(x);
  std::vector<ForwardPass> passes;
  passes.reserve(calls.size());
  int64_t shrink_work = 0, expand_work = 0;
  for (const LoraForward& call : calls) {
    passes.emplace_back(call, x_rows);
    const Lora& lora = call.lora;
    shrink_work += lora.M * lora.K * lora.R;
    expand_work += lora.M * lora.N * lora.R;
  }
  const Lora& first = calls[0].lora;
  const bool base_first = first.base_first();
  const RowRanges ranges = RowRanges::independent(first.M);
  parallel(ranges.count, shrink_work + (base_first ? 0 : expand_work), [&](int64_t task) {
    const int64_t begin = ranges.begin(task), end = ranges.end(task);
    for (const ForwardPass& pass : passes) {
      pass.shrink(rows, begin, end);
      if (pass.product.has_value()) continue;
      if (pass.weight == nullptr) {
        pass.expand(Base::kY, begin, end);
      } else if (!base_first) {
        pass.expand(Base::kBias, begin, end);
      } else if (pass.bias.has_value() && first.M > kFewRows) {
        pass.write_bias(begin, end);
      }
    }
  });
  bool expand = false;
  for (size_t i = 0; i < calls.size(); ++i) {
    const LoraForward& call = calls[i];
    if (call.weight == nullptr) continue;
    if (passes[i].product.has_value()) {
      multiply(*passes[i].product);
      continue;
    }
    const Tensor out = as_matrix(call.out, first.M, call.lora.N);
    if (base_first && (call.bias == nullptr || first.M <= kFewRows)) {
      linear_out(out, x_rows, *call.weight, call.bias);
    } else {
      matmul_add(out, x_rows, transposed(*call.weight));
    }
    expand = base_first;
  }
  if (!expand) return;
  parallel(ranges.count, expand_work, [&](int64_t task) {
    for (const ForwardPass& pass : passes) {
      if (pass.weight != nullptr) pass.expand(Base::kOut, ranges.begin(task), ranges.end(task));
    }
  });
}

void lora_backward(std::span<const LoraBackward> calls, const std::optional<Tensor>& x, const Tensor* grad_x,
                   bool add) {
  for (size_t first = 0, last; first < calls.size(); first = last) {
    // The cut depends on the rank, and the order of sums on the cut: neighbours of one cut go together.
    const int64_t M = calls[first].lora.M;
    const RowRanges ranges = RowRanges::summed(M, calls[first].lora.R);
    bool need_a = false;
    int64_t work = 0;
    std::vector<BackwardPass> passes;
    passes.reserve(calls.size());
    for (last = first; last < calls.size() && RowRanges::summed(M, calls[last].lora.R) == ranges; ++last) {
      const BackwardPass& pass = passes.emplace_back(calls[last], grad_x != nullptr, ranges);
      need_a = need_a || pass.need_a;
      work += M * (pass.lora.K + pass.lora.N) * pass.lora.R;
    }
    const std::optional<Matrix> rows = need_a ? std::optional<Matrix>(*x) : std::nullopt;
    void* dx = grad_x != nullptr ? grad_x->mutable_data_ptr() : nullptr;
    parallel(ranges.count, work, [&](int64_t task) {
      bool add_to_dx = add;
      for (const BackwardPass& pass : passes) {  // all on the same rows of x and dX while they are in the cache
        pass.run(rows, dx, add_to_dx, task, ranges.begin(task), ranges.end(task));
        add_to_dx = add_to_dx || pass.need_x;
      }
    });

    std::vector<Finish> sums;
    for (const BackwardPass& pass : passes) {
      const Lora& lora = pass.lora;
      LoraGradients& gradients = pass.call.gradients;
      if (pass.need_a)
        sums.emplace_back(lora, pass.da, ranges.count, lora.R, lora.K, false, std::vector<double>{}, gradients.a, "a");
      if (pass.need_b)
        sums.emplace_back(lora, pass.dbt, ranges.count, lora.R, lora.N, true, lora.factors(), gradients.b, "b");
      if (pass.need_bias)
        sums.emplace_back(lora, pass.dbias, ranges.count, 1, lora.N, false, std::vector<double>{}, gradients.bias,
                          "bias");
      if (pass.need_scale) pass.finish_scale();
      add = add || pass.need_x;
    }
    int64_t tasks = 0;
    work = 0;
    for (const Finish& sum : sums) {
      tasks += sum.tasks();
      work += sum.work();
    }
    parallel(tasks, work, [&](int64_t task) {
      const Finish* sum = sums.data();
      for (; task >= sum->tasks(); ++sum) task -= sum->tasks();
      sum->run(task);
    });
  }
}

bool lora_backward_in_products(std::span<LoraBackward> calls, const std::optional<Tensor>& x, const Tensor& grad_x) {
#if defined(PYFUSED_HAVE_AMX)
  if (lora_backward_in_panels(calls, x, grad_x)) return true;
#endif
  return lora_backward_in_vectors(calls, x, grad_x);
}

}  // namespace pyfused
