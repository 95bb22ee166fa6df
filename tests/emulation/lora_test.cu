// The launchers of csrc/cuda/lora.h against naive loops, without torch: for the sanitizers, which give false alarms
// inside Python, and for compute-sanitizer on a GPU. Few small cases; the results on many are tests/ops' business.
#include <string>
#include <vector>

#include "launcher_test.h"
#include "lora.h"
#include "sums.h"

namespace pyfused {
namespace {

struct Shape {
  int64_t m, k, n;
  int r;
  double dropout;
  int64_t extra;  // elements after each row of x: an odd number rules 16-byte copies out
  bool allow_tf32;
};

// One adapter on one x in all of its parts.
template <class TX, class TC>
class Test {
 public:
  using S = Sum<Compute<TX, TC>>;

  Test(const char* name, KernelTypes types, const Shape& shape)
      : name_(std::string(name) + " M=" + std::to_string(shape.m) + " K=" + std::to_string(shape.k) +
              " N=" + std::to_string(shape.n) + " r=" + std::to_string(shape.r)),
        types_(types),
        shape_(shape),
        m_(shape.m),
        k_(shape.k),
        n_(shape.n),
        r_(shape.r),
        threshold_(drop_threshold(shape.dropout)),
        seed_(1),
        x_(m_, k_, k_ + shape.extra, 1),
        a_(r_, k_, k_ + shape.extra, 2),
        b_(n_, r_, r_ + shape.extra, 3),
        dy_(m_, n_, n_ + shape.extra, 4),
        bias_(n_, 5),
        vector_(r_, 6),
        s_(m_, r_, r_, 7) {
    types_.allow_tf32 = shape.allow_tf32;
    seed_.host[0] = 0x123456789abcdef0;
  }

  void run() {
    shrink();
    reduce();
    expand();
    if (threshold_ == 0 && lora_decode_fits(types_, m_, k_, n_, r_)) decode();
    if constexpr (is_16bit<TX> && std::is_same_v<TX, TC>) {
      concat(false);
      concat(true);
    }
  }

 private:
  // Relative to the size of the terms; a second product may have its first factor rounded to 16 bits.
  double tolerance(bool rounds_factor) const {
    if (std::is_same_v<S, double>) return 1e-13;
    if (shape_.allow_tf32 && sizeof(Compute<TX, TC>) == 4) return 2e-3;
    return rounds_factor && sizeof(Compute<TX, TC>) == 2 ? 1e-2 : 3e-6;
  }

  template <class Got, class Wanted>
  void compare(const char* what, int64_t rows, int64_t columns, double tolerance, const Got& got,
               const Wanted& wanted) {
    ::pyfused::compare(name_ + ": " + what, rows, columns, tolerance, got, wanted);
  }

  double dropped(const TestMatrix<TX>& x, uint64_t seed, int64_t i, int64_t j) const {
    return threshold_ != 0 && !keeps(seed, threshold_, i, j) ? 0.0 : x.at(i, j);
  }
  DropoutSource dropout() { return {threshold_ != 0 ? seed_.to_device() : nullptr, threshold_}; }

  // Two stages: parts over K, then their sum.
  void shrink() {
    const int splits = k_ > 128 ? 2 : 1;
    TestMatrix<S> parts(splits * m_, r_, r_, 0), total(m_, r_, r_, 0);
    const LoraShrink::Adapter adapter{r_, a_.as_rows(), dropout(), 1.25, parts.to_device()};
    LoraShrink call{};
    call.types = types_;
    call.m = m_;
    call.k = k_;
    call.x = x_.as_rows();
    call.splits = splits;
    call.adapters = {&adapter, 1};
    launch_lora_shrink(call, nullptr);
    PartSum sum{};
    sum.parts = adapter.parts;
    sum.part_count = splits;
    sum.part_stride = sum.count = m_ * r_;
    sum.vector_run = 1;
    sum.vector_size = r_;
    sum.out = total.to_device();
    sum.out_dtype = std::is_same_v<S, double> ? Dtype::kFloat64 : Dtype::kFloat32;
    sum.factor = 2.0;
    sum.vector = {vector_.to_device(), types_.adapter};
    launch_sums({&sum, 1}, std::is_same_v<S, double>, nullptr);
    total.to_host();
    const uint64_t seed = static_cast<uint64_t>(seed_.host[0]);
    compare(
        "s from parts", m_, r_, tolerance(false), [&](int64_t i, int64_t r) { return total.at(i, r); },
        [&](int64_t i, int64_t r) {
          double value = 0;
          for (int64_t k = 0; k < k_; ++k) value += dropped(x_, seed, i, k) * a_.at(r, k);
          return 2.5 * vector_[r] * value;
        });
  }

  // dy against b and s, then x against s with the mask.
  void reduce() {
    LoraReduce call{};
    call.types = types_;
    call.m = m_;
    call.n = n_;
    call.x = dy_.as_rows();
    const bool with_rows = r_ <= kMaxFusedRank;
    const int64_t slabs = divide_up_to(n_, lora_slab_columns(types_, r_));
    call.range_rows = lora_range_rows(types_, m_, n_, r_, with_rows, 4);
    int64_t ranges = divide_up_to(m_, call.range_rows);
    TestMatrix<S> rows(slabs * m_, r_, r_, 0), columns(ranges * n_, r_, r_, 0);
    if (with_rows) {
      call.rows_parts = rows.to_device();
      call.c = b_.to_device();
      call.c_column_stride = b_.ld;
      call.c_rank_stride = 1;
    }
    LoraReduce::Adapter adapter{r_, s_.to_device(), {}, columns.to_device(), r_, 1};
    call.adapters = {&adapter, 1};
    launch_lora_reduce(call, nullptr);
    if (with_rows) rows.to_host();
    columns.to_host();
    const auto sum = [](const TestMatrix<S>& parts, int64_t count, int64_t stride, int64_t i, int64_t j) {
      double value = 0;
      for (int64_t part = 0; part < count; ++part) value += parts.at(part * stride + i, j);
      return value;
    };
    if (with_rows) {
      compare(
          "u from dy", m_, r_, tolerance(false), [&](int64_t i, int64_t r) { return sum(rows, slabs, m_, i, r); },
          [&](int64_t i, int64_t r) {
            double value = 0;
            for (int64_t n = 0; n < n_; ++n) value += dy_.at(i, n) * b_.at(n, r);
            return value;
          });
    }
    compare(
        "db from dy", n_, r_, tolerance(true), [&](int64_t i, int64_t r) { return sum(columns, ranges, n_, i, r); },
        [&](int64_t i, int64_t r) {
          double value = 0;
          for (int64_t m = 0; m < m_; ++m) value += dy_.at(m, i) * s_.at(m, r);
          return value;
        });

    call.n = k_;
    call.x = x_.as_rows();
    call.rows_parts = nullptr;
    call.range_rows = lora_range_rows(types_, m_, k_, r_, false, 4);
    ranges = divide_up_to(m_, call.range_rows);
    TestMatrix<S> grad_a(ranges * r_, k_, k_, 0);
    adapter = {r_, s_.to_device(), dropout(), grad_a.to_device(), 1, k_};
    launch_lora_reduce(call, nullptr);
    grad_a.to_host();
    const uint64_t seed = static_cast<uint64_t>(seed_.host[0]);
    compare(
        "da from x", r_, k_, tolerance(true), [&](int64_t r, int64_t k) { return sum(grad_a, ranges, r_, r, k); },
        [&](int64_t r, int64_t k) {
          double value = 0;
          for (int64_t m = 0; m < m_; ++m) value += dropped(x_, seed, m, k) * s_.at(m, r);
          return value;
        });
  }

  double rounding() const { return sizeof(TX) == 2 ? 1.0 / 128 : 0.0; }

  // On top of a source and a bias, in place and not.
  void expand() {
    TestMatrix<TX> out(m_, n_, n_, 0);
    const LoraExpand::Adapter adapter{
        r_, s_.to_device(), 1, m_ * r_, nullptr, 0.5, {vector_.to_device(), types_.adapter}, b_.to_device(), b_.ld,
        1,  dropout()};
    LoraExpand call{};
    call.types = types_;
    call.m = m_;
    call.n = n_;
    call.adapters = {&adapter, 1};
    call.source = dy_.as_rows();
    call.bias = bias_.to_device();
    call.out = out.to_device();
    call.ld_out = n_;
    const uint64_t seed = static_cast<uint64_t>(seed_.host[0]);
    launch_lora_expand(call, nullptr);
    out.to_host();
    compare(
        "y from s", m_, n_, tolerance(true) + rounding(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) {
          double value = 0;
          for (int r = 0; r < r_; ++r) value += 0.5 * vector_[r] * s_.at(i, r) * b_.at(j, r);
          if (threshold_ != 0 && !keeps(seed, threshold_, i, j)) value = 0;
          return value + dy_.at(i, j) + bias_[j];
        });
  }

  // y from x and s, with rows of w as they are or as columns; the mask is a backward's, where w is transposed.
  void concat(bool transposed) {
    TestMatrix<TX> s(m_, r_, r_ + shape_.extra, 21), out(m_, n_, n_, 0);
    const auto matrix = [&](int64_t rows, int64_t columns, int seed) {
      return transposed ? TestMatrix<TX>(columns, rows, rows + shape_.extra, seed)
                        : TestMatrix<TX>(rows, columns, columns + shape_.extra, seed);
    };
    TestMatrix<TX> w = matrix(n_, k_, 22), c = matrix(n_, r_, 23);
    LoraConcat call{};
    call.type = types_.data;
    call.m = m_;
    call.n = n_;
    call.k = k_;
    call.r = r_;
    call.x = x_.as_rows();
    call.s = s.as_rows();
    call.w = w.as_rows();
    call.c = c.as_rows();
    call.transposed = transposed;
    if (transposed) call.dropout = dropout();
    call.bias = bias_.to_device();
    call.out = out.to_device();
    call.ld_out = n_;
    launch_lora_concat(call, nullptr);
    out.to_host();
    const auto of = [&](const TestMatrix<TX>& from, int64_t j, int64_t i) {
      return transposed ? from.at(i, j) : from.at(j, i);
    };
    const bool drops = transposed && threshold_ != 0;
    const uint64_t seed = static_cast<uint64_t>(seed_.host[0]);
    compare(
        transposed ? "y in one product, transposed" : "y in one product", m_, n_, rounding(),
        [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) {
          double value = bias_[j];
          if (!drops || keeps(seed, threshold_, i, j)) {
            for (int r = 0; r < r_; ++r) value += s.at(i, r) * of(c, j, r);
          }
          for (int64_t k = 0; k < k_; ++k) value += x_.at(i, k) * of(w, j, k);
          return value;
        });
  }

  void decode() {
    TestMatrix<TX> out(m_, n_, n_, 0);
    TestMatrix<S> s(m_, r_, r_, 0);
    const LoraDecode::Adapter adapter{n_,
                                      r_,
                                      a_.as_rows(),
                                      b_.to_device(),
                                      b_.ld,
                                      0.5,
                                      {vector_.to_device(), types_.adapter},
                                      s.to_device(),
                                      dy_.as_rows(),
                                      out.to_device(),
                                      n_};
    const LoraDecode call{types_, m_, k_, x_.as_rows(), {&adapter, 1}};
    launch_lora_decode(call, nullptr);
    s.to_host();
    out.to_host();
    const auto expected = [&](int64_t i, int64_t r) {
      double value = 0;
      for (int64_t k = 0; k < k_; ++k) value += x_.at(i, k) * a_.at(r, k);
      return value;
    };
    compare("decode: s", m_, r_, tolerance(false), [&](int64_t i, int64_t r) { return s.at(i, r); }, expected);
    compare(
        "decode: y", m_, n_, tolerance(true) + rounding(), [&](int64_t i, int64_t j) { return out.at(i, j); },
        [&](int64_t i, int64_t j) {
          double value = dy_.at(i, j);
          for (int r = 0; r < r_; ++r) value += 0.5 * vector_[r] * expected(i, r) * b_.at(j, r);
          return value;
        });

    const TX finite = x_.host[0];
    x_.host[0] = from_double<TX>(std::numeric_limits<double>::infinity());
    x_.to_device();
    launch_lora_decode(call, nullptr);
    out.to_host();
    bool same = true;  // an infinity, or NaN where its terms have either sign
    for (int64_t j = 0; j < n_; ++j) {
      double value = 0;
      for (int r = 0; r < r_; ++r) value += vector_[r] * expected(0, r) * b_.at(j, r);
      same = same && (std::isnan(value) ? std::isnan(out.at(0, j)) : out.at(0, j) == value);
    }
    check(same, name_ + ": decode: an infinity in x");
    x_.host[0] = finite;
    x_.to_device();
  }

  std::string name_;
  KernelTypes types_;
  Shape shape_;
  int64_t m_, k_, n_;
  int r_;
  uint32_t threshold_;
  DeviceArray<int64_t> seed_;
  TestMatrix<TX> x_;
  TestMatrix<TC> a_, b_;
  TestMatrix<TX> dy_;
  TestVector<TX> bias_;
  TestVector<TC> vector_;
  TestMatrix<S> s_;
};

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  const Shape shapes[] = {
      {65, 136, 72, 8, 0.1, 0, false},    // rows of 16-byte copies, two blocks of rows
      {37, 301, 531, 17, 0.5, 3, false},  // nothing divides, more than one slab
      {3, 128, 40, 3, 0.0, 8, false},     // a few rows: decode
      {50, 200, 130, 16, 0.0, 0, false},  // decode in four blocks of rows
      {20, 150, 64, 70, 0.2, 0, false},   // more ranks than a block has
  };
  for (const Shape& shape : shapes) run_with_all_types<Test>(shape);
  run_with_types<Test>("fp32 as TF32", Dtype::kFloat32, Dtype::kFloat32, Shape{37, 301, 131, 17, 0.5, 3, true});
  return exit_status();
}
