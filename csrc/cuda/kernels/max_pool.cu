// Gradient of 2x2 max-pooling, from the stored activation, added to the activation's own.
#include "common.cuh"

namespace rf::cuda {
namespace {

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) max_pool_bwd_kernel(const PoolGradArgs args) {
  using A = Acc<T>;
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  if (!lane.active) return;
  const int64_t pixel = sweep.channels_last ? args.image.c : 1, row = args.image.w * pixel;
  const int64_t steps[4] = {0, pixel, row, row + pixel};
  const T* grad_output = static_cast<const T*>(args.grad_output);
  const T* output = static_cast<const T*>(args.output);
  const T* grad_pooled = static_cast<const T*>(args.grad_pooled) +
                         pooled_offset(args.image, sweep, tile.group, lane.lane);
  T* grad = static_cast<T*>(args.grad);
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
    const Window window = window_of(args.image, p);
    const bool inside[4] = {true, window.right, window.lower, window.right && window.lower};
    Pack<T, kWidth> z[4], g[4] = {}, pooled = {};
    if (inside[3]) pooled = load<T, kWidth>(grad_pooled + window.pooled);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = lane.offset + window.upper + steps[i];
      if (inside[i] && grad_output != nullptr) g[i] = load<T, kWidth>(grad_output + at);
      if (inside[3]) z[i] = load<T, kWidth>(output + at);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      int winner = 0;
      if (inside[3]) {
        A best = get(z[0].values[k]);
#pragma unroll
        for (int i = 1; i < 4; ++i) {
          const A other = get(z[i].values[k]);
          if (pool_replaces(other, best)) {
            best = other;
            winner = i;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const A routed = i == winner ? get(pooled.values[k]) : A(0);
        put(&g[i].values[k], get(g[i].values[k]) + routed);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (inside[i]) store(grad + lane.offset + window.upper + steps[i], g[i]);
    }
  }
}

}  // namespace

void pool_grad(const PoolGradArgs& args, void* stream) {
  // A block owns a tile of windows of up to 64 vectors of channels.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = &max_pool_bwd_kernel<T, decltype(width)::value>;
    launch(kernel, blocks_of(args.sweep), kThreads, stream, args);
  });
}

}  // namespace rf::cuda
