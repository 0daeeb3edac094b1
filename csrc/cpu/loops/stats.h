// Mean and squared distances of every tile of an image.
#pragma once

#include "common.h"

namespace rf::cpu {
namespace {

// Positions whose mean is the shift of the tile's sums: enough of them that the cancellation in
// moments_from_sums stays near rounding even if these positions are unlike the rest.
constexpr int64_t kShiftRows = 32;

template <int kRows, class T, class A>
RF_LOOP void add_rows(const T* x, int64_t stride, int64_t n, A* __restrict sum) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A added = A(0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) added += get(x[r * stride + i]);
    sum[i] += added;
  }
}

template <int kRows, class T, class A>
RF_LOOP void add_moments(
    const T* x, int64_t stride, int64_t n, const A* __restrict shift, A* __restrict sum,
    A* __restrict squares) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    A added = A(0), squared = A(0);
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const A d = get(x[r * stride + i]) - shift[i];
      added += d;
      squared += d * d;
    }
    sum[i] += added;
    squares[i] += squared;
  }
}

template <class T, class A>
void estimate_shift(const T* x, const TileSpan& span, A* shift, A* partial, double* total) {
  const int64_t width = span.channels * span.repeat;
  const int64_t whole_rows = span.length / width;
  const int64_t length = whole_rows > 0 ? smaller(whole_rows, kShiftRows) * width : span.length;
  sum_lanes(length, width, 1, partial, total, [&](auto rows, int64_t offset, int64_t n) {
    add_rows<decltype(rows)::value>(x + offset, width, n, partial);
  });
  fold_lanes(total, span.channels, span.repeat);
  const double positions = static_cast<double>(length / span.channels);
  for (int64_t i = 0; i < width; i += span.channels) {
    for (int64_t c = 0; c < span.channels; ++c) {
      shift[i + c] = static_cast<A>(finite_or_zero(total[c] / positions));
    }
  }
}

template <class T>
void tile_stats(const T* x, const TileSpan& span, char* scratch, double* mean, double* m2) {
  using A = Acc<T>;
  const int64_t width = span.channels * span.repeat;
  double* total = reinterpret_cast<double*>(scratch);
  A* shift = reinterpret_cast<A*>(total + 2 * width);
  A* partial = shift + width;
  estimate_shift(x, span, shift, partial, total);
  sum_lanes(span.length, width, 2, partial, total, [&](auto rows, int64_t offset, int64_t n) {
    add_moments<decltype(rows)::value>(x + offset, width, n, shift, partial, partial + width);
  });
  fold_lanes(total, span.channels, span.repeat);
  fold_lanes(total + width, span.channels, span.repeat);
  const double positions = static_cast<double>(span.length / span.channels);
  for (int64_t c = 0; c < span.channels; ++c) {
    const Moments<double> moments =
        moments_from_sums(positions, static_cast<double>(shift[c]), total[c], total[width + c]);
    mean[c] = moments.mean;
    m2[c] = moments.m2;
  }
}

template <class T>
void stats(const StatsArgs& args) {
  const int64_t lane_bytes = 2 * sizeof(double) + 3 * sizeof(Acc<T>);
  for_each_tile(args.image, args.tiles, lane_bytes, [&](const TileSpan& span, char* scratch) {
    double* mean = args.partials + span.tile * 2 * args.image.c + span.channel;
    tile_stats(
        static_cast<const T*>(args.input) + span.offset, span, scratch, mean, mean + args.image.c);
  });
}

}  // namespace
}  // namespace rf::cpu
