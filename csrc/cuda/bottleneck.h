// The bottleneck's CUDA launchers: raw pointers and a stream, see lora.h. M rows, D width, H bottleneck. Sums are fp32,
// for fp64 data fp64.
#pragma once

#include <cuda_runtime_api.h>

#include "../common/activation.h"
#include "types.h"

namespace pyfused {

// A factor and, where it is learned, a vector of one element or of D.
struct BottleneckScale {
  double factor;
  ConstVector vector;
  int64_t size;
};

// Around the products of rows of D:
//   v[m][d] = keep(m, d) * (u[m][d] * scale[d] + b[d] * scale[d])
//   out[m][d] = residual[m][d] + v[m][d], parts[range][d] = sum over the range's rows of v[m][d]
// each of out and parts where it is given. source is u's type, out's and the residual's is target.
struct BottleneckColumns {
  Dtype source, target;
  int64_t rows, columns;
  ConstRows u, residual;  // residual may be none; out may be u
  BottleneckScale scale;
  ConstVector bias;
  DropoutSource dropout;
  void* out;  // [M, D]
  void* parts;
  int64_t range_rows;
};
void launch_bottleneck_columns(const BottleneckColumns& call, cudaStream_t stream);

// Between the products, on contiguous [M, H] of one type:
//   h = h_scale * activation(z), dz = dh * dz_scale * activation'(z), parts[range][j] = sum over the range's rows of dz
// each where it is given; dz may be dh. The scales' vectors have one element.
struct BottleneckMiddle {
  Dtype dtype;
  Activation activation;
  int64_t rows, columns;
  const void* z;
  const void* dh;
  BottleneckScale h_scale, dz_scale;
  void* h;
  void* dz;
  void* parts;
  int64_t range_rows;
};
void launch_bottleneck_middle(const BottleneckMiddle& call, cudaStream_t stream);

// Both products back to back, the hidden values in shared memory; not for fp64. With z_in the backward:
//   forward   z = x w1^T + down_bias, h = activation(z)
//   backward  dz = keep(m, d) x w1^T * dz_scale * activation'(z_in), with h = activation(z_in) where asked for, and for
//             each block of kFusedRows rows sums [D] of keep x and sums [H] of dz, each where asked for
//   out = residual + keep(m, d) (h w2^T scale + bias scale), in the backward with dz for h; where it is given
struct BottleneckFused {
  KernelTypes types;
  Activation activation;
  int64_t rows, width;
  int hidden;    // up to kMaxFusedHidden
  ConstRows x;   // [M, D]
  ConstRows w1;  // [H, D], as w2 of the adapter's type
  ConstRows w2;  // [D, H]
  DropoutSource x_dropout, out_dropout;
  const void* down_bias;  // of the adapter's type, or null
  const void* z_in;       // like z
  void* z;                // [M, H] of the adapter's type
  void* h;                // [M, H] sums
  void* dz;               // [M, H] sums
  BottleneckScale dz_scale, scale;
  ConstVector bias;
  ConstRows residual;
  void* out;
  void* x_sums;
  void* down_sums;
  int shared_bytes;  // what a block may have on this GPU
};
inline constexpr int kFusedRows = 64;
inline constexpr int kMaxFusedHidden = 128;  // what fits every GPU's shared memory beside the stages
void launch_bottleneck_fused(const BottleneckFused& call, cudaStream_t stream);

// Rows of a range of either: enough blocks for the GPU, parts that stay small beside the data.
int64_t bottleneck_range_rows(int64_t rows, int64_t columns, int multiprocessors);

// From raw [D, H] = g^T h in the sums' type, the gradient of the scale's vector: factor * dots[d], dots[d] = sum over j
// of w[d][j] raw[d][j] + b[d] * sums[d], or the sum of the dots where size is 1. dots: memory for D sums.
struct BottleneckScaleGradient {
  int64_t width, hidden;
  const void* w;  // contiguous, like b of weight's type
  Dtype weight;
  ConstVector bias;
  const void* raw;
  const void* sums;  // [D], where there is a bias
  void* dots;
  double factor;
  int64_t size;
  void* out;
  Dtype out_dtype;
};
void launch_bottleneck_scale_gradient(const BottleneckScaleGradient& call, bool is_double, cudaStream_t stream);

}  // namespace pyfused
