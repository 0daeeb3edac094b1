// Between the operators (checks, scratch memory, stream) and the kernels: what a launch is told.
// Neither torch nor CUDA headers, so that each side compiles without the other's.
#pragma once

#include <stdint.h>

#include "../resize_math.h"
#include "../types.h"
#include "tiling.h"

namespace rf::cuda {

// A per-channel vector, or null.
struct Vector {
  void* data;
  DType dtype;
};

struct Norm {
  Vector mean;
  Vector var;
  Vector weight;
  Vector bias;
  double eps;
};

// partials: [2][slots][channels], mean and squared distances of each slot.
struct StatsArgs {
  Sweep sweep;
  DType dtype;
  const void* input;
  double* partials;
  Vector mean;
  Vector var;
};

struct ForwardArgs {
  Image image;
  Sweep sweep;
  DType dtype;
  bool relu;
  const void* input;
  const void* residual;
  void* output;
  void* pooled;
  Norm main;
  Norm shortcut;
};

// coefficients: what grad_sums leaves for grad, [4][channels] in the accumulation type: the mean
// gradient and the slope (see batch_norm_grad) of the input and of the residual.
//
// partials: [3][slots][channels], sums of g, g * (input - mean) and g * (residual - residual mean).
// Each gradient is null unless it is wanted.
struct GradArgs {
  Sweep sweep;
  DType dtype;
  Mask mask;
  bool batch_stats;
  bool residual_batch_stats;
  const void* grad_output;
  const void* input;
  const void* output;
  const void* residual;
  Norm main;
  Norm shortcut;
  void* partials;
  void* coefficients;
  Vector grad_weight;
  Vector grad_bias;
  Vector grad_residual_weight;
  Vector grad_residual_bias;
  void* grad_input;
  void* grad_residual;
};

struct PoolGradArgs {
  Image image;
  Sweep sweep;
  DType dtype;
  const void* grad_output;
  const void* grad_pooled;
  const void* output;
  void* grad;
};

// sweep: over the output, which holds the channels of `input` and then those of `skip`.
struct ResizeArgs {
  Image input_image;
  Image skip_image;
  Image output_image;
  Sweep sweep;
  DType dtype;
  ResizeMode mode;
  const void* input;
  const void* skip;
  void* output;
};

// sweep: over grad_input; skip_sweep: over grad_skip.
struct ResizeGradArgs {
  Image input_image;
  Image skip_image;
  Image output_image;
  Sweep sweep;
  Sweep skip_sweep;
  DType dtype;
  ResizeMode mode;
  const void* grad_output;
  void* grad_input;
  void* grad_skip;
};

struct RunningStatsArgs {
  int64_t channels;
  int64_t count;
  double momentum;
  Vector mean;
  Vector var;
  Vector bias;
  Vector running_mean;
  Vector running_var;
  int64_t* counter;
};

// Each enqueues its kernels on the stream (a cudaStream_t); a launch that fails raises.
void stats(const StatsArgs& args, void* stream);
void forward(const ForwardArgs& args, void* stream);
void grad_sums(const GradArgs& args, void* stream);
void grad(const GradArgs& args, void* stream);
void pool_grad(const PoolGradArgs& args, void* stream);
void resize(const ResizeArgs& args, void* stream);
void resize_grad(const ResizeGradArgs& args, void* stream);
void running_stats(const RunningStatsArgs& args, void* stream);

}  // namespace rf::cuda
