# One OBJECT library per CPU capability from the same sources, csrc/cpu/kernels/*.cpp. Only these get -m flags: a flag like
# -mavx2 on host code would break machines without it.
#
# Each copy sees PYFUSED_ISA=<level>, the namespace of all that it defines, and PYFUSED_ISA_<level>. Kernels read no errno
# and no floating-point exception flags, so loops with sqrt or a select may become vector code; -ffast-math, which would
# drop NaN and reorder sums, is not used. They neither throw nor call what throws; without exceptions no destructor asks
# for a handler, which would be a symbol that the levels share.
set(PYFUSED_KERNEL_FLAGS -O3 -fno-math-errno -fno-trapping-math -fno-exceptions -fopenmp-simd)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU" AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  # False alarms about the _mm512_undefined_* of the compiler's own headers (GCC bug 105593).
  list(APPEND PYFUSED_KERNEL_FLAGS -Wno-maybe-uninitialized)
endif()

set(PYFUSED_FLAGS_DEFAULT "")
set(PYFUSED_FLAGS_AVX2 -mavx2 -mfma -mf16c)
set(PYFUSED_FLAGS_AVX512 ${PYFUSED_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512dq -mavx512vl)
set(PYFUSED_FLAGS_AVX512_BF16 ${PYFUSED_FLAGS_AVX512} -mavx512bf16)
set(PYFUSED_FLAGS_AMX ${PYFUSED_FLAGS_AVX512_BF16})  # its instructions are in assembly, kernels/amx.h

option(PYFUSED_EMULATE_CPU "Compile the levels above AVX2 for a machine that has only that, to test and not to use" OFF)
set(PYFUSED_EMULATION ${CMAKE_CURRENT_LIST_DIR}/../tests/emulation/cpu)
if(PYFUSED_EMULATE_CPU)
  if(NOT CMAKE_CXX_COMPILER_ID STREQUAL "GNU" OR NOT CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    message(FATAL_ERROR "PYFUSED_EMULATE_CPU is for g++ on x86-64.")
  endif()
  set(PYFUSED_REAL_FLAGS_AMX ${PYFUSED_FLAGS_AMX})
  # A vector of 64 bytes is passed in memory, which concerns nobody else. More optimisation takes several times as long to
  # compile; without fused multiply-adds numbers would be others.
  set(emulated_flags ${PYFUSED_FLAGS_AVX2} -O1 -fexpensive-optimizations -Wno-psabi)
  foreach(level AVX512 AVX512_BF16 AMX)
    set(PYFUSED_FLAGS_${level} ${emulated_flags})
  endforeach()
  set_source_files_properties(${PYFUSED_EMULATION}/tiles.cpp PROPERTIES COMPILE_OPTIONS -O3)
endif()

set(PYFUSED_HIGHEST_CPU_CAPABILITY "" CACHE STRING
    "Compile CPU kernels up to this level, as DEFAULT or AVX2: less to compile; empty: all levels of the architecture")

# Sets PYFUSED_CPU_KERNELS (the objects) and PYFUSED_CPU_DEFINITIONS (PYFUSED_HAVE_<level>) in the caller.
function(pyfused_add_cpu_kernels)
  if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
    message(FATAL_ERROR "pyfused builds on Linux only, not on ${CMAKE_SYSTEM_NAME}.")
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|amd64|AMD64)$")
    set(levels DEFAULT AVX2 AVX512 AVX512_BF16 AMX)
  elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64)$")
    set(levels DEFAULT)  # NEON is part of the base architecture
  else()
    message(FATAL_ERROR "pyfused builds for x86-64 and aarch64 only, not for ${CMAKE_SYSTEM_PROCESSOR}.")
  endif()

  if(PYFUSED_HIGHEST_CPU_CAPABILITY)
    list(FIND levels "${PYFUSED_HIGHEST_CPU_CAPABILITY}" index)
    if(index EQUAL -1)
      message(FATAL_ERROR "PYFUSED_HIGHEST_CPU_CAPABILITY must be empty or one of ${levels}, got "
                          "'${PYFUSED_HIGHEST_CPU_CAPABILITY}'.")
    endif()
    math(EXPR count "${index} + 1")
    list(SUBLIST levels 0 ${count} levels)
  endif()

  file(GLOB sources CONFIGURE_DEPENDS csrc/cpu/kernels/*.cpp)
  # what has loops in tiles; the other kernels run on AVX512_BF16's
  file(GLOB only_AMX CONFIGURE_DEPENDS csrc/cpu/kernels/*_amx.cpp)
  list(REMOVE_ITEM sources ${only_AMX})
  set(sources_AMX csrc/cpu/kernels/lora.cpp ${only_AMX})
  foreach(level IN LISTS levels)
    set(target pyfused_cpu_${level})
    if(DEFINED sources_${level})
      add_library(${target} OBJECT ${sources_${level}})
    else()
      add_library(${target} OBJECT ${sources})
    endif()
    target_include_directories(${target} PRIVATE csrc)
    target_compile_definitions(${target} PRIVATE PYFUSED_ISA=${level} PYFUSED_ISA_${level})
    target_compile_options(${target} PRIVATE ${PYFUSED_KERNEL_FLAGS} ${PYFUSED_FLAGS_${level}})
    target_link_libraries(${target} PRIVATE pyfused_warnings)
    if(PYFUSED_EMULATE_CPU AND level MATCHES "^(AVX512|AVX512_BF16|AMX)$")
      # before the compiler's own folders: for immintrin.h
      target_include_directories(${target} BEFORE PRIVATE ${PYFUSED_EMULATION})
      target_compile_definitions(${target} PRIVATE PYFUSED_EMULATE_CPU)
      if(level STREQUAL "AMX")
        target_sources(${target} PRIVATE ${PYFUSED_EMULATION}/tiles.cpp)
      endif()
    endif()
    list(APPEND kernels $<TARGET_OBJECTS:${target}>)
    list(APPEND definitions PYFUSED_HAVE_${level})
  endforeach()
  if(PYFUSED_EMULATE_CPU)
    list(APPEND definitions PYFUSED_EMULATE_CPU)
  endif()
  set(PYFUSED_CPU_KERNELS ${kernels} PARENT_SCOPE)
  set(PYFUSED_CPU_DEFINITIONS ${definitions} PARENT_SCOPE)
endfunction()
