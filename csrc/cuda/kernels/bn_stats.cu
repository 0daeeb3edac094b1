// Mean and biased variance of every channel, in two stages: moments per tile, then their merge.
#include "common.cuh"

namespace rf::cuda {
namespace {

// Takes in up to kUnroll values of one channel: their moments about the first one, merged.
template <class A>
__device__ __forceinline__ Moments<A> add_values(
    Moments<A> moments, const A (&values)[kUnroll], int count) {
  const A shift = finite_or_zero(values[0]);
  A sum = A(0), squares = A(0);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const A distance = u < count ? values[u] - shift : A(0);
    sum += distance;
    squares += distance * distance;
  }
  return merge(moments, moments_from_sums(static_cast<A>(count), shift, sum, squares));
}

// Moments of x - shift of a thread's positions.
template <class T, int kWidth>
__device__ __forceinline__ void add_positions(
    const StatsArgs& args, const Tile& tile, const Lane& lane, const Acc<T> (&shift)[kWidth],
    Moments<Acc<T>> (&moments)[kWidth]) {
  const Sweep& sweep = args.sweep;
  const T* input = static_cast<const T*>(args.input) + lane.offset;
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += kUnroll * sweep.rows) {
    const int count = static_cast<int>(smaller(kUnroll, divide_up(tile.end - p, sweep.rows)));
    Pack<T, kWidth> x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = p + static_cast<int64_t>(u < count ? u : 0) * sweep.rows;
      x[u] = load<T, kWidth>(input + at * sweep.position_step);
    }
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      Acc<T> values[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) values[u] = get(x[u].values[k]) - shift[k];
      moments[k] = add_values(moments[k], values, count);
    }
  }
}

// A block's shift, one value of the tile per channel: a mean far from zero would be rounded more
// than the deviations that are computed from it.
template <class T, int kWidth>
__device__ __forceinline__ void choose_shift(
    const StatsArgs& args, const Tile& tile, const Lane& lane, Acc<T> (&shift)[kWidth]) {
  const T* first = static_cast<const T*>(args.input) + lane.offset;
  const auto values = load<T, kWidth>(first + tile.begin * args.sweep.position_step);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    shift[k] = finite_or_zero(get(values.values[parameter_of(args.sweep, k)]));
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) bn_stats_kernel(const StatsArgs args) {
  using A = Acc<T>;
  __shared__ Moments<A> shared[kThreads * kWidth];
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  A shift[kWidth] = {};
  Moments<A> moments[kWidth] = {};
  if (lane.active) {
    choose_shift<T, kWidth>(args, tile, lane, shift);
    add_positions<T, kWidth>(args, tile, lane, shift, moments);
  }
  join_rows(sweep, lane, moments, shared, [](Moments<A> a, Moments<A> b) { return merge(a, b); });
  if (!lane.active || lane.row > 0) return;
  const int64_t at = slot_of(sweep, tile) * sweep.channels + slice_of(sweep, tile.group).first;
  double* mean = args.partials + at;
  double* m2 = mean + slots_of(sweep) * sweep.channels;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (k > 0 && !sweep.channels_last) break;
    mean[lane.local + k] = static_cast<double>(shift[k]) + static_cast<double>(moments[k].mean);
    m2[lane.local + k] = static_cast<double>(moments[k].m2);
  }
}

// The moments of all slots about the first one's mean, in double.
__global__ void __launch_bounds__(kThreads) bn_stats_finish_kernel(const StatsArgs args) {
  const Sweep& sweep = args.sweep;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                    threadIdx.x % kFinishChannels;
  const int64_t slots = slots_of(sweep);
  const double* mean = args.partials + c;
  const double* m2 = mean + slots * sweep.channels;
  const bool filled = c < sweep.channels && slots > 0;
  const double shift = filled ? finite_or_zero(mean[0]) : 0.0;
  double sums[3] = {0.0, 0.0, 0.0};
  if (filled) {
#pragma unroll 4
    for (int64_t slot = threadIdx.x / kFinishChannels; slot < slots; slot += kFinishRows) {
      const double count = static_cast<double>(slot_elements(sweep, slot));
      const double distance = mean[slot * sweep.channels] - shift;
      sums[0] += count;
      sums[1] += count * distance;
      sums[2] += count * distance * distance + m2[slot * sweep.channels];
    }
  }
  add_finish_rows(sums);
  if (threadIdx.x >= kFinishChannels || c >= sweep.channels) return;
  const Moments<double> all = sums[0] > 0.0
                                  ? moments_from_sums(sums[0], shift, sums[1], sums[2])
                                  : Moments<double>{0.0, 0.0, 0.0};
  write(args.mean, c, all.mean);
  write(args.var, c, all.count > 0.0 ? all.m2 / all.count : 0.0);
}

}  // namespace

void stats(const StatsArgs& args, void* stream) {
  // A block reads one tile of up to 64 vectors of channels and leaves one partial per channel.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(
        &bn_stats_kernel<T, decltype(width)::value>, blocks_of(args.sweep), kThreads, stream, args);
  });
  // A block merges all partials of 16 channels.
  const int64_t blocks = divide_up(args.sweep.channels, kFinishChannels);
  launch(&bn_stats_finish_kernel, blocks, kThreads, stream, args);
}

}  // namespace rf::cuda
