// What every op shares on the host side, whatever the device: checks of tensors, allocation, tensors as matrices.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <vector>

#include "check.h"
#include "dtype.h"

namespace pyfused {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using OptionalTensors = std::vector<std::optional<Tensor>>;

inline const Tensor* or_null(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

inline int64_t divide_up(int64_t n, int64_t d) { return (n + d - 1) / d; }
inline int64_t round_up(int64_t n, int64_t step) { return divide_up(n, step) * step; }

inline Dtype dtype_of(const Tensor& tensor, const char* op, const char* argument) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      fail(op, argument, "be float32, bfloat16, float16 or float64", "another dtype");
  }
}

inline ScalarType scalar_type(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return ScalarType::Float;
    case Dtype::kBFloat16:
      return ScalarType::BFloat16;
    case Dtype::kFloat16:
      return ScalarType::Half;
    default:
      return ScalarType::Double;
  }
}

// Where a call runs: the CPU, or one GPU.
struct Device {
  int32_t type, index;

  static Device cpu() { return {aoti_torch_device_type_cpu(), 0}; }
  static Device of(const Tensor& tensor) {
    Device device{0, 0};
    aoti_torch_get_device_type(tensor.get(), &device.type);
    aoti_torch_get_device_index(tensor.get(), &device.index);
    return device;
  }
  bool is_cpu() const { return type == aoti_torch_device_type_cpu(); }
};

// On the call's device, and with memory: FSDP frees the storage of parameters that it has sharded.
inline void check_device(const Tensor& tensor, const Device& device, const char* op, const char* argument) {
  if (device.is_cpu()) {
    PF_CHECK(tensor.is_cpu(), op, argument, "be on the CPU", "another device");
  } else {
    const Device got = Device::of(tensor);
    PF_CHECK(got.type == device.type && got.index == device.index, op, argument, "be on the first argument's GPU",
             "another device");
  }
  PF_CHECK(tensor.numel() == 0 || tensor.const_data_ptr() != nullptr, op, argument, "have memory",
           "a tensor whose storage was freed");
}

inline void check_shape(const Tensor& tensor, std::initializer_list<int64_t> shape, const char* op,
                        const char* argument) {
  const auto sizes = tensor.sizes();
  if (std::equal(sizes.begin(), sizes.end(), shape.begin(), shape.end())) return;
  std::ostringstream expected;  // only now: building a message costs more than a small op
  expected << "have shape [";
  for (const int64_t* size = shape.begin(); size != shape.end(); ++size) {
    expected << (size == shape.begin() ? "" : ", ") << *size;
  }
  expected << ']';
  fail(op, argument, expected.str(), shape_of(tensor));
}

// What dropout's mask is made from.
inline void check_seed(const Tensor& seed, const Device& device, const char* op) {
  check_device(seed, device, op, "seed");
  PF_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, op, "seed",
           "be an int64 tensor with one element", shape_of(seed));
}

// The frozen layer's weight [N, K] and bias [N], in the activations' dtype.
inline void check_linear(const Tensor& like, const Tensor& weight, const std::optional<Tensor>& bias, int64_t N,
                         int64_t K, const Device& device, const char* op) {
  check_device(weight, device, op, "weight");
  check_shape(weight, {N, K}, op, "weight");
  PF_CHECK(weight.scalar_type() == like.scalar_type(), op, "weight", "have x's dtype", "another dtype");
  if (!bias.has_value()) return;
  check_device(*bias, device, op, "bias");
  check_shape(*bias, {N}, op, "bias");
  PF_CHECK(bias->scalar_type() == like.scalar_type(), op, "bias", "have x's dtype", "another dtype");
}

// A contiguous tensor, not initialised: leading's sizes but for the last, then the last given.
inline Tensor empty(const int64_t* leading, size_t leading_count, int64_t last, ScalarType type, const Device& device) {
  std::vector<int64_t> sizes(leading, leading + leading_count);
  sizes.push_back(last);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  AtenTensorHandle handle;
  if (aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                               torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device.type,
                               device.index, &handle) != AOTI_TORCH_SUCCESS) {
    fail_in_torch("no tensor of " + std::to_string(stride) + " elements", "out of memory. Torch's message is above");
  }
  return Tensor(handle);
}

inline Tensor empty(std::initializer_list<int64_t> shape, ScalarType type, const Device& device) {
  return empty(shape.begin(), shape.size() - 1, shape.end()[-1], type, device);
}

// Leading dimensions of a tensor with another last one.
inline Tensor empty_rows(const Tensor& like, int64_t columns, const Device& device) {
  const auto sizes = like.sizes();
  return empty(sizes.data(), sizes.size() - 1, columns, like.scalar_type(), device);
}

// Of a tensor [..., columns] as a matrix.
inline int64_t rows_of(const Tensor& tensor) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < tensor.dim(); ++i) rows *= tensor.size(i);
  return rows;
}

inline Tensor as_matrix(const Tensor& tensor, int64_t rows, int64_t columns) {
  return tensor.dim() == 2 ? tensor : torch::stable::reshape(tensor, {rows, columns});
}

// A matrix seen with its dimensions exchanged, past the dispatcher: a small product's weights leave little of the
// cache, so a call costs by how much code it runs.
inline Tensor transposed(const Tensor& matrix) {
  const int64_t sizes[] = {matrix.size(1), matrix.size(0)}, strides[] = {matrix.stride(1), matrix.stride(0)};
  AtenTensorHandle handle;
  // the offset is counted from the matrix's own
  if (aoti_torch__reinterpret_tensor(matrix.get(), 2, sizes, strides, 0, &handle) != AOTI_TORCH_SUCCESS) {
    fail_in_torch("torch made no view of a tensor");
  }
  return Tensor(handle);
}

// A tensor [..., columns] as a matrix: rows of unit stride, ld elements apart. Copied only where it has no such form.
struct Matrix {
  Tensor tensor;  // keeps a copy alive
  int64_t ld;

  explicit Matrix(const Tensor& source) : tensor(source), ld(leading_dimension(source)) {
    if (ld < 0) {  // contiguous() would not say why there is no room for as many numbers as x has
      ld = source.size(source.dim() - 1);
      Tensor copy = empty_rows(source, ld, Device::of(source));
      tensor = torch::stable::copy_(copy, source);
    }
  }

 private:
  // -1 where rows are not evenly spaced or not of unit stride.
  static int64_t leading_dimension(const Tensor& source) {
    const auto sizes = source.sizes();
    const auto strides = source.strides();
    const int64_t last = source.dim() - 1;
    if (sizes[last] > 1 && strides[last] != 1) return -1;
    int64_t ld = sizes[last], expected = -1;
    for (int64_t i = last - 1; i >= 0; --i) {
      if (sizes[i] == 1) continue;
      if (expected < 0) {
        ld = strides[i];
        if (ld < sizes[last]) return -1;  // rows overlap, as in an expanded tensor
      } else if (strides[i] != expected) {
        return -1;
      }
      expected = strides[i] * sizes[i];
    }
    return ld;
  }
};

}  // namespace pyfused
