// The part of DLPack 1 (https://github.com/dmlc/dlpack) that calls.h reads: an ABI that holds
// within a major version. torch's own copy of the header is not for libraries on its stable ABI.
#pragma once

#include <stdint.h>

namespace rf::dlpack {

constexpr uint32_t kMajor = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };

struct Device {
  int32_t type;
  int32_t index;
};

enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t dim;
  DataType dtype;
  int64_t* sizes;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  void* previous;
  void* allocate;
  void* owned_from_python;
  void* owned_to_python;
  // Fills in a tensor that is valid as long as the Python object; may be null. Not 0: an exception
  // is set.
  int (*from_python)(void* object, Tensor* tensor);
  void* current_stream;
};

}  // namespace rf::dlpack
