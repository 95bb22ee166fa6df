// Which gradients a backward is asked for: bits of the raw ops' `needs`, which pyfused/ops/<op>.py has too. No torch
// header, for files on either side of the stable ABI.
#pragma once

#include <cstdint>

namespace pyfused {

// LoRA.
enum Needs : int64_t { kNeedX = 1, kNeedA = 2, kNeedB = 4, kNeedScale = 8, kNeedBias = 16 };

enum Ia3Needs : int64_t { kIa3NeedX = 1, kIa3NeedScale = 2 };

enum BottleneckBits : int64_t {
  kBottleneckNeedX = 1,
  kBottleneckNeedDown = 2,
  kBottleneckNeedDownBias = 4,
  kBottleneckNeedUp = 8,
  kBottleneckNeedUpBias = 16,
  kBottleneckNeedScale = 32,
  kBottleneckResidualIsX = 64,  // no gradient of its own: grad_y is added to x's
};

}  // namespace pyfused
