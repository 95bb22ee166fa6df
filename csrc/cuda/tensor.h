// What every CUDA op shares on the host side: the current stream and device, the vendor's GEMM, sums of parts. Under
// the tests' emulation (PYFUSED_EMULATE_CUDA) the kernels run on the CPU, and so does the rest.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/tensor.h"
#if defined(PYFUSED_EMULATE_CUDA)
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#endif

#include <array>
#include <atomic>

#include "sums.h"

namespace pyfused {

#if defined(PYFUSED_EMULATE_CUDA)
#define PYFUSED_CUDA_KEY CPU
#else
#define PYFUSED_CUDA_KEY CUDA
#endif

// The GPU that a call runs on: its first argument's. Any argument on a GPU brings a call here.
inline Device gpu_of(const Tensor& tensor, const char* op, const char* argument) {
  const Device device = Device::of(tensor);
#if !defined(PYFUSED_EMULATE_CUDA)
  PF_CHECK(device.type == aoti_torch_device_type_cuda(), op, argument, "be on a GPU", "another device");
#else
  (void)op, (void)argument;
#endif
  return device;
}

// Makes a tensor's GPU the current one, for torch and for the CUDA runtime that is linked into this library.
class DeviceScope {
 public:
  const Device device;

  explicit DeviceScope(const Device& device)
#if defined(PYFUSED_EMULATE_CUDA)
      : device(device) {
  }
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 4; }
  int capability() const { return 80; }
  int shared_bytes() const { return 163 * 1024; }
#else
      : device(device), guard_(device.index) {
    check(cudaSetDevice(device.index));
    void* stream = nullptr;
    if (aoti_torch_get_current_cuda_stream(device.index, &stream) != AOTI_TORCH_SUCCESS) {
      fail_in_torch("torch has no current CUDA stream");
    }
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

  int multiprocessors() const {
    static Known known{};
    return cached(known, [this] { return attribute(cudaDevAttrMultiProcessorCount); });
  }
  // 80 for an A100, 90 for an H100.
  int capability() const {
    static Known known{};
    return cached(known, [this] {
      return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    });
  }
  // What a block may have.
  int shared_bytes() const {
    static Known known{};
    return cached(known, [this] { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); });
  }

 private:
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("pyfused: CUDA: ") + cudaGetErrorString(error));
  }
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, which, device.index));
    return value;
  }
  using Known = std::array<std::atomic<int>, 64>;  // by GPU; 0: not asked yet
  template <class Query>
  int cached(Known& known, const Query& query) const {
    if (device.index >= static_cast<int>(known.size())) return query();
    int value = known[device.index].load(std::memory_order_relaxed);
    if (value == 0) known[device.index].store(value = query(), std::memory_order_relaxed);
    return value;
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
#endif
};

// The vendor's GEMM into memory of ours, past the dispatcher: neither autocast nor autograd of the caller's
// surroundings can change what comes out. out = a b + self; self may be a bias [N], out or null.
inline void matmul_out(const Tensor& out, const Tensor& a, const Tensor& b, const Tensor* self) {
#if defined(PYFUSED_EMULATE_CUDA)
  const auto mm = aoti_torch_cpu_mm_out;
  const auto addmm = aoti_torch_cpu_addmm_out;
#else
  const auto mm = aoti_torch_cuda_mm_out;
  const auto addmm = aoti_torch_cuda_addmm_out;
#endif
  const AOTITorchError error =
      self != nullptr ? addmm(out.get(), self->get(), a.get(), b.get(), 1.0, 1.0) : mm(out.get(), a.get(), b.get());
  if (error != AOTI_TORCH_SUCCESS) fail_in_torch("torch's matrix product failed");
}

// out = the sum of parts [count, size], rounded once.
inline PartSum sum_of(const Tensor& parts, int64_t count, int64_t size, const Tensor& out, const char* op) {
  PartSum sum{};
  sum.parts = parts.const_data_ptr();
  sum.part_count = count;
  sum.part_stride = sum.count = size;
  sum.out = out.mutable_data_ptr();
  sum.out_dtype = dtype_of(out, op, "gradient");
  sum.factor = 1.0;
  return sum;
}

}  // namespace pyfused
