// Argument checks: every refusal is a sentence that names the operator and the argument, says what
// was expected and what came.
#pragma once

#ifdef USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#endif

#include <sstream>
#include <stdexcept>
#include <string>

#include "tensor.h"

namespace rf {

// Not STD_TORCH_CHECK: that puts the source file's path in front of the sentence.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream sentence;
  (sentence << ... << parts);
  throw std::runtime_error(sentence.str());
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.size(i);
  text << ']';
  return text.str();
}

inline std::string strides_of(const Tensor& t) {
  std::ostringstream text;
  text << '(';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i == 0 ? "" : ", ") << t.stride(i);
  text << ')';
  return text.str();
}

inline const char* dtype_name(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return torch::headeronly::toString(type);
  }
}

inline bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 ||
         type == ScalarType::Half;
}

// Dense with dimensions in the given order from the outermost to the innermost; the strides of
// dimensions of size 1 mean nothing.
inline bool dense_in_order(const Tensor& t, const int (&order)[4]) {
  int64_t expected = 1;
  for (int i = 3; i >= 0; --i) {
    const int64_t size = t.size(order[i]);
    if (size != 1 && t.stride(order[i]) != expected) return false;
    expected *= size;
  }
  return true;
}

// An argument's name in two parts, put together only for a refusal.
struct Name {
  Name(const char* name) : Name("", name) {}

  Name(const char* prefix, const char* name) : prefix(prefix), name(name) {}

  const char* prefix;
  const char* name;
};

inline std::ostream& operator<<(std::ostream& text, const Name& name) {
  return text << name.prefix << name.name;
}

// A call runs on the GPU, which is then the current one, if any of its tensors is on one. Memory may
// be missing: that of zeros which torch does not store, or one that was given back.
inline void check_memory(const char* op, const Name& name, const Tensor& t) {
#ifdef USE_CUDA
  const int32_t device = torch::stable::accelerator::getCurrentDeviceIndex();
  if (!t.is_cuda() || t.get_device_index() != device) {
    fail(op, ": ", name, " must be on cuda:", device, ", like the other tensors");
  }
#else
  if (!t.is_cpu()) fail(op, ": ", name, " must be on the CPU, like the other tensors");
#endif
  if (t.numel() > 0 && t.data_ptr() == nullptr) fail(op, ": ", name, " has no memory");
}

// The images of one call: all of one dtype and one dense layout, which is known once all were
// added.
class Images {
 public:
  Images(const char* op, const char* name, const Tensor& first)
      : op_(op), dtype_(first.scalar_type()) {
    if (!is_floating(dtype_)) {
      fail(
          op, ": ", name, " must be float32, float64, bfloat16 or float16, got ",
          dtype_name(dtype_));
    }
    add(name, first);
  }

  void add(const char* name, const Tensor& t) {
    check_memory(op_, name, t);
    if (t.dim() != 4) fail(op_, ": ", name, " must have 4 dimensions (N, C, H, W), got ", t.dim());
    if (t.scalar_type() != dtype_) {
      fail(
          op_, ": ", name, " must be ", dtype_name(dtype_), " like the other images, got ",
          dtype_name(t.scalar_type()));
    }
    if (t.numel() == 0) return;
    contiguous_ = contiguous_ && dense_in_order(t, {0, 1, 2, 3});
    channels_last_ = channels_last_ && dense_in_order(t, {0, 2, 3, 1});
    if (!contiguous_ && !channels_last_) {
      fail(
          op_, ": ", name,
          " must be dense, contiguous or channels_last, in the same layout as the ",
          "other images, got strides ", strides_of(t), " for shape ", shape_of(t));
    }
  }

  void add(const char* name, const Tensor& t, int64_t n, int64_t c, int64_t h, int64_t w) {
    add(name, t);
    if (t.size(0) == n && t.size(1) == c && t.size(2) == h && t.size(3) == w) return;
    fail(
        op_, ": ", name, " must have shape [", n, ", ", c, ", ", h, ", ", w, "], got ",
        shape_of(t));
  }

  void add_like(const char* name, const Tensor& t, const Tensor& other) {
    add(name, t, other.size(0), other.size(1), other.size(2), other.size(3));
  }

  void add_like(const char* name, const OptionalTensor& t, const Tensor& other) {
    if (t.has_value()) add_like(name, *t, other);
  }

  // Where both layouts describe the same memory, single pixels are better read as one row of
  // channels.
  bool channels_last(int64_t plane) const { return channels_last_ && (!contiguous_ || plane == 1); }

  ScalarType dtype() const { return dtype_; }

 private:
  const char* op_;
  ScalarType dtype_;
  bool contiguous_ = true;
  bool channels_last_ = true;
};

inline void check_vector(const char* op, const Name& name, const Tensor& t, int64_t length) {
  check_memory(op, name, t);
  if (t.dim() != 1 || t.size(0) != length) {
    fail(
        op, ": ", name, " must have shape [", length, "] (one value per channel), got ",
        shape_of(t));
  }
  if (length > 1 && t.stride(0) != 1) {
    fail(op, ": ", name, " must be contiguous, got strides ", strides_of(t));
  }
  if (!is_floating(t.scalar_type())) {
    fail(op, ": ", name, " must be a floating-point vector, got ", dtype_name(t.scalar_type()));
  }
}

// Statistics are float32, or float64 for float64 images; weights may also be of the images' dtype.
inline void check_channels(
    const char* op, const Name& name, const Tensor& t, int64_t channels, ScalarType image,
    bool statistics) {
  check_vector(op, name, t, channels);
  const ScalarType wide = image == ScalarType::Double ? image : ScalarType::Float;
  const ScalarType type = t.scalar_type();
  if (type == wide || (!statistics && type == image)) return;
  const bool either = !statistics && wide != image;
  fail(
      op, ": ", name, " must be ", dtype_name(wide), either ? " or " : "",
      either ? dtype_name(image) : "", " for ", dtype_name(image), " images, got ",
      dtype_name(type));
}

}  // namespace rf
