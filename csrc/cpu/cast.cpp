#include "vectors.h"

namespace rf::cpu {
namespace {

// Dense: the strides are those of some order of the dimensions without gaps.
bool is_dense(const Tensor& t) {
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  return t.numel() == 0 || last + 1 == t.numel();
}

void check_cast(const Tensor& input, const Tensor& output) {
  check_memory("cast", "output", output);
  if (!is_floating(input.scalar_type()) || !is_floating(output.scalar_type())) {
    fail(
        "cast: input and output must be float32, float64, bfloat16 or float16, got ",
        dtype_name(input.scalar_type()), " and ", dtype_name(output.scalar_type()));
  }
  if (shape_of(input) != shape_of(output)) {
    fail("cast: output must have shape ", shape_of(input), " like input, got ", shape_of(output));
  }
  bool same = is_dense(input);
  for (int64_t i = 0; i < input.dim(); ++i) {
    same = same && (input.size(i) == 1 || input.stride(i) == output.stride(i));
  }
  if (!same && input.numel() > 0) {
    fail(
        "cast: input and output must be dense with the same strides, got ", strides_of(input),
        " and ", strides_of(output), " for shape ", shape_of(input));
  }
}

void cast(const Tensor& input, const Tensor& output) {
  check_cast(input, output);
  kernels().cast[dtype_of(input.scalar_type())][dtype_of(output.scalar_type())](
      {input.numel(), input.data_ptr(), output.mutable_data_ptr()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) { m.impl("cast", RF_BOX(&cast)); }

}  // namespace rf::cpu
