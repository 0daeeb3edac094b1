#include "operators.h"

namespace rf::cuda {

void bn_act_forward(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, double residual_eps,
    bool relu, const Tensor& output, const OptionalTensor& pooled) {
  const Device device("bn_act_forward", input);
  const Normalization main = {mean, var, weight, bias, eps};
  const Normalization shortcut = {
      residual_mean, residual_var, residual_weight, residual_bias, residual_eps};
  const Images images =
      ForwardOperands{input, main, residual, shortcut, relu, output, pooled}.check();
  const Image image = image_of(input, images);
  const void* data[] = {
      input.data_ptr(), pointer(residual), output.data_ptr(), pointer(pooled)};
  // The windows of a plane are two elements apart: no vectors there.
  const int64_t run = pooled.has_value() && !image.channels_last ? 1 : run_length(image);
  const int width = width_of(images, run, {data[0], data[1], data[2], data[3]});
  const Sweep sweep = pooled.has_value() ? windows_of(image, width, kSweepBlocks)
                                         : sweep_of(image, width, kSweepBlocks);
  forward(
      {image, sweep, dtype_of(images.dtype()), relu, data[0], data[1], output.mutable_data_ptr(),
       mutable_pointer(pooled), norm_of(main), norm_of(shortcut)},
      device.stream());
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("bn_act_forward", RF_BOX(&bn_act_forward));
}

}  // namespace rf::cuda
