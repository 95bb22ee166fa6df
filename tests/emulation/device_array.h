// Memory that a test fills on the host and a kernel works on: with nvcc a copy on the GPU, emulated the host's own.
#pragma once

#include <vector>

#include "platform.cuh"

namespace pyfused {

template <class T>
class DeviceArray {
 public:
  std::vector<T> host;

  explicit DeviceArray(size_t size) : host(size) {}
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray& operator=(const DeviceArray&) = delete;

#if defined(PYFUSED_EMULATE_CUDA)
  T* to_device() { return host.data(); }
  void to_host() {}
#else
  ~DeviceArray() { cudaFree(device_); }
  T* to_device() {
    if (device_ == nullptr) check_launch("an allocation", cudaMalloc(&device_, bytes()));
    check_launch("a copy to the GPU", cudaMemcpy(device_, host.data(), bytes(), cudaMemcpyHostToDevice));
    return device_;
  }
  void to_host() {
    check_launch("a copy from the GPU", cudaMemcpy(host.data(), device_, bytes(), cudaMemcpyDeviceToHost));
  }

 private:
  size_t bytes() const { return host.size() * sizeof(T); }
  T* device_ = nullptr;
#endif
};

}  // namespace pyfused
