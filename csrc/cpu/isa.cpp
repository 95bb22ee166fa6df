#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace pyfused {

namespace {

#if defined(__x86_64__)
// Whether the processor has bf16 tiles and Linux lets this process use them, which it wants to be asked for.
bool amx_supported() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kBf16) == 0 || (edx & kTile) == 0) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

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
    case Capability::AMX:
      return supported(Capability::AVX512_BF16) && amx_supported();
  }
  return false;
#else
  return capability == Capability::DEFAULT;
#endif
}

Capability best() {
  Capability result = Capability::DEFAULT;
  for (Capability capability : kCapabilities) {
    if (available(capability) && !emulated(capability)) result = capability;
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
    case Capability::AMX:
      return "AMX";
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
#ifdef PYFUSED_HAVE_AMX
    case Capability::AMX:
#endif
      return true;
    default:
      return false;
  }
}

bool emulated([[maybe_unused]] Capability capability) {
#if defined(PYFUSED_EMULATE_CPU)
  return compiled(capability) && capability > Capability::AVX2;
#else
  return false;
#endif
}

bool available(Capability capability) {
  return compiled(capability) && supported(emulated(capability) ? Capability::AVX2 : capability);
}

Capability chosen_capability() {
  static const Capability chosen = choose();
  return chosen;
}

Capability cpu_capability() {
  const Capability chosen = chosen_capability();
  return chosen == Capability::AMX ? Capability::AVX512_BF16 : chosen;
}

namespace {

// Chosen when the library is loaded, so that _ops and _C agree whatever happens to the environment later. An error
// waits for the first call that can report it.
[[maybe_unused]] const bool chosen_at_load = [] {
  try {
    chosen_capability();
  } catch (const std::runtime_error&) {
    return false;
  }
  return true;
}();

}  // namespace

}  // namespace pyfused
