// The launchers of csrc/cuda/bottleneck.h against naive loops, see lora_test.cu.
#include <cmath>
#include <string>

#include "bottleneck.h"
#include "copy.cuh"
#include "launcher_test.h"

namespace pyfused {
namespace {

struct Shape {
  int64_t m, d;
  int h;
  double dropout;
  int64_t extra;  // elements after each row of the inputs
};

// gelu by erf, and its derivative
double activation(double z) { return 0.5 * z * std::erfc(-z / std::sqrt(2.0)); }
double slope(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-0.5 * z * z) / std::sqrt(8.0 * std::atan(1.0));
}

template <class TX, class TC>
class Test {
 public:
  using S = Sum<Compute<TX, TC>>;

  Test(const char* name, KernelTypes types, const Shape& shape)
      : name_(std::string(name) + " M=" + std::to_string(shape.m) + " D=" + std::to_string(shape.d) +
              " H=" + std::to_string(shape.h)),
        types_(types),
        m_(shape.m),
        d_(shape.d),
        h_(shape.h),
        threshold_(drop_threshold(shape.dropout)),
        seed_(1),
        x_(m_, d_, d_ + shape.extra, 1),
        w1_(h_, d_, d_ + shape.extra, 2),
        w2_(d_, h_, h_ + shape.extra, 3),
        residual_(m_, d_, d_ + shape.extra, 4),
        down_bias_(h_, 5),
        bias_(d_, 6),
        scale_(d_, 7) {
    seed_.host[0] = 0x123456789abcdef0;
  }

  void run() {
    passes();
    if (std::is_same_v<TX, double>) return;
    for (const int bytes : {kSharedLimit, 163 * 1024}) {  // an A100's: more stages
      shared_bytes_ = bytes;
      forward();
      backward();
    }
  }

 private:
  bool kept(int64_t i, int64_t j) const {
    return threshold_ == 0 || keeps(static_cast<uint64_t>(seed_.host[0]), threshold_, i, j);
  }
  DropoutSource dropout() { return {threshold_ != 0 ? seed_.to_device() : nullptr, threshold_}; }
  BottleneckScale channels() { return {0.5, {scale_.to_device(), Dtype::kFloat32}, d_}; }
  double tolerance() const {
    return std::is_same_v<S, double> ? 1e-13 : sizeof(TX) == 2 || sizeof(TC) == 2 ? 1.0 / 64 : 1e-5;
  }
  double sum_tolerance() const { return std::is_same_v<S, double> ? 1e-13 : 5e-6; }
  template <class Got, class Wanted>
  void hold(const char* what, int64_t rows, int64_t columns, double tolerance, const Got& got, const Wanted& wanted) {
    compare(name_ + ": " + what, rows, columns, tolerance, got, wanted);
  }

  void passes() {
    TestMatrix<TX> out(m_, d_, d_, 0);
    BottleneckColumns call{};
    call.source = call.target = types_.data;
    call.rows = m_;
    call.columns = d_;
    call.u = x_.as_rows();
    call.residual = residual_.as_rows();
    call.scale = channels();
    call.bias = {bias_.to_device(), types_.adapter};
    call.dropout = dropout();
    call.out = out.to_device();
    call.range_rows = bottleneck_range_rows(m_, d_, 4);
    const int64_t ranges = divide_up_to(m_, call.range_rows);
    TestMatrix<S> parts(ranges, d_, d_, 0);
    call.parts = parts.to_device();
    launch_bottleneck_columns(call, nullptr);
    out.to_host();
    parts.to_host();
    const auto value = [&](int64_t i, int64_t j) {
      return kept(i, j) ? (x_.at(i, j) + bias_[j]) * 0.5 * scale_[j] : 0.0;
    };
    hold(
        "columns", m_, d_, tolerance(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) { return residual_.at(i, j) + value(i, j); });
    hold(
        "sums of columns", 1, d_, sum_tolerance(), [&](int64_t, int64_t j) { return total(parts, ranges, j); },
        [&](int64_t, int64_t j) {
          double sum = 0;
          for (int64_t i = 0; i < m_; ++i) sum += value(i, j);
          return sum;
        });

    TestMatrix<TX> z(m_, h_, h_, 8), dh(m_, h_, h_, 9), h(m_, h_, h_, 0), dz(m_, h_, h_, 0);
    BottleneckMiddle middle{};
    middle.dtype = types_.data;
    middle.activation = Activation::kGelu;
    middle.rows = m_;
    middle.columns = h_;
    middle.z = z.to_device();
    middle.dh = dh.to_device();
    middle.h_scale = {2.0, {}, 1};
    middle.dz_scale = {3.0, {}, 1};
    middle.h = h.to_device();
    middle.dz = dz.to_device();
    middle.range_rows = bottleneck_range_rows(m_, h_, 4);
    launch_bottleneck_middle(middle, nullptr);
    h.to_host();
    dz.to_host();
    hold(
        "h", m_, h_, tolerance(), [&](int64_t i, int64_t j) { return h.at(i, j); },
        [&](int64_t i, int64_t j) { return 2.0 * activation(z.at(i, j)); });
    hold(
        "dz", m_, h_, tolerance(), [&](int64_t i, int64_t j) { return dz.at(i, j); },
        [&](int64_t i, int64_t j) { return 3.0 * dh.at(i, j) * slope(z.at(i, j)); });
  }

  double total(const TestMatrix<S>& parts, int64_t count, int64_t j) const {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts.at(part, j);
    return sum;
  }

  BottleneckFused fused() {
    BottleneckFused call{};
    call.types = types_;
    call.activation = Activation::kGelu;
    call.rows = m_;
    call.width = d_;
    call.hidden = h_;
    call.x = x_.as_rows();
    call.w1 = w1_.as_rows();
    call.w2 = w2_.as_rows();
    call.scale = channels();
    call.residual = residual_.as_rows();
    call.shared_bytes = shared_bytes_;
    return call;
  }

  void forward() {
    TestMatrix<TC> z(m_, h_, h_, 0);
    TestMatrix<TX> out(m_, d_, d_, 0);
    BottleneckFused call = fused();
    call.down_bias = down_bias_.to_device();
    call.bias = {bias_.to_device(), types_.adapter};
    call.out_dropout = dropout();
    call.z = z.to_device();
    call.out = out.to_device();
    launch_bottleneck_fused(call, nullptr);
    z.to_host();
    out.to_host();
    hold(
        "fused z", m_, h_, tolerance(), [&](int64_t i, int64_t j) { return z.at(i, j); },
        [&](int64_t i, int64_t j) {
          double sum = down_bias_[j];
          for (int64_t d = 0; d < d_; ++d) sum += x_.at(i, d) * w1_.at(j, d);
          return sum;
        });
    hold(
        "fused y", m_, d_, tolerance(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) {
          double sum = bias_[j];
          for (int64_t k = 0; k < h_; ++k) sum += activation(z.at(i, k)) * w2_.at(j, k);
          return residual_.at(i, j) + (kept(i, j) ? sum * 0.5 * scale_[j] : 0.0);
        });
  }

  void backward() {
    const int64_t blocks = divide_up_to<int64_t>(m_, kFusedRows);
    TestMatrix<TC> z(m_, h_, h_, 8);
    TestMatrix<S> h(m_, h_, h_, 0), dz(m_, h_, h_, 0), sums(blocks, d_, d_, 0), down_sums(blocks, h_, h_, 0);
    TestMatrix<TX> out(m_, d_, d_, 0);
    BottleneckFused call = fused();
    call.x_dropout = dropout();
    call.z_in = z.to_device();
    call.dz_scale = {3.0, {}, 1};
    call.h = h.to_device();
    call.dz = dz.to_device();
    call.x_sums = sums.to_device();
    call.down_sums = down_sums.to_device();
    call.out = out.to_device();
    launch_bottleneck_fused(call, nullptr);
    for (TestMatrix<S>* result : {&h, &dz, &sums, &down_sums}) result->to_host();
    out.to_host();
    const auto dropped = [&](int64_t i, int64_t d) { return kept(i, d) ? x_.at(i, d) : 0.0; };
    hold(
        "fused h", m_, h_, sum_tolerance(), [&](int64_t i, int64_t j) { return h.at(i, j); },
        [&](int64_t i, int64_t j) { return activation(z.at(i, j)); });
    hold(
        "fused dz", m_, h_, sum_tolerance(), [&](int64_t i, int64_t j) { return dz.at(i, j); },
        [&](int64_t i, int64_t j) {
          double sum = 0;
          for (int64_t d = 0; d < d_; ++d) sum += dropped(i, d) * w1_.at(j, d);
          return 3.0 * sum * slope(z.at(i, j));
        });
    hold(
        "fused dx", m_, d_, tolerance(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) {
          double sum = 0;
          for (int64_t k = 0; k < h_; ++k) sum += dz.at(i, k) * w2_.at(j, k);
          return residual_.at(i, j) + sum * 0.5 * scale_[j];
        });
    const auto over_rows = [&](const auto& element) {
      double sum = 0;
      for (int64_t i = 0; i < m_; ++i) sum += element(i);
      return sum;
    };
    hold(
        "fused sums of dy", 1, d_, sum_tolerance(), [&](int64_t, int64_t d) { return total(sums, blocks, d); },
        [&](int64_t, int64_t d) { return over_rows([&](int64_t i) { return dropped(i, d); }); });
    hold(
        "fused sums of dz", 1, h_, sum_tolerance(), [&](int64_t, int64_t j) { return total(down_sums, blocks, j); },
        [&](int64_t, int64_t j) { return over_rows([&](int64_t i) { return dz.at(i, j); }); });
  }

  std::string name_;
  KernelTypes types_;
  int64_t m_, d_;
  int h_, shared_bytes_ = 0;
  uint32_t threshold_;
  DeviceArray<int64_t> seed_;
  TestMatrix<TX> x_;
  TestMatrix<TC> w1_, w2_;
  TestMatrix<TX> residual_;
  TestVector<TC> down_bias_, bias_;
  TestVector<float> scale_;
};

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  const Shape shapes[] = {
      {70, 264, 24, 0.1, 0},   // 16-byte copies, two blocks of rows, two steps of columns
      {37, 301, 101, 0.5, 3},  // nothing divides, hidden values in several chunks
      {3, 40, 1, 0.0, 0},
  };
  for (const Shape& shape : shapes) run_with_all_types<Test>(shape);
  return exit_status();
}
