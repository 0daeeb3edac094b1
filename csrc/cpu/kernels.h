// The seam between the operators (checks, per-channel vectors) and the loops over memory. The loops
// are compiled once per instruction set; each compilation fills one table of function pointers.
//
// Whatever the loops include must have internal linkage: an inline function shared with other
// translation units could be kept in its AVX-512 version and then run on a CPU without it.
#pragma once

#include <stdint.h>

#include "../types.h"

namespace rf::cpu {

struct Image {
  int64_t n, c, h, w;
  bool channels_last;
  // Length of a per-channel vector: c, or for channels_last c times a power of two, the values
  // repeated, so that a few channels still fill the vector registers.
  int64_t width;
};

static inline int64_t plane(const Image& image) { return image.h * image.w; }

static inline int64_t elements(const Image& image) { return image.n * image.c * plane(image); }

// Reductions add up fixed tiles, whatever the number of threads: `positions` pixels of all channels
// (channels_last) or of one plane (contiguous), the last tile of the run being shorter.
struct Tiles {
  int64_t positions;
  int64_t per_run;
  int64_t count;
};

static inline int64_t tile_run(const Image& image) {
  return image.channels_last ? image.n * plane(image) : plane(image);
}

static inline int64_t tile_positions(const Image& image, const Tiles& tiles, int64_t tile) {
  const int64_t rest = tile_run(image) - tile % tiles.per_run * tiles.positions;
  return rest < tiles.positions ? rest : tiles.positions;
}

// Per-channel vectors in the accumulation type; null where unused.
struct Affine {
  const void* mean;
  const void* scale;
  const void* bias;
};

struct GradAffine {
  const void* mean;
  const void* scale;
  const void* mean_grad;
  const void* slope;
};

enum class Residual { kNone, kPlain, kNormalized };

// partials: double[tiles][2][c], the mean and the sum of squared distances of each tile.
struct StatsArgs {
  Image image;
  Tiles tiles;
  const void* input;
  double* partials;
};

struct ForwardArgs {
  Image image;
  Residual kind;
  bool relu;
  const void* input;
  const void* residual;
  void* output;
  void* pooled;
  Affine affine;
  Affine residual_affine;
};

struct MaskArgs {
  Mask mask;
  const void* grad_output;
  const void* output;
  const void* input;
  Affine affine;
};

// partials: double[tiles][3][c], sums of g, g * (input - mean) and g * (residual - residual mean).
struct GradSumsArgs {
  Image image;
  Tiles tiles;
  MaskArgs masked;
  const void* residual;
  const void* residual_mean;
  double* partials;
};

// A null output is not wanted; a null `slope` means fixed statistics; a null
// `residual_affine.scale` means that the residual's gradient is g itself.
struct GradArgs {
  Image image;
  MaskArgs masked;
  const void* residual;
  GradAffine affine;
  GradAffine residual_affine;
  void* grad_input;
  void* grad_residual;
};

struct PoolGradArgs {
  Image image;
  const void* grad_output;
  const void* grad_pooled;
  const void* output;
  void* grad;
};

struct Axis {
  int64_t in;
  int64_t out;
};

// Output i of an axis is (1 - weight[i]) * in[first[i]] + weight[i] * in[second[i]].
struct Taps {
  const int32_t* first;
  const int32_t* second;
  const void* weight;
};

// image: the input's n and c with the output's h and w.
struct ResizeArgs {
  Image image;
  Axis rows;
  Axis columns;
  int64_t skip_channels;
  bool nearest;
  Taps row_taps;
  Taps column_taps;
  const void* input;
  const void* skip;
  void* output;
};

// Input i of an axis receives the sum over k < terms of weight[k * in + i] * grad[source[k * in +
// i]]. Where it has fewer terms the rest name the output after the last one, with weight 0.
struct Gather {
  int64_t terms;
  const int32_t* source;
  const void* weight;
};

struct ResizeGradArgs {
  Image image;
  Axis rows;
  Axis columns;
  int64_t skip_channels;
  Gather row_gather;
  Gather column_gather;
  const void* grad_output;
  void* grad_input;
  void* grad_skip;
};

struct CastArgs {
  int64_t elements;
  const void* input;
  void* output;
};

// All float32; weight: [k][3][3][c], c and k multiples of 16. `packed` has 16 * c * k elements, laid
// out for the convolution, or `rotated` for its gradient with respect to the input. special[k / 16]:
// whether 16 output channels have a weight that is not finite.
struct WinogradPackArgs {
  int64_t k, c;
  bool rotated;
  const float* weight;
  float* packed;
  char* special;
};

// channels_last; bias and residual may be null.
struct WinogradArgs {
  int64_t n, c, h, w, k;
  bool relu;
  const float* input;
  const float* packed;
  const float* bias;
  const float* residual;
  float* output;
};

// The last two are null in a compilation without fused multiply-add.
struct Kernels {
  const char* name;
  void (*stats[kDTypes])(const StatsArgs&);
  void (*forward[kDTypes])(const ForwardArgs&);
  void (*grad_sums[kDTypes])(const GradSumsArgs&);
  void (*grad[kDTypes])(const GradArgs&);
  void (*pool_grad[kDTypes])(const PoolGradArgs&);
  void (*resize[kDTypes])(const ResizeArgs&);
  void (*resize_grad[kDTypes])(const ResizeGradArgs&);
  void (*cast[kDTypes][kDTypes])(const CastArgs&);
  void (*winograd_pack)(const WinogradPackArgs&);
  void (*winograd)(const WinogradArgs&);
};

// The table for this CPU; raises when RESUNET_FAST_ISA names what cannot run.
const Kernels& kernels();

const Kernels& kernels_default();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();

// Calls body on disjoint ranges that cover [0, items), each with `scratch_bytes` bytes of its own.
using ParallelBody = void (*)(int64_t begin, int64_t end, char* scratch, const void* context);
void run_parallel(
    int64_t items, int64_t elements_per_item, int64_t scratch_bytes, ParallelBody body,
    const void* context);

}  // namespace rf::cpu
