// The ops of _autograd, with the arguments of the raw ops in schema.cpp; each gives y, or changes it in place. Those of
// one adapter draw the seed that dropout needs where it is not given.
#pragma once

#include "common.h"

namespace pyfused {

Tensor lora_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& a, const Tensor& b,
                   const Optional& scale_vector, double scale, double dropout_p, const Optional& seed, bool allow_tf32);

std::vector<Tensor> lora_linear_shared(const Tensor& x, const std::vector<Tensor>& weights,
                                       const std::vector<Optional>& biases, const std::vector<Optional>& a,
                                       const std::vector<Optional>& b, const std::vector<Optional>& scale_vectors,
                                       const std::vector<double>& scales, const std::vector<double>& dropout_ps,
                                       const std::vector<Optional>& seeds, bool allow_tf32);

// residual_is_x: x is the residual too, and `residual` None.
Tensor bottleneck(const Tensor& x, const Optional& residual, const Tensor& w_down, const Optional& b_down,
                  const Tensor& w_up, const Optional& b_up, const Optional& scale_vector, int64_t activation,
                  double scale, double dropout_p, const Optional& seed, bool residual_is_x, bool allow_tf32);

// flatten: scale may have any shape, as in layers; its gradient has the same.
Tensor ia3_linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Tensor& scale, bool input_side,
                  bool flatten);
Tensor ia3_scale(const Tensor& x, const Tensor& scale, int64_t dim);

// In place: adapters of `tables`, see schema.cpp, for the rows of each y.
void multi_lora_(const std::vector<Tensor>& y, const Tensor& x, const std::vector<Tensor>& tables, const Tensor& index,
                 const Optional& segments);

}  // namespace pyfused
