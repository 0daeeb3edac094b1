#include <Python.h>

#include "../calls.h"

PyMODINIT_FUNC PyInit__C(void) {
  using namespace rf::cpu;
  return rf::calls::module(
      "_C", {bn_stats, bn_act_forward, bn_act_backward, update_running_stats});
}
