// Where an output pixel of an upsampling reads its input, along one axis; torch's conventions.
#pragma once

#include <stdint.h>

#include "bn_math.h"

namespace rf {

enum ResizeMode : int { kNearest = 0, kBilinear = 1, kBilinearAlignCorners = 2 };

// out = (1 - weight) * in[first] + weight * in[second]
template <class A>
struct Tap {
  int64_t first;
  int64_t second;
  A weight;
};

// In float32 whatever the images' dtype: in float64 other pixels would be nearest than in torch.
template <class A>
RF_HD Tap<A> nearest_tap(int64_t index, int64_t in, int64_t out) {
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  const int64_t source = static_cast<int64_t>(static_cast<float>(index) * scale);
  const int64_t clamped = source < in - 1 ? source : in - 1;
  return {clamped, clamped, A(0)};
}

template <class A>
RF_HD A source_position(int64_t index, int64_t in, int64_t out, bool align_corners) {
  if (align_corners) {
    const A scale = out > 1 ? static_cast<A>(in - 1) / static_cast<A>(out - 1) : A(0);
    return scale * static_cast<A>(index);
  }
  const A scale = static_cast<A>(in) / static_cast<A>(out);
  const A position = scale * (static_cast<A>(index) + A(0.5)) - A(0.5);
  return position < A(0) ? A(0) : position;
}

template <class A>
RF_HD Tap<A> resize_tap(int64_t index, int64_t in, int64_t out, ResizeMode mode) {
  if (mode == kNearest) return nearest_tap<A>(index, in, out);
  const A position = source_position<A>(index, in, out, mode == kBilinearAlignCorners);
  const int64_t floor = static_cast<int64_t>(position);
  const int64_t first = floor < in - 1 ? floor : in - 1;
  const A distance = position - static_cast<A>(first);
  const A weight = distance > A(1) ? A(1) : distance;
  return {first, first < in - 1 ? first + 1 : first, weight};
}

}  // namespace rf
