// Checks at the native boundary: whatever would be unsafe in memory. Python's functional layer has checked before and
// raises TypeError or ValueError; what is caught here is a raw op called by hand.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

// What was wrong with the last call in this thread, which torch keeps from 2.13 on, and before wrote to stderr.
extern "C" __attribute__((weak, visibility("default"))) const char* torch_exception_get_what_without_backtrace();

namespace pyfused {

inline std::string shape_of(const torch::stable::Tensor& tensor) {
  std::ostringstream out;
  out << '[';
  for (int64_t i = 0; i < tensor.dim(); ++i) out << (i ? ", " : "") << tensor.size(i);
  out << ']';
  return out.str();
}

template <class Expected, class Got>
[[noreturn]] void fail(const char* op, const char* argument, const Expected& expected, const Got& got) {
  std::ostringstream out;
  out << op << ": " << argument << " must " << expected << ", got " << got;
  throw std::runtime_error(out.str());
}

// A call of torch's C functions failed: "pyfused: torch's matrix product failed: <torch's own sentence>". Memory that
// does not suffice is most of it, and who handles that looks for torch's words. before_2_13: in place of them.
[[noreturn]] inline void fail_in_torch(const std::string& what, const char* before_2_13) {
  const bool has_sentence = torch_exception_get_what_without_backtrace != nullptr;
  throw std::runtime_error("pyfused: " + what + ": " +
                           (has_sentence ? torch_exception_get_what_without_backtrace() : before_2_13));
}
[[noreturn]] inline void fail_in_torch(const std::string& what) { fail_in_torch(what, "torch's message is above"); }

}  // namespace pyfused

// "lora_linear: a must have shape [8, 64], got [8, 32]". Not STD_TORCH_CHECK: that puts the build's paths into
// messages.
#define PF_CHECK(condition, op, argument, expected, got)            \
  do {                                                              \
    if (!(condition)) ::pyfused::fail(op, argument, expected, got); \
  } while (false)
