// Gradient of normalisation, residual and ReLU: sums per tile, their merge, one sweep that writes.
#include "affine.cuh"

namespace rf::cuda {
namespace {

template <class A>
struct Sums {
  A grad;
  A with_input;
  A with_residual;
};

// g = grad_output where the ReLU let the value through, else 0.
template <class T, int kWidth>
struct Masked {
  using A = Acc<T>;

  Mask mask;
  Affine<A, kWidth> affine;

  __device__ __forceinline__ A operator()(int k, T grad, T x, T z) const {
    const A g = get(grad);
    if (mask == Mask::kAll) return g;
    if (mask == Mask::kOutput) return relu_passes(get(z), A(0)) ? g : A(0);
    return relu_passes(affine(k, get(x)), rounds_to_zero(T{})) ? g : A(0);
  }
};

// The operands of up to kCount positions, read before any is used.
template <class T, int kWidth, int kCount>
struct Operands {
  int64_t at[kCount];
  Pack<T, kWidth> g[kCount], x[kCount], z[kCount], r[kCount];

  __device__ __forceinline__ void load_from(
      const GradArgs& args, const Tile& tile, const Lane& lane, int64_t p, bool input) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t position = p + static_cast<int64_t>(u) * args.sweep.rows;
      at[u] = position < tile.end ? lane.offset + position * args.sweep.position_step : -1;
      if (at[u] < 0) continue;
      g[u] = load<T, kWidth>(static_cast<const T*>(args.grad_output) + at[u]);
      if (input) x[u] = load<T, kWidth>(static_cast<const T*>(args.input) + at[u]);
      if (args.mask == Mask::kOutput) {
        z[u] = load<T, kWidth>(static_cast<const T*>(args.output) + at[u]);
      }
    }
  }

  __device__ __forceinline__ void load_residual(const GradArgs& args) {
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (at[u] >= 0) r[u] = load<T, kWidth>(static_cast<const T*>(args.residual) + at[u]);
    }
  }
};

template <class T, int kWidth, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2) bn_act_sums_kernel(const GradArgs args) {
  using A = Acc<T>;
  __shared__ AffineSlice<A, kWidth> affine;
  __shared__ A residual_means[kResidual ? kMaxLanes * kWidth : 1];
  __shared__ Sums<A> shared[kThreads * kWidth];
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  fill_parameters(sweep, tile.group, [&](int64_t i, int64_t channel) {
    affine.fill(i, channel, args.main);
    if constexpr (kResidual) {
      residual_means[i] = static_cast<A>(read(args.shortcut.mean, channel));
    }
  });
  Sums<A> sums[kWidth] = {};
  if (lane.active) {
    const Masked<T, kWidth> masked = {args.mask, {affine, sweep, lane}};
    constexpr int kCount = kUnroll / 2;
    for (int64_t p = tile.begin + lane.row; p < tile.end; p += kCount * sweep.rows) {
      Operands<T, kWidth, kCount> operands;
      operands.load_from(args, tile, lane, p, true);
      if constexpr (kResidual) operands.load_residual(args);
#pragma unroll
      for (int u = 0; u < kCount; ++u) {
        if (operands.at[u] < 0) continue;
#pragma unroll
        for (int k = 0; k < kWidth; ++k) {
          const T x = operands.x[u].values[k];
          const A g = masked(k, operands.g[u].values[k], x, operands.z[u].values[k]);
          sums[k].grad += g;
          sums[k].with_input += g * (get(x) - masked.affine.mean[k]);
          if constexpr (kResidual) {
            const A mean = residual_means[lane.local + parameter_of(sweep, k)];
            sums[k].with_residual += g * (get(operands.r[u].values[k]) - mean);
          }
        }
      }
    }
  }
  join_rows(sweep, lane, sums, shared, [](const Sums<A>& a, const Sums<A>& b) -> Sums<A> {
    return {a.grad + b.grad, a.with_input + b.with_input, a.with_residual + b.with_residual};
  });
  if (!lane.active || lane.row > 0) return;
  const Slice slice = slice_of(sweep, tile.group);
  const int64_t step = slots_of(sweep) * sweep.channels;
  A* out = static_cast<A*>(args.partials) + slot_of(sweep, tile) * sweep.channels + slice.first;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    if (k > 0 && !sweep.channels_last) break;
    out[lane.local + k] = sums[k].grad;
    out[lane.local + k + step] = sums[k].with_input;
    if constexpr (kResidual) out[lane.local + k + 2 * step] = sums[k].with_residual;
  }
}

// The weight's gradient sum(g * xhat) = sum(g * (x - mean)) / deviation, and the coefficients of
// batch_norm_grad.
template <class A>
__device__ __forceinline__ void finish_norm(
    const GradArgs& args, const Norm& norm, int64_t c, double sum, double products,
    const Vector& grad_weight, const Vector& grad_bias, A* coefficients) {
  const Sweep& sweep = args.sweep;
  const double deviation = reciprocal_deviation(read(norm.var, c), norm.eps);
  const double positions =
      static_cast<double>(sweep.groups / (sweep.channels_last ? sweep.groups : sweep.channels)) *
      static_cast<double>(sweep.positions * (sweep.channels_last ? 1 : sweep.width));
  if (grad_bias.data != nullptr) write(grad_bias, c, sum);
  if (grad_weight.data != nullptr) write(grad_weight, c, products * deviation);
  coefficients[c] = static_cast<A>(sum / positions);
  coefficients[c + sweep.channels] =
      static_cast<A>(products * deviation * (deviation / positions));
}

template <class A>
__global__ void __launch_bounds__(kThreads) bn_act_finish_kernel(const GradArgs args) {
  const Sweep& sweep = args.sweep;
  const int64_t c = blockIdx.x * static_cast<int64_t>(kFinishChannels) +
                    threadIdx.x % kFinishChannels;
  const int64_t slots = slots_of(sweep), step = slots * sweep.channels;
  const A* partials = static_cast<const A*>(args.partials) + c;
  double sums[3] = {0.0, 0.0, 0.0};
  if (c < sweep.channels) {
#pragma unroll 4
    for (int64_t slot = threadIdx.x / kFinishChannels; slot < slots; slot += kFinishRows) {
      const A* at = partials + slot * sweep.channels;
      sums[0] += static_cast<double>(at[0]);
      sums[1] += static_cast<double>(at[step]);
      if (args.shortcut.mean.data != nullptr) sums[2] += static_cast<double>(at[2 * step]);
    }
  }
  add_finish_rows(sums);
  if (threadIdx.x >= kFinishChannels || c >= sweep.channels) return;
  A* coefficients = static_cast<A*>(args.coefficients);
  finish_norm(
      args, args.main, c, sums[0], sums[1], args.grad_weight, args.grad_bias, coefficients);
  if (args.shortcut.mean.data == nullptr) return;
  finish_norm(
      args, args.shortcut, c, sums[0], sums[2], args.grad_residual_weight, args.grad_residual_bias,
      coefficients + 2 * sweep.channels);
}

// Parameters of the input's gradient. Fixed statistics do not depend on the input.
template <class A, int kWidth>
struct GradSlice {
  A mean[kMaxLanes * kWidth];
  A scale[kMaxLanes * kWidth];
  A mean_grad[kMaxLanes * kWidth];
  A slope[kMaxLanes * kWidth];

  __device__ __forceinline__ void fill(
      int64_t i, int64_t channel, const Norm& norm, const A* coefficients, int64_t channels) {
    mean[i] = static_cast<A>(read(norm.mean, channel));
    scale[i] = static_cast<A>(scale_of(norm, channel));
    mean_grad[i] = coefficients == nullptr ? A(0) : coefficients[channel];
    slope[i] = coefficients == nullptr ? A(0) : coefficients[channel + channels];
  }

  __device__ __forceinline__ A operator()(int i, A g, A x, bool batch_stats) const {
    if (!batch_stats) return scale[i] * g;
    return batch_norm_grad(g, x, mean[i], scale[i], mean_grad[i], slope[i]);
  }
};

template <class A>
struct GradSlice<A, 0> {};

template <class T, int kWidth, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2) bn_act_bwd_kernel(const GradArgs args) {
  using A = Acc<T>;
  __shared__ A bias[kMaxLanes * kWidth];
  __shared__ GradSlice<A, kWidth> main;
  __shared__ GradSlice<A, kResidual ? kWidth : 0> shortcut;
  const Sweep& sweep = args.sweep;
  const Tile tile = tile_of(sweep, blockIdx.x);
  const Lane lane = lane_of(sweep, tile.group, threadIdx.x);
  const A* coefficients = static_cast<const A*>(args.coefficients);
  fill_parameters(sweep, tile.group, [&](int64_t i, int64_t channel) {
    bias[i] = static_cast<A>(read(args.main.bias, channel, 0.0));
    main.fill(
        i, channel, args.main, args.batch_stats ? coefficients : nullptr, sweep.channels);
    if constexpr (kResidual) {
      const A* own = args.residual_batch_stats ? coefficients + 2 * sweep.channels : nullptr;
      shortcut.fill(i, channel, args.shortcut, own, sweep.channels);
    }
  });
  if (!lane.active) return;
  T* grad_input = static_cast<T*>(args.grad_input);
  T* grad_residual = static_cast<T*>(args.grad_residual);
  const bool needs_input =
      (args.batch_stats && grad_input != nullptr) || args.mask == Mask::kRecomputed;
  const bool needs_residual = kResidual && args.residual_batch_stats && grad_residual != nullptr;
  constexpr int kCount = kUnroll / 2;
  for (int64_t p = tile.begin + lane.row; p < tile.end; p += kCount * sweep.rows) {
    Operands<T, kWidth, kCount> operands = {};
    operands.load_from(args, tile, lane, p, needs_input);
    if (needs_residual) operands.load_residual(args);
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      if (operands.at[u] < 0) continue;
      Pack<T, kWidth> dx, dr;
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        const int i = lane.local + parameter_of(sweep, k);
        const A x = get(operands.x[u].values[k]);
        A g = get(operands.g[u].values[k]);
        if (args.mask == Mask::kOutput) {
          if (!relu_passes(get(operands.z[u].values[k]), A(0))) g = A(0);
        } else if (args.mask == Mask::kRecomputed) {
          const A v = batch_norm(x, main.mean[i], main.scale[i], bias[i]);
          if (!relu_passes(v, rounds_to_zero(T{}))) g = A(0);
        }
        put(&dx.values[k], main(i, g, x, args.batch_stats));
        if constexpr (kResidual) {
          const A r = get(operands.r[u].values[k]);
          put(&dr.values[k], shortcut(i, g, r, args.residual_batch_stats));
        } else {
          put(&dr.values[k], g);
        }
      }
      // The input's gradient may overwrite grad_output, which this thread has read.
      if (grad_residual != nullptr) store(grad_residual + operands.at[u], dr);
      if (grad_input != nullptr) store(grad_input + operands.at[u], dx);
    }
  }
}

}  // namespace

void grad_sums(const GradArgs& args, void* stream) {
  const bool residual = args.shortcut.mean.data != nullptr;
  // A block sums one tile of up to 64 vectors of channels and leaves one partial per channel.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    const auto kernel = residual ? &bn_act_sums_kernel<T, kWidth, true>
                                 : &bn_act_sums_kernel<T, kWidth, false>;
    launch(kernel, blocks_of(args.sweep), kThreads, stream, args);
  });
  // A block adds all partials of 16 channels.
  const int64_t blocks = divide_up(args.sweep.channels, kFinishChannels);
  const auto finish =
      args.dtype == kFloat64 ? &bn_act_finish_kernel<double> : &bn_act_finish_kernel<float>;
  launch(finish, blocks, kThreads, stream, args);
}

void grad(const GradArgs& args, void* stream) {
  const bool residual = args.shortcut.mean.data != nullptr;
  // A block writes the gradients of one tile of up to 64 vectors of channels.
  with_vectors(args.dtype, args.sweep.width, [&](auto* type, auto width) {
    using T = std::remove_pointer_t<decltype(type)>;
    constexpr int kWidth = decltype(width)::value;
    const auto kernel =
        residual ? &bn_act_bwd_kernel<T, kWidth, true> : &bn_act_bwd_kernel<T, kWidth, false>;
    launch(kernel, blocks_of(args.sweep), kThreads, stream, args);
  });
}

}  // namespace rf::cuda
