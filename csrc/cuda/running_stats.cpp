#include "operators.h"

namespace rf::cuda {

void update_running_stats(
    const Tensor& mean, const Tensor& var, const OptionalTensor& bias, int64_t count,
    double momentum, const Tensor& running_mean, const Tensor& running_var,
    const OptionalTensor& num_batches_tracked) {
  const Device device("update_running_stats", mean);
  check_update_running_stats(
      mean, var, bias, momentum, running_mean, running_var, num_batches_tracked);
  running_stats(
      {mean.numel(), count, momentum, vector_of(mean), vector_of(var), vector_of(bias),
       vector_of(running_mean), vector_of(running_var),
       static_cast<int64_t*>(mutable_pointer(num_batches_tracked))},
      device.stream());
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CUDA, m) {
  m.impl("update_running_stats", RF_BOX(&update_running_stats));
}

}  // namespace rf::cuda
