// Where a call runs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../check.h"

namespace rf::cuda {

// Makes a tensor's device current while it lives; `stream` is torch's current one there.
class Device {
 public:
  Device(const char* op, const Tensor& t) : guard_(checked_index(op, t)) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
  }

  void* stream() const { return stream_; }

 private:
  static int32_t checked_index(const char* op, const Tensor& t) {
    if (!t.is_cuda()) fail(op, ": all tensors must be on the GPU when one is");
    return t.get_device_index();
  }

  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_ = nullptr;
};

}  // namespace rf::cuda
