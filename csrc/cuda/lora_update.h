// How the rank-r update meets the base product, per shape: the one place where that is chosen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

namespace pyfused {

enum class LoraUpdate {
  kAfter,   // the base product, then one pass that reads and writes its output
  kBefore,  // the update first, then the base product on top of it (beta = 1), whose read hides under its arithmetic
  kConcat,  // both as one product over K + R in a kernel of ours, see lora_concat.cu
};

// PYFUSED_LORA_UPDATE, for measuring: auto, after, before or concat. Read at each call.
inline std::string_view forced_lora_update() {
  const char* value = std::getenv("PYFUSED_LORA_UPDATE");
  const std::string_view name = value == nullptr || *value == '\0' ? "auto" : value;
  if (name != "auto" && name != "after" && name != "before" && name != "concat") {
    throw std::runtime_error("PYFUSED_LORA_UPDATE must be auto, after, before or concat, got '" + std::string(name) +
                             "'");
  }
  return name;
}

// The first row that fits decides. No row is measured yet: they follow the byte model in docs/performance-cuda.md. A
// measured row names its file under benchmarks/results/. kConcat has no row: it has never run on a GPU, and a product
// that is 3 % slower than the vendor's already loses.
struct LoraUpdateRow {
  int64_t min_rows;         // of x
  int64_t min_contraction;  // of the base product: K in forward, N in backward
  LoraUpdate update;
};
inline constexpr LoraUpdateRow kLoraUpdates[] = {
    {256, 512, LoraUpdate::kBefore},  // model: the base product is bound by arithmetic, its read of y is free
    {0, 0, LoraUpdate::kAfter},
};

// concat_fits: whether kConcat has such a call at all.
inline LoraUpdate choose_lora_update(int64_t rows, int64_t contraction, bool concat_fits) {
  const std::string_view forced = forced_lora_update();
  if (forced == "after") return LoraUpdate::kAfter;
  if (forced == "before") return LoraUpdate::kBefore;
  if (forced == "concat") {
    if (concat_fits) return LoraUpdate::kConcat;
    throw std::runtime_error(
        "PYFUSED_LORA_UPDATE=concat: only for bf16 or fp16, adapter included, and a weight with rows of unit stride");
  }
  for (const LoraUpdateRow& row : kLoraUpdates) {
    if (row.update == LoraUpdate::kConcat && !concat_fits) continue;
    if (rows >= row.min_rows && contraction >= row.min_contraction) return row.update;
  }
  return LoraUpdate::kAfter;
}

}  // namespace pyfused
