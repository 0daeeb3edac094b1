#include "normalization.h"

namespace rf::cpu {

void bn_act_forward(
    const Tensor& input, const Tensor& mean, const Tensor& var, const OptionalTensor& weight,
    const OptionalTensor& bias, double eps, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, const OptionalTensor& residual_bias, double residual_eps,
    bool relu, const Tensor& output, const OptionalTensor& pooled) {
  const Normalization main = {mean, var, weight, bias, eps};
  const Normalization shortcut = {
      residual_mean, residual_var, residual_weight, residual_bias, residual_eps};
  const Images images =
      ForwardOperands{input, main, residual, shortcut, relu, output, pooled}.check();
  const Image image = image_of(input, images);
  const AffineLanes affine(main, image, images.dtype());
  const AffineLanes residual_affine(shortcut, image, images.dtype());
  const Residual kind = !residual.has_value() ? Residual::kNone
                        : shortcut.present()  ? Residual::kNormalized
                                              : Residual::kPlain;
  kernels().forward[dtype_of(images.dtype())](
      {image, kind, relu, input.data_ptr(), pointer(residual), output.mutable_data_ptr(),
       mutable_pointer(pooled), affine.view(), residual_affine.view()});
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("bn_act_forward", RF_BOX(&bn_act_forward));
}

}  // namespace rf::cpu
