#include <torch/csrc/stable/library.h>

#include "vectors.h"

namespace rf::cpu {
namespace {

// The counter after this batch, 0 without one.
int64_t count_batch(const char* op, const OptionalTensor& counter) {
  if (!counter.has_value()) return 0;
  if (counter->numel() != 1 || counter->scalar_type() != ScalarType::Long) {
    fail(
        op, ": num_batches_tracked must be one int64, got ", dtype_name(counter->scalar_type()),
        " of shape ", shape_of(*counter));
  }
  return ++*static_cast<int64_t*>(counter->mutable_data_ptr());
}

void update_running_stats(
    const Tensor& mean, const Tensor& var, const OptionalTensor& bias, int64_t count,
    double momentum, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  const char* op = "update_running_stats";
  const int64_t channels = mean.numel();
  check_vector(op, "mean", mean, channels);
  check_vector(op, "var", var, channels);
  if (bias.has_value()) check_vector(op, "bias", *bias, channels);
  check_vector(op, "running_mean", running_mean, channels);
  check_vector(op, "running_var", running_var, channels);
  if (momentum < 0.0 && !num_batches_tracked.has_value()) {
    fail(op, ": num_batches_tracked must be given when momentum is negative (cumulative average)");
  }
  const int64_t batches = count_batch(op, num_batches_tracked);
  if (count == 0) return;
  const double factor = momentum < 0.0 ? 1.0 / static_cast<double>(batches) : momentum;
  const double unbias = static_cast<double>(count) / static_cast<double>(count - 1);
  const std::vector<double> means = read_vector(mean), vars = read_vector(var);
  const std::vector<double> biases = read_vector(bias, channels, 0.0);
  std::vector<double> new_mean = read_vector(running_mean), new_var = read_vector(running_var);
  for (int64_t c = 0; c < channels; ++c) {
    new_mean[c] = (1.0 - factor) * new_mean[c] + factor * (means[c] + biases[c]);
    new_var[c] = (1.0 - factor) * new_var[c] + factor * vars[c] * unbias;
  }
  write_vector(new_mean, running_mean);
  write_vector(new_var, running_var);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("update_running_stats", TORCH_BOX(&update_running_stats));
}

}  // namespace rf::cpu
