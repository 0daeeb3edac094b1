// Per-channel vectors: read from any floating dtype, computed in double, laid out for the loops.
#pragma once

#include <cstdint>
#include <vector>

#include "../operands.h"
#include "kernels.h"

namespace rf::cpu {

// Calls f with a null pointer of the tensor's storage type.
template <class F>
void with_storage(ScalarType type, const F& f) {
  switch (dtype_of(type)) {
    case kFloat64: return f(static_cast<double*>(nullptr));
    case kBFloat16: return f(static_cast<BFloat16*>(nullptr));
    case kFloat16: return f(static_cast<Float16*>(nullptr));
    default: return f(static_cast<float*>(nullptr));
  }
}

inline std::vector<double> read_vector(const Tensor& t) {
  std::vector<double> values(t.numel());
  with_storage(t.scalar_type(), [&](auto* type) {
    const auto* p = static_cast<const std::remove_pointer_t<decltype(type)>*>(t.data_ptr());
    for (size_t i = 0; i < values.size(); ++i) values[i] = get(p[i]);
  });
  return values;
}

inline std::vector<double> read_vector(const OptionalTensor& t, int64_t length, double otherwise) {
  return t.has_value() ? read_vector(*t) : std::vector<double>(length, otherwise);
}

inline void write_vector(const std::vector<double>& values, const Tensor& t) {
  with_storage(t.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    auto* p = static_cast<T*>(t.mutable_data_ptr());
    for (size_t i = 0; i < values.size(); ++i) put(p + i, static_cast<Acc<T>>(values[i]));
  });
}

inline void write_vector(const std::vector<double>& values, const OptionalTensor& t) {
  if (t.has_value()) write_vector(values, *t);
}

inline std::vector<double> scale_of(
    const OptionalTensor& weight, const std::vector<double>& var, double eps) {
  std::vector<double> scale = read_vector(weight, static_cast<int64_t>(var.size()), 1.0);
  for (size_t c = 0; c < var.size(); ++c) scale[c] *= reciprocal_deviation(var[c], eps);
  return scale;
}

// The image of a call whose layout is known. Enough repetitions of the channels to fill 256 lanes.
inline Image image_of(const Tensor& t, const Images& images) {
  Image image = {t.size(0), t.size(1), t.size(2), t.size(3), false, t.size(1)};
  image.channels_last = images.channels_last(image.h * image.w);
  while (image.channels_last && image.width > 0 && image.width < 256) image.width *= 2;
  return image;
}

// A per-channel vector in the accumulation type, repeated to image.width; `data` lives as long as
// this.
class LaneVector {
 public:
  LaneVector() = default;

  LaneVector(const std::vector<double>& values, const Image& image, ScalarType type) {
    if (type == ScalarType::Double) {
      fill<double>(values, image.width);
    } else {
      fill<float>(values, image.width);
    }
  }

  const void* data() const { return bytes_.empty() ? nullptr : bytes_.data(); }

 private:
  template <class A>
  void fill(const std::vector<double>& values, int64_t width) {
    bytes_.resize(width * sizeof(A));
    A* lanes = reinterpret_cast<A*>(bytes_.data());
    const int64_t channels = static_cast<int64_t>(values.size());
    for (int64_t c = 0; c < channels; ++c) lanes[c] = static_cast<A>(values[c]);
    for (int64_t i = channels; i < width; ++i) lanes[i] = lanes[i - channels];
  }

  std::vector<char> bytes_;
};

// Cuts a reduction into tiles: a function of the shape alone, so that sums do not depend on
// threads.
inline Tiles tiles_of(const Image& image) {
  const int64_t run = tile_run(image);
  const int64_t channels = image.channels_last && image.c > 0 ? image.c : 1;
  const int64_t row = image.channels_last && image.c > 0 ? image.width / image.c : 1;
  const int64_t least = 32768 / channels + 1, most = 1048576 / channels + 1;
  int64_t positions = run / 128 + 1;
  if (positions < least) positions = least;
  if (positions > most) positions = most;
  positions = (positions + row - 1) / row * row;
  const int64_t per_run = run > 0 ? (run + positions - 1) / positions : 0;
  return {positions, per_run, image.channels_last ? per_run : per_run * image.n};
}

}  // namespace rf::cpu
