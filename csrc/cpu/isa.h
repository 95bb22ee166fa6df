// CPU capability: which of the copies of csrc/cpu/kernels/ runs on this machine.
//
// The levels are those of CMakeLists.txt (PYFUSED_HAVE_<level> says which were compiled); a level contains those before
// it. No torch headers: the file serves _ops and _C alike.
#pragma once

#include <array>

namespace pyfused {

enum class Capability { DEFAULT, AVX2, AVX512, AVX512_BF16, AMX };

inline constexpr std::array kCapabilities{Capability::DEFAULT, Capability::AVX2, Capability::AVX512,
                                          Capability::AVX512_BF16, Capability::AMX};

const char* name(Capability capability);

// Compiled into this build.
bool compiled(Capability capability);

// Compiled into this build for machines without its instructions, to be tested there; chosen only by its name.
bool emulated(Capability capability);

// Compiled into this build and supported by this machine, its operating system included.
bool available(Capability capability);

// The best available level that is not emulated, or the one that the environment variable PYFUSED_CPU_CAPABILITY names;
// read once. Throws std::runtime_error where the variable names a level that is unknown or not available.
Capability chosen_capability();

// The same for kernels on vectors, which all ops have: AVX512_BF16 where AMX is chosen.
Capability cpu_capability();

}  // namespace pyfused
