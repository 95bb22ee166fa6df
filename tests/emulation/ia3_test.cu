// The launchers of csrc/cuda/ia3.h against naive loops, see lora_test.cu.
#include <string>

#include "dispatch.cuh"
#include "ia3.h"
#include "launcher_test.h"
#include "sums.h"

namespace pyfused {
namespace {

struct Shape {
  int64_t rows, columns, extra;  // elements after each row of the inputs
};

// parts [count, size] added up
template <class S>
void add_parts(TestMatrix<S>& parts, int64_t count, int64_t size, TestVector<S>& total) {
  PartSum sum{};
  sum.parts = parts.to_device();
  sum.part_count = count;
  sum.part_stride = sum.count = size;
  sum.out = total.to_device();
  sum.out_dtype = std::is_same_v<S, double> ? Dtype::kFloat64 : Dtype::kFloat32;
  sum.factor = 1.0;
  launch_sums({&sum, 1}, std::is_same_v<S, double>, nullptr);
  total.to_host();
}

template <class T>
double tolerance() {
  return std::is_same_v<T, double> ? 1e-13 : sizeof(T) == 4 ? 3e-6 : 1.0 / 128;
}

template <class T>
void test_columns(const std::string& name, Dtype dtype, const Shape& shape) {
  using S = Sum<T>;
  const int64_t M = shape.rows, N = shape.columns, ld = N + shape.extra;
  TestMatrix<T> source(M, N, ld, 1), z(M, N, ld, 2), out(M, N, N, 0);
  TestVector<float> scale(N, 3);
  TestVector<T> shift(N, 4);
  Ia3Columns call{};
  call.dtype = dtype;
  call.rows = M;
  call.columns = N;
  call.source = source.as_rows();
  call.scale = {scale.to_device(), Dtype::kFloat32};
  call.shift = {shift.to_device(), dtype};
  call.out = out.to_device();
  call.range_rows = ia3_range_rows(dtype, M, N, 4);
  launch_ia3_columns(call, nullptr);
  out.to_host();
  const auto got = [&](int64_t i, int64_t j) { return out.at(i, j); };
  compare(name + ": scaled columns", M, N, tolerance<T>(), got,
          [&](int64_t i, int64_t j) { return (source.at(i, j) + shift[j]) * scale[j]; });

  const int64_t ranges = divide_up_to(M, call.range_rows);
  TestMatrix<S> parts(ranges, N, N, 0);
  TestVector<S> total(N, 0);
  call.z = z.as_rows();
  call.out = out.to_device();
  call.parts = parts.to_device();
  launch_ia3_columns(call, nullptr);
  out.to_host();
  parts.to_host();
  compare(name + ": scaled gradient of columns", M, N, tolerance<T>(), got,
          [&](int64_t i, int64_t j) { return source.at(i, j) * scale[j]; });
  add_parts(parts, ranges, N, total);
  compare(
      name + ": gradient of the scale of columns", 1, N, std::is_same_v<T, double> ? 1e-13 : 3e-6,
      [&](int64_t, int64_t j) { return total[j]; },
      [&](int64_t, int64_t j) {
        double sum = 0;
        for (int64_t i = 0; i < M; ++i) sum += source.at(i, j) * (z.at(i, j) + shift[j]);
        return sum;
      });

  // rows beyond the last, which a thread has zeros for, leave an infinity alone
  shift.host[0] = from_double<T>(-std::numeric_limits<double>::infinity());
  for (int64_t i = 0; i < M; ++i) source.host[i * ld] = from_double<T>(1.0);
  call.source = source.as_rows();
  call.shift.data = shift.to_device();
  launch_ia3_columns(call, nullptr);
  parts.to_host();
  add_parts(parts, ranges, N, total);
  check(std::isinf(total[0]), name + ": an infinity among the shifts");
}

// The product with its factors, with and without the unscaled one.
template <class T>
void test_linear(const std::string& name, Dtype dtype, int64_t M, int64_t N, int64_t K, int64_t extra) {
  TestMatrix<T> x(M, K, K + extra, 1), w(N, K, K + extra, 2), out(M, N, N, 0), base(M, N, N, 0);
  TestVector<float> scale(N, 3);
  TestVector<T> bias(N, 4);
  const auto product = [&](int64_t i, int64_t j) {
    double sum = bias[j];
    for (int64_t k = 0; k < K; ++k) sum += x.at(i, k) * w.at(j, k);
    return sum;
  };
  Ia3Linear call{};
  call.dtype = dtype;
  call.m = M;
  call.n = N;
  call.k = K;
  call.x = x.as_rows();
  call.w = w.as_rows();
  call.bias = bias.to_device();
  call.scale = {scale.to_device(), Dtype::kFloat32};
  call.capability = 80;
  for (const bool with_base : {false, true}) {
    call.out = out.to_device();
    call.base = with_base ? base.to_device() : nullptr;
    launch_ia3_linear(call, nullptr);
    out.to_host();
    compare(
        name + ": scaled product", M, N, tolerance<T>(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) { return product(i, j) * scale[j]; });
  }
  base.to_host();
  compare(
      name + ": product before the scale", M, N, tolerance<T>(), [&](int64_t i, int64_t j) { return base.at(i, j); },
      product);
}

template <class T>
void test_rows(const std::string& name, Dtype dtype, int64_t outer, int64_t channels, int64_t inner) {
  using S = Sum<T>;
  const int64_t rows = outer * channels;
  TestMatrix<T> source(rows, inner, inner, 1), z(rows, inner, inner, 2), out(rows, inner, inner, 0);
  TestVector<float> scale(channels, 3);
  Ia3Rows call{};
  call.dtype = dtype;
  call.rows = rows;
  call.columns = inner;
  call.period = channels;
  call.run_columns = ia3_run_columns(inner);
  call.source = source.to_device();
  call.scale = {scale.to_device(), Dtype::kFloat32};
  call.out = out.to_device();
  const auto got = [&](int64_t i, int64_t j) { return out.at(i, j); };
  const auto scaled = [&](int64_t i, int64_t j) { return source.at(i, j) * scale[i % channels]; };
  launch_ia3_rows(call, nullptr);
  out.to_host();
  compare(name + ": scaled rows", rows, inner, tolerance<T>(), got, scaled);

  const int64_t count = divide_up_to(inner, call.run_columns) * outer;
  TestMatrix<S> parts(count, channels, channels, 0);
  TestVector<S> total(channels, 0);
  call.z = z.to_device();
  call.out = out.to_device();
  call.parts = parts.to_device();
  launch_ia3_rows(call, nullptr);
  out.to_host();
  parts.to_host();
  compare(name + ": scaled gradient of rows", rows, inner, tolerance<T>(), got, scaled);
  add_parts(parts, count, channels, total);
  compare(
      name + ": gradient of the scale of rows", 1, channels, std::is_same_v<T, double> ? 1e-13 : 3e-6,
      [&](int64_t, int64_t c) { return total[c]; },
      [&](int64_t, int64_t c) {
        double sum = 0;
        for (int64_t o = 0; o < outer; ++o) {
          for (int64_t j = 0; j < inner; ++j) sum += source.at(o * channels + c, j) * z.at(o * channels + c, j);
        }
        return sum;
      });
}

template <class T>
void run(const char* name, Dtype dtype) {
  // several ranges of rows; nothing divides, two tiles of columns; one element
  for (const Shape& shape : {Shape{300, 64, 0}, Shape{37, 301, 3}, Shape{1, 1, 0}}) {
    const std::string size = " M=" + std::to_string(shape.rows) + " N=" + std::to_string(shape.columns);
    test_columns<T>(name + size, dtype, shape);
    if constexpr (is_16bit<T>) test_linear<T>(name + size, dtype, shape.rows, shape.columns, 77, shape.extra);
  }
  if constexpr (is_16bit<T>) test_linear<T>(std::string(name) + " 130 x 136 x 160", dtype, 130, 136, 160, 0);
  test_rows<T>(std::string(name) + " 2 x 5 x 4104", dtype, 2, 5, 4104);
  test_rows<T>(std::string(name) + " 3 x 7 x 49", dtype, 3, 7, 49);
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
