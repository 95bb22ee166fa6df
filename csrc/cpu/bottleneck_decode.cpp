// The bottleneck's forward for a few rows, as in decoding. The weights are read as they are: the vendor's GEMM would
// pack them, at a price that a product of a few rows does not earn back. One task multiplies by a part of a weight, so
// that each of several threads reads a part alone.
#include "bottleneck.h"

namespace pyfused {
namespace {

// Columns of w_down, at most, and of the result, at least, that one task goes through. Of w_down more for one and two
// rows: their sums are longer before they are added up.
constexpr int64_t kDownColumns = 256;
constexpr int64_t kUpColumns = 64;
// Columns of the result in one go.
constexpr int64_t kBlockColumns = philox::kBlockColumns;

// What a product of a few rows is to parallel(): reading the weight takes as long as multiplying two rows by it.
int64_t work_of(const Bottleneck& call) { return std::max<int64_t>(call.M, 2) * call.D * call.H; }

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

// Sums [M, H] in parts, one for each range of w_down's columns.
struct Parts {
  int64_t count, rows, ld;
  Scratch sums;
};

Parts multiply_down(const Bottleneck& call, const View& x, const WeightRows& weight) {
  const int64_t most = kDownColumns * (call.M == 1 ? 4 : call.M == 2 ? 2 : 1);
  const int64_t step = round_up(divide_up(call.D, 2 * divide_up(call.D, 2 * most)), 16);
  const int64_t count = divide_up(call.D, step), rows = round_up(call.M, 4), ld = round_up(call.H, 8);
  Parts parts{count, rows, ld, Scratch(count * rows, ld, call.accumulator)};
  parallel(count, work_of(call), [&](int64_t task) {
    const int64_t begin = task * step, columns = std::min(step, call.D - begin);
    // each task packs x for itself: what one thread has written, another core fetches at a higher price
    alignas(64) float packed[kMaxFewRows * kDownColumns];  // or a quarter of the rows in fp64
    call.kernels.pack_few_rows(static_cast<const char*>(x.data) + begin * size_of(x.dtype), x.row_stride, call.M,
                               columns, packed);
    call.kernels.few_rows[weight.type](packed, call.M, columns, weight.data + begin * weight.element, weight.ld, 0,
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
  const Scratch packed(round_up(M, 4), round_up(call.H, 16), call.accumulator);
  call.products.pack_few_rows(h.data, h.row_stride, M, call.H, packed.at(0));
  const int64_t least = call.threshold != 0 ? kBlockColumns : kUpColumns;
  const int64_t step = std::max(round_up(divide_up(D, kMaxRanges), least), least);
  parallel(divide_up(D, step), work_of(call), [&](int64_t task) {
    alignas(64) float sums[kMaxFewRows * kBlockColumns], scale[2 * kBlockColumns], bias[2 * kBlockColumns];  // or fp64
    for (int64_t begin = task * step, last = std::min(begin + step, D); begin < last; begin += kBlockColumns) {
      const int64_t end = std::min(begin + kBlockColumns, last);
      call.fill_channels(scale, bias, b_up, begin, end - begin);
      call.kernels.few_rows[weight.type](packed.at(0), M, weight.K, weight.data, weight.ld, begin, end, sums,
                                         kBlockColumns);
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
  return call.M <= (call.accumulator == Dtype::kFloat64 ? kMaxFewDoubleRows : kMaxFewRows);
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
