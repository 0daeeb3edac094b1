// Arguments of a call from Python, read through DLPack's exchange API, which torch offers as C
// functions.
#pragma once

#include <Python.h>

#include <exception>
#include <optional>

#include "dlpack.h"
#include "tensor.h"

namespace rf::calls {
namespace {

struct Declined : std::exception {};

// What of torch the calls need; `bind` sets it.
struct Torch {
  const dlpack::ExchangeApi* tensors = nullptr;
  PyObject* tensor = nullptr;
  PyObject* parameter = nullptr;
  PyObject* is_neg = nullptr;
};

Torch torch_;

ScalarType scalar_type(const dlpack::DataType& type) {
  const auto is = [&](dlpack::TypeCode code, int bits) {
    return type.lanes == 1 && type.code == code && type.bits == bits;
  };
  if (is(dlpack::kFloat, 32)) return ScalarType::Float;
  if (is(dlpack::kBfloat, 16)) return ScalarType::BFloat16;
  if (is(dlpack::kFloat, 16)) return ScalarType::Half;
  if (is(dlpack::kFloat, 64)) return ScalarType::Double;
  if (is(dlpack::kInt, 64)) return ScalarType::Long;
  throw Declined();
}

DeviceType device_type(const dlpack::Device& device) {
  if (device.type == dlpack::kCpu) return DeviceType::kCpu;
  if (device.type == dlpack::kCuda) return DeviceType::kCuda;
  throw Declined();
}

Tensor borrowed(PyObject* object) {
  dlpack::Tensor t;
  if (torch_.tensors->from_python(object, &t) != 0) throw Declined();
  return Tensor(
      static_cast<char*>(t.data) + t.byte_offset, t.sizes, t.strides, t.dim, scalar_type(t.dtype),
      device_type(t.device), t.device.index);
}

// Subclasses are declined, and values that are to be negated when they are read, which DLPack does
// not say.
void check_plain(PyObject* object) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(object));
  if (type != torch_.tensor && type != torch_.parameter) throw Declined();
  PyObject* negated = PyObject_CallMethodObjArgs(object, torch_.is_neg, nullptr);
  Py_XDECREF(negated);
  if (negated != Py_False) throw Declined();
}

// Positional arguments, read one after the other.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count) : next_(values), end_(values + count) {}

  Tensor tensor() {
    PyObject* value = take();
    check_plain(value);
    return borrowed(value);
  }

  OptionalTensor optional() {
    if (next_ != end_ && *next_ != Py_None) return tensor();
    return take(), std::nullopt;
  }

  // Made by the caller for this call, as torch makes them.
  Tensor fresh() { return borrowed(take()); }

  OptionalTensor optional_fresh() {
    if (next_ != end_ && *next_ != Py_None) return fresh();
    return take(), std::nullopt;
  }

  bool flag() {
    PyObject* value = take();
    if (value != Py_True && value != Py_False) throw Declined();
    return value == Py_True;
  }

  int64_t integer() {
    const int64_t number = PyLong_AsLongLong(take());
    if (number == -1 && PyErr_Occurred()) throw Declined();
    return number;
  }

  double number() {
    const double number = PyFloat_AsDouble(take());
    if (number == -1.0 && PyErr_Occurred()) throw Declined();
    return number;
  }

  // None, a cumulative average, is negative for the operators.
  double momentum() {
    if (next_ != end_ && *next_ == Py_None) return take(), -1.0;
    const double momentum = number();
    if (momentum < 0.0) throw Declined();
    return momentum;
  }

 private:
  PyObject* take() {
    if (next_ == end_) throw Declined();
    return *next_++;
  }

  PyObject* const* next_;
  PyObject* const* end_;
};

}  // namespace
}  // namespace rf::calls
