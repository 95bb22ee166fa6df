// A thread block as fibers: each CUDA thread runs until it waits for others, then one of those that can go on is taken
// at random. Barriers and warp operations that can never complete are errors that say who waits where.
#pragma once

#include <vector_types.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#include "fiber.h"

namespace pyfused::emulation {

constexpr unsigned kWarp = 32;
constexpr size_t kSharedLimit = 163 * 1024;  // what a block may have on an A100

using Where = std::source_location;

inline std::string describe(const char* operation, const Where& where) {
  return std::string(operation) + " in " + where.file_name() + ":" + std::to_string(where.line());
}

[[noreturn]] inline void fail(const std::string& problem) { throw std::runtime_error(problem); }

struct Copy {  // a cp.async under way
  void* to;
  const void* from;
  int bytes, group;
};

struct Thread {
  Context* context = nullptr;
  uint3 index{};
  unsigned linear = 0;
  const char* operation = nullptr;  // what it waits for
  Where where;
  bool ended = false;
  std::vector<Copy> copies;
  int groups = 0;
};

// Threads that wait together.
struct Meeting {
  unsigned arrived = 0;
  const char* operation = nullptr;
  Where where;
};

struct Warp : Meeting {
  void* operands[kWarp] = {};
};

// One at a time in a process: the fibers find theirs through `running`.
class Block {
 public:
  Block(dim3 grid, dim3 block, size_t shared_bytes, uint64_t seed, std::function<void()> body)
      : grid_dim(grid), block_dim(block), body_(std::move(body)), random_(seed * 2 + 1) {
    const size_t threads = size_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > 65535 ||
        grid.z == 0 || grid.z > 65535) {
      fail("no valid grid and block: " + text(grid) + ", " + text(block));
    }
    if (shared_bytes > kSharedLimit) {
      fail(std::to_string(shared_bytes) + " bytes of shared memory, and an A100 has " + std::to_string(kSharedLimit));
    }
    shared_bytes_ = shared_bytes;
    void* memory = nullptr;  // exactly as large as asked for, so that AddressSanitizer knows its end
    if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1)) != 0) throw std::bad_alloc();
    shared_.reset(static_cast<unsigned char*>(memory));
    threads_.resize(threads);
    warps_.resize((threads + kWarp - 1) / kWarp);
    while (fibers_.size() < threads) fibers_.emplace_back(fibers_.size(), &run_thread);
    for (size_t i = 0; i < threads; ++i) threads_[i].context = &fibers_[i].context;
#if defined(__SANITIZE_THREAD__)
    host_.fiber = __tsan_get_current_fiber();
#endif
  }

  // Runs one block from its start to the end of all its threads.
  void run(uint3 index) {
    begin(index);
    released(&current);
    switch_context(host_, *current->context);
    acquired(&host_);
    running = nullptr;
    current = nullptr;
    if (failure_ || ended_ != threads_.size()) fibers_.clear();  // they stand in the middle of the kernel
    if (failure_) std::rethrow_exception(failure_);
    if (ended_ != threads_.size()) fail(who_waits());
  }

  // __syncthreads.
  void meet_all(const char* operation, const Where& where) {
    released(&barrier_);
    {
      const SchedulerScope scope;
      arrive(barrier_, operation, where);
      if (barrier_.arrived == threads_.size()) {
        barrier_.arrived = 0;
        for (Thread& thread : threads_) ready_.push_back(&thread);
      }
    }
    go_on();
    acquired(&barrier_);
  }

  // An operation of all lanes of a warp: the last one that arrives runs `compute` on what the lanes brought, null where
  // a block has no such lane. As on a GPU, only __syncwarp (ordered) makes the lanes see each other's memory.
  void meet_warp(const char* operation, const Where& where, void* operand, void (*compute)(void* const*),
                 bool ordered) {
    Warp& warp = warps_[current->linear / kWarp];
    if (ordered) released(&warp);
    {
      const SchedulerScope scope;
      const unsigned first = current->linear / kWarp * kWarp;
      const unsigned lanes = std::min<unsigned>(kWarp, static_cast<unsigned>(threads_.size()) - first);
      arrive(warp, operation, where);
      warp.operands[current->linear % kWarp] = operand;
      if (warp.arrived == lanes) {
        warp.arrived = 0;
        if (compute != nullptr) compute(warp.operands);
        for (unsigned i = 0; i < lanes; ++i) ready_.push_back(&threads_[first + i]);
      }
    }
    go_on();
    if (ordered) acquired(&warp);
  }

  unsigned char* shared() const { return shared_.get(); }

  dim3 grid_dim, block_dim;
  uint3 block_index{};

  static inline Block* running = nullptr;
  static inline Thread* current = nullptr;

 private:
  struct Free {
    void operator()(unsigned char* memory) const { std::free(memory); }
  };

  static std::string text(dim3 size) {
    return "(" + std::to_string(size.x) + ", " + std::to_string(size.y) + ", " + std::to_string(size.z) + ")";
  }

  void begin(uint3 index) {
    block_index = index;
    std::memset(shared_.get(), 0xff, shared_bytes_);  // NaN in every type
    ended_ = 0;
    failure_ = nullptr;
    barrier_ = {};
    std::fill(warps_.begin(), warps_.end(), Warp{});
    ready_.clear();
    for (unsigned i = 0; i < threads_.size(); ++i) start(i);
    running = this;
    current = take();
  }

  void start(unsigned linear) {
    Thread& thread = threads_[linear];
    thread.linear = linear;
    thread.index = {linear % block_dim.x, linear / block_dim.x % block_dim.y, linear / (block_dim.x * block_dim.y)};
    thread.ended = false;
    thread.copies.clear();
    thread.groups = 0;
    ready_.push_back(&thread);
  }

  // The whole life of a fiber: one thread of every block of every grid.
  static void run_thread() {
    acquired(&current);
    arrived(*current->context);
    for (;;) running->run_body();
  }

  void run_body() {
    acquired(&current);  // all that the host did
    std::exception_ptr failure;
    try {
      body_();
    } catch (...) {
      failure = std::current_exception();
    }
    {
      const SchedulerScope scope;
      if (failure) failure_ = std::move(failure);
      current->ended = true;
      ++ended_;
    }
    go_on();
    acquired(&current);  // the host again, with the next block, maybe of another grid: this object may be gone
  }

  // Notes that this thread waits; the others that meet must have come to the same operation.
  void arrive(Meeting& meeting, const char* operation, const Where& where) {
    current->operation = operation;
    current->where = where;
    if (meeting.arrived++ == 0) {
      meeting.operation = operation;
      meeting.where = where;
    } else if (meeting.operation != operation || meeting.where.line() != where.line() ||
               meeting.where.column() != where.column()) {
      fail("threads that must wait at one place wait at two: " + describe(meeting.operation, meeting.where) + " and " +
           describe(operation, where));
    }
  }

  // Runs another thread until this one is taken again; the host, where none can run.
  void go_on() {
    released(&host_);  // the host alone comes after all of this, in whatever state the threads are left
    Context *self, *next;
    {
      const SchedulerScope scope;
      self = current->context;
      const bool stop = failure_ || ready_.empty();
      current = stop ? nullptr : take();
      next = stop ? &host_ : current->context;
    }
    if (next != self) switch_context(*self, *next);
  }

  Thread* take() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    const size_t i = (random_ >> 32) * ready_.size() >> 32;
    std::swap(ready_[i], ready_.back());
    Thread* thread = ready_.back();
    ready_.pop_back();
    return thread;
  }

  std::string who_waits() const {
    std::map<std::string, int> waiting;
    for (const Thread& thread : threads_) {
      if (!thread.ended) ++waiting[describe(thread.operation, thread.where)];
    }
    std::string problem = "threads wait for ever: " + std::to_string(ended_) + " have ended";
    for (const auto& [place, count] : waiting) problem += ", " + std::to_string(count) + " wait at " + place;
    return problem;
  }

  std::function<void()> body_;
  uint64_t random_;
  size_t shared_bytes_ = 0;
  std::unique_ptr<unsigned char[], Free> shared_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Meeting barrier_;
  std::vector<Thread*> ready_;
  Context host_;
  std::exception_ptr failure_;
  size_t ended_ = 0;

  static inline std::deque<Fiber> fibers_;  // kept for the next launch
};

inline uint64_t seed() {
  const char* text = std::getenv("PYFUSED_EMULATION_SEED");
  return text == nullptr ? 1 : std::strtoull(text, nullptr, 10);
}

// Runs the blocks of a grid one after another, in an order that depends on the seed.
inline void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  std::string at;
  try {
    Block runner(grid, block, shared_bytes, seed(), std::move(body));
    const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
    const uint64_t first = seed() * 0x9e3779b97f4a7c15u % blocks;
    for (uint64_t i = 0; i < blocks; ++i) {
      const uint64_t block_number = (i + first) % blocks;
      const uint3 index{static_cast<unsigned>(block_number % grid.x),
                        static_cast<unsigned>(block_number / grid.x % grid.y),
                        static_cast<unsigned>(block_number / grid.x / grid.y)};
      at =
          ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
      runner.run(index);
    }
  } catch (const std::exception& error) {
    throw std::runtime_error("emulated kernel " + std::string(name) + at + ": " + error.what());
  }
}

}  // namespace pyfused::emulation
