// 2x2 max-pool with stride 2 of a pair of image rows, and its gradient.
#pragma once

#include "common.h"

namespace rf::cpu {
namespace {

// Element i of a window's four sources lies at i * kStep: channels follow each other in
// channels_last (kStep 1, right neighbour C further), windows in a plane (kStep 2, neighbour 1).
template <int kStep, class T>
RF_LOOP void pool_windows(const T* upper, const T* lower, int64_t right, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t at = i * kStep;
    const auto b = get(upper[at + right]), c = get(lower[at]), d = get(lower[at + right]);
    auto best = get(upper[at]);
    best = pool_replaces(b, best) ? b : best;
    best = pool_replaces(c, best) ? c : best;
    best = pool_replaces(d, best) ? d : best;
    put(out + i, best);
  }
}

template <bool kChannelsLast, class T>
void pool_rows(const Image& image, const T* upper, int64_t row, T* pooled, int64_t pair) {
  const int64_t columns = image.w / 2;
  if constexpr (kChannelsLast) {
    T* out = pooled + pair * columns * image.c;
    for (int64_t w = 0; w < columns; ++w) {
      const T* window = upper + 2 * w * image.c;
      pool_windows<1>(window, window + row, image.c, out + w * image.c, image.c);
    }
  } else {
    pool_windows<2>(upper, upper + row, 1, pooled + pair * columns, columns);
  }
}

template <class T>
struct WindowGrad {
  const T* grad_upper;
  const T* grad_lower;
  const T* upper;
  const T* lower;
  const T* pooled;
  T* out_upper;
  T* out_lower;
};

template <int kStep, bool kAdd, class T>
RF_LOOP void scatter_windows(const WindowGrad<T>& rows, int64_t right, int64_t n) {
  using A = Acc<T>;
  const T *upper = rows.upper, *lower = rows.lower, *pooled = rows.pooled;
  [[maybe_unused]] const T *grad_upper = rows.grad_upper, *grad_lower = rows.grad_lower;
  T *out_upper = rows.out_upper, *out_lower = rows.out_lower;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const int64_t left = i * kStep, next = left + right;
    const A b = get(upper[next]), c = get(lower[left]), d = get(lower[next]), g = get(pooled[i]);
    const A a = get(upper[left]);
    const bool b_wins = pool_replaces(b, a);
    const A best_b = b_wins ? b : a;
    const bool c_wins = pool_replaces(c, best_b);
    const A best_c = c_wins ? c : best_b;
    const bool d_wins = pool_replaces(d, best_c);
    // The last one to win takes the gradient; the others share nothing.
    const A before_d = d_wins ? A(0) : g, before_c = c_wins ? A(0) : before_d;
    const A to_d = d_wins ? g : A(0), to_c = c_wins ? before_d : A(0);
    const A to_b = b_wins ? before_c : A(0), to_a = b_wins ? A(0) : before_c;
    put(out_upper + left, to_a + (kAdd ? get(grad_upper[left]) : A(0)));
    put(out_upper + next, to_b + (kAdd ? get(grad_upper[next]) : A(0)));
    put(out_lower + left, to_c + (kAdd ? get(grad_lower[left]) : A(0)));
    put(out_lower + next, to_d + (kAdd ? get(grad_lower[next]) : A(0)));
  }
}

// Elements outside every window: the last row or column of an odd size.
template <bool kAdd, class T>
RF_LOOP void copy_or_clear(const T* grad, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    put(out + i, (kAdd ? get(grad[i]) : Acc<T>(0)) + Acc<T>(0));
  }
}

template <bool kChannelsLast, bool kAdd, class T>
void scatter_rows(const Image& image, const WindowGrad<T>& rows) {
  const int64_t columns = image.w / 2;
  const int64_t pixel = kChannelsLast ? image.c : 1;
  if constexpr (kChannelsLast) {
    for (int64_t w = 0; w < columns; ++w) {
      const int64_t left = 2 * w * pixel;
      const int64_t read = kAdd ? left : 0;
      scatter_windows<1, kAdd, T>(
          {rows.grad_upper + read, rows.grad_lower + read, rows.upper + left, rows.lower + left,
           rows.pooled + w * pixel, rows.out_upper + left, rows.out_lower + left},
          pixel, pixel);
    }
  } else {
    scatter_windows<2, kAdd, T>(rows, 1, columns);
  }
  if (image.w % 2 == 0) return;
  const int64_t tail = 2 * columns * pixel;
  const int64_t read = kAdd ? tail : 0;
  copy_or_clear<kAdd>(rows.grad_upper + read, rows.out_upper + tail, pixel);
  copy_or_clear<kAdd>(rows.grad_lower + read, rows.out_lower + tail, pixel);
}

template <class Vector, bool kAdd, class T>
void pool_grad_as(const PoolGradArgs& args) {
  const Image& image = args.image;
  const T* grad = static_cast<const T*>(args.grad_output);
  const T* pooled = static_cast<const T*>(args.grad_pooled);
  const T* output = static_cast<const T*>(args.output);
  T* out = static_cast<T*>(args.grad);
  const int64_t pooled_row = image.w / 2 * (Vector::kChannelsLast ? image.c : 1);
  for_each_row_pair<Vector>(
      image, [&](int64_t offset, int64_t row, int64_t rows, int64_t pair, int64_t) {
        const int64_t read = kAdd ? offset : 0;
        if (rows == 1) return copy_or_clear<kAdd>(grad + read, out + offset, row);
        const T* lower_grad = grad + (kAdd ? offset + row : 0);
        scatter_rows<Vector::kChannelsLast, kAdd, T>(
            image, {grad + read, lower_grad, output + offset, output + offset + row,
                    pooled + pair * pooled_row, out + offset, out + offset + row});
      });
}

template <class T>
void pool_grad(const PoolGradArgs& args) {
  using A = Acc<T>;
  const bool add = args.grad_output != nullptr;
  if (args.image.channels_last) {
    return add ? pool_grad_as<PerLane<A>, true, T>(args) : pool_grad_as<PerLane<A>, false, T>(args);
  }
  return add ? pool_grad_as<Uniform<A>, true, T>(args) : pool_grad_as<Uniform<A>, false, T>(args);
}

}  // namespace
}  // namespace rf::cpu
