// One register of floats, where a loop under `#pragma omp simd` is not enough: kVector of them, with + - * / and > by
// element. Reads and writes are of any alignment.
#pragma once

#include "op.h"

#define FASTGAN_INLINE inline __attribute__((always_inline))

namespace fastgan {

typedef float Vec __attribute__((vector_size(kVector * 4)));

FASTGAN_INLINE Vec read(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

FASTGAN_INLINE void write(float* p, Vec v) { std::memcpy(p, &v, sizeof v); }

FASTGAN_INLINE Vec all(float x) { return x - Vec{}; }

}  // namespace fastgan
