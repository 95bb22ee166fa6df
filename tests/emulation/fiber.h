// Fibers: stacks of their own on one OS thread, switched by hand. On x86-64 a switch is a dozen instructions; elsewhere
// ucontext does it, with a system call each time. AddressSanitizer and ThreadSanitizer are told of every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if !defined(__x86_64__) || defined(PYFUSED_EMULATION_UCONTEXT)
#define PYFUSED_EMULATION_USES_UCONTEXT
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>

// ThreadSanitizer then looks at no plain access of the running fiber, and again at all.
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

namespace pyfused::emulation {

// The scheduler's own data is shared by all fibers on purpose: within a scope of this, it is no race. A scope ends
// before another fiber runs.
class SchedulerScope {
 public:
#if defined(__SANITIZE_THREAD__)
  SchedulerScope() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~SchedulerScope() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  SchedulerScope() {}
#endif
  SchedulerScope(const SchedulerScope&) = delete;
  SchedulerScope& operator=(const SchedulerScope&) = delete;
};

// What one fiber did before released(tag) comes before what another does after acquired(tag).
inline void released([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
}
inline void acquired([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
}

// Memory for one stack, with a page below it that traps an overflow. Stacks begin at different lines of their pages:
// at the same one, a block's threads would push each other out of the cache.
class Stack {
 public:
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
  static constexpr size_t kBytes = 512 * 1024;
#else
  static constexpr size_t kBytes = 128 * 1024;
#endif

  explicit Stack(size_t number) : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))), skew_(number * 64 % page_) {
    void* memory = mmap(nullptr, page_ + kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
    mprotect(memory_, page_, PROT_NONE);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(memory_, page_ + kBytes); }
  char* bottom() const { return memory_ + page_; }
  size_t bytes() const { return kBytes - skew_; }

 private:
  size_t page_, skew_;
  char* memory_;
};

// Where an execution stands that does not run: a fiber's, or the one of the OS thread that started the fibers.
struct Context {
#if defined(PYFUSED_EMULATION_USES_UCONTEXT)
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  size_t bytes = 0;
  void* fake_stack = nullptr;
#endif
#if defined(__SANITIZE_THREAD__)
  void* fiber = nullptr;
#endif
};

#if !defined(PYFUSED_EMULATION_USES_UCONTEXT)
// Saves what a call must preserve on the running stack, and the place in *save; goes on from the place in *load.
__attribute__((naked, noinline, no_sanitize("address", "thread", "undefined"))) inline void swap_stacks(void** save,
                                                                                                        void** load) {
  (void)save, (void)load;
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq (%rsi), %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret)");
}
#endif

#if defined(__SANITIZE_ADDRESS__)
// The context that was left last; one per process, since launches run one at a time.
inline Context* left = nullptr;
#endif

// To be called first on the stack that a switch leads to.
inline void arrived([[maybe_unused]] Context& self) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(self.fake_stack, &left->bottom, &left->bytes);
#endif
}

// Goes on with `to`; returns when something switches back to `from`.
inline void switch_context(Context& from, Context& to) {
#if defined(__SANITIZE_ADDRESS__)
  left = &from;
  __sanitizer_start_switch_fiber(&from.fake_stack, to.bottom, to.bytes);
#endif
#if defined(__SANITIZE_THREAD__)
  void* fiber;
  {
    const SchedulerScope scope;
    fiber = to.fiber;
  }
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(PYFUSED_EMULATION_USES_UCONTEXT)
  swapcontext(&from.registers, &to.registers);
#else
  swap_stacks(&from.stack_pointer, &to.stack_pointer);
#endif
  arrived(from);
}

// Makes `context` the start of entry() on the stack; entry calls arrived() first, and never returns.
inline void prepare(Context& context, const Stack& stack, void (*entry)()) {
#if defined(PYFUSED_EMULATION_USES_UCONTEXT)
  getcontext(&context.registers);
  context.registers.uc_stack.ss_sp = stack.bottom();
  context.registers.uc_stack.ss_size = stack.bytes();
  context.registers.uc_link = nullptr;
  makecontext(&context.registers, entry, 0);
#else
  // what swap_stacks pops: six registers and where to go; above, the address that entry would return to
  void** top = reinterpret_cast<void**>(stack.bottom() + stack.bytes());
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
#endif
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack.bottom(), Stack::kBytes);  // of another stack's frames that were left for good
  context.bottom = stack.bottom();
  context.bytes = stack.bytes();
  context.fake_stack = nullptr;
#endif
}

// A stack with what runs on it, or waits to.
struct Fiber {
  Stack stack;
  Context context;

  Fiber(size_t number, void (*entry)()) : stack(number) {
    prepare(context, stack, entry);
#if defined(__SANITIZE_THREAD__)
    context.fiber = __tsan_create_fiber(0);
#endif
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
#if defined(__SANITIZE_THREAD__)
  ~Fiber() { __tsan_destroy_fiber(context.fiber); }
#endif
};

}  // namespace pyfused::emulation
