// Conversion between storage types.
#pragma once

#include "common.h"

namespace rf::cpu {
namespace {

template <class From, class To>
void cast(const CastArgs& args) {
  const From* from = static_cast<const From*>(args.input);
  To* to = static_cast<To*>(args.output);
  parallel(divide_up(args.elements, kSpan), kSpan, 0, [&](int64_t begin, int64_t end, char*) {
    const int64_t last = smaller(end * kSpan, args.elements);
#pragma omp simd
    for (int64_t i = begin * kSpan; i < last; ++i) put(to + i, static_cast<Acc<To>>(get(from[i])));
  });
}

}  // namespace
}  // namespace rf::cpu
