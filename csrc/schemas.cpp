// Every private operator: inputs, attributes, then the outputs that it writes. None is
// differentiable and none checks for aliasing; resunet_fast.ops gives them their meaning and their
// gradients.
#include <torch/csrc/stable/library.h>

// clang-format off
STABLE_TORCH_LIBRARY(resunet_fast_native, m) {
  m.def("cpu_isa() -> str");
  m.def("bn_stats(Tensor input, Tensor(a!) mean, Tensor(b!) var) -> ()");
  m.def("bn_act_forward(Tensor input, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, Tensor? residual_bias, float residual_eps, bool relu, Tensor(a!) output, Tensor(b!)? pooled) -> ()");
  m.def("max_pool_backward(Tensor? grad_output, Tensor grad_pooled, Tensor output, Tensor(a!) grad) -> ()");
  m.def("bn_act_backward(Tensor grad_output, Tensor input, Tensor? output, Tensor mean, Tensor var, Tensor? weight, Tensor? bias, float eps, bool batch_stats, Tensor? residual, Tensor? residual_mean, Tensor? residual_var, Tensor? residual_weight, float residual_eps, bool residual_batch_stats, bool relu, Tensor(a!)? grad_input, Tensor(b!)? grad_weight, Tensor(c!)? grad_bias, Tensor(d!)? grad_residual, Tensor(e!)? grad_residual_weight, Tensor(f!)? grad_residual_bias) -> ()");
  m.def("upsample_forward(Tensor input, Tensor? skip, int mode, Tensor(a!) output) -> ()");
  m.def("upsample_backward(Tensor grad_output, int mode, Tensor(a!) grad_input, Tensor(b!)? grad_skip) -> ()");
  m.def("update_running_stats(Tensor mean, Tensor var, Tensor? bias, int count, float momentum, Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? num_batches_tracked) -> ()");
  m.def("cast(Tensor input, Tensor(a!) output) -> ()");
  m.def("winograd_pack(Tensor weight, bool rotated, Tensor(a!) packed) -> bool");
  m.def("winograd_conv2d(Tensor input, Tensor packed, Tensor? bias, Tensor? residual, bool relu, Tensor(a!) output) -> ()");
  m.def("has_winograd() -> bool");
}
// clang-format on
