// Activation functions times a gain, with first and second derivatives. Branch-free arithmetic, so that loops
// vectorize.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "common.h"

namespace fastgan {

// Each struct has value(v) = gain act(v), slope(ref, d) = d gain act'(v) and, unless piecewise linear,
// curvature(ref, d) = d gain act''(v). `ref` is value(v), except for silu, where it is v.

struct LinearAct {
  float gain;
  float value(float v) const { return v * gain; }
  float slope(float, float d) const { return d * gain; }
};

struct ReluAct {
  float gain;
  // Selected rather than multiplied by 0, which would turn infinity into NaN. NaN is preserved. The product is outside of
  // the selection: a multiplication under a condition might trap, and compilers do not vectorize it.
  float value(float v) const {
    const float scaled = v * gain;
    return v <= 0.0f ? 0.0f : scaled;
  }
  // At NaN the gradient passes through, as in ATen, so that the NaN stays visible.
  float slope(float y, float d) const {
    const float scaled = d * gain;
    return y <= 0.0f ? 0.0f : scaled;
  }
};

struct LreluAct {
  float gain, negative;
  float value(float v) const { return v * (v > 0.0f ? gain : negative); }
  float slope(float y, float d) const { return d * (y > 0.0f ? gain : negative); }
};

// e^x = scale (1 + rest), where scale is a power of two and |rest| < 0.42 with a relative error below 1e-7. x is
// clamped to the range of float. NaN stays NaN.
struct Exponential {
  float scale, rest;
  explicit Exponential(float x) {
    x = x > 87.0f ? 87.0f : (x < -87.0f ? -87.0f : x);
    // Adding 1.5 * 2^23 rounds to an integer k, held in the low bits of the sum.
    constexpr float magic = 12582912.0f;
    const float shifted = x * 1.44269504f + magic;
    const float k = shifted - magic;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bits = (bits - 0x4b400000u + 127u) << 23;
    std::memcpy(&scale, &bits, sizeof scale);
    // ln 2 is split in two parts (Cody-Waite); the first has few bits, so that k times it is exact.
    const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
    const float tail = 1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720 + r * (1.0f / 5040))));
    rest = r + r * r * (0.5f + r * tail);
  }
};

inline float sigmoid(float v) {
  const Exponential e(-v);
  return 1.0f / (1.0f + (e.scale + e.scale * e.rest));
}

inline float tanh(float v) {
  // Beyond 10 the result rounds to 1 in float.
  const float a = std::fabs(v) > 10.0f ? 10.0f : std::fabs(v);
  const Exponential e(2.0f * a);
  const float minus_one = e.scale * e.rest + (e.scale - 1.0f);
  // Far from 0, 1 - 2 / (e^2a + 1) is accurate; near 0, (e^2a - 1) / (e^2a + 1) is.
  const bool far = a > 0.6f;
  const float quotient = (far ? -2.0f : minus_one) / (minus_one + 2.0f);
  return std::copysign((far ? 1.0f : 0.0f) + quotient, v);
}

struct TanhAct {
  float gain, inverse;
  float value(float v) const { return gain * tanh(v); }
  // gain (1 - tanh^2), from y = gain tanh. The factored form is more accurate near 1.
  float slope(float y, float d) const { return d * ((gain - y) * (gain + y) * inverse); }
  float curvature(float y, float d) const { return d * ((gain - y) * (gain + y) * inverse * (-2.0f * y * inverse)); }
};

struct SigmoidAct {
  float gain, inverse;
  float value(float v) const { return gain * sigmoid(v); }
  float slope(float y, float d) const {
    const float s = y * inverse;
    return d * gain * (s * (1.0f - s));
  }
  float curvature(float y, float d) const {
    const float s = y * inverse;
    return d * gain * (s * (1.0f - s) * (1.0f - 2.0f * s));
  }
};

struct SiluAct {
  float gain;
  float value(float v) const { return gain * (v * sigmoid(v)); }
  float slope(float v, float d) const {
    const float s = sigmoid(v);
    return d * gain * (s * (1.0f + v * (1.0f - s)));
  }
  float curvature(float v, float d) const {
    const float s = sigmoid(v);
    return d * gain * (s * (1.0f - s) * (2.0f + v * (1.0f - 2.0f * s)));
  }
};

}  // namespace fastgan
