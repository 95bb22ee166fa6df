// How a bottleneck is computed, per shape: the one place where that is chosen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "bottleneck.h"

namespace pyfused {

enum class BottleneckPath {
  kFused,   // both products in one kernel, the hidden values in shared memory
  kPasses,  // the vendor's products, with passes between and after them
};

// Whether the fused kernel has such a call at all.
inline bool bottleneck_fits(Dtype data, int64_t hidden) { return data != Dtype::kFloat64 && hidden <= kMaxFusedHidden; }

// PYFUSED_BOTTLENECK, for measuring: auto, fused or passes; read at each call. The choice is not measured yet: a block
// of the fused kernel has 64 rows, and below half a block for each multiprocessor the vendor's products, which also cut
// the columns, are taken to be faster.
inline BottleneckPath choose_bottleneck_path(Dtype data, int64_t rows, int64_t hidden, int multiprocessors) {
  const char* value = std::getenv("PYFUSED_BOTTLENECK");
  const std::string_view name = value == nullptr || *value == '\0' ? "auto" : value;
  if (name != "auto" && name != "fused" && name != "passes") {
    throw std::runtime_error("PYFUSED_BOTTLENECK must be auto, fused or passes, got '" + std::string(name) + "'");
  }
  if (!bottleneck_fits(data, hidden) || name == "passes") return BottleneckPath::kPasses;
  const bool fills = 2 * rows >= int64_t{kFusedRows} * multiprocessors;
  return fills || name == "fused" ? BottleneckPath::kFused : BottleneckPath::kPasses;
}

}  // namespace pyfused
