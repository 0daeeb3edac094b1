// Arithmetic of batch norm, ReLU and max-pool for one element, and the merge of partial statistics.
// Host and device code share it, so the CPU tests exercise what the CUDA kernels compute.
// `static`: each translation unit keeps its own copy, compiled for its own instruction set.
#pragma once

#include <math.h>
#include <stdint.h>

#ifdef __CUDACC__
#define RF_HD __host__ __device__ static inline
#else
#define RF_HD static inline
#endif

namespace rf {

// Number of values, their mean, and the sum of squared distances from it.
template <class A>
struct Moments {
  A count;
  A mean;
  A m2;
};

// Moments from sums of d = x - shift and d*d over `count` > 0 values.
// Accurate when `shift` is near the mean: the cancelling term is (mean - shift)^2 * count.
template <class A>
RF_HD Moments<A> moments_from_sums(A count, A shift, A sum, A sum_of_squares) {
  const A m2 = sum_of_squares - sum * (sum / count);
  return {count, shift + sum / count, m2 < A(0) ? A(0) : m2};
}

// A shift that is not finite would turn infinite sums into NaN: zero keeps an infinite mean
// infinite.
template <class A>
RF_HD A finite_or_zero(A v) {
  return v - v == A(0) ? v : A(0);
}

// Chan, Golub, LeVeque (1979). The mean is a weighted sum, not a + delta * weight, so that a mean
// of infinity stays infinite instead of becoming inf - inf; equal means stay what they are, so that
// a constant has a variance of exactly zero.
template <class A>
RF_HD Moments<A> merge(Moments<A> a, Moments<A> b) {
  if (a.count == A(0)) return b;
  if (b.count == A(0)) return a;
  const A count = a.count + b.count;
  const A delta = b.mean - a.mean;
  const A mean = a.mean * (a.count / count) + b.mean * (b.count / count);
  return {
      count, delta == A(0) ? a.mean : mean,
      a.m2 + b.m2 + delta * delta * (a.count * (b.count / count))};
}

// From the variance of `count` > 0 values to that of what they are drawn from. A single value, of
// which there is no such estimate, keeps its variance of zero.
RF_HD double unbias(int64_t count) {
  return static_cast<double>(count) / static_cast<double>(count > 1 ? count - 1 : 1);
}

RF_HD double reciprocal_deviation(double var, double eps) { return 1.0 / sqrt(var + eps); }

template <class A>
RF_HD A batch_norm(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// relu(NaN) = NaN and relu(-0.) = -0., as torch; a floor of -infinity switches the ReLU off.
template <class A>
RF_HD A clamp_below(A v, A floor) {
  return v < floor ? floor : v;
}

// Which elements the ReLU let through: all, those the stored output shows, or those that the
// forward expression gives again.
enum class Mask { kAll, kOutput, kRecomputed };

// Where ReLU lets the gradient through: above zero, and at NaN. `zero` is the largest value that
// storage rounds to zero when v has not been rounded yet.
template <class A>
RF_HD bool relu_passes(A v, A zero) {
  return !(v <= zero);
}

// g - mean(g) - xhat * mean(g * xhat), times the scale; slope = mean(g * xhat) / deviation.
template <class A>
RF_HD A batch_norm_grad(A g, A x, A mean, A scale, A mean_grad, A slope) {
  return scale * (g - mean_grad - (x - mean) * slope);
}

// Whether a window's later element replaces the maximum so far: ties keep the first, NaN always
// wins.
template <class A>
RF_HD bool pool_replaces(A candidate, A best) {
  return candidate > best || candidate != candidate;
}

}  // namespace rf
