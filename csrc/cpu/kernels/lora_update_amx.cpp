// LoRA's update as more columns of an AMX product, compiled for that level alone. No torch, no std: see simd.h.
#include "lora_update_amx.h"

#include "amx_products.h"
#include "linear_amx.h"

namespace pyfused::PYFUSED_ISA {
namespace {

inline Vector<float> load_ranks(const void* b, Dtype dtype, int64_t element, __mmask16 present) {
  if (dtype == Dtype::kFloat32) {
    return reinterpret_cast<Vector<float>>(_mm512_maskz_loadu_ps(present, static_cast<const float*>(b) + element));
  }
  const __m256i half = _mm256_maskz_loadu_epi16(present, static_cast<const uint16_t*>(b) + element);
  return reinterpret_cast<Vector<float>>(dtype == Dtype::kFloat16 ? _mm512_castps_si512(_mm512_cvtph_ps(half))
                                                                  : _mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
}

}  // namespace

int64_t lora_update_columns(Dtype of_b, int64_t R) { return rank_tiles(of_b, R) * 32; }

void lora_pack_update(const float* s, int64_t M, int64_t R, Dtype of_b, int64_t begin, int64_t end, void* tiles) {
  constexpr int64_t kRows = 2 * kTileRows;
  const int terms = rank_terms(of_b);
  const int64_t columns = lora_update_columns(of_b, R);
  alignas(64) bf16 rows[kRows * kSplitColumns];
  for (int64_t m = begin; m < end; m += kRows) {
    const int64_t count = min_of(kRows, end - m);
    split_rows(s + m * R, count, R, terms, rows, columns);
    char* to = static_cast<char*>(tiles) + m / kTileRows * (columns / 32) * kTileBytes;
    linear_pack_rows(rows, columns, M, columns, 0, count, to);
  }
}

void lora_update_weight(const void* b, Dtype dtype, int64_t ld_b, int64_t R, int64_t begin, int64_t end, void* rows) {
  const int terms = rank_terms(dtype);
  const int64_t columns = lora_update_columns(dtype, R);
  bf16* to = static_cast<bf16*>(rows) + begin * columns;
  for (int64_t n = begin; n < end; ++n, to += columns) {
    for (int64_t r = 0; r < R; r += 16) {
      const __mmask16 present = ranks_present(r, R);
      Vector<float> rest = load_ranks(b, dtype, n * ld_b + r, present);
      const __m256i high = to_bf16(take_term(rest));
      _mm256_mask_storeu_epi16(to + r, present, high);
      _mm256_mask_storeu_epi16(to + R + r, present, high);
      if (terms == 3) _mm256_mask_storeu_epi16(to + 2 * R + r, present, to_bf16(rest));
    }
    memset(to + terms * R, 0, static_cast<size_t>(columns - terms * R) * sizeof(bf16));
  }
}

void lora_more_rows(const float* s, int64_t R, Dtype of_b, int64_t begin, int64_t end, void* rows) {
  const int64_t columns = lora_update_columns(of_b, R);
  split_rows(s + begin * R, end - begin, R, rank_terms(of_b), static_cast<bf16*>(rows) + begin * columns, columns);
}

void lora_more_weight(const void* a, Dtype dtype, int64_t ld_a, int64_t R, int64_t L, void* rows) {
  const int terms = rank_terms(dtype);
  bf16* to = static_cast<bf16*>(rows);
  for (int64_t l = 0; l < L; l += 16) {
    const __mmask16 present = ranks_present(l, L);
    for (int64_t r = 0; r < R; ++r) {
      Vector<float> rest = load_ranks(a, dtype, r * ld_a + l, present);
      const __m256i high = to_bf16(take_term(rest));
      _mm256_mask_storeu_epi16(to + r * L + l, present, high);
      _mm256_mask_storeu_epi16(to + (R + r) * L + l, present, high);
      if (terms == 3) _mm256_mask_storeu_epi16(to + (2 * R + r) * L + l, present, to_bf16(rest));
    }
    for (int64_t r = terms * R; r < lora_update_columns(dtype, R); ++r) {
      _mm256_mask_storeu_epi16(to + r * L + l, present, _mm256_setzero_si256());
    }
  }
}

}  // namespace pyfused::PYFUSED_ISA
