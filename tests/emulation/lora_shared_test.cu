// LoRA's launchers on several adapters of one x, each with a rank, a seed and a dropout of its own: every result has
// the bits that it has alone, and dx is the sum of all shares. What they compute alone is lora_test.cu's business.
#include <memory>
#include <string>
#include <vector>

#include "launcher_test.h"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int kAdapters = 4;

struct Shape {
  int64_t m, k;
  int ranks[kAdapters];
  double dropout;
  int64_t extra;  // elements after each row of x: an odd number rules 16-byte copies out
};

template <class T>
bool same_bits(TestMatrix<T>& one, TestMatrix<T>& other) {
  one.to_host();
  other.to_host();
  for (int64_t i = 0; i < one.rows; ++i) {  // what lies between the rows is not theirs
    const size_t bytes = static_cast<size_t>(one.columns) * sizeof(T);
    if (std::memcmp(&one.host[i * one.ld], &other.host[i * other.ld], bytes) != 0) return false;
  }
  return true;
}

template <class TX, class TC>
class Test {
 public:
  using S = Sum<Compute<TX, TC>>;

  Test(const char* name, KernelTypes types, const Shape& shape)
      : name_(std::string(name) + " M=" + std::to_string(shape.m) + " K=" + std::to_string(shape.k)),
        types_(types),
        shape_(shape),
        m_(shape.m),
        k_(shape.k),
        x_(m_, k_, k_ + shape.extra, 1),
        seeds_(kAdapters) {
    for (int i = 0; i < kAdapters; ++i) {
      members_.push_back(std::make_unique<Member>(*this, i));
      seeds_.host[i] = static_cast<int64_t>(members_[i]->seed);
    }
  }

  void run() {
    shrink();
    reduce();
    expand();
    if (shape_.dropout == 0) decode();
  }

 private:
  static constexpr int64_t kRangeRows = 32;

  // One adapter; two of each result, in company and alone.
  struct Member {
    int r;
    int64_t n;
    uint32_t threshold;
    uint64_t seed;
    TestMatrix<TC> a, b;
    TestMatrix<S> ds;
    TestMatrix<TX> y;

    Member(const Test& test, int i)
        : r(test.shape_.ranks[i]),
          n(60 + 70 * i),  // one to three blocks of columns
          threshold(i == 1 ? 0 : drop_threshold(test.shape_.dropout / (i + 1))),
          seed(71 + i),
          a(r, test.k_, test.k_ + test.shape_.extra, 11 + i),
          b(n, r, r + test.shape_.extra, 21 + i),
          ds(test.m_, r, r, 31 + i),
          y(test.m_, n, n + test.shape_.extra, 41 + i) {}
  };

  DropoutSource dropout(int i) {
    const uint32_t threshold = members_[i]->threshold;
    return {threshold == 0 ? nullptr : seeds_.to_device() + i, threshold};
  }
  double masked(const Member& one, int64_t m, int64_t k, double value) const {
    return one.threshold != 0 && !keeps(one.seed, one.threshold, m, k) ? 0.0 : value;
  }

  // launch(adapters) with all of them, then with each; adapter(i, result) makes one from where its result goes.
  template <class Adapter, class T, class Make, class Launch>
  void hold(const std::string& what, const std::vector<std::unique_ptr<TestMatrix<T>>>& together,
            const std::vector<std::unique_ptr<TestMatrix<T>>>& alone, const Make& make, const Launch& launch) {
    std::vector<Adapter> adapters;
    for (int i = 0; i < kAdapters; ++i) adapters.push_back(make(i, together[i]->to_device()));
    launch(adapters);
    for (int i = 0; i < kAdapters; ++i) {
      const std::vector<Adapter> one{make(i, alone[i]->to_device())};
      launch(one);
      check(same_bits(*together[i], *alone[i]), name_ + ": the bits of " + what + ", adapter " + std::to_string(i));
    }
  }
  template <class T, class Size>
  std::vector<std::unique_ptr<TestMatrix<T>>> results(const Size& size) {
    std::vector<std::unique_ptr<TestMatrix<T>>> made;
    for (int i = 0; i < kAdapters; ++i) {
      const auto [rows, columns] = size(*members_[i]);
      made.push_back(std::make_unique<TestMatrix<T>>(rows, columns, columns, 0));
    }
    return made;
  }

  void shrink() {
    const auto size = [&](const Member& one) { return std::pair(m_, int64_t{one.r}); };
    hold<LoraShrink::Adapter, S>(
        "s", results<S>(size), results<S>(size),
        [&](int i, S* s) {
          return LoraShrink::Adapter{members_[i]->r, members_[i]->a.as_rows(), dropout(i), 1.0 + i, s};
        },
        [&](const std::vector<LoraShrink::Adapter>& adapters) {
          launch_lora_shrink({types_, m_, k_, x_.as_rows(), 1, adapters}, nullptr);
        });
  }

  void reduce() {
    const int64_t ranges = divide_up_to(m_, kRangeRows);
    const auto size = [&](const Member& one) { return std::pair(ranges * one.r, k_); };
    hold<LoraReduce::Adapter, S>(
        "da", results<S>(size), results<S>(size),
        [&](int i, S* grad_a) {
          return LoraReduce::Adapter{members_[i]->r, members_[i]->ds.to_device(), dropout(i), grad_a, 1, k_};
        },
        [&](const std::vector<LoraReduce::Adapter>& adapters) {
          launch_lora_reduce({types_, m_, k_, x_.as_rows(), kRangeRows, adapters, nullptr, nullptr, 0, 0}, nullptr);
        });
  }

  void expand() {
    std::vector<LoraExpand::Adapter> shares;
    for (int i = 0; i < kAdapters; ++i) {
      Member& one = *members_[i];
      shares.push_back({one.r, one.ds.to_device(), 1, 0, nullptr, 1.0, {}, one.a.to_device(), 1, one.a.ld, dropout(i)});
    }
    TestMatrix<TX> grad_x(m_, k_, k_, 0);
    launch_lora_expand({types_, m_, k_, shares, x_.as_rows(), nullptr, grad_x.to_device(), k_}, nullptr);
    grad_x.to_host();
    const double tolerance = std::is_same_v<S, double> ? 1e-13 : sizeof(TX) == 2 ? 0.03 : 3e-6;
    compare(
        name_ + ": dx of four", m_, k_, tolerance, [&](int64_t m, int64_t k) { return grad_x.at(m, k); },
        [&](int64_t m, int64_t k) {
          double value = x_.at(m, k);
          for (const auto& one : members_) {
            double share = 0;
            for (int r = 0; r < one->r; ++r) share += one->ds.at(m, r) * one->a.at(r, k);
            value += masked(*one, m, k, share);
          }
          return value;
        });
  }

  // Both results of a call, s and y.
  void decode() {
    const auto size_of_s = [&](const Member& one) { return std::pair(m_, int64_t{one.r}); };
    const auto size_of_y = [&](const Member& one) { return std::pair(m_, one.n); };
    auto s_together = results<S>(size_of_s), s_alone = results<S>(size_of_s);
    auto* s = &s_together;
    hold<LoraDecode::Adapter, TX>(
        "y of a few rows", results<TX>(size_of_y), results<TX>(size_of_y),
        [&](int i, TX* y) {
          Member& one = *members_[i];
          return LoraDecode::Adapter{one.n,   one.r, one.a.as_rows(),      one.b.to_device(), one.b.ld,
                                     0.5 + i, {},    (*s)[i]->to_device(), one.y.as_rows(),   y,
                                     one.n};
        },
        [&](const std::vector<LoraDecode::Adapter>& adapters) {
          launch_lora_decode({types_, m_, k_, x_.as_rows(), adapters}, nullptr);
          s = &s_alone;  // from the second launch on
        });
    for (int i = 0; i < kAdapters; ++i) {
      check(same_bits(*s_together[i], *s_alone[i]), name_ + ": the bits of its s, adapter " + std::to_string(i));
    }
  }

  std::string name_;
  KernelTypes types_;
  Shape shape_;
  int64_t m_, k_;
  TestMatrix<TX> x_;
  DeviceArray<int64_t> seeds_;
  std::vector<std::unique_ptr<Member>> members_;
};

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  // Nothing divides; blocks of their own, one adapter with two. Then, where kernels differ by type: two blocks and two
  // ranges of rows, one block for several; decode, in two blocks of rows and both kinds of ranks.
  run_with_all_types<Test>(Shape{37, 301, {17, 5, 40, 3}, 0.5, 3});
  for (const Shape& shape : {Shape{65, 136, {16, 5, 12, 16}, 0.2, 0}, Shape{18, 150, {3, 16, 17, 64}, 0.0, 8}}) {
    run_with_types<Test>("bf16", Dtype::kBFloat16, Dtype::kBFloat16, shape);
    run_with_types<Test>("bf16+fp32", Dtype::kBFloat16, Dtype::kFloat32, shape);
    run_with_types<Test>("fp32", Dtype::kFloat32, Dtype::kFloat32, shape);
  }
  return exit_status();
}
