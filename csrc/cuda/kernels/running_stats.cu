// Running statistics and the counter of batches, in one launch.
#include "common.cuh"

namespace rf::cuda {
namespace {

// One block: the counter must be read by all channels before it changes, and is read once.
__global__ void __launch_bounds__(kThreads) running_stats_kernel(const RunningStatsArgs args) {
  __shared__ int64_t batches;
  if (threadIdx.x == 0 && args.counter != nullptr) batches = ++*args.counter;
  __syncthreads();
  if (args.count == 0) return;
  const double factor =
      args.momentum < 0.0 ? 1.0 / static_cast<double>(batches) : args.momentum;
  const double correction = unbias(args.count);
  for (int64_t c = threadIdx.x; c < args.channels; c += kThreads) {
    const double mean = read(args.mean, c) + read(args.bias, c, 0.0);
    const double var = read(args.var, c);
    write(
        args.running_mean, c, (1.0 - factor) * read(args.running_mean, c) + factor * mean);
    write(
        args.running_var, c,
        (1.0 - factor) * read(args.running_var, c) + factor * var * correction);
  }
}

}  // namespace

void running_stats(const RunningStatsArgs& args, void* stream) {
  // One block owns all channels and the counter.
  launch(&running_stats_kernel, 1, kThreads, stream, args);
}

}  // namespace rf::cuda
