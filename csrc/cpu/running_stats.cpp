#include "vectors.h"

namespace rf::cpu {

void update_running_stats(
    const Tensor& mean, const Tensor& var, const OptionalTensor& bias, int64_t count,
    double momentum, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  check_update_running_stats(
      mean, var, bias, momentum, running_mean, running_var, num_batches_tracked);
  const int64_t channels = mean.numel();
  int64_t batches = 0;
  if (num_batches_tracked.has_value()) {
    batches = ++*static_cast<int64_t*>(num_batches_tracked->mutable_data_ptr());
  }
  if (count == 0) return;
  const double factor = momentum < 0.0 ? 1.0 / static_cast<double>(batches) : momentum;
  const double correction = unbias(count);
  const std::vector<double> means = read_vector(mean), vars = read_vector(var);
  const std::vector<double> biases = read_vector(bias, channels, 0.0);
  std::vector<double> new_mean = read_vector(running_mean), new_var = read_vector(running_var);
  for (int64_t c = 0; c < channels; ++c) {
    new_mean[c] = (1.0 - factor) * new_mean[c] + factor * (means[c] + biases[c]);
    new_var[c] = (1.0 - factor) * new_var[c] + factor * vars[c] * correction;
  }
  write_vector(new_mean, running_mean);
  write_vector(new_var, running_var);
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("update_running_stats", RF_BOX(&update_running_stats));
}

}  // namespace rf::cpu
