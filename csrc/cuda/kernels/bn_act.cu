// Normalisation, residual, ReLU and 2x2 max-pool in one sweep.
#include "affine.cuh"

namespace rf::cuda {
namespace {

// What one thread computes for its channels.
template <class T, int kWidth, bool kNormalized>
struct Forward {
  using A = Acc<T>;
  using Values = Pack<T, kWidth>;

  const T* residual;
  Affine<A, kWidth> main;
  Affine<A, kNormalized ? kWidth : 0> shortcut;
  A floor;

  __device__ __forceinline__ Values operator()(const Values& x, const Values& r) const {
    Values z;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      A v = main(k, get(x.values[k]));
      if constexpr (kNormalized) {
        v += shortcut(k, get(r.values[k]));
      } else if (residual != nullptr) {
        v += get(r.values[k]);
      }
      put(&z.values[k], clamp_below(v, floor));
    }
    return z;
  }
};

template <class T, int kWidth, bool kNormalized>
__device__ __forceinline__ Forward<T, kWidth, kNormalized> prepare(
    const ForwardArgs& args, int64_t group, const Lane& lane) {
  using A = Acc<T>;
  __shared__ AffineSlice<A, kWidth> main;
  __shared__ AffineSlice<A, kNormalized ? kWidth : 0> shortcut;
  fill_parameters(args.sweep, group, [&](int64_t i, int64_t channel) {
    main.fill(i, channel, args.main);
    if constexpr (kNormalized) shortcut.fill(i, channel, args.shortcut);
  });
  return {
      static_cast<const T*>(args.residual),
      {main, args.sweep, lane},
      {shortcut, args.sweep, lane},
      args.relu ? A(0) : -static_cast<A>(HUGE_VAL)};
}

template <class T, int kWidth, bool kNormalized>
__global__ void __launch_bounds__(kThreads) bn_act_fwd_kernel(const ForwardArgs args) {
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  const auto compute = prepare<T, kWidth, kNormalized>(args, tile.group, lane);
  if (!lane.active) return;
  const T* input = static_cast<const T*>(args.input);
  T* output = static_cast<T*>(args.output);
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += kUnroll * sweep.rows) {
    int64_t at[kUnroll];
    Pack<T, kWidth> x[kUnroll], r[kUnroll] = {};
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t position = p + static_cast<int64_t>(u) * sweep.rows;
      at[u] = position < tile.end ? lane.offset + position * sweep.position_step : -1;
      if (at[u] < 0) continue;
      x[u] = load<T, kWidth>(input + at[u]);
      if (compute.residual != nullptr) r[u] = load<T, kWidth>(compute.residual + at[u]);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (at[u] >= 0) store(output + at[u], compute(x[u], r[u]));
    }
  }
}

template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> larger(
    Pack<T, kWidth> best, const Pack<T, kWidth>& other) {
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (pool_replaces(get(other.values[k]), get(best.values[k]))) best.values[k] = other.values[k];
  }
  return best;
}

// A thread owns 2x2 windows: the pooled value is computed from the outputs as stored.
template <class T, int kWidth, bool kNormalized>
__global__ void __launch_bounds__(kThreads, 2) bn_act_pool_fwd_kernel(const ForwardArgs args) {
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  const auto compute = prepare<T, kWidth, kNormalized>(args, tile.group, lane);
  if (!lane.active) return;
  const int64_t pixel = sweep.channels_last ? args.image.c : 1, row = args.image.w * pixel;
  // Half a window at a time where there is a second set of parameters: all of it would spill.
  constexpr int kAtOnce = kNormalized ? 2 : 4;
  const int64_t steps[4] = {0, pixel, row, row + pixel};
  const T* input = static_cast<const T*>(args.input);
  T* output = static_cast<T*>(args.output);
  T* pooled = static_cast<T*>(args.pooled) +
              pooled_offset(args.image, sweep, tile.group, lane.lane);
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
    const Window window = window_of(args.image, p);
    const bool inside[4] = {true, window.right, window.lower, window.right && window.lower};
    Pack<T, kWidth> best;
#pragma unroll
    for (int first = 0; first < 4; first += kAtOnce) {
      Pack<T, kWidth> x[kAtOnce], r[kAtOnce] = {};
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!inside[first + i]) continue;
        const int64_t at = lane.offset + window.upper + steps[first + i];
        x[i] = load<T, kWidth>(input + at);
        if (compute.residual != nullptr) r[i] = load<T, kWidth>(compute.residual + at);
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!inside[first + i]) continue;
        const Pack<T, kWidth> z = compute(x[i], r[i]);
        store(output + lane.offset + window.upper + steps[first + i], z);
        best = first + i == 0 ? z : larger(best, z);
      }
    }
    if (inside[3]) store(pooled + window.pooled, best);
  }
}

template <class T, int kWidth, bool kNormalized>
void forward_as(const ForwardArgs& args, void* stream) {
  // A block owns a tile of positions, or of windows, of up to 64 vectors of channels.
  const auto kernel = args.pooled == nullptr ? &bn_act_fwd_kernel<T, kWidth, kNormalized>
                                             : &bn_act_pool_fwd_kernel<T, kWidth, kNormalized>;
  launch(kernel, blocks_of(args.sweep), kThreads, stream, args);
}

}  // namespace

void forward(const ForwardArgs& args, void* stream) {
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    args.shortcut.mean.data == nullptr ? forward_as<T, kWidth, false>(args, stream)
                                       : forward_as<T, kWidth, true>(args, stream);
  });
}

}  // namespace rf::cuda
