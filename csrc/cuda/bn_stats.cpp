#include "operators.h"

namespace rf::cuda {

void bn_stats(const Tensor& input, const Tensor& mean, const Tensor& var) {
  const Device device("bn_stats", input);
  const Images images = check_bn_stats(input, mean, var);
  const Image image = image_of(input, images);
  const int width = width_of(images, run_length(image), {input.data_ptr()});
  const Sweep sweep = sweep_of(image, width, kReductionBlocks);
  const torch::stable::Tensor partials = scratch(input, ScalarType::Double, 2 * slots_of(sweep) * image.c);
  stats(
      {sweep, dtype_of(images.dtype()), input.data_ptr(),
       static_cast<double*>(partials.mutable_data_ptr()), vector_of(mean), vector_of(var)},
      device.stream());
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("bn_stats", RF_BOX(&bn_stats));
}

}  // namespace rf::cuda
