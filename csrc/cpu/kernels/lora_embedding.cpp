// What LoRA on an embedding does by token, compiled once per ISA level. No torch, no std: see simd.h for why.
#include "lora_embedding.h"

#include "simd.h"

namespace pyfused::PYFUSED_ISA {
namespace {

template <class T, class Acc>
bool gather(const void* a_, int64_t rank_stride, int64_t token_stride, int64_t V, const int64_t* ids, int64_t row_begin,
            int64_t row_end, int64_t R, void* s_) {
  const T* a = static_cast<const T*>(a_);
  Acc* s = static_cast<Acc*>(s_);
  bool inside = true;
  for (int64_t m = row_begin; m < row_end; ++m) {
    const int64_t id = ids[m];
    const bool known = id >= 0 && id < V;
    inside = inside && known;
    const T* from = a + (known ? id : 0) * token_stride;
    for (int64_t r = 0; r < R; ++r) s[m * R + r] = known ? static_cast<Acc>(load_one(from + r * rank_stride)) : Acc(0);
  }
  return inside;
}

template <class T, class Acc>
void scatter(const void* u_, int64_t R, const int64_t* ids, int64_t M, int64_t skip, double scale, int64_t V,
             void* sums_, void* da_) {
  const Acc* u = static_cast<const Acc*>(u_);
  Acc* sums = static_cast<Acc*>(sums_);
  T* da = static_cast<T*>(da_);
  const Acc factor = static_cast<Acc>(scale);
  memset(sums, 0, static_cast<size_t>(V) * sizeof(Acc));
  for (int64_t m = 0; m < M; ++m) {
    if (ids[m] != skip) sums[ids[m]] += u[m * R] * factor;
  }
  if (sums_ == da_) return;
  for (int64_t v = 0; v < V; ++v) store_one(da + v, sums[v]);
}

template <class Acc>
constexpr LoraEmbeddingKernels table() {
  return {{gather<float, Acc>, gather<bf16, Acc>, gather<fp16, Acc>, gather<double, Acc>},
          {scatter<float, Acc>, scatter<bf16, Acc>, scatter<fp16, Acc>, scatter<double, Acc>}};
}

constexpr LoraEmbeddingKernels kSingle = table<float>(), kDouble = table<double>();

}  // namespace

const LoraEmbeddingKernels& lora_embedding_kernels(Dtype dtype) { return dtype == Dtype::kFloat64 ? kDouble : kSingle; }

}  // namespace pyfused::PYFUSED_ISA
