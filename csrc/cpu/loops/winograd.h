// 3x3 convolution with stride 1 and padding 1 by Winograd's minimal filtering F(2x2, 3x3) (Lavin
// and Gray, arXiv:1509.09308): Y = A^T [(G g G^T) * (B^T d B)] A for each 2x2 tile of the output.
// The sum over input channels makes the product 16 matrix products, one per element of the tile.
//
// Every output is one chain of fused multiply-adds over the input channels in ascending order: the
// same bits however tiles and channels are spread, and with every instruction set.
#pragma once

#include "winograd_tile.h"

#ifdef RF_WINOGRAD

namespace rf::cpu {
namespace {

// Channels per block of the packed weight: [K / 16][4 * 4][C][16].
constexpr int64_t kBlock = 16;
// Output channels that one product computes, in two registers.
constexpr int64_t kGroup = 2 * kWidth;
constexpr int64_t kPoints = 16;
// Rows of a product are a multiple of this.
constexpr int64_t kRowUnit = 4;

// One tile: where its 4x4 inputs lie (zeros outside of the image) and its 2x2 outputs.
struct Patch {
  const float* input[16];
  int64_t output[4];  // pixel, or -1 outside of the image
};

inline void locate(const WinogradArgs& args, int64_t tile, const float* zeros, Patch& patch) {
  const int64_t columns = divide_up(args.w, 2), rows = divide_up(args.h, 2);
  const int64_t top = tile / columns % rows * 2, left = tile % columns * 2;
  const int64_t image = tile / (columns * rows) * args.h * args.w;
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t y = top + i / 4 - 1, x = left + i % 4 - 1;
    const bool inside = y >= 0 && y < args.h && x >= 0 && x < args.w;
    patch.input[i] = inside ? args.input + (image + y * args.w + x) * args.c : zeros;
  }
  for (int64_t i = 0; i < 4; ++i) {
    const int64_t y = top + i / 2, x = left + i % 2;
    patch.output[i] = y < args.h && x < args.w ? image + y * args.w + x : -1;
  }
}

// What one thread keeps: V [16][C / 16][tiles][16], M [16][tiles][kGroup], each of the 16 one cache
// line longer so that they do not compete for the same lines.
struct Scratch {
  int64_t tiles;
  int64_t data_pitch;
  int64_t product_pitch;
  float* data;
  float* product;
  float* zeros;
  char* special;

  Scratch(int64_t c, int64_t most_tiles, char* memory) : tiles(most_tiles) {
    data_pitch = tiles * c + kBlock;
    product_pitch = tiles * kGroup + kBlock;
    data = reinterpret_cast<float*>(memory);
    product = data + kPoints * data_pitch;
    zeros = product + kPoints * product_pitch;
    special = reinterpret_cast<char*>(zeros + c);
  }

  static int64_t bytes(int64_t c, int64_t tiles) {
    const int64_t floats = kPoints * (tiles * (c + kGroup) + 2 * kBlock) + c;
    return floats * static_cast<int64_t>(sizeof(float)) + tiles;
  }
};

// Transforms one tile of the input; true if something in it is not finite.
RF_LOOP bool transform_tile(const Patch& patch, int64_t c, const Scratch& scratch, float* out) {
  Register poison = {};
  for (int64_t first = 0; first < c; first += kWidth) {
    Register d[16], v[16];
    for (int i = 0; i < 16; ++i) d[i] = load(patch.input[i] + first);
    // What the tile after the next one is the first to read: too many streams for the processor's
    // own prefetching.
    for (int i = 10; i < 16; i += i == 11 ? 3 : 1) {
      __builtin_prefetch(patch.input[i] + first + 4 * c);
    }
    transform_data(d, v);
    // Each input is in one of these four, and 0 * v is NaN if that is not finite.
    poison += (v[0] + v[3]) * 0.0f + (v[12] + v[15]) * 0.0f;
    float* at = out + first / kBlock * scratch.tiles * kBlock + first % kBlock;
    for (int i = 0; i < 16; ++i) store(at + i * scratch.data_pitch, v[i]);
  }
  bool special = false;
  for (int64_t i = 0; i < kWidth; ++i) special |= poison[i] != 0.0f;
  return special;
}

// M[rows][registers] = V[rows][c] * U[c][registers]; `next`: from one register of U to the other.
template <int kRowCount, int kRegisters>
RF_LOOP void multiply(
    const float* data, int64_t data_step, const float* filter, int64_t next, int64_t c,
    float* product) {
  Register sum[kRowCount][kRegisters] = {};
  for (int64_t block = 0; block < c; block += kBlock) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < kBlock; ++i) {
      Register u[kRegisters];
      for (int j = 0; j < kRegisters; ++j) u[j] = load(filter + j * next + i * kBlock);
      for (int row = 0; row < kRowCount; ++row) {
        const float v = data[row * kBlock + i];
        for (int j = 0; j < kRegisters; ++j) sum[row][j] = fused(v, u[j], sum[row][j]);
      }
    }
    data += data_step;
    filter += kBlock * kBlock;
  }
  for (int row = 0; row < kRowCount; ++row) {
    for (int j = 0; j < kRegisters; ++j) store(product + row * kGroup + j * kWidth, sum[row][j]);
  }
}

template <int kRegisters>
void multiply_rows(
    const Scratch& scratch, const float* data, const float* filter, int64_t next, int64_t c,
    int64_t tiles, float* product) {
  const int64_t step = scratch.tiles * kBlock;
  int64_t row = 0;
  const auto rows = [&](auto count) {
    constexpr int kCount = decltype(count)::value;
    for (; row + kCount <= divide_up(tiles, kRowUnit) * kRowUnit; row += kCount) {
      multiply<kCount, kRegisters>(
          data + row * kBlock, step, filter, next, c, product + row * kGroup);
    }
  };
  rows(Rows<kRows>{});
  if constexpr (kRows > 2 * kRowUnit) rows(Rows<2 * kRowUnit>{});
  if constexpr (kRows > kRowUnit) rows(Rows<kRowUnit>{});
}

// One register of a tile's outputs from the definition: what is not finite stays where it belongs.
RF_LOOP void convolve_tile(const Patch& patch, const float* filter, int64_t c, Register y[4]) {
  for (int i = 0; i < 4; ++i) y[i] = Register{};
  for (int64_t channel = 0; channel < c; ++channel) {
    Register u[16], g[9];
    for (int64_t i = 0; i < 16; ++i) u[i] = load(filter + (i * c + channel) * kBlock);
    restore_filter(u, g);
    for (int i = 0; i < 4; ++i) {
      for (int tap = 0; tap < 9; ++tap) {
        const int at = (i / 2 + tap / 3) * 4 + i % 2 + tap % 3;
        y[i] += g[tap] * patch.input[at][channel];
      }
    }
  }
}

// Bias, residual, ReLU and store of one register of a tile's outputs.
RF_INLINE void finish(
    const WinogradArgs& args, const Patch& patch, int64_t channel, const Register y[4]) {
  const Register bias = args.bias == nullptr ? Register{} : load(args.bias + channel);
  for (int i = 0; i < 4; ++i) {
    if (patch.output[i] < 0) continue;
    const int64_t at = patch.output[i] * args.k + channel;
    Register z = y[i];
    if (args.bias != nullptr) z += bias;
    if (args.residual != nullptr) z += load(args.residual + at);
    if (args.relu) z = z < 0.0f ? Register{} : z;
    store(args.output + at, z);
  }
}

// The tiles from `first` on, of the output channels from `channel` on.
template <int kRegisters>
RF_LOOP void convolve_block(
    const WinogradArgs& args, const Scratch& scratch, int64_t first, int64_t tiles,
    int64_t channel) {
  const int64_t block = kPoints * args.c * kBlock;
  const float* filter = args.packed + channel / kBlock * block;
  const int64_t next = kWidth == kBlock ? block : kWidth;
  for (int64_t i = 0; i < kPoints; ++i) {
    multiply_rows<kRegisters>(
        scratch, scratch.data + i * scratch.data_pitch, filter + i * args.c * kBlock, next, args.c,
        tiles, scratch.product + i * scratch.product_pitch);
  }
  for (int64_t tile = 0; tile < tiles; ++tile) {
    Patch patch;
    locate(args, first + tile, scratch.zeros, patch);
    for (int j = 0; j < kRegisters; ++j) {
      Register y[4];
      if (scratch.special[tile]) {
        convolve_tile(patch, filter + j * next, args.c, y);
      } else {
        const float* at = scratch.product + tile * kGroup + j * kWidth;
        Register m[16];
        for (int i = 0; i < 16; ++i) m[i] = load(at + i * scratch.product_pitch);
        transform_output(m, y);
      }
      finish(args, patch, channel + j * kWidth, y);
    }
  }
}

// Enough tiles to use each weight often; of few channels, V stays in the second-level cache.
constexpr int64_t kMostTiles = 48;

inline void winograd(const WinogradArgs& args) {
  const int64_t total = args.n * divide_up(args.h, 2) * divide_up(args.w, 2);
  const int64_t blocks = divide_up(total, kMostTiles);
  const int64_t tiles = divide_up(divide_up(total, blocks), kRowUnit) * kRowUnit;
  const int64_t groups = divide_up(args.k, kGroup);
  const int64_t work = tiles * args.c * kGroup;
  parallel(
      divide_up(total, tiles) * groups, work, Scratch::bytes(args.c, tiles),
      [&](int64_t begin, int64_t end, char* memory) {
        const Scratch scratch(args.c, tiles, memory);
        clear(scratch.zeros, args.c);
        for (int64_t item = begin; item < end; ++item) {
          const int64_t first = item / groups * tiles, channel = item % groups * kGroup;
          const int64_t count = smaller(tiles, total - first);
          // Threads that share a block each transform it.
          for (int64_t tile = 0; (item == begin || channel == 0) && tile < count; ++tile) {
            Patch patch;
            locate(args, first + tile, scratch.zeros, patch);
            scratch.special[tile] =
                transform_tile(patch, args.c, scratch, scratch.data + tile * kBlock);
          }
          if (args.k - channel < kGroup) {
            convolve_block<1>(args, scratch, first, count, channel);
          } else {
            convolve_block<2>(args, scratch, first, count, channel);
          }
        }
      });
}

// Rows of `kWidth` elements become columns; both lie in rows of kBlock elements.
RF_INLINE void transpose(const float* in, float* out) {
  Register rows[kWidth], next[kWidth];
  for (int64_t i = 0; i < kWidth; ++i) rows[i] = load(in + i * kBlock);
  for (int64_t stage = 1; stage < kWidth; stage *= 2) {
    for (int64_t i = 0; i < kWidth / 2; ++i) {
      interleave(rows[i], rows[i + kWidth / 2], next[2 * i], next[2 * i + 1]);
    }
    for (int64_t i = 0; i < kWidth; ++i) rows[i] = next[i];
  }
  for (int64_t i = 0; i < kWidth; ++i) store(out + i * kBlock, rows[i]);
}

// One register of G g G^T, lanes along the input channels; the sum of 0 * g goes to `poison`.
RF_INLINE void transformed_filter(
    const float* weight, int64_t c, Register u[16], Register& poison) {
  Register g[9];
  for (int tap = 0; tap < 9; ++tap) {
    g[tap] = load(weight + tap * c);
    poison += g[tap] * 0.0f;
  }
  transform_filter(g, u);
}

// 16 input channels of 16 output channels: for the convolution.
RF_LOOP void pack_block(
    const WinogradPackArgs& args, int64_t k, int64_t c, float* scratch, Register& poison) {
  for (int64_t row = 0; row < kBlock; ++row) {
    for (int64_t lane = 0; lane < kBlock; lane += kWidth) {
      Register u[16];
      transformed_filter(args.weight + (k + row) * 9 * args.c + c + lane, args.c, u, poison);
      for (int64_t i = 0; i < 16; ++i) {
        store(scratch + (i * kBlock + row) * kBlock + lane, u[i]);
      }
    }
  }
  float* out = args.packed + k * kPoints * args.c + c * kBlock;
  for (int64_t i = 0; i < kPoints; ++i) {
    for (int64_t row = 0; row < kBlock; row += kWidth) {
      for (int64_t lane = 0; lane < kBlock; lane += kWidth) {
        transpose(
            scratch + (i * kBlock + row) * kBlock + lane,
            out + (i * args.c + lane) * kBlock + row);
      }
    }
  }
}

// 16 input channels of 16 output channels, exchanged and rotated by 180 degrees: for the gradient
// of the input. The rotation exchanges the first and the last point of an axis.
RF_LOOP void pack_rotated_block(
    const WinogradPackArgs& args, int64_t k, int64_t c, Register& poison) {
  constexpr int kRotated[4] = {3, 1, 2, 0};
  for (int64_t row = 0; row < kBlock; ++row) {
    for (int64_t lane = 0; lane < kBlock; lane += kWidth) {
      Register u[16];
      transformed_filter(args.weight + (k + row) * 9 * args.c + c + lane, args.c, u, poison);
      float* out = args.packed + (c * kPoints * args.k) + (k + row) * kBlock + lane;
      for (int64_t i = 0; i < 16; ++i) {
        store(out + (kRotated[i / 4] * 4 + kRotated[i % 4]) * args.k * kBlock, u[i]);
      }
    }
  }
}

inline void winograd_pack(const WinogradPackArgs& args) {
  const int64_t rows = args.k / kBlock, columns = args.c / kBlock;
  parallel(
      rows, 16 * kBlock * args.c, kPoints * kBlock * kBlock * sizeof(float),
      [&](int64_t begin, int64_t end, char* scratch) {
        for (int64_t item = begin; item < end; ++item) {
          Register poison = {};
          const int64_t k = item * kBlock;
          for (int64_t i = 0; i < columns; ++i) {
            if (args.rotated) {
              pack_rotated_block(args, k, i * kBlock, poison);
            } else {
              pack_block(args, k, i * kBlock, reinterpret_cast<float*>(scratch), poison);
            }
          }
          bool special = false;
          for (int64_t i = 0; i < kWidth; ++i) special |= poison[i] != 0.0f;
          args.special[item] = special;
        }
      });
}

}  // namespace
}  // namespace rf::cpu

#endif
