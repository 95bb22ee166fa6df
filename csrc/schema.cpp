// Every op of pyfused: the native API on one page. Kernels are registered where they are written, csrc/cpu/<op>.cpp and
// csrc/cuda/<op>.cpp; fakes, autograd and argument errors are in pyfused/ops/<op>.py, which is the public interface.
//
// Conventions: names with a leading underscore are private; a schema is changed by adding, not by editing; an output
// that was not asked for is an empty tensor (the stable ABI has no optional returns).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pyfused, m) {
  // y = x weight^T + bias + (scale * scale_vector * drop(x) a^T) b^T, and s = drop(x) a^T in fp32 (fp64 for fp64).
  // x [..., K], weight [N, K], bias [N], a [R, K], b [N, R], scale_vector [R], seed int64 [1] -> y [..., N], s [M, R]
  // allow_tf32: on CUDA, fp32 products of the adapter may be one TF32 product instead of three.
  m.def(
      "_lora_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? scale_vector, "
      "float scale, float dropout_p, Tensor? seed, bool allow_tf32=False) -> (Tensor y, Tensor s)");
  // The same on CPU, and dropout's mask as _lora_backward takes it for the seed, int32 [M, words]: bit k % 32 of word
  // k / 32, four words for each 128 columns begun. Without rows where it is not kept: no dropout, or it is made again
  // as soon as read.
  m.def(
      "_lora_linear_forward_with_mask(Tensor x, Tensor weight, Tensor? bias, Tensor a, Tensor b, Tensor? scale_vector, "
      "float scale, float dropout_p, Tensor? seed) -> (Tensor y, Tensor s, Tensor mask)");
  // _lora_linear_forward on top of y [..., N], the output of any base layer; a new tensor.
  m.def(
      "_lora_delta_forward(Tensor y, Tensor x, Tensor a, Tensor b, Tensor? scale_vector, float scale, "
      "float dropout_p, Tensor? seed, bool allow_tf32=False) -> (Tensor out, Tensor s)");
  // Gradients for the bits set in needs: 1 x, 2 a, 4 b, 8 scale_vector, 16 bias. Without weight, grad_x is the
  // adapter's share alone. seed: the forward's, or on CPU its mask.
  m.def(
      "_lora_backward(Tensor grad_y, Tensor? x, Tensor? weight, Tensor a, Tensor b, Tensor? s, Tensor? scale_vector, "
      "float scale, float dropout_p, Tensor? seed, int needs, bool allow_tf32=False) -> (Tensor grad_x, Tensor grad_a, "
      "Tensor grad_b, "
      "Tensor grad_scale_vector, Tensor grad_bias)");

  // _lora_linear_forward for several projections of one x, entry by entry; a and b are None where there is no adapter,
  // and s is then an empty tensor.
  m.def(
      "_lora_linear_shared_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] a, Tensor?[] b, "
      "Tensor?[] scale_vectors, float[] scales, float[] dropout_ps, Tensor?[] seeds, bool allow_tf32=False) -> "
      "(Tensor[] y, Tensor[] s)");
  // The same on CPU, and masks as _lora_linear_forward_with_mask has them.
  m.def(
      "_lora_linear_shared_forward_with_masks(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor?[] a, Tensor?[] b, "
      "Tensor?[] scale_vectors, float[] scales, float[] dropout_ps, Tensor?[] seeds) -> "
      "(Tensor[] y, Tensor[] s, Tensor[] masks)");
  // Their gradients: grad_x for all together where a needs has its bit, with weights then; grads has four for each
  // projection, of a, b, scale_vector and bias. seeds: the forward's, or on CPU its masks.
  m.def(
      "_lora_linear_shared_backward(Tensor[] grad_y, Tensor? x, Tensor?[] weights, Tensor?[] a, Tensor?[] b, "
      "Tensor?[] s, Tensor?[] scale_vectors, float[] scales, float[] dropout_ps, Tensor?[] seeds, int[] needs, "
      "bool allow_tf32=False) -> (Tensor grad_x, Tensor[] grads)");

  // x weight^T + bias, the frozen layer alone and without a gradient: F.linear's bits, sooner for a few rows of bf16 on
  // a CPU with AMX. x [..., K], weight [N, K], bias [N] -> [..., N]
  m.def("_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor");

  // LoRA on an embedding: out = y + (scale * scale_vector * a^T[ids]) b^T, and s = a^T[ids] in fp32 (fp64 for fp64).
  // y [..., D], ids int64 with as many elements as y has rows, a [R, V], b [D, R], scale_vector [R] -> out [..., D], s
  // [M, R]
  m.def(
      "_lora_embedding_forward(Tensor y, Tensor ids, Tensor a, Tensor b, Tensor? scale_vector, float scale) -> "
      "(Tensor out, Tensor s)");
  // Gradients for the bits set in needs: 2 a, 4 b; that of y is grad_y. padding_idx: a token whose column gets none, or
  // -1.
  m.def(
      "_lora_embedding_backward(Tensor grad_y, Tensor ids, Tensor a, Tensor b, Tensor? s, Tensor? scale_vector, "
      "float scale, int padding_idx, int needs) -> (Tensor grad_a, Tensor grad_b)");

  // Many LoRA adapters in one batch: each y [..., N] of the same x [..., K] grows by the adapter of its rows. index
  // int32 or int64: an adapter's place in the tables or -1 for none, each for as many rows as the next, or with
  // segments (int64 or int32, one more than index) for the rows between its entries. tables: int64 [adapters, 10], see
  // pyfused/ops/multi_lora.py; the addresses in them are not checked.
  m.def("_multi_lora_(Tensor(a!)[] y, Tensor x, Tensor[] tables, Tensor index, Tensor? segments) -> ()");
  // The same for 2-D x, and y with its slices side by side, over adapters stacked by slot, as serving engines keep
  // them: a [slots, ..., R, K] and b [slots, ..., N, R] for each slice, dense; a matrix alone is that of all slots.
  // index: at least a place for each row, further ones are not read.
  m.def("_multi_lora_stacked_(Tensor(a!) y, Tensor x, Tensor[] a, Tensor[] b, float scale, Tensor index) -> ()");
  // The same into new tensors, the adapters as tensors, slice after slice; a, b [R, K] and [N, R] or None. s: drop(x)
  // a^T for the backward, [slices, M, largest R].
  m.def(
      "_multi_lora_forward(Tensor[] y, Tensor x, Tensor?[] a, Tensor?[] b, float[] scales, float[] dropout_ps, "
      "Tensor?[] seeds, Tensor index, Tensor? segments) -> (Tensor[] out, Tensor s)");
  // Gradients for the bits set in needs, one for each adapter of each slice: 1 x (anywhere for all), 2 a, 4 b. grads
  // has two for each, zero where no row has the adapter.
  m.def(
      "_multi_lora_backward(Tensor[] grad_y, Tensor x, Tensor?[] a, Tensor?[] b, float[] scales, float[] dropout_ps, "
      "Tensor?[] seeds, Tensor index, Tensor? segments, Tensor s, int[] needs) -> (Tensor grad_x, Tensor[] grads)");

  // y = residual + scale * scale_vector * drop(activation(x w_down^T + b_down) w_up^T + b_up), and z = x w_down^T +
  // b_down in the type of the products: x's where w_down and w_up have it, else fp32 (fp64 for fp64). y is the second
  // term alone without a residual. x [..., D], residual [..., D], w_down [H, D], b_down [H], w_up [D, H], b_up [D],
  // scale_vector [1] or [D], seed int64 [1] -> y [..., D], z [M, H]. activation: see csrc/common/activation.h
  m.def(
      "_bottleneck_forward(Tensor x, Tensor? residual, Tensor w_down, Tensor? b_down, Tensor w_up, Tensor? b_up, "
      "Tensor? scale_vector, int activation, float scale, float dropout_p, Tensor? seed, bool allow_tf32=False) -> "
      "(Tensor y, Tensor z)");
  // Gradients for the bits set in needs: 1 x, 2 w_down, 4 b_down, 8 w_up, 16 b_up, 32 scale_vector. 64: grad_y is added
  // to grad_x, for a residual that is x.
  m.def(
      "_bottleneck_backward(Tensor grad_y, Tensor? x, Tensor w_down, Tensor w_up, Tensor? b_down, Tensor? b_up, "
      "Tensor z, Tensor? scale_vector, int activation, float scale, float dropout_p, Tensor? seed, int needs, "
      "bool allow_tf32=False) -> "
      "(Tensor grad_x, Tensor grad_w_down, Tensor grad_b_down, Tensor grad_w_up, Tensor grad_b_up, "
      "Tensor grad_scale_vector)");

  // IA3: y = (x weight^T + bias) * scale with scale [N], or y = (x * scale) weight^T + bias with scale [K] where
  // input_side; and where that is to be kept (output side) what the scale is applied to, else an empty tensor. In fp32
  // and fp64 base is without the bias, which the scale's pass adds.
  // x [..., K], weight [N, K], bias [N] -> y [..., N], base [..., N]
  m.def(
      "_ia3_linear_forward(Tensor x, Tensor weight, Tensor? bias, Tensor scale, bool input_side, bool keep_base) -> "
      "(Tensor y, Tensor base)");
  // Gradients for the bits set in needs: 1 x, 2 scale. saved: base, or x where input_side. bias: the
  // forward's, for the output side.
  m.def(
      "_ia3_linear_backward(Tensor grad_y, Tensor? saved, Tensor? weight, Tensor? bias, Tensor scale, bool input_side, "
      "int needs) -> (Tensor grad_x, Tensor grad_scale)");
  // x * scale along one dimension; scale [x.size(dim)].
  m.def("_ia3_scale_forward(Tensor x, Tensor scale, int dim) -> Tensor y");
  m.def(
      "_ia3_scale_backward(Tensor grad_y, Tensor? x, Tensor scale, int dim, int needs) -> (Tensor grad_x, Tensor "
      "grad_scale)");

  // x [..., K] with a part p of its elements set to zero and the others divided by 1 - p: LoRA's mask on its own, and
  // its gradient, of grad_y by the same seed. seed int64 [1]
  m.def("_dropout(Tensor x, float p, Tensor seed) -> Tensor");

  // Address of the CpuKernels (common/cpu_kernels.h) of this library, for _autograd.
  m.def("_cpu_kernels() -> int");
}
