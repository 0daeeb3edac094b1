// The index arithmetic of the kernels for ctypes.
#include "../../csrc/cuda/tiling.h"
#include "../../csrc/resize_math.h"

using namespace rf;
using namespace rf::cuda;

extern "C" {

// How often each element of the image is owned by a thread of a sweep, and its channel's slot.
// Returns the number of slots, or -1 where a position lies outside its tile.
int64_t visit_elements(
    int64_t n, int64_t c, int64_t h, int64_t w, bool last, int width, int64_t blocks,
    int64_t* visits, int64_t* channels, int64_t* slots, int64_t* slot_sizes) {
  const Image image = {n, c, h, w, last};
  const Sweep sweep = sweep_of(image, width, blocks);
  for (int64_t block = 0; block < blocks_of(sweep); ++block) {
    const Tile tile = tile_of(sweep, block);
    const Slice slice = slice_of(sweep, tile.group);
    for (int thread = 0; thread < kThreads; ++thread) {
      const Lane lane = lane_of(sweep, tile.group, thread);
      if (!lane.active) continue;
      for (int64_t p = tile.begin + lane.row; p < tile.end; p += sweep.rows) {
        if (p >= sweep.positions) return -1;
        for (int k = 0; k < width; ++k) {
          const int64_t at = lane.offset + p * sweep.position_step + k;
          visits[at] += 1;
          channels[at] = slice.first + lane.local + parameter_of(sweep, k);
          slots[at] = slot_of(sweep, tile);
        }
      }
    }
  }
  const int64_t count = slots_of(sweep);
  for (int64_t slot = 0; slot < count; ++slot) slot_sizes[slot] = slot_elements(sweep, slot);
  return count;
}

int64_t block_count(
    int64_t n, int64_t c, int64_t h, int64_t w, bool last, int width, int64_t most) {
  return blocks_of(sweep_of({n, c, h, w, last}, width, most));
}

int width_for(int64_t run, int full, bool aligned) { return vector_width(run, full, aligned); }

// Window `position` of a sweep over windows: offsets of its upper left and pooled elements.
void window_at(
    int64_t n, int64_t c, int64_t h, int64_t w, bool last, int64_t position, int64_t* offsets,
    bool* complete) {
  const Window window = window_of({n, c, h, w, last}, position);
  offsets[0] = window.upper;
  offsets[1] = window.pooled;
  complete[0] = window.right;
  complete[1] = window.lower;
}

// The order in which the rows of a block are joined, as pairs; their number is returned.
int joins(int rows, int* pairs) {
  int count = 0;
  for (int half = first_half(rows); half >= 1; half /= 2) {
    for (int row = 0; row < half && row + half < rows; ++row) {
      pairs[2 * count] = row;
      pairs[2 * count + 1] = row + half;
      ++count;
    }
  }
  return count;
}

void readers_of(int64_t index, int64_t in, int64_t out, int mode, int64_t* range) {
  const Range found = readers<float>(index, in, out, static_cast<ResizeMode>(mode));
  range[0] = found.begin;
  range[1] = found.end;
}

float share(int64_t output, int64_t index, int64_t in, int64_t out, int mode) {
  return share_of(resize_tap<float>(output, in, out, static_cast<ResizeMode>(mode)), index);
}

void divide_64(int64_t a, int64_t b, int64_t* result) {
  const Quotient found = divide(a, b);
  result[0] = found.quotient;
  result[1] = found.remainder;
}

}  // extern "C"
