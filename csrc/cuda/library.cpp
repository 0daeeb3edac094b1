// The schemas of these operators are in the CPU library, which is loaded first.
#include <Python.h>

// Importing the module is only a way to load the library; Python finds the operators in torch.ops.
extern "C" PyObject* PyInit__CUDA(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_CUDA", nullptr, -1, nullptr};
  return PyModule_Create(&definition);
}
