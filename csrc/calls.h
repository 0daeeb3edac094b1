// Units that Python calls without the dispatcher: where nothing but autograd listens, finding an
// operator and converting its arguments takes longer than computing on a small image. Tensors are
// read through DLPack's exchange API, which torch offers as C functions. A call answers False,
// having written nothing, to whatever is not plain; the operators then take it, or say what is
// wrong with it. To be included once per library.
#pragma once

#include <exception>
#include <optional>

#include "arguments.h"
#include "operands.h"
#include "signatures.h"

namespace rf::calls {
namespace {

Operators operators_;

#ifdef USE_CUDA
// Made current before the checks, which expect it: the forward may be called from a thread whose
// device is another, and the backward from one of autograd's, whose device it is.
using Current = torch::stable::accelerator::DeviceGuard;
#else
struct Current {
  explicit Current(int32_t) {}
};
#endif

// Statistics that are given as two vectors, or that a call computes: a matrix [2, C].
class Statistics {
 public:
  Statistics(
      const OptionalTensor& batch, const OptionalTensor& mean, const OptionalTensor& var,
      const Tensor& image)
      : mean(batch.has_value() ? row(*batch, 0, image) : mean.value()),
        var(batch.has_value() ? row(*batch, 1, image) : var.value()) {}

  const Tensor mean;
  const Tensor var;

 private:
  static Tensor row(const Tensor& batch, int64_t i, const Tensor& image) {
    const bool wide = image.scalar_type() == ScalarType::Double;
    const ScalarType type = wide ? ScalarType::Double : ScalarType::Float;
    const bool matrix = image.dim() == 4 && batch.dim() == 2 && batch.size(0) == 2 &&
                        batch.size(1) == image.size(1) && batch.stride(1) == 1;
    if (!matrix || batch.scalar_type() != type) throw Declined();
    char* data = static_cast<char*>(batch.mutable_data_ptr());
    return Tensor(
        data + i * batch.stride(0) * (wide ? 8 : 4), batch.sizes() + 1, batch.strides() + 1, 1,
        type, batch.is_cuda() ? DeviceType::kCuda : DeviceType::kCpu, batch.get_device_index());
  }
};

int64_t positions(const Tensor& image) { return image.size(0) * image.size(2) * image.size(3); }

// bn_act(input, weight, bias, running_mean, running_var, num_batches_tracked, training, momentum,
// eps, residual, relu, output, batch): z = relu(batch_norm(input) + residual) into `output`. With
// `batch`, [2, C], by the batch's statistics, which are left there; when training, the running
// ones follow.
class Forward {
 public:
  explicit Forward(Arguments& a)
      : input_(a.tensor()),
        current_(input_.get_device_index()),
        weight_(a.optional()),
        bias_(a.optional()),
        running_mean_(a.optional()),
        running_var_(a.optional()),
        counter_(a.optional()),
        training_(a.flag()),
        momentum_(a.momentum()),
        eps_(a.number()),
        residual_(a.optional()),
        relu_(a.flag()),
        output_(a.fresh()),
        batch_(a.optional_fresh()),
        statistics_(batch_, running_mean_, running_var_, input_) {
    check();
  }

  int64_t elements() const { return input_.numel(); }

  void run() const {
    if (batch_.has_value()) operators_.bn_stats(input_, statistics_.mean, statistics_.var);
    operators_.bn_act_forward(
        input_, statistics_.mean, statistics_.var, weight_, bias_, eps_, residual_, none_, none_,
        none_, none_, 0.0, relu_, output_, none_);
    if (!tracks()) return;
    operators_.update_running_stats(
        statistics_.mean, statistics_.var, none_, positions(input_), momentum_, *running_mean_,
        *running_var_, counter_);
  }

 private:
  bool tracks() const { return training_ && running_mean_.has_value(); }

  void check() const {
    ForwardOperands{input_, {statistics_.mean, statistics_.var, weight_, bias_, eps_}, residual_,
                    {},     relu_,  output_, none_}
        .check();
    if (input_.numel() == 0 || (batch_.has_value() && positions(input_) == 1)) throw Declined();
    if (running_mean_.has_value() != running_var_.has_value()) throw Declined();
    if (training_ && (!batch_.has_value() || (counter_.has_value() && !tracks()))) throw Declined();
    if (tracks()) {
      check_update_running_stats(
          statistics_.mean, statistics_.var, none_, momentum_, *running_mean_, *running_var_,
          counter_);
    }
    check_one_dtype();
  }

  // torch refuses vectors of several dtypes, and of others than the image's or the statistics'.
  void check_one_dtype() const {
    std::optional<ScalarType> common;
    for (const OptionalTensor* t : {&weight_, &bias_, &running_mean_, &running_var_}) {
      if (!t->has_value()) continue;
      const ScalarType type = (*t)->scalar_type();
      if (type != common.value_or(type)) throw Declined();
      if (type != input_.scalar_type() && type != statistics_.mean.scalar_type()) throw Declined();
      common = type;
    }
  }

  const Tensor input_;
  const Current current_;
  const OptionalTensor weight_, bias_, running_mean_, running_var_, counter_;
  const bool training_;
  const double momentum_, eps_;
  const OptionalTensor residual_;
  const bool relu_;
  const Tensor output_;
  const OptionalTensor batch_;
  const Statistics statistics_;
  const OptionalTensor none_;
};

// bn_act_backward(grad_output, input, output, batch, running_mean, running_var, weight, bias, eps,
// relu, grad_input, grad_weight, grad_bias, grad_residual): what is not None is written; `output`
// is that of the forward where the ReLU's mask depends on a residual.
class Backward {
 public:
  explicit Backward(Arguments& a)
      : grad_output_(a.tensor()),
        current_(grad_output_.get_device_index()),
        input_(a.tensor()),
        output_(a.optional()),
        batch_(a.optional_fresh()),
        running_mean_(a.optional()),
        running_var_(a.optional()),
        statistics_(batch_, running_mean_, running_var_, input_),
        weight_(a.optional()),
        bias_(a.optional()),
        eps_(a.number()),
        relu_(a.flag()),
        grad_input_(a.optional_fresh()),
        grad_weight_(a.optional_fresh()),
        grad_bias_(a.optional_fresh()),
        grad_residual_(a.optional_fresh()) {
    const Wanted wanted = {grad_input_, grad_weight_, grad_bias_, grad_residual_, none_, none_};
    const Normalization main = {statistics_.mean, statistics_.var, weight_, bias_, eps_};
    BackwardOperands{grad_output_, input_, output_, main,  batch_.has_value(),
                     none_,        {},     false,   relu_, wanted}
        .check();
  }

  int64_t elements() const { return input_.numel(); }

  void run() const {
    operators_.bn_act_backward(
        grad_output_, input_, output_, statistics_.mean, statistics_.var, weight_, bias_, eps_,
        batch_.has_value(), none_, none_, none_, none_, 0.0, false, relu_, grad_input_,
        grad_weight_, grad_bias_, grad_residual_, none_, none_);
  }

 private:
  const Tensor grad_output_;
  const Current current_;
  const Tensor input_;
  const OptionalTensor output_, batch_, running_mean_, running_var_;
  const Statistics statistics_;
  const OptionalTensor weight_, bias_;
  const double eps_;
  const bool relu_;
  const OptionalTensor grad_input_, grad_weight_, grad_bias_, grad_residual_;
  const OptionalTensor none_;
};

// update_running_stats(running_mean, running_var, num_batches_tracked, mean, var, conv_bias, count,
// momentum).
class Update {
 public:
  explicit Update(Arguments& a)
      : running_mean_(a.tensor()),
        current_(running_mean_.get_device_index()),
        running_var_(a.tensor()),
        counter_(a.optional()),
        mean_(a.tensor()),
        var_(a.tensor()),
        bias_(a.optional()),
        count_(a.integer()),
        momentum_(a.momentum()) {
    check_update_running_stats(
        mean_, var_, bias_, momentum_, running_mean_, running_var_, counter_);
    // The operator rounds it to the statistics' dtype.
    const bool wider = bias_.has_value() && bias_->scalar_type() == ScalarType::Double;
    if (wider && mean_.scalar_type() != ScalarType::Double) throw Declined();
  }

  int64_t elements() const { return mean_.numel(); }

  void run() const {
    operators_.update_running_stats(
        mean_, var_, bias_, count_, momentum_, running_mean_, running_var_, counter_);
  }

 private:
  const Tensor running_mean_;
  const Current current_;
  const Tensor running_var_;
  const OptionalTensor counter_;
  const Tensor mean_, var_;
  const OptionalTensor bias_;
  const int64_t count_;
  const double momentum_;
};

// Other Python threads run meanwhile, unless there is so little to do that waking them takes longer.
class WithoutPython {
 public:
  explicit WithoutPython(bool worthwhile)
      : thread_(worthwhile ? PyEval_SaveThread() : nullptr) {}
  WithoutPython(const WithoutPython&) = delete;
  WithoutPython& operator=(const WithoutPython&) = delete;

  ~WithoutPython() {
    if (thread_ != nullptr) PyEval_RestoreThread(thread_);
  }

 private:
  PyThreadState* thread_;
};

constexpr int64_t kFewElements = 32768;

// False before anything is written; what fails later is an error, because a second try would update
// running statistics twice.
template <class Call>
PyObject* answer(PyObject*, PyObject* const* values, Py_ssize_t count) {
  std::optional<Call> call;
  try {
    Arguments arguments(values, count);
    call.emplace(arguments);
  } catch (const std::exception&) {
    PyErr_Clear();
    return PyBool_FromLong(0);
  }
  try {
    const WithoutPython unlocked(call->elements() > kFewElements);
    call->run();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
  return PyBool_FromLong(1);
}

// bind(exchange_api, Tensor, Parameter): whether the calls understand this torch.
PyObject* bind(PyObject*, PyObject* arguments) {
  PyObject *capsule, *tensor, *parameter;
  if (!PyArg_ParseTuple(arguments, "OOO", &capsule, &tensor, &parameter)) return nullptr;
  const char* name = "dlpack_exchange_api";
  if (!PyCapsule_IsValid(capsule, name)) return PyBool_FromLong(0);
  const auto* api =
      static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, name));
  if (api->major != dlpack::kMajor || api->from_python == nullptr) return PyBool_FromLong(0);
  Py_INCREF(tensor);
  Py_INCREF(parameter);
  torch_ = {api, tensor, parameter, PyUnicode_InternFromString("is_neg")};
  return PyBool_FromLong(1);
}

template <class Call>
PyMethodDef method(const char* name) {
  void* function = reinterpret_cast<void*>(&answer<Call>);
  return {name, reinterpret_cast<PyCFunction>(function), METH_FASTCALL, nullptr};
}

PyObject* module(const char* name, const Operators& operators) {
  operators_ = operators;
  static PyMethodDef methods[] = {
      {"bind", bind, METH_VARARGS, nullptr},
      method<Forward>("bn_act"),
      method<Backward>("bn_act_backward"),
      method<Update>("update_running_stats"),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {
      PyModuleDef_HEAD_INIT, name, nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&definition);
}

}  // namespace
}  // namespace rf::calls
