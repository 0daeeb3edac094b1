// The operands of each operator and the checks that are the same on every device.
#pragma once

#include "check.h"
#include "resize_math.h"
#include "types.h"

namespace rf {

inline DType dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return kFloat64;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kFloat16;
    default: return kFloat32;
  }
}

inline const void* pointer(const OptionalTensor& t) {
  return t.has_value() ? t->data_ptr() : nullptr;
}

inline void* mutable_pointer(const OptionalTensor& t) {
  return t.has_value() ? t->mutable_data_ptr() : nullptr;
}

// One batch normalisation of a call: its statistics and weights.
struct Normalization {
  OptionalTensor mean;
  OptionalTensor var;
  OptionalTensor weight;
  OptionalTensor bias;
  double eps;

  bool present() const { return mean.has_value(); }

  // `prefix` is what the argument names start with: "" or "residual_".
  void check(const char* op, const char* prefix, int64_t channels, ScalarType image) const {
    const auto vector = [&](const char* name, const OptionalTensor& t, bool statistics) {
      if (t.has_value()) check_channels(op, {prefix, name}, *t, channels, image, statistics);
    };
    vector("mean", mean, true);
    vector("var", var, true);
    vector("weight", weight, false);
    vector("bias", bias, false);
  }
};

inline void check_residual(
    const char* op, const OptionalTensor& residual, const Normalization& shortcut, int64_t channels,
    ScalarType image) {
  if (shortcut.mean.has_value() != shortcut.var.has_value()) {
    fail(op, ": residual_mean and residual_var must be given together");
  }
  if (shortcut.present() && !residual.has_value()) {
    fail(op, ": residual_mean is given without a residual");
  }
  if (!shortcut.present() && (shortcut.weight.has_value() || shortcut.bias.has_value())) {
    fail(op, ": residual_weight and residual_bias need residual_mean and residual_var");
  }
  shortcut.check(op, "residual_", channels, image);
}

inline Images check_bn_stats(const Tensor& input, const Tensor& mean, const Tensor& var) {
  Images images("bn_stats", "input", input);
  check_channels("bn_stats", "mean", mean, input.size(1), images.dtype(), true);
  check_channels("bn_stats", "var", var, input.size(1), images.dtype(), true);
  return images;
}

struct ForwardOperands {
  const Tensor& input;
  Normalization main;
  const OptionalTensor& residual;
  Normalization shortcut;
  bool relu;
  const Tensor& output;
  const OptionalTensor& pooled;

  Images check() const {
    const char* op = "bn_act_forward";
    Images images(op, "input", input);
    images.add_like("residual", residual, input);
    images.add_like("output", output, input);
    if (pooled.has_value()) {
      images.add(
          "pooled", *pooled, input.size(0), input.size(1), input.size(2) / 2, input.size(3) / 2);
    }
    main.check(op, "", input.size(1), images.dtype());
    check_residual(op, residual, shortcut, input.size(1), images.dtype());
    return images;
  }
};

// The gradients that a call writes, each absent unless it is wanted.
struct Wanted {
  OptionalTensor input, weight, bias, residual, residual_weight, residual_bias;

  bool vectors() const {
    return weight.has_value() || bias.has_value() || residual_weight.has_value() ||
           residual_bias.has_value();
  }

  void check(const char* op, int64_t channels, ScalarType image) const {
    const auto vector = [&](const char* name, const OptionalTensor& t) {
      if (t.has_value()) check_channels(op, name, *t, channels, image, false);
    };
    vector("grad_weight", weight);
    vector("grad_bias", bias);
    vector("grad_residual_weight", residual_weight);
    vector("grad_residual_bias", residual_bias);
  }
};

struct BackwardOperands {
  const Tensor& grad_output;
  const Tensor& input;
  const OptionalTensor& output;
  Normalization main;
  bool batch_stats;
  const OptionalTensor& residual;
  Normalization shortcut;
  bool residual_batch_stats;
  bool relu;
  Wanted wanted;

  Images check() const {
    const char* op = "bn_act_backward";
    Images images(op, "grad_output", grad_output);
    images.add_like("input", input, grad_output);
    images.add_like("output", output, grad_output);
    images.add_like("residual", residual, grad_output);
    images.add_like("grad_input", wanted.input, grad_output);
    images.add_like("grad_residual", wanted.residual, grad_output);
    const ScalarType type = images.dtype();
    main.check(op, "", input.size(1), type);
    check_residual(op, residual, shortcut, input.size(1), type);
    wanted.check(op, input.size(1), type);
    if (relu && residual.has_value() && !output.has_value()) {
      fail(op, ": output must be given when there is a residual, for the ReLU's mask");
    }
    if ((wanted.residual_weight.has_value() || wanted.residual_bias.has_value()) &&
        !shortcut.present()) {
      fail(op, ": grad_residual_weight and grad_residual_bias need residual_mean");
    }
    return images;
  }

  Mask mask() const {
    return !relu ? Mask::kAll : output.has_value() ? Mask::kOutput : Mask::kRecomputed;
  }

  bool needs_sums() const {
    const bool residual_varies = shortcut.present() && residual_batch_stats;
    return wanted.vectors() || (wanted.input.has_value() && batch_stats) ||
           (wanted.residual.has_value() && residual_varies);
  }
};

inline Images check_max_pool_backward(
    const OptionalTensor& grad_output, const Tensor& grad_pooled, const Tensor& output,
    const Tensor& grad) {
  Images images("max_pool_backward", "output", output);
  images.add_like("grad", grad, output);
  images.add_like("grad_output", grad_output, output);
  images.add(
      "grad_pooled", grad_pooled, output.size(0), output.size(1), output.size(2) / 2,
      output.size(3) / 2);
  return images;
}

inline ResizeMode checked_mode(const char* op, int64_t mode) {
  if (mode < kNearest || mode > kBilinearAlignCorners) {
    fail(op, ": mode must be 0 (nearest), 1 (bilinear) or 2 (bilinear, align_corners), got ", mode);
  }
  return static_cast<ResizeMode>(mode);
}

inline void check_not_empty(const char* op, const char* name, const Tensor& t) {
  if (t.size(2) < 1 || t.size(3) < 1) {
    fail(op, ": ", name, " must have at least one row and one column, got ", shape_of(t));
  }
}

inline Images check_upsample_forward(
    const Tensor& input, const OptionalTensor& skip, const Tensor& output) {
  const char* op = "upsample_forward";
  Images images(op, "input", input);
  images.add("output", output);
  const int64_t n = input.size(0), h = output.size(2), w = output.size(3);
  const int64_t skip_channels = skip.has_value() && skip->dim() == 4 ? skip->size(1) : 0;
  if (skip.has_value()) images.add("skip", *skip, n, skip_channels, h, w);
  images.add("output", output, n, input.size(1) + skip_channels, h, w);
  if (output.numel() > 0) check_not_empty(op, "input", input);
  return images;
}

inline Images check_upsample_backward(
    const Tensor& grad_output, const Tensor& grad_input, const OptionalTensor& grad_skip) {
  const char* op = "upsample_backward";
  Images images(op, "grad_output", grad_output);
  images.add("grad_input", grad_input);
  const int64_t n = grad_output.size(0);
  const int64_t skip_channels = grad_output.size(1) - grad_input.size(1);
  if (skip_channels < 0 || grad_input.size(0) != n) {
    fail(
        op, ": grad_input must have the batch size of grad_output and at most its channels, got ",
        shape_of(grad_input), " for grad_output of shape ", shape_of(grad_output));
  }
  if (grad_skip.has_value()) {
    images.add(
        "grad_skip", *grad_skip, n, skip_channels, grad_output.size(2), grad_output.size(3));
  }
  if (grad_input.numel() > 0) check_not_empty(op, "grad_output", grad_output);
  return images;
}

inline void check_update_running_stats(
    const Tensor& mean, const Tensor& var, const OptionalTensor& bias, double momentum,
    const Tensor& running_mean, const Tensor& running_var, const OptionalTensor& counter) {
  const char* op = "update_running_stats";
  const int64_t channels = mean.numel();
  check_vector(op, "mean", mean, channels);
  check_vector(op, "var", var, channels);
  if (bias.has_value()) check_vector(op, "bias", *bias, channels);
  check_vector(op, "running_mean", running_mean, channels);
  check_vector(op, "running_var", running_var, channels);
  if (momentum < 0.0 && !counter.has_value()) {
    fail(op, ": num_batches_tracked must be given when momentum is negative (cumulative average)");
  }
  if (!counter.has_value()) return;
  check_memory(op, "num_batches_tracked", *counter);
  if (counter->numel() != 1 || counter->scalar_type() != ScalarType::Long) {
    fail(
        op, ": num_batches_tracked must be one int64, got ", dtype_name(counter->scalar_type()),
        " of shape ", shape_of(*counter));
  }
}

}  // namespace rf
