// LoRA's update as more columns of a linear layer's product in AMX tiles (linear_amx.h): s b^T and ds a for fp32
// numbers that are taken as sums of bf16 terms (lora_amx.h says which).
//
// Names of sizes: M rows, R rank, N rows of b, L columns of a.
#pragma once

#include <cstdint>

#include "../../common/dtype.h"

namespace pyfused::AMX {

// Columns of it, with what fills up the last tile.
int64_t lora_update_columns(Dtype of_b, int64_t R);
// Rows [begin, end) of s [M, R], fp32, as x: the bounds as in linear_pack_rows.
void lora_pack_update(const float* s, int64_t M, int64_t R, Dtype of_b, int64_t begin, int64_t end, void* tiles);
// Rows [begin, end) of b [N, R], `ld_b` apart, as w: rows of lora_update_columns().
void lora_update_weight(const void* b, Dtype dtype, int64_t ld_b, int64_t R, int64_t begin, int64_t end, void* rows);
// The same for LinearPanels: rows of s as more columns of x, [M, lora_update_columns()], and a [R, L], `ld_a`
// apart, as more rows of w, [lora_update_columns(), L].
void lora_more_rows(const float* s, int64_t R, Dtype of_b, int64_t begin, int64_t end, void* rows);
void lora_more_weight(const void* a, Dtype dtype, int64_t ld_a, int64_t R, int64_t L, void* rows);

}  // namespace pyfused::AMX
