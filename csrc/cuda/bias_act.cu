// bias_act, forward and both backwards. The formulas are in fastgan/ops/bias_act.py.
#include "map.h"

namespace fastgan {

namespace {

struct Activation {
  int act;
  float negative_slope, gain, inverse_gain;

  __device__ __forceinline__ static float sigmoid(float v) { return 1.0f / (1.0f + expf(-v)); }

  __device__ __forceinline__ float value(float v) const {
    switch (act) {
      case kRelu:
        return v <= 0.0f ? 0.0f : v * gain;  // preserves NaN
      case kLrelu:
        return (v > 0.0f ? v : v * negative_slope) * gain;
      case kTanh:
        return tanhf(v) * gain;
      case kSigmoid:
        return sigmoid(v) * gain;
      case kSilu:
        return v * sigmoid(v) * gain;
      default:
        return v * gain;
    }
  }

  // act' and act'' without the gain. ref: the output, except for silu, where it is x + bias.
  __device__ __forceinline__ void slopes(float ref, float& first, float& second) const {
    const float y = ref * inverse_gain;
    second = 0.0f;
    switch (act) {
      case kRelu:
        first = ref <= 0.0f ? 0.0f : 1.0f;  // the gradient passes through a NaN
        break;
      case kLrelu:
        first = ref > 0.0f ? 1.0f : negative_slope;
        break;
      case kTanh:
        first = 1.0f - y * y;
        second = -2.0f * y * first;
        break;
      case kSigmoid:
        first = y * (1.0f - y);
        second = first * (1.0f - 2.0f * y);
        break;
      case kSilu: {
        const float s = sigmoid(ref);
        first = s * (1.0f + ref * (1.0f - s));
        second = s * (1.0f - s) * (2.0f + ref * (1.0f - 2.0f * s));
        break;
      }
      default:
        first = 1.0f;
    }
  }
};

// in: x. out: y.
struct Forward : Activation {
  static constexpr int kIn = 1, kOut = 1;
  __device__ __forceinline__ void operator()(const float (&in)[1], float bias, float (&out)[1]) const {
    out[0] = value(in[0] + bias);
  }
};

// in: dy, ref. out: dx.
struct Backward : Activation {
  static constexpr int kIn = 2, kOut = 1;
  __device__ __forceinline__ void operator()(const float (&in)[2], float bias, float (&out)[1]) const {
    float first, second;
    slopes(in[1] + bias, first, second);
    // Selected rather than multiplied by 0 where relu is flat: dy may be infinite.
    out[0] = act == kRelu && first == 0.0f ? 0.0f : in[0] * first * gain;
  }
};

// in: u, dy, ref. out: gdy, gx.
struct SecondBackward : Activation {
  static constexpr int kIn = 3, kOut = 2;
  __device__ __forceinline__ void operator()(const float (&in)[3], float bias, float (&out)[2]) const {
    float first, second;
    slopes(in[2] + bias, first, second);
    out[0] = in[0] * first * gain;
    out[1] = in[0] * in[1] * second * gain;
  }
};

Activation activation(int64_t act, double negative_slope, double gain) {
  STD_TORCH_CHECK(act >= kLinear && act <= kSilu, "act must be 0 to 5, got ", act);
  return {static_cast<int>(act), static_cast<float>(negative_slope), static_cast<float>(gain),
          static_cast<float>(1.0 / gain)};
}

}  // namespace

Tensor bias_act_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                        double gain) {
  const Features f = features(x);
  check_bias(bias, x, f.c);
  const Tensor y = torch::stable::empty_like(x);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    map<T>(x, f, Forward{activation(act, negative_slope, gain)}, {{data<T>(x)}, {output<T>(y)}}, bias, false);
  });
  return y;
}

std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy, const std::optional<Tensor>& ref,
                                             const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                                             double gain, bool want_bias) {
  const Features f = features(dy);
  STD_TORCH_CHECK(ref.has_value() || act == kLinear, "ref must be a tensor unless act is linear, got None");
  if (ref) check_like(*ref, "ref", dy, f);
  check_bias(bias, dy, f.c);
  const Tensor dx = torch::stable::empty_like(dy);
  Tensor db;
  dispatch(dy, [&](auto element) {
    using T = decltype(element);
    db = map<T>(dy, f, Backward{activation(act, negative_slope, gain)},
                {{data<T>(dy), ref ? data<T>(*ref) : nullptr}, {output<T>(dx)}}, bias, want_bias);
  });
  return {dx, db};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_second_backward(const Tensor& u, const Tensor& dy, const Tensor& ref,
                                                            const std::optional<Tensor>& bias, int64_t act,
                                                            double negative_slope, double gain, bool want_bias) {
  const Features f = features(u);
  check_like(dy, "dy", u, f);
  check_like(ref, "ref", u, f);
  check_bias(bias, u, f.c);
  const Tensor gdy = torch::stable::empty_like(u), gx = torch::stable::empty_like(u);
  Tensor gb;
  dispatch(u, [&](auto element) {
    using T = decltype(element);
    gb = map<T>(u, f, SecondBackward{activation(act, negative_slope, gain)},
                {{data<T>(u), data<T>(dy), data<T>(ref)}, {output<T>(gdy), output<T>(gx)}}, bias, want_bias);
  });
  return {gdy, gx, gb};
}

FASTGAN_CUDA_OP(bias_act_forward);
FASTGAN_CUDA_OP(bias_act_backward);
FASTGAN_CUDA_OP(bias_act_second_backward);

}  // namespace fastgan
