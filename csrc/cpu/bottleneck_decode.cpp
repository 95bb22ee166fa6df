// The bottleneck's forward for a few rows, as in decoding. The weights are read as they are: the vendor's GEMM would
// pack them, at a price that a product of a few rows does not earn back. One task multiplies by a part of a weight, so
// that each of several threads reads a part alone.
#include "bottleneck.h"

namespace pyfused {
namespace {

// From so many rows on, fp32 sums are made of quads (kernels/bottleneck_products.h). Long dot products of fewer rows
// are cheaper than quads, most of whose lanes have no row; a dot product of H terms is not.
constexpr int64_t kDownQuadRows = 4;
constexpr int64_t kUpQuadRows = 2;
// Columns of w_down, at most, and of the result, at least, that one task goes through.
constexpr int64_t kDownColumns = 256;
constexpr int64_t kUpColumns = 64;
// Columns of the result in one go.
constexpr int64_t kBlockColumns = philox::kBlockColumns;

bool in_quads(const Bottleneck& call, int64_t least_rows) {
  return call.accumulator == Dtype::kFloat32 && call.M >= least_rows;
}

// What a product of a few rows is to parallel(): reading the weight takes as long as multiplying two rows by it.
int64_t work_of(const Bottleneck& call) { return std::max<int64_t>(call.M, 2) * call.D * call.H; }

// Rows in the accumulation type, zero behind the last column: as they are where they are so already.
struct WideRows {
  std::optional<Scratch> packed;
  const void* data;
  int64_t ld;

  WideRows(const Bottleneck& call, const BottleneckKernels& kernels, const View& rows)
      : data(rows.data), ld(rows.row_stride) {
    if (rows.dtype == call.accumulator && rows.columns % kPackedColumns == 0) return;
    ld = round_up(rows.columns, kPackedColumns);
    packed.emplace(rows.rows, ld, call.accumulator);
    data = packed->at(0);
    kernels.pack[static_cast<int>(rows.dtype)](rows.data, rows.row_stride, 1, rows.rows, rows.columns, packed->at(0),
                                               ld);
  }
};

// A weight with rows of unit stride.
struct WeightRows {
  Tensor tensor;
  const char* data;
  int64_t N, K, ld, element;
  int type;

  WeightRows(const Bottleneck& call, const Tensor& weight)
      : tensor(weight.stride(1) == 1 ? weight : torch::stable::contiguous(weight)),
        data(static_cast<const char*>(tensor.const_data_ptr())),
        N(weight.size(0)),
        K(weight.size(1)),
        ld(tensor.stride(0)) {
    const Dtype dtype = dtype_of(weight, call.op, "weight");
    type = static_cast<int>(dtype);
    element = size_of(dtype);
  }
};

// Sums [M, H] in parts: W_down x by ranges of columns, or for dot products, which are cheapest when long, whole.
struct Parts {
  int64_t count, rows, ld;
  Scratch sums;
};

Parts multiply_down(const Bottleneck& call, const View& x, const WeightRows& weight) {
  if (!in_quads(call, kDownQuadRows)) {
    Parts whole{1, call.M, call.H, Scratch(call.M, call.H, call.accumulator)};
    // each task widens x for itself: what one thread has written, another core fetches at a higher price
    const int64_t step = std::min<int64_t>(round_up(divide_up(call.H, 4), 4), 32);
    parallel(divide_up(call.H, step), work_of(call), [&](int64_t task) {
      const WideRows wide(call, call.kernels, x);
      const int64_t begin = task * step, end = std::min(begin + step, call.H);
      call.kernels.few_rows[weight.type](wide.data, wide.ld, call.M, weight.K, weight.data, weight.ld, begin, end,
                                         whole.sums.at(begin), whole.ld);
    });
    return whole;
  }
  const int64_t step = round_up(divide_up(call.D, 2 * divide_up(call.D, 2 * kDownColumns)), 16);
  const int64_t count = divide_up(call.D, step), rows = round_up(call.M, 4), ld = round_up(call.H, 8);
  Parts parts{count, rows, ld, Scratch(count * rows, ld, call.accumulator)};
  parallel(count, work_of(call), [&](int64_t task) {
    const int64_t begin = task * step, columns = std::min(step, call.D - begin);
    alignas(64) float quads[kMaxFewRows * kDownColumns];
    call.kernels.pack_quads(static_cast<const char*>(x.data) + begin * size_of(x.dtype), x.row_stride, call.M, columns,
                            quads);
    call.kernels.quad_rows[weight.type](quads, call.M, columns, weight.data + begin * weight.element, weight.ld, 0,
                                        call.H, parts.sums.at(task * rows * ld), ld);
  });
  return parts;
}

// z, before the activation.
void add_down(const Bottleneck& call, const Parts& parts, const std::optional<Tensor>& b_down, const View& z) {
  const bool rounds = call.product != call.accumulator;
  const Scratch wide(rounds ? call.M : 0, call.H, call.accumulator);
  void* sums = rounds ? wide.at(0) : z.data;
  call.with_accumulator([&](auto zero) {
    using Acc = decltype(zero);
    for (int64_t m = 0; m < call.M; ++m) {
      Acc* row = static_cast<Acc*>(sums) + m * call.H;
      call.fill(row, b_down, 0, call.H);
      for (int64_t part = 0; part < parts.count; ++part) {
        const Acc* added = static_cast<const Acc*>(parts.sums.at((part * parts.rows + m) * parts.ld));
        for (int64_t j = 0; j < call.H; ++j) row[j] += added[j];
      }
    }
  });
  if (!rounds) return;
  call.kernels.unpack[static_cast<int>(call.product)](sums, 1, call.M * call.H, call.H, call.M, 0, call.H, nullptr,
                                                      z.data, call.H, 1);
}

void multiply_up(const Bottleneck& call, const View& h, const Matrix* residual, const WeightRows& weight,
                 const std::optional<Tensor>& b_up, const View& y) {
  const int64_t M = call.M, D = call.D, in = size_of(call.dtype);
  std::optional<WideRows> rows;
  std::optional<Scratch> quads;
  if (in_quads(call, kUpQuadRows)) {
    quads.emplace(round_up(M, 4), round_up(call.H, 16), Dtype::kFloat32);
    call.products.pack_quads(h.data, h.row_stride, M, call.H, quads->at(0));
  } else {
    rows.emplace(call, call.products, h);
  }
  const int64_t least = call.threshold != 0 ? kBlockColumns : kUpColumns;
  const int64_t step = std::max(round_up(divide_up(D, kMaxRanges), least), least);
  parallel(divide_up(D, step), work_of(call), [&](int64_t task) {
    alignas(64) float sums[kMaxFewRows * kBlockColumns], scale[2 * kBlockColumns], bias[2 * kBlockColumns];  // or fp64
    for (int64_t begin = task * step, last = std::min(begin + step, D); begin < last; begin += kBlockColumns) {
      const int64_t end = std::min(begin + kBlockColumns, last);
      call.fill_channels(scale, bias, b_up, begin, end - begin);
      if (quads.has_value()) {
        call.kernels.quad_rows[weight.type](quads->at(0), M, weight.K, weight.data, weight.ld, begin, end, sums,
                                            kBlockColumns);
      } else {
        call.kernels.few_rows[weight.type](rows->data, rows->ld, M, weight.K, weight.data, weight.ld, begin, end, sums,
                                           kBlockColumns);
      }
      call.kernels.finish_wide(
          sums, kBlockColumns,
          residual ? static_cast<const char*>(residual->tensor.const_data_ptr()) + begin * in : nullptr,
          residual ? residual->ld : 0, static_cast<char*>(y.data) + begin * in, D, 0, begin, M, end - begin, scale,
          bias, call.dropout);
    }
  });
}

}  // namespace

bool bottleneck_has_few_rows(const Bottleneck& call) {
  return call.M <= (call.accumulator == Dtype::kFloat64 ? 4 : kMaxFewRows);
}

void bottleneck_forward_of_few_rows(const Bottleneck& call, const Matrix& x, const Matrix* residual,
                                    const Tensor& w_down, const std::optional<Tensor>& b_down, const Tensor& w_up,
                                    const std::optional<Tensor>& b_up, const Tensor& y, const Tensor& z) {
  const View all_z(z.const_data_ptr(), call.M, call.H, call.H, call.product);
  add_down(call, multiply_down(call, call.rows_of(x), WeightRows(call, w_down)), b_down, all_z);
  const Scratch h_memory(call.M, call.H, call.product);
  const View h(h_memory.at(0), call.M, call.H, call.H, call.product);
  call.products.activate(all_z.data, call.M, call.H, call.activation, h.data);
  multiply_up(call, h, residual, WeightRows(call, w_up), b_up,
              View(y.const_data_ptr(), call.M, call.D, call.D, call.dtype));
}

}  // namespace pyfused
