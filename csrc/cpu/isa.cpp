#include "cpu/isa.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyfused {

namespace {

// __builtin_cpu_supports also asks whether the operating system saves the registers.
bool supported(Capability capability) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  switch (capability) {
    case Capability::DEFAULT:
      return true;
    case Capability::AVX2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Capability::AVX512:
      return supported(Capability::AVX2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Capability::AVX512_BF16:
      return supported(Capability::AVX512) && __builtin_cpu_supports("avx512bf16");
  }
  return false;
#else
  return capability == Capability::DEFAULT;
#endif
}

Capability best() {
  Capability result = Capability::DEFAULT;
  for (Capability capability : kCapabilities) {
    if (available(capability)) result = capability;
  }
  return result;
}

Capability choose() {
  const char* wanted = std::getenv("PYFUSED_CPU_CAPABILITY");
  if (wanted == nullptr || *wanted == '\0') return best();
  std::string names;
  for (Capability capability : kCapabilities) {
    if (!available(capability)) continue;
    if (std::string(wanted) == name(capability)) return capability;
    names += (names.empty() ? "" : ", ") + std::string(name(capability));
  }
  throw std::runtime_error("PYFUSED_CPU_CAPABILITY must be one of the levels that this machine and this build have (" +
                           names + "), got '" + wanted + "'");
}

}  // namespace

const char* name(Capability capability) {
  switch (capability) {
    case Capability::DEFAULT:
      return "DEFAULT";
    case Capability::AVX2:
      return "AVX2";
    case Capability::AVX512:
      return "AVX512";
    case Capability::AVX512_BF16:
      return "AVX512_BF16";
  }
  return "unknown";
}

bool compiled(Capability capability) {
  switch (capability) {
    case Capability::DEFAULT:
#ifdef PYFUSED_HAVE_AVX2
    case Capability::AVX2:
#endif
#ifdef PYFUSED_HAVE_AVX512
    case Capability::AVX512:
#endif
#ifdef PYFUSED_HAVE_AVX512_BF16
    case Capability::AVX512_BF16:
#endif
      return true;
    default:
      return false;
  }
}

bool available(Capability capability) { return compiled(capability) && supported(capability); }

Capability cpu_capability() {
  static const Capability chosen = choose();
  return chosen;
}

namespace {

// Chosen when the library is loaded, so that _ops and _C agree whatever happens to the environment later. An error
// waits for the first call that can report it.
[[maybe_unused]] const bool chosen_at_load = [] {
  try {
    cpu_capability();
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}();

}  // namespace

}  // namespace pyfused
