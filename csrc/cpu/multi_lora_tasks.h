// How a call of multi_lora on CPU is cut into tasks and shared out among threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "../common/multi_lora.h"
#include "lora.h"

namespace pyfused {

// What it costs to read an element of an adapter, in multiply-adds: of a few rows' time most is that of memory which
// nobody has read for a while.
inline constexpr int64_t kReadCost = 4;
// From this cost on other threads are woken.
inline constexpr int64_t kParallelCost = 1 << 17;

// One adapter as the loops read it.
struct Adapter : TableEntry {
  Dropout dropout{0, 0};
  double dropout_scale = 1.0;

  using TableEntry::TableEntry;
  explicit Adapter(const TableEntry& entry) : TableEntry(entry) {}
  Adapter(const TableEntry& entry, const Lora& checked)
      : TableEntry(entry), dropout(checked.mask.dropout), dropout_scale(checked.dropout_scale) {}
};

// Some rows of a group, in one slice.
struct Task {
  size_t slice;
  int64_t group_begin, first, count;  // rows[group_begin + first], ...
  const Adapter* adapter;

  int64_t cost() const { return adapter->R * (adapter->K + adapter->N) * (kReadCost + count); }
};

// Puts the rows of s that are not all zero, and their places, before the others; how many they are.
template <class Acc>
int64_t drop_zeros(const int64_t* rows, Acc* s, int64_t count, int64_t R, int64_t* kept_rows) {
  int64_t kept = 0;
  for (int64_t i = 0; i < count; ++i) {
    const Acc* from = s + i * R;
    if (std::all_of(from, from + R, [](Acc value) { return value == 0; })) continue;
    if (kept != i) std::copy(from, from + R, s + kept * R);
    kept_rows[kept++] = rows[i];
  }
  return kept;
}

// Tasks shared out among threads. Each thread has a part of its own, the same in every call with such a batch, so that
// it finds in its caches what it read the last time; whoever is done takes what others have left.
class Parts {
 public:
  explicit Parts(const std::vector<Task>& tasks) : tasks_(tasks), parts_(count_of(tasks)) {
    int64_t total = 0, before = 0, last = -1;
    for (const Task& task : tasks) total += task.cost();
    for (size_t i = 0; i < tasks.size(); ++i) {
      const int64_t part = before * static_cast<int64_t>(parts_.size()) / total;
      while (last < part) parts_[++last].next = i;
      parts_[part].end = i + 1;
      before += tasks[i].cost();
    }
  }

  // On each thread work(each), where each(run) calls run(task) for its tasks.
  template <class F>
  void run(const F& work) {
    const auto some = [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        work([&](const auto& run) {
          for (size_t turn = 0; turn < parts_.size(); ++turn) {
            Part& from = parts_[(part + turn) % parts_.size()];
            for (size_t i; (i = from.next.fetch_add(1, std::memory_order_relaxed)) < from.end;) {
              run(tasks_[i]);
            }
          }
        });
      }
    };
    if (parts_.size() == 1) return some(0, 1);
    torch::stable::parallel_for(0, static_cast<int64_t>(parts_.size()), 1, some);
  }

 private:
  struct Part {
    std::atomic<size_t> next = 0;
    size_t end = 0;
  };
  const std::vector<Task>& tasks_;
  std::vector<Part> parts_;

  static size_t count_of(const std::vector<Task>& tasks) {
    int64_t total = 0;
    for (const Task& task : tasks) total += task.cost();
    return total < kParallelCost ? 1 : std::min<size_t>(tasks.size(), torch::stable::get_num_threads());
  }
};

}  // namespace pyfused
