// The parameters of (x - mean) * scale + bias: a block's copy for its slice of the channels, and a
// thread's for its vector.
#pragma once

#include "common.cuh"

namespace rf::cuda {
namespace {

// Width 0: a normalisation that is not there.
template <class A, int kWidth>
struct AffineSlice {
  A mean[kMaxLanes * kWidth];
  A scale[kMaxLanes * kWidth];
  A bias[kMaxLanes * kWidth];

  __device__ __forceinline__ void fill(int64_t i, int64_t channel, const Norm& norm) {
    mean[i] = static_cast<A>(read(norm.mean, channel));
    scale[i] = static_cast<A>(scale_of(norm, channel));
    bias[i] = static_cast<A>(read(norm.bias, channel, 0.0));
  }
};

template <class A>
struct AffineSlice<A, 0> {};

template <class A, int kWidth>
struct Affine {
  Parameter<A, kWidth> mean;
  Parameter<A, kWidth> scale;
  Parameter<A, kWidth> bias;

  __device__ __forceinline__ Affine(
      const AffineSlice<A, kWidth>& slice, const Sweep& sweep, const Lane& lane)
      : mean(slice.mean, sweep, lane),
        scale(slice.scale, sweep, lane),
        bias(slice.bias, sweep, lane) {}

  __device__ __forceinline__ A operator()(int k, A x) const {
    return batch_norm(x, mean[k], scale[k], bias[k]);
  }
};

template <class A>
struct Affine<A, 0> {
  __device__ __forceinline__ Affine(const AffineSlice<A, 0>&, const Sweep&, const Lane&) {}
};

}  // namespace
}  // namespace rf::cuda
