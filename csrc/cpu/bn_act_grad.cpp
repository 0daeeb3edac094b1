#include <torch/csrc/stable/library.h>

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
    scale_ = LaneVector(norm.scale(), image, type);
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

// The outputs of the call, each null unless it is wanted.
struct Wanted {
  OptionalTensor input, weight, bias, residual, residual_weight, residual_bias;

  bool vectors() const {
    return weight.has_value() || bias.has_value() || residual_weight.has_value() ||
           residual_bias.has_value();
  }

  void check(const char* op, const Images& images, int64_t channels) const {
    const auto vector = [&](const char* name, const OptionalTensor& t) {
      if (t.has_value()) check_channels(op, name, *t, channels, images.dtype(), false);
    };
    vector("grad_weight", weight);
    vector("grad_bias", bias);
    vector("grad_residual_weight", residual_weight);
    vector("grad_residual_bias", residual_bias);
  }
};

struct Backward {
  Image image;
  ScalarType type;
  MaskArgs masked;
  const void* residual;
  Normalization main;
  Normalization shortcut;
  bool batch_stats;
  bool residual_batch_stats;

  bool needs_sums(const Wanted& wanted) const {
    const bool residual_varies = shortcut.present() && residual_batch_stats;
    return wanted.vectors() || (wanted.input.has_value() && batch_stats) ||
           (wanted.residual.has_value() && residual_varies);
  }

  Sums sums() const {
    const LaneVector mean =
        shortcut.present() ? LaneVector(read_vector(*shortcut.mean), image, type) : LaneVector();
    return sum_gradients(image, dtype_of(type), masked, residual, mean.data());
  }

  void write_vectors(const Sums& sums, const Wanted& wanted) const {
    write_vector(sums.grad, wanted.bias);
    write_vector(sums.grad, wanted.residual_bias);
    if (wanted.weight.has_value()) write_vector(weight_grad(sums.with_input, main), *wanted.weight);
    if (wanted.residual_weight.has_value()) {
      write_vector(weight_grad(sums.with_residual, shortcut), *wanted.residual_weight);
    }
  }

  void write_images(const Sums& sums, const Wanted& wanted) const {
    GradLanes inner, outer;
    if (wanted.input.has_value()) {
      inner = GradLanes(main, image, type, batch_stats, sums.grad, sums.with_input);
    }
    if (wanted.residual.has_value() && shortcut.present()) {
      outer = GradLanes(shortcut, image, type, residual_batch_stats, sums.grad, sums.with_residual);
    }
    kernels().grad[dtype_of(type)](
        {image, masked, residual, inner.view(), outer.view(), mutable_pointer(wanted.input),
         mutable_pointer(wanted.residual)});
  }
};

void bn_act_backward(
    const Tensor& grad_output, const Tensor& input, const OptionalTensor& output,
    const Tensor& mean, const Tensor& var, const OptionalTensor& weight, const OptionalTensor& bias,
    double eps, bool batch_stats, const OptionalTensor& residual,
    const OptionalTensor& residual_mean, const OptionalTensor& residual_var,
    const OptionalTensor& residual_weight, double residual_eps, bool residual_batch_stats,
    bool relu, const OptionalTensor& grad_input, const OptionalTensor& grad_weight,
    const OptionalTensor& grad_bias, const OptionalTensor& grad_residual,
    const OptionalTensor& grad_residual_weight, const OptionalTensor& grad_residual_bias) {
  const char* op = "bn_act_backward";
  Images images(op, "grad_output", grad_output);
  images.add_like("input", input, grad_output);
  images.add_like("output", output, grad_output);
  images.add_like("residual", residual, grad_output);
  images.add_like("grad_input", grad_input, grad_output);
  images.add_like("grad_residual", grad_residual, grad_output);
  const ScalarType type = images.dtype();
  const Normalization main = {mean, var, weight, bias, eps};
  const Normalization shortcut = {
      residual_mean, residual_var, residual_weight, std::nullopt, residual_eps};
  const Wanted wanted = {grad_input,    grad_weight,          grad_bias,
                         grad_residual, grad_residual_weight, grad_residual_bias};
  main.check(op, "", input.size(1), type);
  check_residual(op, residual, shortcut, input.size(1), type);
  wanted.check(op, images, input.size(1));
  if (relu && residual.has_value() && !output.has_value()) {
    fail(op, ": output must be given when there is a residual, for the ReLU's mask");
  }
  if ((grad_residual_weight.has_value() || grad_residual_bias.has_value()) && !shortcut.present()) {
    fail(op, ": grad_residual_weight and grad_residual_bias need residual_mean");
  }

  const Image image = image_of(input, images);
  const AffineLanes affine(main, image, type);
  const Mask mask = !relu ? Mask::kAll : output.has_value() ? Mask::kOutput : Mask::kRecomputed;
  const MaskArgs masked = {
      mask, grad_output.data_ptr(), pointer(output), input.data_ptr(), affine.view()};
  const Backward backward = {image, type,     masked,      pointer(residual),
                             main,  shortcut, batch_stats, residual_batch_stats};
  const Sums sums = backward.needs_sums(wanted) ? backward.sums() : Sums();
  if (wanted.vectors()) backward.write_vectors(sums, wanted);
  if (grad_input.has_value() || grad_residual.has_value()) backward.write_images(sums, wanted);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("bn_act_backward", TORCH_BOX(&bn_act_backward));
}

}  // namespace rf::cpu
