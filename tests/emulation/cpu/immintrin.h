// In the place of the compiler's header of this name, for kernels of the levels above AVX2 where they are emulated: the
// compiler's, then the intrinsics of these levels as avx512.h has them, and the macros by which kernels know the level.
#pragma once

#include_next <immintrin.h>

#include "avx512.h"

#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#if !defined(PYFUSED_ISA_AVX512)
#define __AVX512BF16__ 1
#endif
