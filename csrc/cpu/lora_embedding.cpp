// LoRA on an embedding, on CPU: a's columns are gathered by token in place of a product with x, and LoRA's loops do the
// rest: y grows by s b^T in one pass, and u = dy b and db come from one pass over dy. a's gradient is summed by token
// in the order of the rows, a task for each rank, so it does not depend on the number of threads.
#include "kernels/lora_embedding.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <tuple>

#include "levels.h"
#include "lora.h"

namespace pyfused {
namespace {

const LoraEmbeddingKernels& kernels_for(Dtype dtype) { PF_RETURN_AT_LEVEL(lora_embedding_kernels(dtype)) }

// A call with its small operands; K is the number of tokens.
struct LoraEmbedding : Lora {
  const LoraEmbeddingKernels& by_token;
  const int64_t* ids;

  LoraEmbedding(const char* op, const Tensor& activation, const char* name, const Tensor& ids, const Tensor& a,
                const Tensor& b, const std::optional<Tensor>& scale_vector, double scale)
      : Lora(op, activation, name, a, b, scale_vector, scale, 0.0, std::nullopt), by_token(kernels_for(dtype)) {
    const int64_t columns = activation.size(activation.dim() - 1);
    PF_CHECK(columns == N, op, name, "have b's " + std::to_string(N) + " rows as columns", columns);
    check_device(ids, device, op, "ids");
    PF_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && ids.numel() == M, op, "ids",
             "be a contiguous int64 tensor of " + std::to_string(M) + " elements", shape_of(ids));
    this->ids = static_cast<const int64_t*>(ids.const_data_ptr());
  }

  // b as the loops read it, transposed.
  LoraOperand pack_b(const Tensor& b, SumOver product, std::optional<Scratch>& memory) const {
    const Dtype source = dtype_of(b, op, "b");
    memory.emplace(1, kernels.packed_bytes(product, source, R, N), 1);
    return kernels.pack(product, source, b.const_data_ptr(), b.stride(1), b.stride(0), R, N, memory->at(0));
  }
};

std::tuple<Tensor, Tensor> forward(const Tensor& y, const Tensor& ids, const Tensor& a, const Tensor& b,
                                   const std::optional<Tensor>& scale_vector, double scale) {
  const LoraEmbedding lora("lora_embedding", y, "y", ids, a, b, scale_vector, scale);
  Tensor s = empty({lora.M, lora.R}, lora.accumulator_type(), lora.device);
  Tensor out = empty_rows(y, lora.N, lora.device);
  if (lora.M == 0 || lora.N == 0) return {torch::stable::copy_(out, y), torch::stable::zero_(s)};
  const Matrix rows(y);
  std::optional<Scratch> memory;
  const LoraOperand packed = lora.pack_b(b, SumOver::kRanks, memory);
  const Scratch scaled(lora.M, lora.R, lora.accumulator_size());
  const auto gather = lora.by_token.gather[static_cast<int>(dtype_of(a, lora.op, "a"))];
  const void *from = rows.tensor.const_data_ptr(), *table = a.const_data_ptr();
  void *to = out.mutable_data_ptr(), *gathered = s.mutable_data_ptr();
  std::atomic<bool> inside{true};
  const RowRanges ranges = RowRanges::independent(lora.M);
  parallel(ranges.count, lora.M * lora.N * lora.R, [&](int64_t task) {
    const int64_t begin = ranges.begin(task), end = ranges.end(task);
    if (!gather(table, a.stride(0), a.stride(1), lora.K, lora.ids, begin, end, lora.R, gathered)) inside = false;
    lora.scale_rows(gathered, scaled.at(0), begin, end, 1.0);
    lora.kernels.expand(from, rows.ld, nullptr, to, lora.N, begin, end, lora.N, lora.R, scaled.at(0), packed);
  });
  PF_CHECK(inside, lora.op, "ids", "be in [0, " + std::to_string(lora.K) + ")", "others");
  return {out, s};
}

// Gradients for the bits set in needs: those of a and b in Needs. ids are the forward's, which has looked at them.
std::tuple<Tensor, Tensor> backward(const Tensor& grad_y, const Tensor& ids, const Tensor& a, const Tensor& b,
                                    const std::optional<Tensor>& s, const std::optional<Tensor>& scale_vector,
                                    double scale, int64_t padding_idx, int64_t needs) {
  const LoraEmbedding lora("lora_embedding_backward", grad_y, "grad_y", ids, a, b, scale_vector, scale);
  lora.check_saved(grad_y, std::nullopt, false, s, needs & kNeedB);
  LoraGradients gradients(lora, grad_y, a, b, std::nullopt, needs & (kNeedA | kNeedB));
  if (lora.M == 0 || lora.K == 0 || lora.N == 0) {
    gradients.set_empty(lora, grad_y, false);
    return {gradients.a, gradients.b};
  }
  const bool need_a = needs & kNeedA, need_b = needs & kNeedB;
  for (int64_t m = 0; need_a && m < lora.M; ++m) {
    PF_CHECK(lora.ids[m] >= 0 && lora.ids[m] < lora.K, lora.op, "ids", "be in [0, " + std::to_string(lora.K) + ")",
             lora.ids[m]);
  }
  const Matrix dy(grad_y);
  std::optional<Scratch> memory;
  const LoraOperand packed =
      need_a ? lora.pack_b(b, SumOver::kColumns, memory) : LoraOperand{nullptr, 0, dtype_of(b, lora.op, "b")};
  const RowRanges ranges = RowRanges::summed(lora.M, lora.R);
  const int64_t part = lora.R * lora.ld_b();
  const Scratch u(need_a ? lora.M : 0, lora.R, lora.accumulator_size());
  const Scratch dbt(need_b ? ranges.count : 0, part, lora.accumulator_size());
  parallel(ranges.count, lora.M * lora.N * lora.R, [&](int64_t task) {
    lora.kernels.backward_dy(dy.tensor.const_data_ptr(), dy.ld, ranges.begin(task), ranges.end(task), lora.N, lora.R,
                             packed, need_b ? s->const_data_ptr() : nullptr, need_a ? u.at(0) : nullptr,
                             need_b ? dbt.at(task * part) : nullptr, lora.ld_b(), nullptr);
  });
  const std::vector<double> factors = lora.factors();
  if (need_b) {
    const LoraUnpack unpack = lora.kernels.unpack[static_cast<int>(dtype_of(gradients.b, lora.op, "b"))];
    void* to = gradients.b.mutable_data_ptr();
    parallel(divide_up(lora.N, kFinishColumns), ranges.count * part, [&](int64_t task) {
      const int64_t begin = task * kFinishColumns, end = std::min(begin + kFinishColumns, lora.N);
      unpack(dbt.at(0), ranges.count, part, lora.ld_b(), lora.R, begin, end, factors.data(), to, 1, lora.R);
    });
  }
  if (need_a) {
    const Dtype dtype = dtype_of(gradients.a, lora.op, "a");
    const auto scatter = lora.by_token.scatter[static_cast<int>(dtype)];
    char* to = static_cast<char*>(gradients.a.mutable_data_ptr());
    const bool in_place = dtype == lora.accumulator;
    const Scratch sums(in_place ? 0 : lora.R, lora.K, lora.accumulator_size());
    parallel(lora.R, (lora.M + lora.K) * lora.R, [&](int64_t r) {
      void* row = to + r * lora.K * size_of(dtype);
      const void* gradient = static_cast<const char*>(u.at(0)) + r * lora.accumulator_size();
      scatter(gradient, lora.R, lora.ids, lora.M, padding_idx, factors[static_cast<size_t>(r)], lora.K,
              in_place ? row : sums.at(r * lora.K), row);
    });
  }
  return {gradients.a, gradients.b};
}

}  // namespace
}  // namespace pyfused

STABLE_TORCH_LIBRARY_IMPL(pyfused, CPU, m) {
  m.impl("_lora_embedding_forward", TORCH_BOX(&pyfused::forward));
  m.impl("_lora_embedding_backward", TORCH_BOX(&pyfused::backward));
}
