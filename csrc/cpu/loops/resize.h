// Upsampling next to a copied skip, and its gradient as a gather. Both work on one image row at a
// time: blend two rows into a buffer, then blend its columns.
#pragma once

#include "../../resize_math.h"
#include "common.h"

namespace rf::cpu {
namespace {

template <class A, class T>
RF_LOOP void blend_rows(const T* upper, const T* lower, A weight, A* __restrict out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    out[i] = (A(1) - weight) * get(upper[i]) + weight * get(lower[i]);
  }
}

template <class A, class T>
RF_LOOP void blend_pixels(const A* left, const A* right, A weight, T* out, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) put(out + i, (A(1) - weight) * left[i] + weight * right[i]);
}

// One plane's row: neighbouring outputs gather from the buffer.
template <class A, class T>
RF_LOOP void blend_columns(const A* row, const Taps& taps, T* out, int64_t columns) {
  const int32_t* first = taps.first;
  const int32_t* second = taps.second;
  const A* weights = static_cast<const A*>(taps.weight);
#pragma omp simd
  for (int64_t w = 0; w < columns; ++w) {
    put(out + w, (A(1) - weights[w]) * row[first[w]] + weights[w] * row[second[w]]);
  }
}

template <class T>
void copy(const T* from, T* to, int64_t n) {
  __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
}

template <class T>
RF_LOOP void nearest_row(
    const T* row, const int32_t* first, int64_t columns, int64_t pixel, int64_t gap, T* out) {
  if (pixel == 1 && gap == 1) {
#pragma omp simd
    for (int64_t w = 0; w < columns; ++w) out[w] = row[first[w]];
  } else {
    for (int64_t w = 0; w < columns; ++w) copy(row + first[w] * pixel, out + w * gap, pixel);
  }
}

// Output row `h` of an image or plane that starts at `input`. `pixel` values per pixel (the
// channels, or 1 in a plane), `gap` values from one output pixel to the next.
template <class T, class A>
void resize_row(
    const ResizeArgs& args, const T* input, int64_t pixel, int64_t gap, int64_t h, A* buffer,
    T* out) {
  const Taps& columns = args.column_taps;
  const int64_t row = args.columns.in * pixel, width = args.columns.out;
  const T* upper = input + args.row_taps.first[h] * row;
  if (args.nearest) return nearest_row(upper, columns.first, width, pixel, gap, out);
  const T* lower = input + args.row_taps.second[h] * row;
  blend_rows(upper, lower, static_cast<const A*>(args.row_taps.weight)[h], buffer, row);
  if (pixel == 1 && gap == 1) return blend_columns(buffer, columns, out, width);
  const A* weights = static_cast<const A*>(columns.weight);
  for (int64_t w = 0; w < width; ++w) {
    blend_pixels(
        buffer + columns.first[w] * pixel, buffer + columns.second[w] * pixel, weights[w],
        out + w * gap, pixel);
  }
}

template <class T>
void resize_channels_last(const ResizeArgs& args) {
  using A = Acc<T>;
  const int64_t c = args.image.c, skip_c = args.skip_channels, all = c + skip_c;
  const int64_t height = args.rows.out, width = args.columns.out;
  const int64_t scratch = args.columns.in * c * static_cast<int64_t>(sizeof(A));
  parallel(
      args.image.n * height, width * all, scratch, [&](int64_t begin, int64_t end, char* bytes) {
        for (int64_t item = begin; item < end; ++item) {
          const int64_t n = item / height, h = item % height;
          T* out = static_cast<T*>(args.output) + item * width * all;
          const T* input =
              static_cast<const T*>(args.input) + n * args.rows.in * args.columns.in * c;
          resize_row(args, input, c, all, h, reinterpret_cast<A*>(bytes), out);
          if (skip_c == 0) continue;
          const T* skip = static_cast<const T*>(args.skip) + item * width * skip_c;
          for (int64_t w = 0; w < width; ++w) copy(skip + w * skip_c, out + w * all + c, skip_c);
        }
      });
}

template <class T>
void resize_contiguous(const ResizeArgs& args) {
  using A = Acc<T>;
  const int64_t c = args.image.c, skip_c = args.skip_channels, all = c + skip_c;
  const int64_t height = args.rows.out, width = args.columns.out;
  const int64_t scratch = args.columns.in * static_cast<int64_t>(sizeof(A));
  const auto body = [&](int64_t begin, int64_t end, char* bytes) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t h = item % height, channel = item / height % all, n = item / height / all;
      T* out = static_cast<T*>(args.output) + item * width;
      if (channel >= c) {
        const int64_t plane = n * skip_c + channel - c;
        copy(static_cast<const T*>(args.skip) + (plane * height + h) * width, out, width);
        continue;
      }
      const int64_t plane = n * c + channel;
      const T* input = static_cast<const T*>(args.input) + plane * args.rows.in * args.columns.in;
      resize_row(args, input, 1, 1, h, reinterpret_cast<A*>(bytes), out);
    }
  };
  parallel(args.image.n * all * height, width, scratch, body);
}

template <class T>
void resize(const ResizeArgs& args) {
  return args.image.channels_last ? resize_channels_last<T>(args) : resize_contiguous<T>(args);
}

// sum += weight * x, or = for the first term.
template <class A, class T>
RF_LOOP void accumulate(const T* x, A weight, bool first, A* __restrict sum, int64_t n) {
  if (first) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] = weight * get(x[i]);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) sum[i] += weight * get(x[i]);
  }
}

// Collects the output rows that input row `h` feeds: buffer[columns.out * pixel].
template <class T, class A>
void gather_rows(
    const ResizeGradArgs& args, const T* grad, int64_t pixel, int64_t gap, int64_t h, A* buffer) {
  const Gather& gather = args.row_gather;
  const A* weights = static_cast<const A*>(gather.weight);
  const int64_t width = args.columns.out;
  if (gather.terms == 0 || gather.source[h] == args.rows.out) clear(buffer, width * pixel);
  for (int64_t k = 0; k < gather.terms; ++k) {
    const int64_t at = k * args.rows.in + h;
    if (gather.source[at] == args.rows.out) break;
    const T* row = grad + gather.source[at] * width * gap;
    if (gap == pixel) {
      accumulate(row, weights[at], k == 0, buffer, width * pixel);
    } else {
      for (int64_t w = 0; w < width; ++w) {
        accumulate(row + w * gap, weights[at], k == 0, buffer + w * pixel, pixel);
      }
    }
  }
}

// One plane's row: neighbouring inputs gather from the buffer, whose last element is zero.
template <class A, class T>
RF_LOOP void gather_plane_columns(
    const Axis& axis, const Gather& gather, const A* buffer, A* sum, T* out) {
  clear(sum, axis.in);
  for (int64_t k = 0; k < gather.terms; ++k) {
    const int32_t* source = gather.source + k * axis.in;
    const A* weights = static_cast<const A*>(gather.weight) + k * axis.in;
#pragma omp simd
    for (int64_t w = 0; w < axis.in; ++w) sum[w] += weights[w] * buffer[source[w]];
  }
#pragma omp simd
  for (int64_t w = 0; w < axis.in; ++w) put(out + w, sum[w]);
}

template <class A, class T>
void gather_pixel_columns(
    const Axis& axis, const Gather& gather, const A* buffer, int64_t pixel, A* sum, T* out) {
  const A* weights = static_cast<const A*>(gather.weight);
  for (int64_t w = 0; w < axis.in; ++w) {
    clear(sum, pixel);
    for (int64_t at = w; at < gather.terms * axis.in; at += axis.in) {
      if (gather.source[at] == axis.out) break;
      accumulate(buffer + gather.source[at] * pixel, weights[at], false, sum, pixel);
    }
#pragma omp simd
    for (int64_t i = 0; i < pixel; ++i) put(out + w * pixel + i, sum[i]);
  }
}

// Runs are whole images in channels_last and planes otherwise; `source` maps a run to its gradient.
template <class T, class Source>
void resize_grad_runs(
    const ResizeGradArgs& args, int64_t runs, int64_t pixel, int64_t gap, const Source& source) {
  using A = Acc<T>;
  const int64_t height = args.rows.in, width = args.columns.in;
  const int64_t row = args.columns.out * pixel;
  const int64_t sums = pixel > width ? pixel : width;
  const int64_t scratch = (row + 1 + sums) * static_cast<int64_t>(sizeof(A));
  parallel(runs * height, 2 * row, scratch, [&](int64_t begin, int64_t end, char* bytes) {
    A* buffer = reinterpret_cast<A*>(bytes);
    A* sum = buffer + row + 1;
    buffer[row] = A(0);
    for (int64_t item = begin; item < end; ++item) {
      gather_rows(args, source(item / height), pixel, gap, item % height, buffer);
      T* out = static_cast<T*>(args.grad_input) + item * width * pixel;
      if (pixel == 1) {
        gather_plane_columns(args.columns, args.column_gather, buffer, sum, out);
      } else {
        gather_pixel_columns(args.columns, args.column_gather, buffer, pixel, sum, out);
      }
    }
  });
}

template <class T>
void copy_skip_grad(const ResizeGradArgs& args) {
  const int64_t c = args.image.c, skip_c = args.skip_channels, all = c + skip_c;
  const int64_t plane = args.rows.out * args.columns.out;
  const bool last = args.image.channels_last;
  const int64_t items = args.image.n * (last ? plane : skip_c);
  const int64_t length = last ? skip_c : plane;
  const T* grad = static_cast<const T*>(args.grad_output);
  T* out = static_cast<T*>(args.grad_skip);
  parallel(items, length, 0, [&](int64_t begin, int64_t end, char*) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t from =
          last ? item * all + c : (item / skip_c * all + c + item % skip_c) * plane;
      copy(grad + from, out + item * length, length);
    }
  });
}

template <class T>
void resize_grad(const ResizeGradArgs& args) {
  const int64_t c = args.image.c, all = c + args.skip_channels;
  const int64_t plane = args.rows.out * args.columns.out;
  const T* grad = static_cast<const T*>(args.grad_output);
  if (args.grad_skip != nullptr) copy_skip_grad<T>(args);
  if (args.image.channels_last) {
    const auto image_of = [=](int64_t run) { return grad + run * plane * all; };
    return resize_grad_runs<T>(args, args.image.n, c, all, image_of);
  }
  const auto plane_of = [=](int64_t run) { return grad + (run / c * all + run % c) * plane; };
  resize_grad_runs<T>(args, args.image.n * c, 1, 1, plane_of);
}

}  // namespace
}  // namespace rf::cpu
