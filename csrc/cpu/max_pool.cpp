#include <torch/csrc/stable/library.h>

#include "vectors.h"

namespace rf::cpu {
namespace {

void max_pool_backward(
    const OptionalTensor& grad_output, const Tensor& grad_pooled, const Tensor& output,
    const Tensor& grad) {
  const char* op = "max_pool_backward";
  Images images(op, "output", output);
  images.add_like("grad", grad, output);
  images.add_like("grad_output", grad_output, output);
  images.add(
      "grad_pooled", grad_pooled, output.size(0), output.size(1), output.size(2) / 2,
      output.size(3) / 2);
  kernels().pool_grad[dtype_of(images.dtype())](
      {image_of(output, images), pointer(grad_output), grad_pooled.data_ptr(), output.data_ptr(),
       grad.mutable_data_ptr()});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(resunet_fast_native, CPU, m) {
  m.impl("max_pool_backward", TORCH_BOX(&max_pool_backward));
}

}  // namespace rf::cpu
