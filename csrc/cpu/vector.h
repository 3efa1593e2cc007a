// A register of kVector floats with elementwise + - * / and >, for code that `#pragma omp simd` does not vectorize
// well. Reads and writes need no alignment.
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

FASTGAN_INLINE Vec broadcast(float x) { return x - Vec{}; }

}  // namespace fastgan
