// A tensor as the operators see it, borrowed for one call from whoever makes the call: torch's
// dispatcher, or Python itself (calls.h).
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

namespace rf {

using torch::headeronly::ScalarType;

enum class DeviceType { kCpu, kCuda, kOther };

class Tensor {
 public:
  // Implicit: arguments of the dispatcher become operands.
  Tensor(const torch::stable::Tensor& t)
      : torch_(&t),
        sizes_(t.sizes().data()),
        strides_(t.strides().data()),
        dim_(t.dim()),
        type_(t.scalar_type()),
        device_(
            t.is_cpu()    ? DeviceType::kCpu
            : t.is_cuda() ? DeviceType::kCuda
                          : DeviceType::kOther),
        index_(t.get_device_index()) {}

  Tensor(
      void* data, const int64_t* sizes, const int64_t* strides, int64_t dim, ScalarType type,
      DeviceType device, int32_t index)
      : data_(data),
        sizes_(sizes),
        strides_(strides),
        dim_(dim),
        type_(type),
        device_(device),
        index_(index) {}

  int64_t dim() const { return dim_; }

  const int64_t* sizes() const { return sizes_; }

  const int64_t* strides() const { return strides_; }

  int64_t size(int64_t i) const { return sizes_[i]; }

  int64_t stride(int64_t i) const { return strides_[i]; }

  int64_t numel() const {
    int64_t count = 1;
    for (int64_t i = 0; i < dim_; ++i) count *= sizes_[i];
    return count;
  }

  ScalarType scalar_type() const { return type_; }

  bool is_cpu() const { return device_ == DeviceType::kCpu; }

  bool is_cuda() const { return device_ == DeviceType::kCuda; }

  int32_t get_device_index() const { return index_; }

  const void* data_ptr() const { return torch_ ? torch_->const_data_ptr() : data_; }

  // torch copies now what is written to and was to be copied on the first write.
  void* mutable_data_ptr() const { return torch_ ? torch_->mutable_data_ptr() : data_; }

 private:
  const torch::stable::Tensor* torch_ = nullptr;
  void* data_ = nullptr;
  const int64_t* sizes_;
  const int64_t* strides_;
  int64_t dim_;
  ScalarType type_;
  DeviceType device_;
  int32_t index_;
};

using OptionalTensor = std::optional<Tensor>;

// What the dispatcher hands over for a parameter of an operator.
template <class T>
struct Dispatched {
  using Type = T;
};

template <>
struct Dispatched<const Tensor&> {
  using Type = const torch::stable::Tensor&;
};

template <>
struct Dispatched<const OptionalTensor&> {
  using Type = const std::optional<torch::stable::Tensor>&;
};

template <auto Operator>
struct Adapted;

template <class Result, class... Parameters, Result (*Operator)(Parameters...)>
struct Adapted<Operator> {
  static Result call(typename Dispatched<Parameters>::Type... arguments) {
    return Operator(arguments...);
  }
};

// An operator on rf::Tensor as a kernel of the dispatcher.
#define RF_BOX(function) TORCH_BOX((&::rf::Adapted<(function)>::call))

}  // namespace rf
