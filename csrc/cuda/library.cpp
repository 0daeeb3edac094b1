// The schemas of these operators are in the CPU library, which is loaded first.
#include <Python.h>

#include "../calls.h"

PyMODINIT_FUNC PyInit__CUDA(void) {
  using namespace rf::cuda;
  return rf::calls::module(
      "_CUDA", {bn_stats, bn_act_forward, bn_act_backward, update_running_stats});
}
