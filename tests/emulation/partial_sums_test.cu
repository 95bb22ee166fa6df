// What sums are cut into, over many sizes and GPUs: enough parts to fill the GPU, and no more memory for them than a
// fixed share of what the pass reads. On the host alone.
#include <cstdio>
#include <string>

#include "checks.h"
#include "dispatch.cuh"
#include "lora.h"

namespace pyfused {
namespace {

constexpr int64_t kSizes[] = {1, 17, 64, 100, 512, 1000, 1024, 4096, 4100, 14336, 28672};
constexpr int64_t kRowCounts[] = {1, 31, 64, 500, 2048, 2049, 8192, 40000, 131072, 1000000, 200000000};
constexpr int kRankCounts[] = {1, 4, 8, 15, 16, 17, 32, 33, 64, 128, 200, 256};
constexpr int kMultiprocessors[] = {1, 4, 46, 108, 132, 144};
constexpr KernelTypes kTypes[] = {{Dtype::kBFloat16, Dtype::kBFloat16, false},
                                  {Dtype::kBFloat16, Dtype::kFloat32, false},
                                  {Dtype::kFloat32, Dtype::kFloat32, false},
                                  {Dtype::kFloat64, Dtype::kFloat64, false}};

int64_t size_of_sums(KernelTypes types) { return types.data == Dtype::kFloat64 ? 8 : 4; }

struct Call {
  KernelTypes types;
  int64_t m, n;
  int r, multiprocessors;

  std::string text() const {
    return "M=" + std::to_string(m) + " N=" + std::to_string(n) + " r=" + std::to_string(r) + " on " +
           std::to_string(multiprocessors) + " multiprocessors, " + std::to_string(size_of(types.data)) + " bytes";
  }
  int64_t x_bytes() const { return m * n * size_of(types.data); }
};

// Says which call broke a rule first, and counts the calls.
class Rule {
 public:
  explicit Rule(const char* name) : name_(name) {}
  void hold(bool holds, const Call& call) {
    ++calls_;
    if (!holds && broken_.empty()) broken_ = call.text();
  }
  void report() const {
    check(broken_.empty() && calls_ > 0,
          name_ + (broken_.empty() ? ", " + std::to_string(calls_) + " calls" : ": " + broken_));
  }

 private:
  std::string name_, broken_;
  int64_t calls_ = 0;
};

template <class F>
void for_all_calls(const F& run) {
  for (const KernelTypes types : kTypes) {
    for (const int64_t m : kRowCounts) {
      for (const int64_t n : kSizes) {
        for (const int r : kRankCounts) {
          for (const int multiprocessors : kMultiprocessors) run(Call{types, m, n, r, multiprocessors});
        }
      }
    }
  }
}

// Over rows: the parts of da and db.
void test_ranges() {
  Rule tiles("ranges are whole tiles of 32 rows"), grid("no more ranges than a grid has rows of blocks"),
      accurate("no sum runs over more than 2048 rows, as far as the grid allows"),
      bounded("parts over rows: one, an eighth of x's bytes, or one for each 2048 rows"),
      absolute("parts over rows: a quarter of x's bytes, where there are several, up to 128 ranks in 16 bits"),
      filled("no more blocks than two for each multiprocessor, or what accuracy takes");
  for_all_calls([&](const Call& call) {
    for (const bool with_rows : {false, true}) {
      if (with_rows && call.r > kMaxFusedRank) continue;
      const int64_t rows = lora_range_rows(call.types, call.m, call.n, call.r, with_rows, call.multiprocessors);
      const int64_t ranges = divide_up_to(call.m, rows), for_accuracy = divide_up_to<int64_t>(call.m, 2048);
      const int64_t bytes = ranges * call.n * call.r * size_of_sums(call.types);
      const int64_t slabs = divide_up_to(call.n, lora_slab_columns(call.types, call.r)) *
                            (with_rows ? 1 : divide_up_to(call.r, kMaxFusedRank));
      tiles.hold(rows >= 32 && rows % 32 == 0, call);
      grid.hold(ranges <= 65535, call);
      accurate.hold(rows <= 2048 || for_accuracy > 65535 / 2, call);
      bounded.hold(ranges == 1 || ranges <= for_accuracy || bytes * 8 <= call.x_bytes(), call);
      if (call.r <= 128) absolute.hold(ranges == 1 || bytes * 4 <= call.x_bytes(), call);
      filled.hold(ranges == 1 || ranges <= for_accuracy || ranges * slabs <= 2 * call.multiprocessors, call);
    }
  });
  for (const Rule* rule : {&tiles, &grid, &accurate, &bounded, &absolute, &filled}) rule->report();
}

// Over columns of dy: the parts of u.
void test_slabs() {
  Rule bounded("parts over columns: one, or a quarter of dy's bytes");
  for_all_calls([&](const Call& call) {
    if (call.r > kMaxFusedRank) return;
    const int64_t slabs = divide_up_to(call.n, lora_slab_columns(call.types, call.r));
    const int64_t bytes = (slabs - 1) * call.m * call.r * size_of_sums(call.types);
    bounded.hold(bytes * 4 <= call.x_bytes(), call);
  });
  bounded.report();
}

// Over K: the parts of s.
void test_splits() {
  Rule few("one to 32 splits"), filled("no more blocks than multiprocessors, where there are several splits"),
      deep("each split has four stages of 128 columns, or all"),
      bounded("parts over K: one, or 64 x 64 sums for each multiprocessor");
  for_all_calls([&](const Call& call) {
    const int64_t splits = lora_shrink_splits(call.m, call.n, call.r, call.multiprocessors);
    const int64_t blocks = divide_up_to<int64_t>(call.m, 64) * divide_up_to(call.r, 64);
    few.hold(splits >= 1 && splits <= 32, call);
    filled.hold(splits == 1 || splits * blocks <= call.multiprocessors, call);
    deep.hold(splits == 1 || divide_up_to(divide_up_to<int64_t>(call.n, 128), splits) >= 4, call);
    const int64_t sums = splits * call.m * call.r;
    bounded.hold(splits == 1 || sums <= int64_t{64} * 64 * call.multiprocessors, call);
  });
  for (const Rule* rule : {&few, &filled, &deep, &bounded}) rule->report();
}

}  // namespace
}  // namespace pyfused

int main() {
  using namespace pyfused;
  test_ranges();
  test_slabs();
  test_splits();
  // the case that the bound was set for: all parts of da and db of a layer, at most 32 for each slab of columns
  const KernelTypes bf16{Dtype::kBFloat16, Dtype::kBFloat16, false};
  check(divide_up_to<int64_t>(8192, lora_range_rows(bf16, 8192, 4096, 16, true, 132)) <= 32,
        "8192 x 4096 in bf16, r = 16, 132 multiprocessors: at most 32 parts");
  return exit_status();
}
