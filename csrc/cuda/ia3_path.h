// Where IA3's factors of the output are applied, per shape: the one place where that is chosen.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "../common/dtype.h"

namespace pyfused {

enum class Ia3Path {
  kPass,     // the vendor's product, then one pass over its output
  kProduct,  // in a product of ours, see ia3_linear.cu; it rounds once where a pass has eager's two roundings
};

// PYFUSED_IA3, for measuring: auto, pass or product; read at each call. auto is the pass: the product has never run on
// a GPU, and one that is 4 % slower than the vendor's already loses. fits: whether kProduct has such a call at all.
inline Ia3Path choose_ia3_path(bool fits) {
  const char* value = std::getenv("PYFUSED_IA3");
  const std::string_view name = value == nullptr || *value == '\0' ? "auto" : value;
  if (name != "auto" && name != "pass" && name != "product") {
    throw std::runtime_error("PYFUSED_IA3 must be auto, pass or product, got '" + std::string(name) + "'");
  }
  return fits && name == "product" ? Ia3Path::kProduct : Ia3Path::kPass;
}

}  // namespace pyfused
