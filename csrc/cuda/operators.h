// What the operators of this folder share: tensors as the kernels see them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <initializer_list>

#include "../operands.h"
#include "device.h"
#include "kernels.h"

namespace rf::cuda {

inline Image image_of(const Tensor& t, const Images& images) {
  return {
      t.size(0), t.size(1), t.size(2), t.size(3), images.channels_last(t.size(2) * t.size(3))};
}

inline Image with_channels(Image image, int64_t channels) {
  image.c = channels;
  return image;
}

inline Image with_size(Image image, int64_t h, int64_t w) {
  image.h = h;
  image.w = w;
  return image;
}

// Elements of 16 bytes; float64 is read one by one.
inline int full_width(ScalarType type) {
  if (type == ScalarType::Double) return 1;
  return type == ScalarType::Float ? 4 : 8;
}

// A tensor that starts in the middle of its storage need not be aligned; null pointers are.
inline bool aligned(std::initializer_list<const void*> pointers) {
  bool all = true;
  for (const void* p : pointers) all = all && reinterpret_cast<uintptr_t>(p) % 16 == 0;
  return all;
}

inline int width_of(
    const Images& images, int64_t run, std::initializer_list<const void*> pointers) {
  return vector_width(run, full_width(images.dtype()), aligned(pointers));
}

inline Vector vector_of(const OptionalTensor& t) {
  if (!t.has_value()) return {nullptr, kFloat32};
  return {t->mutable_data_ptr(), dtype_of(t->scalar_type())};
}

inline Norm norm_of(const Normalization& norm) {
  return {
      vector_of(norm.mean), vector_of(norm.var), vector_of(norm.weight), vector_of(norm.bias),
      norm.eps};
}

// Scratch memory from torch's allocator beside `like`, in the accumulation type.
inline torch::stable::Tensor scratch(const Tensor& like, ScalarType image, int64_t length) {
  const bool wide = image == ScalarType::Double;
  const int64_t stride = 1;
  AtenTensorHandle memory;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      1, &length, &stride, wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32(),
      like.is_cuda() ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(),
      like.get_device_index(), &memory));
  return torch::stable::Tensor(memory);
}

}  // namespace rf::cuda
