#include <numeric>

#include "operators.h"

namespace rf::cuda {
namespace {

// A vector must not reach from the input's channels into the skip's.
int64_t common_run(const Image& input, const Image& skip) {
  return input.channels_last ? std::gcd(input.c, skip.c) : 1;
}

void upsample_forward(
    const Tensor& input, const OptionalTensor& skip, int64_t mode, const Tensor& output) {
  const Device device("upsample_forward", input);
  const ResizeMode resize_mode = checked_mode("upsample_forward", mode);
  const Images images = check_upsample_forward(input, skip, output);
  if (output.numel() == 0) return;
  const Image out = image_of(output, images);
  const Image in = with_size(with_channels(out, input.size(1)), input.size(2), input.size(3));
  const Image behind = with_channels(out, out.c - in.c);
  const int width = width_of(
      images, common_run(in, behind), {input.data_ptr(), pointer(skip), output.data_ptr()});
  resize(
      {in, behind, out, sweep_of(out, width, kSweepBlocks), dtype_of(images.dtype()), resize_mode,
       input.data_ptr(), pointer(skip), output.mutable_data_ptr()},
      device.stream());
}

void upsample_backward(
    const Tensor& grad_output, int64_t mode, const Tensor& grad_input,
    const OptionalTensor& grad_skip) {
  const Device device("upsample_backward", grad_output);
  const ResizeMode resize_mode = checked_mode("upsample_backward", mode);
  const Images images = check_upsample_backward(grad_output, grad_input, grad_skip);
  if (grad_input.numel() + grad_output.numel() == 0) return;
  const Image out = image_of(grad_output, images);
  const Image in =
      with_size(with_channels(out, grad_input.size(1)), grad_input.size(2), grad_input.size(3));
  const Image behind = with_channels(out, out.c - in.c);
  const int width = width_of(
      images, common_run(in, behind),
      {grad_output.data_ptr(), grad_input.data_ptr(), pointer(grad_skip)});
  resize_grad(
      {in, behind, out, sweep_of(in, width, kSweepBlocks), sweep_of(behind, width, kSweepBlocks),
       dtype_of(images.dtype()), resize_mode, grad_output.data_ptr(),
       grad_input.mutable_data_ptr(), mutable_pointer(grad_skip)},
      device.stream());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("upsample_forward", RF_BOX(&upsample_forward));
  m.impl("upsample_backward", RF_BOX(&upsample_backward));
}

}  // namespace rf::cuda
