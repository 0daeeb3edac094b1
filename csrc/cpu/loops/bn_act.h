// Normalisation, residual, ReLU and max-pool in one sweep.
#pragma once

#include "common.h"
#include "max_pool.h"

namespace rf::cpu {
namespace {

template <class Vector>
struct AffineVectors {
  Vector mean;
  Vector scale;
  Vector bias;

  AffineVectors(const Affine& affine, int64_t channel)
      : mean(Vector::at(affine.mean, channel)),
        scale(Vector::at(affine.scale, channel)),
        bias(Vector::at(affine.bias, channel)) {}
};

template <Residual kKind, class T, class Vector, class A>
RF_LOOP void normalize(
    const T* x, const T* r, T* out, int64_t n, const AffineVectors<Vector> main,
    const AffineVectors<Vector> shortcut, A floor) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A v = batch_norm(get(x[i]), main.mean[i], main.scale[i], main.bias[i]);
    if constexpr (kKind == Residual::kPlain) v += get(r[i]);
    if constexpr (kKind == Residual::kNormalized) {
      v += batch_norm(get(r[i]), shortcut.mean[i], shortcut.scale[i], shortcut.bias[i]);
    }
    put(out + i, clamp_below(v, floor));
  }
}

template <Residual kKind, class Vector, class T>
void forward_as(const ForwardArgs& args) {
  using A = Acc<T>;
  const T* x = static_cast<const T*>(args.input);
  const T* r = static_cast<const T*>(args.residual);
  T* out = static_cast<T*>(args.output);
  T* pooled = static_cast<T*>(args.pooled);
  const A floor = args.relu ? A(0) : -static_cast<A>(HUGE_VAL);
  const auto body = [&](int64_t offset, int64_t n, int64_t channel) {
    normalize<kKind>(
        x + offset, r + (kKind == Residual::kNone ? 0 : offset), out + offset, n,
        AffineVectors<Vector>(args.affine, channel),
        AffineVectors<Vector>(args.residual_affine, channel), floor);
  };
  if (pooled == nullptr) return for_each_span<Vector>(args.image, body);
  for_each_row_pair<Vector>(
      args.image, [&](int64_t offset, int64_t row, int64_t rows, int64_t pair, int64_t channel) {
        split<Vector>(args.image, offset, rows * row, channel, body);
        if (rows == 2)
          pool_rows<Vector::kChannelsLast>(args.image, out + offset, row, pooled, pair);
      });
}

template <class Vector, class T>
void forward_in(const ForwardArgs& args) {
  switch (args.kind) {
    case Residual::kNone: return forward_as<Residual::kNone, Vector, T>(args);
    case Residual::kPlain: return forward_as<Residual::kPlain, Vector, T>(args);
    case Residual::kNormalized: return forward_as<Residual::kNormalized, Vector, T>(args);
  }
}

template <class T>
void forward(const ForwardArgs& args) {
  return args.image.channels_last ? forward_in<PerLane<Acc<T>>, T>(args)
                                  : forward_in<Uniform<Acc<T>>, T>(args);
}

}  // namespace
}  // namespace rf::cpu
