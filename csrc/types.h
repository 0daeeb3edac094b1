// Storage types of tensors, and their conversion to and from the type that the loops compute in.
// On the CPU branch-free integer arithmetic, so that the compiler vectorises the conversions on
// every target; on a GPU its own instructions, which round alike.
#pragma once

#include <stdint.h>

#include "bn_math.h"

// A conversion left as a call would keep its loop scalar.
#ifdef __CUDACC__
#define RF_ALWAYS_INLINE __host__ __device__ static __forceinline__
#else
#define RF_ALWAYS_INLINE static inline __attribute__((always_inline))
#endif

namespace rf {

enum DType : int { kFloat32, kFloat64, kBFloat16, kFloat16, kDTypes };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

RF_ALWAYS_INLINE uint32_t bits_of(float v) {
  uint32_t bits;
  __builtin_memcpy(&bits, &v, sizeof(bits));
  return bits;
}

RF_ALWAYS_INLINE float float_of(uint32_t bits) {
  float v;
  __builtin_memcpy(&v, &bits, sizeof(v));
  return v;
}

RF_ALWAYS_INLINE float get(float v) { return v; }

RF_ALWAYS_INLINE double get(double v) { return v; }

RF_ALWAYS_INLINE float get(BFloat16 v) { return float_of(static_cast<uint32_t>(v.bits) << 16); }

#ifdef __CUDA_ARCH__

RF_ALWAYS_INLINE float get(Float16 v) {
  float wide;
  asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(v.bits));
  return wide;
}

#else

RF_ALWAYS_INLINE float get(Float16 v) {
  const uint32_t magnitude = v.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t normal = (magnitude << 13) + (112u << 23);
  const uint32_t special = (magnitude << 13) | 0x7f800000u;
  const uint32_t subnormal =
      bits_of(static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f);
  const uint32_t finite = magnitude < 0x0400u ? subnormal : normal;
  return float_of(sign | (magnitude >= 0x7c00u ? special : finite));
}

#endif

RF_ALWAYS_INLINE void put(float* p, float v) { *p = v; }

RF_ALWAYS_INLINE void put(double* p, double v) { *p = v; }

#ifdef __CUDA_ARCH__

RF_ALWAYS_INLINE void put(BFloat16* p, float v) {
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
}

RF_ALWAYS_INLINE void put(Float16* p, float v) {
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(p->bits) : "f"(v));
}

#else

RF_ALWAYS_INLINE void put(BFloat16* p, float v) {
  const uint32_t bits = bits_of(v);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  p->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

RF_ALWAYS_INLINE void put(Float16* p, float v) {
  const uint32_t bits = bits_of(v);
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t rebased = magnitude - (112u << 23);
  const uint32_t rounded = (rebased + 0x0fffu + ((rebased >> 13) & 1u)) >> 13;
  const uint32_t normal = rounded > 0x7c00u ? 0x7c00u : rounded;
  // Adding 0.5 leaves the multiple of 2^-24 in the low bits, rounded to nearest even by the
  // hardware.
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  p->bits = static_cast<uint16_t>(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite));
}

#endif

template <class T>
struct Storage {
  using Acc = float;
};

template <>
struct Storage<double> {
  using Acc = double;
};

template <class T>
using Acc = typename Storage<T>::Acc;

// The largest value that rounds to zero when stored: half the smallest subnormal, ties to even.
RF_HD float rounds_to_zero(float) { return 0.0f; }

RF_HD double rounds_to_zero(double) { return 0.0; }

RF_HD float rounds_to_zero(BFloat16) { return 0x1p-134f; }

RF_HD float rounds_to_zero(Float16) { return 0x1p-25f; }

}  // namespace rf
