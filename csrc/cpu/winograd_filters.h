// The transforms of minimal filtering for 3 taps, with and without a change of scale; winograd.cpp says what they are for.
#pragma once

#include "vector.h"

namespace fastgan {

// The transforms in one direction; T is float or Vec. A tile has kOutputs pixels of y, from the kTaps pixels of x that
// begin at kStride times its number minus the padding.
struct Same {
  static constexpr int64_t kTaps = 4, kPoints = 4, kOutputs = 2, kStride = 2;
  static constexpr bool kOnePoint = false;  // whether A takes every point for the same output
  template <class T>
  static FASTGAN_INLINE void input(const T (&d)[4], T (&t)[4]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[2] - d[1];
    t[3] = d[1] - d[3];
  }
  template <class T>
  static FASTGAN_INLINE void output(const T (&m)[4], T (&y)[2]) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] - m[3];
  }
  template <class T>
  static FASTGAN_INLINE void output_gradient(const T (&y)[2], T (&t)[4]) {
    t[0] = y[0];
    t[1] = y[0] + y[1];
    t[2] = y[0] - y[1];
    t[3] = -y[1];
  }
  template <class T>
  static FASTGAN_INLINE void kernel(const T (&g)[3], T (&t)[4]) {
    const T ends = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
    t[0] = g[0];
    t[1] = ends + middle;
    t[2] = ends - middle;
    t[3] = g[2];
  }
  template <class T>
  static FASTGAN_INLINE void kernel_gradient(const T (&t)[4], T (&g)[3]) {
    const T sum = 0.5f * (t[1] + t[2]);
    g[0] = t[0] + sum;
    g[1] = 0.5f * (t[1] - t[2]);
    g[2] = sum + t[3];
  }
};

// Before averaging: A, which is then (1, 2, 0, -1) / 2, is part of the kernel's transform.
struct Down {
  static constexpr int64_t kTaps = 4, kPoints = 3, kOutputs = 1, kStride = 2;
  static constexpr bool kOnePoint = true;
  template <class T>
  static FASTGAN_INLINE void input(const T (&d)[4], T (&t)[3]) {
    t[0] = d[0] - d[2];
    t[1] = d[1] + d[2];
    t[2] = d[1] - d[3];
  }
  template <class T>
  static FASTGAN_INLINE void kernel(const T (&g)[3], T (&t)[3]) {
    t[0] = 0.5f * g[0];
    t[1] = 0.5f * (g[0] + g[1] + g[2]);
    t[2] = -0.5f * g[2];
  }
  template <class T>
  static FASTGAN_INLINE void kernel_gradient(const T (&t)[3], T (&g)[3]) {
    g[1] = 0.5f * t[1];
    g[0] = 0.5f * t[0] + g[1];
    g[2] = g[1] - 0.5f * t[2];
  }
};

// After upsampling: of B' d, (a - b, 2 b, 0, b - c) for neighbors a, b, c, the factor is part of the kernel's transform.
struct Up {
  static constexpr int64_t kTaps = 3, kPoints = 3, kOutputs = 2, kStride = 1;
  static constexpr bool kOnePoint = false;
  template <class T>
  static FASTGAN_INLINE void input(const T (&d)[3], T (&t)[3]) {
    t[0] = d[0] - d[1];
    t[1] = d[1];
    t[2] = d[1] - d[2];
  }
  template <class T>
  static FASTGAN_INLINE void output(const T (&m)[3], T (&y)[2]) {
    y[0] = m[0] + m[1];
    y[1] = m[1] - m[2];
  }
  template <class T>
  static FASTGAN_INLINE void output_gradient(const T (&y)[2], T (&t)[3]) {
    t[0] = y[0];
    t[1] = y[0] + y[1];
    t[2] = -y[1];
  }
  template <class T>
  static FASTGAN_INLINE void kernel(const T (&g)[3], T (&t)[3]) {
    t[0] = g[0];
    t[1] = g[0] + g[1] + g[2];
    t[2] = g[2];
  }
  template <class T>
  static FASTGAN_INLINE void kernel_gradient(const T (&t)[3], T (&g)[3]) {
    g[0] = t[0] + t[1];
    g[1] = t[1];
    g[2] = t[1] + t[2];
  }
};

}  // namespace fastgan
