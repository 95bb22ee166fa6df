// The update inside the base product: lora_concat.cu's kernel on tensors.
#pragma once

#include "lora_call.h"
#include "sums.h"

namespace pyfused {

// A copy of a sum of s or ds in the data's type, with aligned rows: an operand.
struct RoundedSum {
  Matrix matrix;
  PartSum sum;

  RoundedSum(const Lora& lora, PartSum of);
};

// scale s in the data's type, and s where it was in parts
Matrix scaled_s(const Lora& lora, const Tensor& parts, int64_t part_count, const Tensor& s);
// out = bias + drop(s c^T) + x w^T, one product; in the backward with transposed matrices
void concat(const Lora& lora, const Matrix& x, const Tensor& weight, const Matrix& s, const Matrix& c, bool backward,
            const Tensor* bias, const Tensor& out);

}  // namespace pyfused
