#include "operators.h"

namespace rf::cuda {

void bn_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
    const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, bool batch_stats, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, double residual_eps, bool residual_batch_stats,
    bool relu, const OptionalTensor& grad_input, const OptionalTensor& grad_weight,
    const OptionalTensor& grad_bias, const OptionalTensor& grad_residual,
    const OptionalTensor& grad_residual_weight, const OptionalTensor& grad_residual_bias) {
  const Device device("bn_act_backward", input);
  const Normalization main = {mean, var, weight, bias, eps};
  const Normalization shortcut = {
      residual_mean, residual_var, residual_weight, std::nullopt, residual_eps};
  const Wanted wanted = {grad_input,    grad_weight,          grad_bias,
                         grad_residual, grad_residual_weight, grad_residual_bias};
  const BackwardOperands operands = {
      grad_output, input,    output,  main, batch_stats, residual,
      shortcut,    residual_batch_stats, relu, wanted};
  const Images images = operands.check();
  const Image image = image_of(input, images);
  const int width = width_of(
      images, run_length(image),
      {grad_output.data_ptr(), input.data_ptr(), pointer(output), pointer(residual),
       pointer(grad_input), pointer(grad_residual)});
  const Sweep sums = sweep_of(image, width, kReductionBlocks);
  const bool needs_sums = operands.needs_sums();
  const int64_t partials = needs_sums ? 3 * slots_of(sums) * image.c : 0;
  const torch::stable::Tensor memory = scratch(input, images.dtype(), partials + 4 * image.c);
  const int64_t bytes = images.dtype() == ScalarType::Double ? 8 : 4;
  char* coefficients = static_cast<char*>(memory.mutable_data_ptr());
  GradArgs args = {
      sums, dtype_of(images.dtype()), operands.mask(), batch_stats, residual_batch_stats,
      grad_output.data_ptr(), input.data_ptr(), pointer(output), pointer(residual), norm_of(main),
      norm_of(shortcut), coefficients + 4 * image.c * bytes, coefficients, vector_of(grad_weight),
      vector_of(grad_bias), vector_of(grad_residual_weight), vector_of(grad_residual_bias),
      mutable_pointer(grad_input), mutable_pointer(grad_residual)};
  if (needs_sums) grad_sums(args, device.stream());
  if (!grad_input.has_value() && !grad_residual.has_value()) return;
  args.sweep = sweep_of(image, width, kSweepBlocks);
  grad(args, device.stream());
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("bn_act_backward", RF_BOX(&bn_act_backward));
}

}  // namespace rf::cuda
