// A batch normalisation as the loops want it.
#pragma once

#include "vectors.h"

namespace rf::cpu {

inline std::vector<double> scale_of(const Normalization& norm) {
  return scale_of(norm.weight, read_vector(*norm.var), norm.eps);
}

// The vectors of (x - mean) * scale + bias; empty for a normalisation that is not there.
class AffineLanes {
 public:
  AffineLanes(const Normalization& norm, const Image& image, ScalarType type) {
    if (!norm.present()) return;
    mean_ = LaneVector(read_vector(*norm.mean), image, type);
    scale_ = LaneVector(scale_of(norm), image, type);
    bias_ = LaneVector(read_vector(norm.bias, image.c, 0.0), image, type);
  }

  Affine view() const { return {mean_.data(), scale_.data(), bias_.data()}; }

 private:
  LaneVector mean_, scale_, bias_;
};

}  // namespace rf::cpu
