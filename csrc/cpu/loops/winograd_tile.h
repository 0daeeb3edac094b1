// Registers with fused multiply-add, and the transforms of F(2x2, 3x3) on registers of channels.
#pragma once

#include "common.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define RF_WINOGRAD

#include <immintrin.h>

#define RF_INLINE static inline __attribute__((always_inline))

namespace rf::cpu {
namespace {

#ifdef __AVX512F__
using Register = __m512;
constexpr int64_t kWidth = 16;
constexpr int kRows = 12;  // 24 of the 32 registers hold sums

RF_INLINE Register fused(float a, Register b, Register sum) {
  return _mm512_fmadd_ps(_mm512_set1_ps(a), b, sum);
}

// The elements of a and b in turn.
RF_INLINE void interleave(Register a, Register b, Register& low, Register& high) {
  const __m512i first =
      _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  low = _mm512_permutex2var_ps(a, first, b);
  high = _mm512_permutex2var_ps(a, second, b);
}
#else
using Register = __m256;
constexpr int64_t kWidth = 8;
constexpr int kRows = 4;  // 8 of the 16 registers hold sums

RF_INLINE Register fused(float a, Register b, Register sum) {
  return _mm256_fmadd_ps(_mm256_set1_ps(a), b, sum);
}

RF_INLINE void interleave(Register a, Register b, Register& low, Register& high) {
  const Register even = _mm256_unpacklo_ps(a, b), odd = _mm256_unpackhi_ps(a, b);
  low = _mm256_permute2f128_ps(even, odd, 0x20);
  high = _mm256_permute2f128_ps(even, odd, 0x31);
}
#endif

// A register anywhere in memory.
RF_INLINE Register load(const float* p) {
  Register value;
  __builtin_memcpy(&value, p, sizeof(value));
  return value;
}

RF_INLINE void store(float* p, Register value) { __builtin_memcpy(p, &value, sizeof(value)); }

RF_INLINE void filter_row(Register a, Register b, Register c, Register out[4]) {
  const Register half = Register{} + 0.5f, outer = a + c;
  out[0] = a;
  out[1] = half * (outer + b);
  out[2] = half * (outer - b);
  out[3] = c;
}

// G g G^T.
RF_INLINE void transform_filter(const Register g[9], Register u[16]) {
  Register rows[3][4];
  for (int r = 0; r < 3; ++r) filter_row(g[3 * r], g[3 * r + 1], g[3 * r + 2], rows[r]);
  for (int s = 0; s < 4; ++s) {
    Register column[4];
    filter_row(rows[0][s], rows[1][s], rows[2][s], column);
    for (int r = 0; r < 4; ++r) u[4 * r + s] = column[r];
  }
}

RF_INLINE void restore_row(const Register* u, int step, Register* out, int out_step) {
  out[0] = u[0];
  out[out_step] = u[step] - u[2 * step];
  out[2 * out_step] = u[3 * step];
}

// g from G g G^T, but for its rounding.
RF_INLINE void restore_filter(const Register u[16], Register g[9]) {
  Register rows[12];
  for (int s = 0; s < 4; ++s) restore_row(u + s, 4, rows + s, 4);
  for (int r = 0; r < 3; ++r) restore_row(rows + 4 * r, 1, g + 3 * r, 1);
}

RF_INLINE void data_row(
    const Register& a, const Register& b, const Register& c, const Register& d, Register* out,
    int step) {
  out[0] = a - c;
  out[step] = b + c;
  out[2 * step] = c - b;
  out[3 * step] = b - d;
}

// B^T d B.
RF_INLINE void transform_data(const Register d[16], Register v[16]) {
  Register columns[16];
  for (int s = 0; s < 4; ++s) data_row(d[s], d[4 + s], d[8 + s], d[12 + s], columns + s, 4);
  for (int r = 0; r < 4; ++r) {
    const Register* row = columns + 4 * r;
    data_row(row[0], row[1], row[2], row[3], v + 4 * r, 1);
  }
}

// A^T m A.
RF_INLINE void transform_output(const Register m[16], Register y[4]) {
  Register rows[8];
  for (int s = 0; s < 4; ++s) {
    rows[s] = m[s] + m[4 + s] + m[8 + s];
    rows[4 + s] = m[4 + s] - m[8 + s] - m[12 + s];
  }
  for (int r = 0; r < 2; ++r) {
    const Register* row = rows + 4 * r;
    y[2 * r] = row[0] + row[1] + row[2];
    y[2 * r + 1] = row[1] - row[2] - row[3];
  }
}

}  // namespace
}  // namespace rf::cpu

#endif
