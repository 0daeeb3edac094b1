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

// (1 - weight) * a + weight * b.
template <class A>
RF_HD A mix(A a, A b, A weight) {
  return (A(1) - weight) * a + weight * b;
}

// What output with this tap takes from input `index`: the transpose's weight.
template <class A>
RF_HD A share_of(Tap<A> tap, int64_t index) {
  return (tap.first == index ? A(1) - tap.weight : A(0)) +
         (tap.second == index ? tap.weight : A(0));
}

struct Range {
  int64_t begin;
  int64_t end;
};

// The first output whose tap begins at input `index` or behind it; `out` if there is none. Taps
// ascend, so that the estimate is corrected by walking.
template <class A>
RF_HD int64_t first_reader(int64_t index, int64_t in, int64_t out, ResizeMode mode) {
  const double guess =
      static_cast<double>(index) * (static_cast<double>(out) / static_cast<double>(in));
  int64_t i = guess < static_cast<double>(out) ? static_cast<int64_t>(guess) : out;
  while (i > 0 && resize_tap<A>(i - 1, in, out, mode).first >= index) --i;
  while (i < out && resize_tap<A>(i, in, out, mode).first < index) ++i;
  return i;
}

// The outputs that may read input `index` >= 0.
template <class A>
RF_HD Range readers(int64_t index, int64_t in, int64_t out, ResizeMode mode) {
  const int64_t earliest = mode == kNearest || index == 0 ? index : index - 1;
  return {
      earliest == 0 ? 0 : first_reader<A>(earliest, in, out, mode),
      first_reader<A>(index + 1, in, out, mode)};
}

}  // namespace rf
