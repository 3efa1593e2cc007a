// A register of kVector floats with elementwise + - * / and >, for code that `#pragma omp simd` does not vectorize
// well. Reads and writes need no alignment.
#pragma once

#include "op.h"

#if defined(FASTGAN_BF16)
#include <immintrin.h>
#endif

#define FASTGAN_INLINE inline __attribute__((always_inline))

namespace fastgan {

typedef float Vec __attribute__((vector_size(kVector * 4)));

// Accumulators of a product, rows by vectors: as many as fit in registers.
#if defined(FASTGAN_AVX512)
inline constexpr int64_t kTileRows = 6;
inline constexpr int64_t kTileVectors = 4;
#else
inline constexpr int64_t kTileRows = 4;
inline constexpr int64_t kTileVectors = 2;
#endif

FASTGAN_INLINE Vec read(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTGAN_INLINE void write(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

#if defined(FASTGAN_BF16)

// Also for the bits of two bfloat16, with which no arithmetic of floats may be done.
FASTGAN_INLINE Vec broadcast(float x) { return (Vec)_mm512_set1_ps(x); }

FASTGAN_INLINE Vec read(const BFloat16* p) {
  __m256i bits;
  std::memcpy(&bits, p, sizeof bits);
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
}

// Rounded to bfloat16.
FASTGAN_INLINE __m256i nearest(Vec v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }

FASTGAN_INLINE void write(BFloat16* p, Vec v) {
  const __m256i bits = nearest(v);
  std::memcpy(p, &bits, sizeof bits);
}

#else

FASTGAN_INLINE Vec broadcast(float x) { return x - Vec{}; }

#endif

}  // namespace fastgan
