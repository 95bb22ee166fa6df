// The emulation must find what it is for: kernels with one fault each. Without arguments all faults that are errors or
// wrong results; "race" and "bounds" are for builds with ThreadSanitizer and AddressSanitizer, which end the program.
#include <cmath>
#include <cstdlib>
#include <string>

#include "checks.h"
#include "device_array.h"
#include "platform.cuh"

namespace pyfused {
namespace {

enum Fault {
  kNone,
  kNoBarrier,    // others' numbers are read before a __syncthreads
  kNoWait,       // a copy is read before a cp_async_wait
  kEarlyExit,    // one thread returns before a barrier
  kTwoBarriers,  // threads wait at different barriers
  kTwoShuffles,  // the lanes of a warp wait at different shuffles
  kHalfWarp,     // only some lanes reach a tensor-core instruction
  kMask,         // a shuffle for some of the lanes
  kMisaligned,   // an asynchronous copy from an odd address
  kRaceInWarp,   // a shuffle is taken for a barrier
  kOutOfBounds,  // one element after the end is written
};

constexpr int kThreads = 64;

__global__ void reverse(Fault fault, const float* x, float* y) {
  PF_DYN_SMEM(float, shared);
  const int thread = threadIdx.x;
  if (thread % 4 == 0) cp_async_16(shared + thread, x + thread + (fault == kMisaligned), 16);
  cp_async_commit();
  if (fault != kNoWait) cp_async_wait<0>();
  if (fault == kEarlyExit && thread == 5) return;
  if (fault == kTwoBarriers && thread == 5) {
    __syncthreads();
  } else if (fault != kNoBarrier && fault != kRaceInWarp) {
    __syncthreads();
  }
  if (fault == kTwoShuffles && thread % 2 == 0) {
    y[thread] = __shfl_sync(0xffffffffu, 1.0f, 3);
  } else if (fault == kTwoShuffles || fault == kRaceInWarp) {
    y[thread] = __shfl_sync(0xffffffffu, 1.0f, 3);
  }
  if (fault == kMask && thread < 16) y[thread] = __shfl_xor_sync(0xffffu, 1.0f, 1);
  if (fault == kHalfWarp && thread % 2 == 0) y[thread] = __uint_as_float(movmatrix(1u));
  y[thread + (fault == kOutOfBounds)] = shared[kThreads - 1 - thread];
}

struct Outcome {
  std::string error;
  bool right;
};

Outcome run(Fault fault) {
  DeviceArray<float> x(kThreads + 4), y(kThreads);
  for (int i = 0; i < kThreads; ++i) x.host[i] = static_cast<float>(i);
  try {
    PF_LAUNCH(dim3(3), dim3(kThreads), kThreads * sizeof(float), nullptr, reverse, fault, x.to_device(), y.to_device());
  } catch (const std::runtime_error& error) {
    return {error.what(), false};
  }
  y.to_host();
  bool right = true;
  for (int i = 0; i < kThreads; ++i) right = right && y.host[i] == static_cast<float>(kThreads - 1 - i);
  return {"", right};
}

// Holds that the fault gives an error that says this, or, with an empty text, a wrong result.
void find(const char* name, Fault fault, const std::string& text) {
  const Outcome outcome = run(fault);
  const bool as_expected = text.empty() ? outcome.error.empty() && !outcome.right
                                        : outcome.error.find("emulated kernel reverse, block") == 0 &&
                                              outcome.error.find(text) != std::string::npos;
  check(as_expected && run(kNone).right, name + (": " + outcome.error));  // and the next launch is as good as new
}

}  // namespace
}  // namespace pyfused

int main(int count, char** arguments) {
  using namespace pyfused;
  const std::string which = count > 1 ? arguments[1] : "";
  if (which == "race" || which == "bounds") {
    run(which == "race" ? kRaceInWarp : kOutOfBounds);
    return EXIT_SUCCESS;
  }
  check(run(kNone).right, "no fault");
  find("a missing __syncthreads", kNoBarrier, "");
  find("a missing cp_async_wait", kNoWait, "");
  find("a thread that returns early", kEarlyExit, "1 have ended, 63 wait at __syncthreads in ");
  find("two barriers", kTwoBarriers, "must wait at one place wait at two");
  find("two shuffles", kTwoShuffles, "must wait at one place wait at two");
  find("half a warp", kHalfWarp, "32 have ended, 32 wait at movmatrix in ");
  find("a shuffle of some lanes", kMask, "whole warps only");
  find("a misaligned copy", kMisaligned, "multiples of 16");
  return exit_status();
}
