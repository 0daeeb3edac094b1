#include "operators.h"

namespace rf::cuda {
namespace {

void max_pool_backward(
    const OptionalTensor& grad_output, const Tensor& grad_pooled, const Tensor& output,
    const Tensor& grad) {
  const Device device("max_pool_backward", output);
  const Images images = check_max_pool_backward(grad_output, grad_pooled, output, grad);
  const Image image = image_of(output, images);
  const int64_t run = image.channels_last ? image.c : 1;
  const int width = width_of(
      images, run,
      {pointer(grad_output), grad_pooled.data_ptr(), output.data_ptr(), grad.data_ptr()});
  pool_grad(
      {image, windows_of(image, width, kSweepBlocks), dtype_of(images.dtype()),
       pointer(grad_output), grad_pooled.data_ptr(), output.data_ptr(), grad.mutable_data_ptr()},
      device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("max_pool_backward", RF_BOX(&max_pool_backward));
}

}  // namespace rf::cuda
