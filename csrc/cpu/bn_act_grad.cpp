#include "normalization.h"

namespace rf::cpu {
namespace {

struct Sums {
  std::vector<double> grad;
  std::vector<double> with_input;
  std::vector<double> with_residual;
};

Sums add_tiles(const Image& image, const Tiles& tiles, const std::vector<double>& partials) {
  Sums sums = {
      std::vector<double>(image.c), std::vector<double>(image.c), std::vector<double>(image.c)};
  for (int64_t tile = 0; tile < tiles.count; ++tile) {
    const double* at = partials.data() + tile * 3 * image.c;
    for (int64_t c = 0; c < image.c; ++c) {
      sums.grad[c] += at[c];
      sums.with_input[c] += at[image.c + c];
      sums.with_residual[c] += at[2 * image.c + c];
    }
  }
  return sums;
}

Sums sum_gradients(
    const Image& image, DType dtype, const MaskArgs& masked, const void* residual,
    const void* residual_mean) {
  const Tiles tiles = tiles_of(image);
  std::vector<double> partials(tiles.count * 3 * image.c);
  kernels().grad_sums[dtype]({image, tiles, masked, residual, residual_mean, partials.data()});
  return add_tiles(image, tiles, partials);
}

// sum(g * (x - mean)) / deviation = sum(g * xhat), the weight's gradient.
std::vector<double> weight_grad(const std::vector<double>& products, const Normalization& norm) {
  std::vector<double> result = read_vector(*norm.var);
  for (size_t c = 0; c < result.size(); ++c) {
    result[c] = products[c] * reciprocal_deviation(result[c], norm.eps);
  }
  return result;
}

// The vectors of batch_norm_grad; without batch statistics the gradient is scale * g.
class GradLanes {
 public:
  GradLanes() = default;

  GradLanes(
      const Normalization& norm, const Image& image, ScalarType type, bool batch_stats,
      const std::vector<double>& sum_grad, const std::vector<double>& products) {
    mean_ = LaneVector(read_vector(*norm.mean), image, type);
    scale_ = LaneVector(scale_of(norm), image, type);
    if (!batch_stats) return;
    const double positions = static_cast<double>(image.n * plane(image));
    std::vector<double> mean_grad = sum_grad, slope = weight_grad(products, norm);
    const std::vector<double> var = read_vector(*norm.var);
    for (size_t c = 0; c < slope.size(); ++c) {
      mean_grad[c] /= positions;
      slope[c] *= reciprocal_deviation(var[c], norm.eps) / positions;
    }
    mean_grad_ = LaneVector(mean_grad, image, type);
    slope_ = LaneVector(slope, image, type);
  }

  GradAffine view() const {
    return {mean_.data(), scale_.data(), mean_grad_.data(), slope_.data()};
  }

 private:
  LaneVector mean_, scale_, mean_grad_, slope_;
};

struct Backward {
  Image image;
  ScalarType type;
  MaskArgs masked;
  const BackwardOperands& of;

  Sums sums() const {
    LaneVector mean;
    if (of.shortcut.present()) mean = LaneVector(read_vector(*of.shortcut.mean), image, type);
    return sum_gradients(image, dtype_of(type), masked, pointer(of.residual), mean.data());
  }

  void write_vectors(const Sums& sums) const {
    write_vector(sums.grad, of.wanted.bias);
    write_vector(sums.grad, of.wanted.residual_bias);
    if (of.wanted.weight.has_value()) {
      write_vector(weight_grad(sums.with_input, of.main), *of.wanted.weight);
    }
    if (of.wanted.residual_weight.has_value()) {
      write_vector(weight_grad(sums.with_residual, of.shortcut), *of.wanted.residual_weight);
    }
  }

  void write_images(const Sums& sums) const {
    GradLanes inner, outer;
    if (of.wanted.input.has_value()) {
      inner = GradLanes(of.main, image, type, of.batch_stats, sums.grad, sums.with_input);
    }
    if (of.wanted.residual.has_value() && of.shortcut.present()) {
      outer = GradLanes(
          of.shortcut, image, type, of.residual_batch_stats, sums.grad, sums.with_residual);
    }
    kernels().grad[dtype_of(type)](
        {image, masked, pointer(of.residual), inner.view(), outer.view(),
         mutable_pointer(of.wanted.input), mutable_pointer(of.wanted.residual)});
  }
};

}  // namespace

void bn_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
    const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, bool batch_stats, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, double residual_eps, bool residual_batch_stats,
    bool relu, const OptionalTensor& grad_input, const OptionalTensor& grad_weight,
    const OptionalTensor& grad_bias, const OptionalTensor& grad_residual,
    const OptionalTensor& grad_residual_weight, const OptionalTensor& grad_residual_bias) {
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
  const AffineLanes affine(main, image, images.dtype());
  const MaskArgs masked = {
      operands.mask(), grad_output.data_ptr(), pointer(output), input.data_ptr(), affine.view()};
  const Backward backward = {image, images.dtype(), masked, operands};
  const Sums sums = operands.needs_sums() ? backward.sums() : Sums();
  if (wanted.vectors()) backward.write_vectors(sums);
  if (grad_input.has_value() || grad_residual.has_value()) backward.write_images(sums);
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("bn_act_backward", RF_BOX(&bn_act_backward));
}

}  // namespace rf::cpu
