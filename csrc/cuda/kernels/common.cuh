// What the kernels share: vectors of memory, per-channel parameters, the joining of rows, launches.
#pragma once

#include "../kernels.h"
#include "launch.cuh"

namespace rf::cuda {
namespace {

template <class T>
constexpr int kVector = static_cast<int>(sizeof(T) < 8 ? 16 / sizeof(T) : 1);

template <class T, int kWidth>
struct alignas(kWidth * sizeof(T)) Pack {
  T values[kWidth];
};

// Sixteen bytes travel as four words: the compiler keeps one access of 128 bits.
struct alignas(16) Words {
  uint32_t words[4];
};

template <class T, int kWidth>
__device__ __forceinline__ Pack<T, kWidth> load(const T* from) {
  using Whole = Pack<T, kWidth>;
  if constexpr (sizeof(Whole) == sizeof(Words)) {
    const Words words = *reinterpret_cast<const Words*>(from);
    Whole pack;
    __builtin_memcpy(&pack, &words, sizeof(pack));
    return pack;
  } else {
    return *reinterpret_cast<const Whole*>(from);
  }
}

template <class T, int kWidth>
__device__ __forceinline__ void store(T* to, const Pack<T, kWidth>& pack) {
  if constexpr (sizeof(pack) == sizeof(Words)) {
    Words words;
    __builtin_memcpy(&words, &pack, sizeof(words));
    *reinterpret_cast<Words*>(to) = words;
  } else {
    *reinterpret_cast<Pack<T, kWidth>*>(to) = pack;
  }
}

__device__ __forceinline__ double read(const Vector& vector, int64_t i) {
  switch (vector.dtype) {
    case kFloat64: return static_cast<const double*>(vector.data)[i];
    case kBFloat16: return get(static_cast<const BFloat16*>(vector.data)[i]);
    case kFloat16: return get(static_cast<const Float16*>(vector.data)[i]);
    default: return static_cast<const float*>(vector.data)[i];
  }
}

__device__ __forceinline__ double read(const Vector& vector, int64_t i, double otherwise) {
  return vector.data == nullptr ? otherwise : read(vector, i);
}

__device__ __forceinline__ void write(const Vector& vector, int64_t i, double value) {
  switch (vector.dtype) {
    case kFloat64: return put(static_cast<double*>(vector.data) + i, value);
    case kBFloat16: return put(static_cast<BFloat16*>(vector.data) + i, static_cast<float>(value));
    case kFloat16: return put(static_cast<Float16*>(vector.data) + i, static_cast<float>(value));
    default: return put(static_cast<float*>(vector.data) + i, static_cast<float>(value));
  }
}

// weight / sqrt(var + eps), in double as on the CPU.
__device__ __forceinline__ double scale_of(const Norm& norm, int64_t channel) {
  return read(norm.weight, channel, 1.0) * reciprocal_deviation(read(norm.var, channel), norm.eps);
}

// One parameter of the channels of a thread's vector, from the block's copy.
template <class A, int kWidth>
struct Parameter {
  A values[kWidth];

  __device__ __forceinline__ Parameter(const A* shared, const Sweep& sweep, const Lane& lane) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) values[k] = shared[lane.local + parameter_of(sweep, k)];
  }

  __device__ __forceinline__ A operator[](int k) const { return values[k]; }
};

// fill(i, channel) for every channel of the block's slice.
template <class Fill>
__device__ __forceinline__ void fill_parameters(const Sweep& sweep, int64_t group, Fill fill) {
  const Slice slice = slice_of(sweep, group);
  for (int64_t i = threadIdx.x; i < slice.count; i += kThreads) fill(i, slice.first + i);
  __syncthreads();
}

// Joins the values of all rows of a block, in an order that depends on nothing but the sweep. Row 0
// is left with the result: one value per channel, `mine[0]` alone in a plane.
template <class S, int kWidth, class Join>
__device__ __forceinline__ void join_rows(
    const Sweep& sweep, const Lane& lane, S (&mine)[kWidth], S* shared, Join join) {
  if (!sweep.channels_last) {
#pragma unroll
    for (int k = 1; k < kWidth; ++k) mine[0] = join(mine[0], mine[k]);
  }
  const int row = sweep.lanes * kWidth;
  S* own = shared + lane.row * row + lane.lane * kWidth;
  if (lane.active) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) own[k] = mine[k];
  }
  for (int half = first_half(sweep.rows); half >= 1; half /= 2) {
    __syncthreads();
    if (!lane.active || lane.row >= half || lane.row + half >= sweep.rows) continue;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) own[k] = join(own[k], own[k + half * row]);
  }
  if (lane.active && lane.row == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) mine[k] = own[k];
  }
}

// The second stage of reductions: a block owns kFinishChannels channels, and each of its
// kFinishRows rows of threads every kFinishRows-th slot.
constexpr int kFinishChannels = 16;
constexpr int kFinishRows = kThreads / kFinishChannels;

// Adds what the rows of threads have summed; all threads of row 0 get the result.
template <int kSums>
__device__ __forceinline__ void add_finish_rows(double (&sums)[kSums]) {
  __shared__ double shared[kSums][kFinishRows][kFinishChannels];
  const int column = threadIdx.x % kFinishChannels, row = threadIdx.x / kFinishChannels;
#pragma unroll
  for (int s = 0; s < kSums; ++s) shared[s][row][column] = sums[s];
  __syncthreads();
  if (row > 0) return;
#pragma unroll
  for (int s = 0; s < kSums; ++s) {
    for (int other = 1; other < kFinishRows; ++other) sums[s] += shared[s][other][column];
  }
}

// f(null pointer of the storage type, width as a type) for the vectors of a sweep.
template <int kWidth>
struct Width {
  static constexpr int value = kWidth;
};

template <class T, class F>
void with_width(int width, const F& f) {
  if constexpr (kVector<T> > 1) {
    if (width == kVector<T>) return f(static_cast<T*>(nullptr), Width<kVector<T>>{});
  }
  f(static_cast<T*>(nullptr), Width<1>{});
}

template <class F>
void with_vectors(DType dtype, int width, const F& f) {
  switch (dtype) {
    case kFloat64: return with_width<double>(width, f);
    case kBFloat16: return with_width<BFloat16>(width, f);
    case kFloat16: return with_width<Float16>(width, f);
    default: return with_width<float>(width, f);
  }
}

}  // namespace
}  // namespace rf::cuda
