// Memory that a test fills on the host and a kernel works on: a copy on the GPU. Emulated it is a copy, too, so that
// one that a test forgets is seen without a GPU.
#pragma once

#include <cstring>
#include <new>
#include <stdexcept>
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
  ~DeviceArray() { ::operator delete(device_, kAlignment); }
  T* to_device() {
    if (device_ == nullptr) device_ = static_cast<T*>(::operator new(bytes(), kAlignment));
    std::memcpy(device_, host.data(), bytes());
    return device_;
  }
  void to_host() {
    if (device_ == nullptr) throw std::logic_error("a copy from the GPU of what is not there");
    std::memcpy(host.data(), device_, bytes());
  }
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
#endif

 private:
  static constexpr std::align_val_t kAlignment{256};  // cudaMalloc's
  size_t bytes() const { return host.size() * sizeof(T); }
  T* device_ = nullptr;
};

}  // namespace pyfused
