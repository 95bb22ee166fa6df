// Calls a kernel function in the namespace of the CPU level in use.
#pragma once

#include "isa.h"

#if defined(PYFUSED_HAVE_AVX2)
#define PF_CASE_AVX2(call) \
  case Capability::AVX2:   \
    return AVX2::call;
#else
#define PF_CASE_AVX2(call)
#endif
#if defined(PYFUSED_HAVE_AVX512)
#define PF_CASE_AVX512(call) \
  case Capability::AVX512:   \
    return AVX512::call;
#else
#define PF_CASE_AVX512(call)
#endif
#if defined(PYFUSED_HAVE_AVX512_BF16)
#define PF_CASE_AVX512_BF16(call) \
  case Capability::AVX512_BF16:   \
    return AVX512_BF16::call;
#else
#define PF_CASE_AVX512_BF16(call)
#endif

// return <level>::call; a template cannot take a namespace.
#define PF_RETURN_AT_LEVEL(call) \
  switch (cpu_capability()) {    \
    PF_CASE_AVX512_BF16(call)    \
    PF_CASE_AVX512(call)         \
    PF_CASE_AVX2(call)           \
    default:                     \
      return DEFAULT::call;      \
  }
