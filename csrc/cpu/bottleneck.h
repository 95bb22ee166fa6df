// A bottleneck call on CPU: its arguments checked, its small operands in the types that the passes want, and how its
// rows are cut. Work is cut by shape alone, never by the number of threads.
#pragma once

#include <cstring>
#include <numeric>
#include <optional>
#include <vector>

#include "../common/bottleneck.h"
#include "kernels/bottleneck.h"
#include "levels.h"
#include "linear_vectors.h"
#include "matrix.h"

namespace pyfused {

inline const BottleneckKernels& bottleneck_kernels_for(Dtype dtype) { PF_RETURN_AT_LEVEL(bottleneck_kernels(dtype)) }

// Bytes of one panel of rows: it and the result fit into a second-level cache of 2 MiB. The vendor's GEMM has a price
// for each call, 15 us in 16 bit, so panels have at least so many rows.
inline constexpr int64_t kBottleneckPanelBytes = 768 << 10;
inline constexpr int64_t kMinBottleneckPanelRows = 128;
inline constexpr int64_t kMaxBottleneckPanelRows = 512;
// What a smaller matrix is cut into, so that several threads have work.
inline constexpr int64_t kSmallBottleneckPanels = 2;
// The same for products of our own, which have no such price: what a panel may have of a second-level cache of 1 MiB
// beside the weights, and rows in whole tiles of those kernels.
inline constexpr int64_t kOwnPanelBytes = 384 << 10;
inline constexpr int64_t kMinOwnPanelRows = 48;
inline constexpr int64_t kOwnPanelUnit = 6;
// A call with its small operands.
struct Bottleneck : BottleneckArguments {
  const BottleneckKernels& kernels;   // of x's type
  const BottleneckKernels& products;  // of the products' type
  Dropout dropout;
  bool own_products;  // of the rows, as far as sizes say it
  int64_t panel_rows, tasks;
  double scalar;                   // factor times a scale vector of one element
  std::optional<Tensor> channels;  // a scale vector [D]

  Bottleneck(const char* op, const Tensor& rows, const char* name, const Tensor& w_down,
             const std::optional<Tensor>& b_down, const Tensor& w_up, const std::optional<Tensor>& b_up,
             const std::optional<Tensor>& scale_vector, int64_t activation, double factor, double dropout_p,
             const std::optional<Tensor>& seed)
      : BottleneckArguments(op, Device::cpu(), rows, name, w_down, b_down, w_up, b_up, scale_vector, activation, factor,
                            dropout_p, seed),
        kernels(bottleneck_kernels_for(dtype)),
        products(bottleneck_kernels_for(product)),
        dropout{0, threshold},
        own_products(has_linear_product(product, M, ProductFor::kBottleneck, std::min(D, H))),
        scalar(factor) {
    if (threshold != 0) std::memcpy(&dropout.seed, seed->const_data_ptr(), sizeof dropout.seed);
    if (scale_vector.has_value()) {
      if (scale_vector->numel() == 1) {
        scalar *= to_doubles(*scale_vector)[0];
      } else {
        channels = scale_vector;
      }
    }
    const int64_t row_bytes = std::max<int64_t>(D * size_of(product), 1);
    const int64_t least = own_products ? kMinOwnPanelRows : kMinBottleneckPanelRows;
    const int64_t unit = own_products ? kOwnPanelUnit : 16;
    const int64_t fitting = (own_products ? kOwnPanelBytes : kBottleneckPanelBytes) / row_bytes / unit * unit;
    int64_t panels = divide_up(M, std::clamp(fitting, least, kMaxBottleneckPanelRows));
    panels = std::max(panels, std::min<int64_t>(divide_up(M, least), kSmallBottleneckPanels));
    panels += panels > 1 ? panels % 2 : 0;  // the number of threads is even nearly everywhere
    panel_rows = round_up(divide_up(M, std::max<int64_t>(panels, 1)), unit);
    task_rows_ = panel_rows * divide_up(panels, 2 * kMaxRanges);
    if (own_products) panel_rows += unit;  // the last task has up to so many more
    tasks = own_products ? std::min(panels, kMaxRanges) : divide_up(M, std::max<int64_t>(task_rows_, 1));
  }

  bool wide() const { return product != dtype; }

  // Whether a residual is written first and the vendor's product adds to it, which takes one pass over M x D less.
  // MKL's kernels without AVX-512 would set the result to zero before they do the same.
  bool adds_to_residual() const { return dtype == accumulator && chosen_capability() < Capability::AVX512; }
  // Whether it is added as a product of ours is stored.
  bool residual_in_product(const RowProducts& products) const { return dtype == accumulator && products.ours(); }

  // Whether the weights' gradients are products of ours in a type.
  bool own_gradients(Dtype type) const {
    return has_linear_product(type, H, ProductFor::kBottleneckGradient, std::min(D, M));
  }

  // Memory for dropout's mask of so many rows as bits (BottleneckKernels::make_keep_bits); none without dropout.
  int64_t keep_words() const { return round_up(D, philox::kBlockColumns) / 32; }
  Scratch keep_memory(int64_t rows) const {
    return {threshold == 0 ? 0 : rows, keep_words(), static_cast<int64_t>(sizeof(uint32_t))};
  }

  View rows_of(const Matrix& matrix) const { return {matrix.tensor.const_data_ptr(), M, D, matrix.ld, dtype}; }

  // run(task, its first row, the row behind its last) on all threads.
  template <class F>
  void for_row_tasks(const F& run) const {
    parallel(tasks, M * D * H, [&](int64_t task) { run(task, first_row(task), first_row(task + 1)); });
  }

  std::vector<double> to_doubles(const Tensor& vector) const {
    std::vector<double> values(static_cast<size_t>(vector.numel()));
    const int64_t size = vector.numel();
    bottleneck_kernels_for(Dtype::kFloat64)
        .pack[static_cast<int>(dtype_of(vector, op, "vector"))](vector.const_data_ptr(), 0, vector.stride(0), 1, size,
                                                                values.data(), size);
    return values;
  }
  void from_doubles(const std::vector<double>& values, const Tensor& out) const {
    const auto size = static_cast<int64_t>(values.size());
    bottleneck_kernels_for(Dtype::kFloat64)
        .unpack[static_cast<int>(dtype_of(out, op, "gradient"))](values.data(), 1, size, size, 1, 0, size, nullptr,
                                                                 out.mutable_data_ptr(), size, 1);
  }
  // A vector's `size` elements from `begin` on in the accumulation type; zeros where it is not given.
  void fill(void* values, const std::optional<Tensor>& source, int64_t begin, int64_t size) const {
    if (source.has_value()) {
      const Dtype from = dtype_of(*source, op, "vector");
      const int64_t stride = source->stride(0);
      kernels.pack[static_cast<int>(from)](
          static_cast<const char*>(source->const_data_ptr()) + begin * stride * size_of(from), 0, stride, 1, size,
          values, size);
    } else {
      std::memset(values, 0, static_cast<size_t>(size * size_of(accumulator)));
    }
  }
  Scratch vector(const std::optional<Tensor>& source, int64_t size) const {
    Scratch values(1, size, accumulator);
    fill(values.at(0), source, 0, size);
    return values;
  }

  // A weight for the products, any strides: as it is, or its values in their type.
  struct Weight {
    std::optional<Scratch> packed;
    View view;
  };

  // b_down [1, H] in the products' type. It belongs into the product: added to a rounded z, it would move the points at
  // which an activation like relu bends.
  Weight down_bias(const Tensor& source) const {
    const Dtype from = dtype_of(source, op, "b_down");
    if (from == product && source.stride(0) == 1) {
      return {std::nullopt, View(source.const_data_ptr(), 1, H, H, product)};
    }
    Scratch rounded(1, H, product);
    kernels.unpack[static_cast<int>(product)](vector(source, H).at(0), 1, H, H, 1, 0, H, nullptr, rounded.at(0), H, 1);
    const View view(rounded.at(0), 1, H, H, product);
    return {std::move(rounded), view};
  }

  // What finish does to channels from `begin` on: out = residual + keep * (u * scale + bias).
  void fill_channels(void* scale_, void* bias_, const std::optional<Tensor>& b_up, int64_t begin, int64_t size) const {
    fill(scale_, channels, begin, size);
    fill(bias_, b_up, begin, size);
    with_accumulator([&](auto zero) {
      using Acc = decltype(zero);
      Acc *scale = static_cast<Acc*>(scale_), *bias = static_cast<Acc*>(bias_);
      const Acc uniform = static_cast<Acc>(scalar * dropout_scale);
      for (int64_t d = 0; d < size; ++d) {
        scale[d] = channels.has_value() ? scale[d] * uniform : uniform;
        bias[d] *= scale[d];
      }
    });
  }
  struct Channels {
    Scratch scale, bias;
  };
  Channels channel_factors(const std::optional<Tensor>& b_up) const {
    Channels factors{Scratch(1, D, accumulator), Scratch(1, D, accumulator)};
    fill_channels(factors.scale.at(0), factors.bias.at(0), b_up, 0, D);
    return factors;
  }

  Weight weight(const Tensor& source) const {
    const Dtype from = dtype_of(source, op, "weight");
    return from == product ? Weight{std::nullopt, View(source, from)} : widen(source);
  }
  // w_up for the backward: its rows times the channels' scale.
  Weight scaled_rows(const Tensor& w_up) const {
    if (!channels.has_value()) return weight(w_up);
    Weight scaled = widen(w_up);
    Scratch rounded(D, H, product);
    const std::vector<double> scale = to_doubles(*channels);
    kernels.unpack[static_cast<int>(product)](scaled.view.data, 1, D * H, H, D, 0, H, scale.data(), rounded.at(0), H,
                                              1);
    const View view(rounded.at(0), D, H, H, product);
    return {std::move(rounded), view};
  }
  // What a channel is multiplied by, dropout's factor included.
  std::vector<double> channel_scale() const {
    std::vector<double> scale =
        channels.has_value() ? to_doubles(*channels) : std::vector<double>(static_cast<size_t>(D), 1.0);
    for (double& value : scale) value *= scalar * dropout_scale;
    return scale;
  }
  // Gradients of b_up and of the scale from sums over rows before the scale: sums[d] of g, what drops left of dy, and
  // dots[d] of g u, which is row d of w_up times row d of g^T h.
  void write_up_vectors(const BottleneckNeeds& needs, const std::optional<Tensor>& b_up,
                        const std::vector<double>& sums, std::vector<double> dots, BottleneckGradients& grad) const {
    if (needs.up_bias) {
      std::vector<double> bias = channel_scale();
      for (int64_t d = 0; d < D; ++d) bias[d] *= sums[d];
      from_doubles(bias, grad.b_up);
    }
    if (!needs.scale) return;
    if (b_up.has_value()) {
      const std::vector<double> bias = to_doubles(*b_up);
      for (int64_t d = 0; d < D; ++d) dots[d] += bias[d] * sums[d];
    }
    if (!channels.has_value()) dots = {std::accumulate(dots.begin(), dots.end(), 0.0)};
    for (double& value : dots) value *= factor * dropout_scale;
    from_doubles(dots, grad.scale);
  }

  Weight widen(const Tensor& source) const {
    const int64_t rows = source.size(0), columns = source.size(1);
    Scratch packed(rows, columns, accumulator);
    const View view(packed.at(0), rows, columns, columns, accumulator);
    kernels.pack[static_cast<int>(dtype_of(source, op, "weight"))](source.const_data_ptr(), source.stride(0),
                                                                   source.stride(1), rows, columns, view.data, columns);
    return {std::move(packed), view};
  }
  // A matrix in a type that is its own or the accumulation type: as it is, or widened into buffer.
  View as_type(const View& source, Dtype type, const Scratch& buffer) const {
    if (source.dtype == type) return source;
    const View view(buffer.at(0), source.rows, source.columns, source.columns, type);
    kernels.pack[static_cast<int>(source.dtype)](source.data, source.row_stride, 1, source.rows, source.columns,
                                                 view.data, view.row_stride);
    return view;
  }
  // Rows of x or dy for the products.
  View in_product_type(const View& source, const Scratch& buffer) const { return as_type(source, product, buffer); }

  template <class F>
  void with_accumulator(const F& run) const {
    accumulator == Dtype::kFloat64 ? run(0.0) : run(0.0f);
  }

 private:
  // Of tasks of ours rows in whole tiles, spread evenly; else as many as a task has.
  int64_t first_row(int64_t task) const {
    if (task == tasks) return M;
    return own_products ? M * task / tasks / kOwnPanelUnit * kOwnPanelUnit : task * task_rows_;
  }

  int64_t task_rows_;
};

// The sums over `count` parts of `size` numbers, `stride` apart, times a factor.
template <class T>
std::vector<double> add_parts(const void* parts, int64_t count, int64_t stride, int64_t size, double factor) {
  std::vector<double> sums(static_cast<size_t>(size), 0.0);
  for (int64_t part = 0; part < count; ++part) {
    const T* from = static_cast<const T*>(parts) + part * stride;
    for (int64_t i = 0; i < size; ++i) sums[i] += static_cast<double>(from[i]);
  }
  for (double& sum : sums) sum *= factor;
  return sums;
}

// Products of our own for a few rows, bottleneck_decode.cpp.
bool bottleneck_has_few_rows(const Bottleneck& call);
void bottleneck_forward_of_few_rows(const Bottleneck& call, const Matrix& x, const Matrix* residual,
                                    const Tensor& w_down, const std::optional<Tensor>& b_down, const Tensor& w_up,
                                    const std::optional<Tensor>& b_up, const Tensor& y, const Tensor& z);

// In AMX tiles, bottleneck_amx.cpp: whether a call's types and sizes are such that its rows can, and both directions.
bool bottleneck_in_tiles(const Bottleneck& call);
void bottleneck_forward_in_tiles(const Bottleneck& call, const Matrix& x, const Matrix* residual, const Tensor& w_down,
                                 const std::optional<Tensor>& b_down, const Tensor& w_up,
                                 const Bottleneck::Channels& channels, const Tensor& y, const Tensor& z);
void bottleneck_backward_in_tiles(const Bottleneck& call, const BottleneckNeeds& needs, const Matrix& grad_y,
                                  const std::optional<Tensor>& x, const Tensor& w_down, const Tensor& w_up,
                                  const std::optional<Tensor>& b_up, const Tensor& z, BottleneckGradients& grad);

}  // namespace pyfused
