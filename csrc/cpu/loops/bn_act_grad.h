// Gradient of normalisation, residual and ReLU: one sweep of sums, one sweep that writes.
#pragma once

#include "bn_act.h"

namespace rf::cpu {
namespace {

// g = grad_output where the ReLU let the value through, else 0.
template <Mask kMask, class T, class Vector>
struct MaskedGrad {
  using A = Acc<T>;
  const T* grad;
  const T* output;
  const T* input;
  AffineVectors<Vector> affine;

  MaskedGrad(const MaskArgs& args, int64_t offset, int64_t channel)
      : grad(static_cast<const T*>(args.grad_output) + offset),
        output(static_cast<const T*>(args.output) + (kMask == Mask::kOutput ? offset : 0)),
        input(static_cast<const T*>(args.input) + offset),
        affine(args.affine, channel) {}

  // Element i of row `at`, whose lane is `lane`.
  A operator()(int64_t at, int64_t lane) const {
    const A g = get(grad[at]);
    if constexpr (kMask == Mask::kAll) return g;
    if constexpr (kMask == Mask::kOutput) return relu_passes(get(output[at]), A(0)) ? g : A(0);
    const A v =
        batch_norm(get(input[at]), affine.mean[lane], affine.scale[lane], affine.bias[lane]);
    return relu_passes(v, rounds_to_zero(T{})) ? g : A(0);
  }
};

template <int kRows, bool kResidual, class Masked, class T, class Vector, class A>
RF_LOOP void add_grad_rows(
    const Masked g, const T* x, const T* r, Vector mean, Vector residual_mean, int64_t stride,
    int64_t n, A* sums, int64_t width) {
  A* __restrict sum = sums;
  A* __restrict with_x = sums + width;
  [[maybe_unused]] A* __restrict with_r = kResidual ? sums + 2 * width : nullptr;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A sum_g = A(0), sum_x = A(0), sum_r = A(0);
#pragma GCC unroll 4
    for (int k = 0; k < kRows; ++k) {
      const int64_t at = k * stride + i;
      const A grad = g(at, i);
      sum_g += grad;
      sum_x += grad * (get(x[at]) - mean[i]);
      if constexpr (kResidual) sum_r += grad * (get(r[at]) - residual_mean[i]);
    }
    sum[i] += sum_g;
    with_x[i] += sum_x;
    if constexpr (kResidual) with_r[i] += sum_r;
  }
}

template <Mask kMask, bool kResidual, class Vector, class T>
void tile_grad_sums(const GradSumsArgs& args, const TileSpan& span, char* scratch) {
  using A = Acc<T>;
  const int64_t width = span.channels * span.repeat;
  const int64_t sums = kResidual ? 3 : 2;
  double* total = reinterpret_cast<double*>(scratch);
  A* partial = reinterpret_cast<A*>(total + sums * width);
  const T* x = static_cast<const T*>(args.masked.input);
  const T* r = static_cast<const T*>(args.residual);
  const Vector mean = Vector::at(args.masked.affine.mean, span.channel);
  const Vector residual_mean = Vector::at(args.residual_mean, span.channel);
  sum_lanes(span.length, width, sums, partial, total, [&](auto rows, int64_t offset, int64_t n) {
    const int64_t at = span.offset + offset;
    add_grad_rows<decltype(rows)::value, kResidual>(
        MaskedGrad<kMask, T, Vector>(args.masked, at, span.channel), x + at,
        r + (kResidual ? at : 0), mean, residual_mean, width, n, partial, width);
  });
  for (int64_t s = 0; s < sums; ++s) {
    fold_lanes(total + s * width, span.channels, span.repeat);
    double* out = args.partials + (span.tile * 3 + s) * args.image.c + span.channel;
    for (int64_t c = 0; c < span.channels; ++c) out[c] = total[s * width + c];
  }
}

template <Mask kMask, bool kResidual, class Vector, class T>
void grad_sums_as(const GradSumsArgs& args) {
  const int64_t lane_bytes = 3 * (sizeof(double) + sizeof(Acc<T>));
  for_each_tile(args.image, args.tiles, lane_bytes, [&](const TileSpan& span, char* scratch) {
    tile_grad_sums<kMask, kResidual, Vector, T>(args, span, scratch);
  });
}

// Statistics of this batch depend on the input (slope given), fixed ones do not.
template <class Vector, class Masked, class T>
RF_LOOP void write_grad(
    const Masked g, const T* x, const GradAffine& affine, int64_t channel, T* out, int64_t n) {
  const Vector mean = Vector::at(affine.mean, channel), scale = Vector::at(affine.scale, channel);
  const Vector mean_grad = Vector::at(affine.mean_grad, channel);
  const Vector slope = Vector::at(affine.slope, channel);
  if (affine.scale == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) put(out + i, g(i, i));
  } else if (affine.slope == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) put(out + i, scale[i] * g(i, i));
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      put(out + i, batch_norm_grad(g(i, i), get(x[i]), mean[i], scale[i], mean_grad[i], slope[i]));
    }
  }
}

template <Mask kMask, class Vector, class T>
void grad_as(const GradArgs& args) {
  const T* x = static_cast<const T*>(args.masked.input);
  const T* r = static_cast<const T*>(args.residual);
  T* grad_input = static_cast<T*>(args.grad_input);
  T* grad_residual = static_cast<T*>(args.grad_residual);
  for_each_span<Vector>(args.image, [&](int64_t offset, int64_t n, int64_t channel) {
    const MaskedGrad<kMask, T, Vector> g(args.masked, offset, channel);
    // The input's gradient last: it may overwrite grad_output, which g reads.
    if (grad_residual != nullptr) {
      const T* source = r == nullptr ? nullptr : r + offset;
      write_grad<Vector>(g, source, args.residual_affine, channel, grad_residual + offset, n);
    }
    if (grad_input != nullptr) {
      write_grad<Vector>(g, x + offset, args.affine, channel, grad_input + offset, n);
    }
  });
}

template <Mask kMask, class T>
void grad_sums_masked(const GradSumsArgs& args) {
  using Lane = PerLane<Acc<T>>;
  using Plane = Uniform<Acc<T>>;
  if (args.image.channels_last) {
    return args.residual_mean == nullptr ? grad_sums_as<kMask, false, Lane, T>(args)
                                         : grad_sums_as<kMask, true, Lane, T>(args);
  }
  return args.residual_mean == nullptr ? grad_sums_as<kMask, false, Plane, T>(args)
                                       : grad_sums_as<kMask, true, Plane, T>(args);
}

template <class T>
void grad_sums(const GradSumsArgs& args) {
  switch (args.masked.mask) {
    case Mask::kAll: return grad_sums_masked<Mask::kAll, T>(args);
    case Mask::kOutput: return grad_sums_masked<Mask::kOutput, T>(args);
    case Mask::kRecomputed: return grad_sums_masked<Mask::kRecomputed, T>(args);
  }
}

template <class Vector, class T>
void grad_in(const GradArgs& args) {
  switch (args.masked.mask) {
    case Mask::kAll: return grad_as<Mask::kAll, Vector, T>(args);
    case Mask::kOutput: return grad_as<Mask::kOutput, Vector, T>(args);
    case Mask::kRecomputed: return grad_as<Mask::kRecomputed, Vector, T>(args);
  }
}

template <class T>
void grad(const GradArgs& args) {
  return args.image.channels_last ? grad_in<PerLane<Acc<T>>, T>(args)
                                  : grad_in<Uniform<Acc<T>>, T>(args);
}

}  // namespace
}  // namespace rf::cpu
