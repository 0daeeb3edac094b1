// How the blocks and threads of a kernel share an image: index arithmetic only, for host and
// device, so that it is tested without a GPU.
#pragma once

#include <stdint.h>

#include "../bn_math.h"

namespace rf::cuda {

constexpr int kThreads = 256;
// Vectors of one position that a block reads side by side: 1 KiB in a row, and their per-channel
// parameters still fit into shared memory.
constexpr int kMaxLanes = 64;
// Positions that a thread reads before it computes: enough loads in flight to hide the memory's
// latency.
constexpr int kUnroll = 4;
// Blocks of a sweep: sixteen for each of the 132 multiprocessors of an H200. Blocks of a reduction:
// four, each of which leaves one partial result per channel. Constants, so that sums depend on the
// shape alone and not on the GPU.
constexpr int64_t kSweepBlocks = 2112;
constexpr int64_t kReductionBlocks = 528;

struct Image {
  int64_t n, c, h, w;
  bool channels_last;
};

RF_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

RF_HD int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Quotient {
  int64_t quotient;
  int64_t remainder;
};

// a, b >= 0. A division of 64 bits costs a GPU five of 32 bits.
RF_HD Quotient divide(int64_t a, int64_t b) {
  if (((a | b) >> 32) == 0) {
    const uint32_t q = static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
    return {q, a - q * b};
  }
  return {a / b, a % b};
}

RF_HD int64_t elements(const Image& image) { return image.n * image.c * image.h * image.w; }

// Elements that lie side by side and may share a vector: the channels of a pixel, or a plane.
RF_HD int64_t run_length(const Image& image) {
  return image.channels_last ? image.c : image.h * image.w;
}

// Vectors of `full` elements where no vector crosses the end of a run and every operand is aligned
// to them, else single elements.
RF_HD int vector_width(int64_t run, int full, bool aligned) {
  return aligned && run % full == 0 ? full : 1;
}

// An image as groups of positions. channels_last: a group is a slice of the channels, a position is
// a pixel of any image, and `lanes` vectors of `width` channels lie side by side. Contiguous: a
// group is one plane, a position is a vector of it, and there is one lane. Every group is cut into
// `tiles` tiles of `span` positions, the last one shorter; a block owns a tile.
struct Sweep {
  int64_t channels;
  int64_t groups;
  int64_t positions;
  int64_t group_step;
  int64_t position_step;
  int64_t tiles;
  int64_t span;
  int width;
  int lanes;
  int rows;
  bool channels_last;
};

RF_HD int64_t blocks_of(const Sweep& sweep) { return sweep.groups * sweep.tiles; }

// `positions` per group; `most` bounds the number of blocks, unless there are more groups.
RF_HD Sweep sweep_over(const Image& image, int width, int64_t positions, int64_t most) {
  Sweep sweep = {};
  sweep.channels = image.c;
  sweep.width = width;
  sweep.positions = positions;
  sweep.channels_last = image.channels_last;
  if (image.channels_last) {
    const int64_t vectors = divide_up(image.c, width);
    sweep.groups = divide_up(vectors, kMaxLanes);
    sweep.lanes = static_cast<int>(sweep.groups > 0 ? divide_up(vectors, sweep.groups) : 1);
    sweep.group_step = static_cast<int64_t>(sweep.lanes) * width;
    sweep.position_step = image.c;
  } else {
    sweep.groups = image.n * image.c;
    sweep.lanes = 1;
    sweep.group_step = image.h * image.w;
    sweep.position_step = width;
  }
  sweep.rows = kThreads / sweep.lanes;
  const int64_t least = static_cast<int64_t>(sweep.rows) * kUnroll;
  const int64_t share = sweep.groups > 0 && most > sweep.groups ? most / sweep.groups : 1;
  const int64_t tiles = smaller(divide_up(positions, least), share);
  sweep.span = tiles > 0 ? divide_up(divide_up(positions, tiles), least) * least : least;
  sweep.tiles = divide_up(positions, sweep.span);
  return sweep;
}

// A sweep over all vectors of an image.
RF_HD Sweep sweep_of(const Image& image, int width, int64_t most) {
  const int64_t plane = image.h * image.w;
  const int64_t positions = image.channels_last ? image.n * plane : plane / width;
  return sweep_over(image, width, positions, most);
}

struct Tile {
  int64_t group;
  int64_t index;
  int64_t begin;
  int64_t end;
};

RF_HD Tile tile_of(const Sweep& sweep, int64_t block) {
  const Quotient at = divide(block, sweep.tiles);
  const int64_t begin = at.remainder * sweep.span;
  return {at.quotient, at.remainder, begin, smaller(begin + sweep.span, sweep.positions)};
}

// The channels of a group, which are those of the parameters that a block keeps at hand.
struct Slice {
  int64_t first;
  int64_t count;
};

RF_HD Slice slice_of(const Sweep& sweep, int64_t group) {
  if (!sweep.channels_last) return {divide(group, sweep.channels).remainder, 1};
  const int64_t first = group * sweep.group_step;
  return {first, smaller(sweep.group_step, sweep.channels - first)};
}

// What a thread owns: the positions begin + row, begin + row + rows, ... of its tile, of each the
// vector that begins `offset` elements into the image plus position * position_step. `local` is the
// place of its first channel in the slice. Threads that are left over are not active.
struct Lane {
  int lane;
  int row;
  int local;
  int64_t offset;
  bool active;
};

RF_HD Lane lane_of(const Sweep& sweep, int64_t group, int thread) {
  const int lane = thread % sweep.lanes, row = thread / sweep.lanes;
  const int local = sweep.channels_last ? lane * sweep.width : 0;
  const bool active = row < sweep.rows && local < slice_of(sweep, group).count;
  return {lane, row, local, group * sweep.group_step + lane * sweep.width, active};
}

// Where element k of a thread's vector finds its parameters, from `local` on.
RF_HD int parameter_of(const Sweep& sweep, int k) { return sweep.channels_last ? k : 0; }

// Reductions leave one partial result per channel and slot.
RF_HD int64_t slots_of(const Sweep& sweep) {
  if (sweep.channels == 0) return 0;
  return sweep.channels_last ? sweep.tiles : sweep.groups / sweep.channels * sweep.tiles;
}

RF_HD int64_t slot_of(const Sweep& sweep, const Tile& tile) {
  if (sweep.channels_last) return tile.index;
  return divide(tile.group, sweep.channels).quotient * sweep.tiles + tile.index;
}

// Elements of one channel behind a slot.
RF_HD int64_t slot_elements(const Sweep& sweep, int64_t slot) {
  const int64_t begin = divide(slot, sweep.tiles).remainder * sweep.span;
  return smaller(sweep.span, sweep.positions - begin) * (sweep.channels_last ? 1 : sweep.width);
}

// The rows of a block are joined as a tree: at each step row r < half takes in row r + half.
RF_HD int first_half(int rows) {
  int half = 1;
  while (2 * half < rows) half *= 2;
  return half;
}

// 2x2 windows: a position is a window, also one that reaches over the last row or column of an odd
// size. contiguous needs width 1.
RF_HD Sweep windows_of(const Image& image, int width, int64_t most) {
  const int64_t windows = divide_up(image.h, 2) * divide_up(image.w, 2);
  return sweep_over(image, width, image.channels_last ? image.n * windows : windows, most);
}

// Offsets of a window's upper left element and of its pooled element from those of the group's
// first; whether it has a right column and a lower row. Only complete windows are pooled.
struct Window {
  int64_t upper;
  int64_t pooled;
  bool right;
  bool lower;
};

RF_HD Window window_of(const Image& image, int64_t position) {
  const int64_t pixel = image.channels_last ? image.c : 1;
  const Quotient column = divide(position, divide_up(image.w, 2));
  const Quotient row = divide(column.quotient, divide_up(image.h, 2));
  const int64_t y = 2 * row.remainder, x = 2 * column.remainder;
  const int64_t pooled_row = row.quotient * (image.h / 2) + row.remainder;
  return {
      ((row.quotient * image.h + y) * image.w + x) * pixel,
      (pooled_row * (image.w / 2) + column.remainder) * pixel, x + 1 < image.w, y + 1 < image.h};
}

// Where a group's pooled elements begin.
RF_HD int64_t pooled_offset(const Image& image, const Sweep& sweep, int64_t group, int lane) {
  const int64_t plane = (image.h / 2) * (image.w / 2);
  return group * (sweep.channels_last ? sweep.group_step : plane) + lane * sweep.width;
}

struct Pixel {
  int64_t n, y, x;
};

// The pixel of a sweep's position with width 1 in contiguous.
RF_HD Pixel pixel_of(const Image& image, const Sweep& sweep, int64_t group, int64_t position) {
  const Quotient column = divide(position, image.w);
  if (!sweep.channels_last) {
    return {divide(group, sweep.channels).quotient, column.quotient, column.remainder};
  }
  const Quotient row = divide(column.quotient, image.h);
  return {row.quotient, row.remainder, column.remainder};
}

RF_HD int64_t offset_of(const Image& image, int64_t n, int64_t c, int64_t y, int64_t x) {
  if (image.channels_last) return ((n * image.h + y) * image.w + x) * image.c + c;
  return ((n * image.c + c) * image.h + y) * image.w + x;
}

}  // namespace rf::cuda
