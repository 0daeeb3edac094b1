#include "vectors.h"

namespace rf::cpu {
namespace {

void max_pool_backward(
    const OptionalTensor& grad_output, const Tensor& grad_pooled, const Tensor& output,
    const Tensor& grad) {
  const Images images = check_max_pool_backward(grad_output, grad_pooled, output, grad);
  kernels().pool_grad[dtype_of(images.dtype())](
      {image_of(output, images), pointer(grad_output), grad_pooled.data_ptr(), output.data_ptr(),
       grad.mutable_data_ptr()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("max_pool_backward", RF_BOX(&max_pool_backward));
}

}  // namespace rf::cpu
