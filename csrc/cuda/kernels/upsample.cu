// Upsampling next to a copied skip, and its gradient as a gather, hence deterministic.
#include "common.cuh"

namespace rf::cuda {
namespace {

template <class A, class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> blend(
    const T* upper, const T* lower, int64_t left, int64_t right, A row_weight, A column_weight) {
  const Pack<T, kWidth> a = load<T, kWidth>(upper + left), b = load<T, kWidth>(upper + right);
  const Pack<T, kWidth> c = load<T, kWidth>(lower + left), d = load<T, kWidth>(lower + right);
  Pack<T, kWidth> out;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    const A at_left = mix(get(a.values[k]), get(c.values[k]), row_weight);
    const A at_right = mix(get(b.values[k]), get(d.values[k]), row_weight);
    put(&out.values[k], mix(at_left, at_right, column_weight));
  }
  return out;
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) upsample_fwd_kernel(const ResizeArgs args) {
  using A = Acc<T>;
  const Sweep& sweep = args.sweep;
  const Image &in = args.input_image, &out = args.output_image;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  if (!lane.active) return;
  const int64_t channel = slice_of(sweep, tile.group).first + lane.local;
  const T* input = static_cast<const T*>(args.input);
  const T* skip = static_cast<const T*>(args.skip);
  T* output = static_cast<T*>(args.output) + lane.offset;
  const int64_t pixel = in.channels_last ? in.c : 1;
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
    const Pixel at = pixel_of(out, sweep, tile.group, p);
    Pack<T, kWidth> value;
    if (channel >= in.c) {
      value = load<T, kWidth>(
          skip + offset_of(args.skip_image, at.n, channel - in.c, at.y, at.x));
    } else {
      const Tap<A> row = resize_tap<A>(at.y, in.h, out.h, args.mode);
      const Tap<A> column = resize_tap<A>(at.x, in.w, out.w, args.mode);
      const T* upper = input + offset_of(in, at.n, channel, row.first, 0);
      const T* lower = input + offset_of(in, at.n, channel, row.second, 0);
      const int64_t left = column.first * pixel, right = column.second * pixel;
      value = args.mode == kNearest
                  ? load<T, kWidth>(upper + left)
                  : blend<A, T, kWidth>(upper, lower, left, right, row.weight, column.weight);
    }
    store(output + p * sweep.position_step, value);
  }
}

// Rows whose shares a thread computes once: those of a doubling. More are computed as they come.
constexpr int kTaps = 4;

// A thread collects for one input pixel: first down the rows of each column, then along them.
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads, 2) upsample_bwd_kernel(const ResizeGradArgs args) {
  using A = Acc<T>;
  const Sweep& sweep = args.sweep;
  const Image &in = args.input_image, &out = args.output_image;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  if (!lane.active) return;
  const int64_t channel = slice_of(sweep, tile.group).first + lane.local;
  const T* grad_output = static_cast<const T*>(args.grad_output);
  T* grad_input = static_cast<T*>(args.grad_input) + lane.offset;
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
    const Pixel at = pixel_of(in, sweep, tile.group, p);
    const Range rows = readers<A>(at.y, in.h, out.h, args.mode);
    const Range columns = readers<A>(at.x, in.w, out.w, args.mode);
    const auto row_share = [&](int64_t y) {
      return share_of(resize_tap<A>(y, in.h, out.h, args.mode), at.y);
    };
    A row_shares[kTaps];
#pragma unroll
    for (int j = 0; j < kTaps; ++j) {
      row_shares[j] = rows.begin + j < rows.end ? row_share(rows.begin + j) : A(0);
    }
    A sums[kWidth] = {};
    for (int64_t x = columns.begin; x < columns.end; ++x) {
      const A column_share = share_of(resize_tap<A>(x, in.w, out.w, args.mode), at.x);
      if (column_share == A(0)) continue;
      A column[kWidth] = {};
      const auto add = [&](int64_t y, A share) {
        if (share == A(0)) return;
        const Pack<T, kWidth> g =
            load<T, kWidth>(grad_output + offset_of(out, at.n, channel, y, x));
#pragma unroll
        for (int k = 0; k < kWidth; ++k) column[k] += share * get(g.values[k]);
      };
#pragma unroll
      for (int j = 0; j < kTaps; ++j) add(rows.begin + j, row_shares[j]);
      for (int64_t y = rows.begin + kTaps; y < rows.end; ++y) add(y, row_share(y));
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sums[k] += column_share * column[k];
    }
    Pack<T, kWidth> total;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) put(&total.values[k], sums[k]);
    store(grad_input + p * sweep.position_step, total);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) skip_bwd_kernel(const ResizeGradArgs args) {
  const Sweep& sweep = args.skip_sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  if (!lane.active) return;
  const int64_t channel = slice_of(sweep, tile.group).first + lane.local + args.input_image.c;
  const T* grad_output = static_cast<const T*>(args.grad_output);
  T* grad_skip = static_cast<T*>(args.grad_skip) + lane.offset;
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
    const Pixel at = pixel_of(args.skip_image, sweep, tile.group, p);
    const T* from = grad_output + offset_of(args.output_image, at.n, channel, at.y, at.x);
    store(grad_skip + p * sweep.position_step, load<T, kWidth>(from));
  }
}

}  // namespace

void resize(const ResizeArgs& args, void* stream) {
  // A block owns a tile of output pixels of up to 64 vectors of channels, blended or copied.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    const auto kernel = &upsample_fwd_kernel<T, decltype(width)::value>;
    launch(kernel, blocks_of(args.sweep), kThreads, stream, args);
  });
}

void resize_grad(const ResizeGradArgs& args, void* stream) {
  // A block owns a tile of input pixels of up to 64 vectors of channels; in the second launch of
  // the skip's pixels.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    launch(&upsample_bwd_kernel<T, kWidth>, blocks_of(args.sweep), kThreads, stream, args);
    if (args.grad_skip == nullptr) return;
    launch(&skip_bwd_kernel<T, kWidth>, blocks_of(args.skip_sweep), kThreads, stream, args);
  });
}

}  // namespace rf::cuda
