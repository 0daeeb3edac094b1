// One batch normalisation of a call: its statistics and weights, checked, and as the loops want
// them.
#pragma once

#include <string>

#include "vectors.h"

namespace rf::cpu {

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
      const std::string full = std::string(prefix) + name;
      if (t.has_value()) check_channels(op, full.c_str(), *t, channels, image, statistics);
    };
    vector("mean", mean, true);
    vector("var", var, true);
    vector("weight", weight, false);
    vector("bias", bias, false);
  }

  std::vector<double> scale() const { return scale_of(weight, read_vector(*var), eps); }
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

// The vectors of (x - mean) * scale + bias; empty for a normalisation that is not there.
class AffineLanes {
 public:
  AffineLanes(const Normalization& norm, const Image& image, ScalarType type) {
    if (!norm.present()) return;
    mean_ = LaneVector(read_vector(*norm.mean), image, type);
    scale_ = LaneVector(norm.scale(), image, type);
    bias_ = LaneVector(read_vector(norm.bias, image.c, 0.0), image, type);
  }

  Affine view() const { return {mean_.data(), scale_.data(), bias_.data()}; }

 private:
  LaneVector mean_, scale_, bias_;
};

}  // namespace rf::cpu
