#include <algorithm>
#include <vector>

#include "vectors.h"

namespace rf::cpu {
namespace {

bool has_winograd() { return kernels().winograd != nullptr; }

void check_available(const char* op) {
  if (has_winograd()) return;
  fail(op, ": needs AVX2 with FMA or AVX-512, this process runs ", kernels().name);
}

void check_channels_last(const char* op, const char* name, const Tensor& t) {
  check_memory(op, name, t);
  const bool image = t.dim() == 4 && t.scalar_type() == ScalarType::Float;
  if (image && (t.numel() == 0 || dense_in_order(t, {0, 2, 3, 1}))) return;
  fail(
      op, ": ", name, " must be float32 with 4 dimensions, dense in channels_last, got ",
      dtype_name(t.scalar_type()), " of shape ", shape_of(t), " with strides ", strides_of(t));
}

void check_multiple(const char* op, const char* name, int64_t channels) {
  if (channels > 0 && channels % 16 == 0) return;
  fail(op, ": ", name, " must be a positive multiple of 16, got ", channels);
}

void check_packed(const char* op, const Tensor& packed, int64_t k, int64_t c) {
  check_memory(op, "packed", packed);
  const bool shaped = packed.dim() == 4 && packed.size(0) == k / 16 && packed.size(1) == 16 &&
                      packed.size(2) == c && packed.size(3) == 16;
  if (shaped && packed.scalar_type() == ScalarType::Float &&
      dense_in_order(packed, {0, 1, 2, 3})) {
    return;
  }
  fail(
      op, ": packed must be contiguous float32 of shape [", k / 16, ", 16, ", c, ", 16], got ",
      dtype_name(packed.scalar_type()), " of shape ", shape_of(packed));
}

// False: a weight is not finite, and the packed one must not be used.
bool winograd_pack(const Tensor& weight, bool rotated, const Tensor& packed) {
  const char* op = "winograd_pack";
  check_available(op);
  check_channels_last(op, "weight", weight);
  const int64_t k = weight.size(0), c = weight.size(1);
  if (weight.size(2) != 3 || weight.size(3) != 3) {
    fail(op, ": weight must have shape [K, C, 3, 3], got ", shape_of(weight));
  }
  check_multiple(op, "K", k);
  check_multiple(op, "C", c);
  check_packed(op, packed, rotated ? c : k, rotated ? k : c);
  std::vector<char> special(k / 16);
  kernels().winograd_pack(
      {k, c, rotated, static_cast<const float*>(weight.data_ptr()),
       static_cast<float*>(packed.mutable_data_ptr()), special.data()});
  return std::find(special.begin(), special.end(), 1) == special.end();
}

void winograd_conv2d(
    const Tensor& input, const Tensor& packed, const OptionalTensor& bias,
    const OptionalTensor& residual, bool relu, const Tensor& output) {
  const char* op = "winograd_conv2d";
  check_available(op);
  check_channels_last(op, "input", input);
  check_channels_last(op, "output", output);
  const int64_t n = input.size(0), c = input.size(1), h = input.size(2), w = input.size(3);
  const int64_t k = output.size(1);
  check_multiple(op, "input's channels", c);
  check_multiple(op, "output's channels", k);
  check_packed(op, packed, k, c);
  Images images(op, "output", output);
  images.add("output", output, n, k, h, w);
  if (residual.has_value()) {
    check_channels_last(op, "residual", *residual);
    images.add_like("residual", *residual, output);
  }
  if (bias.has_value()) check_channels(op, "bias", *bias, k, ScalarType::Float, true);
  if (output.numel() == 0) return;
  kernels().winograd(
      {n, c, h, w, k, relu, static_cast<const float*>(input.data_ptr()),
       static_cast<const float*>(packed.data_ptr()), static_cast<const float*>(pointer(bias)),
       static_cast<const float*>(pointer(residual)),
       static_cast<float*>(output.mutable_data_ptr())});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CompositeExplicitAutograd, m) {
  m.impl("has_winograd", RF_BOX(&has_winograd));
}

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("winograd_pack", RF_BOX(&winograd_pack));
  m.impl("winograd_conv2d", RF_BOX(&winograd_conv2d));
}

}  // namespace rf::cpu
