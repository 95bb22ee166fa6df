// Which gradients of a LoRA call are asked for; no torch header, for files on either side of the stable ABI.
#pragma once

#include <cstdint>

namespace pyfused {

// Bits of `needs`; pyfused/ops/lora.py has the same.
enum Needs : int64_t { kNeedX = 1, kNeedA = 2, kNeedB = 4, kNeedScale = 8, kNeedBias = 16 };

}  // namespace pyfused
