// Every loop for every storage type, as one table. The including file names the instruction set.
#pragma once

#include "bn_act.h"
#include "bn_act_grad.h"
#include "cast.h"
#include "max_pool.h"
#include "resize.h"
#include "stats.h"
#include "winograd.h"

// In the order of DType.
#define RF_EACH_TYPE(loop) {loop<float>, loop<double>, loop<BFloat16>, loop<Float16>}
#define RF_CAST_FROM(from) \
  {cast<from, float>, cast<from, double>, cast<from, BFloat16>, cast<from, Float16>}

#ifdef RF_WINOGRAD
#define RF_WINOGRAD_LOOP(loop) loop
#else
#define RF_WINOGRAD_LOOP(loop) nullptr
#endif

#define RF_DEFINE_KERNELS(isa)                                              \
  namespace rf::cpu {                                                       \
  const Kernels& kernels_##isa() {                                          \
    static constexpr Kernels table = {                                      \
        #isa,                                                               \
        RF_EACH_TYPE(stats),                                                \
        RF_EACH_TYPE(forward),                                              \
        RF_EACH_TYPE(grad_sums),                                            \
        RF_EACH_TYPE(grad),                                                 \
        RF_EACH_TYPE(pool_grad),                                            \
        RF_EACH_TYPE(resize),                                               \
        RF_EACH_TYPE(resize_grad),                                          \
        {RF_CAST_FROM(float), RF_CAST_FROM(double), RF_CAST_FROM(BFloat16), \
         RF_CAST_FROM(Float16)},                                            \
        RF_WINOGRAD_LOOP(winograd_pack),                                    \
        RF_WINOGRAD_LOOP(winograd),                                         \
    };                                                                      \
    return table;                                                           \
  }                                                                         \
  }
