// What the loops share: ranges for threads, per-channel vectors, and sums over lanes.
#pragma once

#include "../../bn_math.h"
#include "../kernels.h"

// A loop over memory as a function of its own: merged into its callers it would be optimised
// together with them, and then not always vectorised.
#define RF_LOOP __attribute__((noinline))

namespace rf::cpu {
namespace {

// Elements that one step of a loop handles: small enough to stay in the first-level cache.
constexpr int64_t kSpan = 8192;
// Rows added up in the accumulation type before they go to double.
constexpr int64_t kRowsPerFlush = 64;

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <class F>
void parallel(int64_t items, int64_t elements_per_item, int64_t scratch_bytes, const F& f) {
  const ParallelBody body = [](int64_t begin, int64_t end, char* scratch, const void* context) {
    (*static_cast<const F*>(context))(begin, end, scratch);
  };
  run_parallel(items, elements_per_item, scratch_bytes, body, &f);
}

// A per-channel vector seen from a row of lanes (channels_last) ...
template <class A>
struct PerLane {
  static constexpr bool kChannelsLast = true;
  const A* values;
  static PerLane at(const void* base, int64_t) { return {static_cast<const A*>(base)}; }
  A operator[](int64_t i) const { return values[i]; }
};

// ... and from a plane, where it is one value.
template <class A>
struct Uniform {
  static constexpr bool kChannelsLast = false;
  A value;
  static Uniform at(const void* base, int64_t channel) {
    return {base == nullptr ? A(0) : static_cast<const A*>(base)[channel]};
  }
  A operator[](int64_t) const { return value; }
};

// body(offset, length, channel) over pieces that start at lane 0 of a per-channel vector.
template <class Vector, class F>
void split(const Image& image, int64_t offset, int64_t length, int64_t channel, const F& body) {
  const int64_t step = Vector::kChannelsLast ? image.width : length;
  for (int64_t i = 0; i < length; i += step) {
    body(offset + i, smaller(step, length - i), channel);
  }
}

// Cuts the image into spans of whole rows of lanes or parts of planes, in parallel.
template <class Vector, class F>
void for_each_span(const Image& image, const F& body) {
  const int64_t total = elements(image);
  if (total == 0) return;
  const int64_t run = Vector::kChannelsLast ? total : plane(image);
  const int64_t unit = Vector::kChannelsLast ? image.width : 1;
  const int64_t span = smaller(divide_up(kSpan, unit) * unit, run);
  const int64_t per_run = divide_up(run, span);
  parallel(total / run * per_run, span, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / per_run;
      const int64_t start = item % per_run * span;
      split<Vector>(image, index * run + start, smaller(span, run - start), index % image.c, body);
    }
  });
}

// body(offset of the upper row, elements per row, rows (1 or 2), pair index, channel) for each pair
// of image rows; the two rows of a pair are adjacent in memory in both layouts.
template <class Vector, class F>
void for_each_row_pair(const Image& image, const F& body) {
  if (elements(image) == 0) return;
  const int64_t pairs = divide_up(image.h, 2);
  const int64_t row = Vector::kChannelsLast ? image.w * image.c : image.w;
  const int64_t images = Vector::kChannelsLast ? image.n : image.n * image.c;
  parallel(images * pairs, 2 * row, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t index = item / pairs;
      const int64_t pair = item % pairs;
      const int64_t rows = smaller(2, image.h - 2 * pair);
      body(
          (index * image.h + 2 * pair) * row, row, rows, index * (image.h / 2) + pair,
          index % image.c);
    }
  });
}

template <class A>
void clear(A* p, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) p[i] = A(0);
}

template <class A>
void flush(A* partial, double* total, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    total[i] += static_cast<double>(partial[i]);
    partial[i] = A(0);
  }
}

template <int kRows>
struct Rows {
  static constexpr int value = kRows;
};

// Adds `length` elements, read as rows of `width` lanes, lane by lane into total[sums * width].
// step(Rows<k>, offset, lanes) adds k rows of the first `lanes` lanes to `partial`.
template <class A, class Step>
void sum_lanes(
    int64_t length, int64_t width, int64_t sums, A* partial, double* total, const Step& step) {
  const int64_t rows = length / width;
  clear(partial, sums * width);
  clear(total, sums * width);
  for (int64_t first = 0; first < rows; first += kRowsPerFlush) {
    const int64_t last = smaller(first + kRowsPerFlush, rows);
    int64_t row = first;
    for (; row + 4 <= last; row += 4) step(Rows<4>{}, row * width, width);
    for (; row < last; ++row) step(Rows<1>{}, row * width, width);
    flush(partial, total, sums * width);
  }
  if (rows * width < length) {
    step(Rows<1>{}, rows * width, length - rows * width);
    flush(partial, total, sums * width);
  }
}

// Adds the repetitions of each channel: the sums end up in total[0 .. channels).
inline void fold_lanes(double* total, int64_t channels, int64_t repeat) {
  for (int64_t half = repeat / 2 * channels; half >= channels; half /= 2) {
#pragma omp simd
    for (int64_t i = 0; i < half; ++i) total[i] += total[i + half];
  }
}

// How one tile of a reduction lies in memory, and where its sums go.
struct TileSpan {
  int64_t tile;
  int64_t channel;
  int64_t offset;
  int64_t length;
  int64_t channels;
  int64_t repeat;
};

// A power of two: enough lanes for wide registers, not more than the tile has positions.
inline int64_t plane_lanes(int64_t positions) {
  int64_t lanes = 256;
  while (lanes > positions) lanes /= 2;
  return lanes;
}

template <class F>
void for_each_tile(const Image& image, const Tiles& tiles, int64_t bytes_per_lane, const F& body) {
  if (elements(image) == 0) return;
  const bool last = image.channels_last;
  const int64_t split_channels = last ? 1 : image.c;
  const int64_t channels = last ? image.c : 1;
  const int64_t lanes = last ? image.width : 256;
  const int64_t items = tiles.count * split_channels;
  parallel(
      items, tiles.positions * channels, lanes * bytes_per_lane,
      [&](int64_t begin, int64_t end, char* scratch) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t part = item % tiles.per_run;
          const int64_t run = item / tiles.per_run;
          const int64_t tile = run / split_channels * tiles.per_run + part;
          const int64_t positions = tile_positions(image, tiles, tile);
          const int64_t offset = (run * tile_run(image) + part * tiles.positions) * channels;
          const int64_t repeat = last ? image.width / image.c : plane_lanes(positions);
          body(
              {tile, run % split_channels, offset, positions * channels, channels, repeat},
              scratch);
        }
      });
}

}  // namespace
}  // namespace rf::cpu
