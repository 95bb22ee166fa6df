// The launcher of csrc/cuda/dropout.h against the mask element by element, see lora_test.cu.
#include <string>

#include "dispatch.cuh"
#include "dropout.h"
#include "launcher_test.h"

namespace pyfused {
namespace {

template <class T>
void test(const char* name, Dtype dtype, int64_t rows, int64_t columns, int64_t extra) {
  const double p = 0.3, scale = keep_scale(drop_threshold(p));
  TestMatrix<T> x(rows, columns, columns + extra, 1), out(rows, columns, columns, 0);
  x.host[0] = from_double<T>(std::numeric_limits<double>::infinity());
  DeviceArray<int64_t> seed(1);
  seed.host[0] = 0x123456789abcdef0;
  while (keeps(static_cast<uint64_t>(seed.host[0]), drop_threshold(p), 0, 0)) ++seed.host[0];  // the infinity goes
  DropoutPass call{};
  call.dtype = dtype;
  call.rows = rows;
  call.columns = columns;
  call.x = x.as_rows();
  call.dropout = {seed.to_device(), drop_threshold(p)};
  call.scale = scale;
  call.out = out.to_device();
  launch_dropout(call, nullptr);
  out.to_host();
  compare(
      std::string(name) + " M=" + std::to_string(rows) + " K=" + std::to_string(columns), rows, columns,
      std::is_same_v<T, double> ? 1e-15
      : sizeof(T) == 4          ? 1e-7
                                : 1.0 / 256,
      [&](int64_t i, int64_t j) { return out.at(i, j); },
      [&](int64_t i, int64_t j) {
        return keeps(static_cast<uint64_t>(seed.host[0]), call.dropout.threshold, i, j) ? x.at(i, j) * scale : 0.0;
      });
}

template <class T>
void run(const char* name, Dtype dtype) {
  test<T>(name, dtype, 37, 301, 3);
  test<T>(name, dtype, 16, 256, 0);
  test<T>(name, dtype, 1, 1, 0);
}

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  run<bf16>("bf16", Dtype::kBFloat16);
  run<fp16>("fp16", Dtype::kFloat16);
  run<float>("fp32", Dtype::kFloat32);
  run<double>("fp64", Dtype::kFloat64);
  return exit_status();
}
