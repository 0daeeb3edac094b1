// Launching a kernel on a stream.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>

namespace rf::cuda {
namespace {

// The runtime is linked statically: it keeps its own last error, which torch does not see.
template <class... Parameters>
void launch(
    void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream,
    const Parameters&... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error("the image has too many planes for one launch");
  kernel<<<static_cast<unsigned>(blocks), threads, 0, static_cast<cudaStream_t>(stream)>>>(
      arguments...);
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  throw std::runtime_error(std::string("a kernel was not launched: ") + cudaGetErrorString(error));
}

}  // namespace
}  // namespace rf::cuda
