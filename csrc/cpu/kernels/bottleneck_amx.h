// The bottleneck in AMX tiles, for bf16 data and weights, as the host sees it. Both products of a row run back to back
// on panels of a few rows, so what lies between them does not leave the first-level cache; sums are fp32.
//
// Names of sizes: M rows, D width, a multiple of 32, H bottleneck, a multiple of 16 and at most kMaxAmxHidden.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../../common/philox.h"

namespace pyfused {

inline constexpr int64_t kMaxAmxHidden = 128;

// A weight as a product's right factor: one that is summed over the D columns, with H results, or the other way round.
// bytes of either: amx_weight_bytes(D, H).
struct BottleneckForwardRows {
  const void *x, *residual;  // residual may be null
  int64_t ld_x, ld_residual, D, H;
  const void *down, *up;      // tiles: of w_down over columns, of w_up over hidden values
  const float* down_bias;     // [H], zeros where there is none
  const float *scale, *bias;  // [D]: out = residual + keep (u * scale + bias)
  Activation activation;
  Dropout dropout;
  void *z, *out;  // [M, H] and [M, D], contiguous
};

// dz = dh factor activation'(z) with dh = keep dy w_up; parts of sums over these rows, in fp32, each where it is not
// null: up [H + 1, D], h^T keep dy and in the last row the sums of keep dy; down [H, D], dz^T x; down_bias [H], sums of
// dz.
struct BottleneckBackwardRows {
  const void *dy, *x;  // x may be null where down is
  int64_t ld_dy, ld_x, D, H;
  const void *up, *down;  // tiles: of w_up over columns, a scale per channel in it, of w_down over hidden values
  Activation activation;
  float factor;
  Dropout dropout;
  bool add_dy;  // dx = dz w_down + dy
  const void* z;
  void* masked;  // room for kAmxBackwardRows rows of D where dropout is on
  void* dx;      // [M, D] contiguous, or null
  float *up_part, *down_part, *down_bias_part;
};
inline constexpr int64_t kAmxBackwardRows = 64;

// Parts [H, D] of a sum over rows, `stride` apart.
struct BottleneckAmxParts {
  const float* data;
  int64_t count, stride, D, H;
};

// From the parts of h^T keep dy what they are needed for, each where it is not null: gradient [D, H] in bf16, each row
// times its scale, and dots[d], the product of row d of the sum and of w_up, both before the scale.
struct BottleneckAmxUpGradient {
  BottleneckAmxParts parts;
  const float* scale;  // [D]
  const void* w_up;    // [D, H] contiguous
  void* gradient;
  double* dots;
};

namespace AMX {
int64_t bottleneck_weight_bytes(int64_t D, int64_t H);
// Tiles of columns [begin, end), multiples of 32, of w [H, D] (of_up: w_up [D, H]), contiguous.
void bottleneck_pack_over_columns(const void* w, bool of_up, int64_t D, int64_t H, int64_t begin, int64_t end,
                                  void* tiles);
void bottleneck_pack_over_hidden(const void* w, bool of_up, int64_t D, int64_t H, int64_t begin, int64_t end,
                                 void* tiles);
void bottleneck_forward_rows(const BottleneckForwardRows& call, int64_t row_begin, int64_t row_end);
void bottleneck_backward_rows(const BottleneckBackwardRows& call, int64_t row_begin, int64_t row_end);
// For columns [begin, end), multiples of 16. The first: gradient [H, D] = the parts' sum, in bf16.
void bottleneck_down_gradient(const BottleneckAmxParts& parts, void* gradient, int64_t begin, int64_t end);
void bottleneck_up_gradient(const BottleneckAmxUpGradient& call, int64_t begin, int64_t end);
}  // namespace AMX

}  // namespace pyfused
