// The operators that are called from Python without the dispatcher, too (calls.h). Each library
// defines them for its device.
#pragma once

#include "tensor.h"

namespace rf {

using BnStats = void(const Tensor& input, const Tensor& mean, const Tensor& var);

using BnActForward = void(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, double residual_eps,
    bool relu, const Tensor& output, const OptionalTensor& pooled);

using BnActBackward = void(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
    const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, bool batch_stats, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, double residual_eps, bool residual_batch_stats,
    bool relu, const OptionalTensor& grad_input, const OptionalTensor& grad_weight,
    const OptionalTensor& grad_bias, const OptionalTensor& grad_residual,
    const OptionalTensor& grad_residual_weight, const OptionalTensor& grad_residual_bias);

using UpdateRunningStats = void(
    const Tensor& mean, const Tensor& var, const OptionalTensor& bias, int64_t count,
    double momentum, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& num_batches_tracked);

struct Operators {
  BnStats* bn_stats;
  BnActForward* bn_act_forward;
  BnActBackward* bn_act_backward;
  UpdateRunningStats* update_running_stats;
};

namespace cpu {

BnStats bn_stats;
BnActForward bn_act_forward;
BnActBackward bn_act_backward;
UpdateRunningStats update_running_stats;

}  // namespace cpu

namespace cuda {

BnStats bn_stats;
BnActForward bn_act_forward;
BnActBackward bn_act_backward;
UpdateRunningStats update_running_stats;

}  // namespace cuda

}  // namespace rf
