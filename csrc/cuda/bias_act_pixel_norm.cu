// bias_act_pixel_norm, forward and both backwards: checks and launches. The kernels are in pixel_norm.h.
#include "map.h"
#include "pixel_norm.h"

namespace fastgan {

namespace {

Piecewise piecewise(int64_t act, double negative_slope, double gain) {
  STD_TORCH_CHECK(act >= kLinear && act <= kLrelu, "act must be 0 to 2 (linear, relu, lrelu), got ", act);
  const double below = act == kLinear ? 1.0 : act == kRelu ? 0.0 : negative_slope;
  return {static_cast<float>(gain), static_cast<float>(below * gain), act == kRelu};
}

// Copies its input; `map` then sums it. For channels that norm_rows cannot sum in the same pass.
struct Identity {
  static constexpr int kIn = 1, kOut = 1;
  __device__ __forceinline__ void operator()(const float (&in)[1], float, float (&out)[1]) const { out[0] = in[0]; }
};

// Runs f; returns the sum of its last output over all dimensions but C, if wanted.
template <class T, class F>
Tensor norm(const Tensor& x, const Features& layout, const F& f, const Arrays<T, F::kIn, F::kOut>& a,
            const std::optional<Tensor>& bias, float* r, bool want_sum) {
  const Launcher launch(x);
  bool wide = (layout.last ? layout.c : layout.l) % kWide<T> == 0;
  for (const T* p : a.in) wide = wide && aligned({p});
  for (const T* p : a.out) wide = wide && aligned({p});
  const float share = 1.0f / static_cast<float>(layout.c);
  Tensor sum;
  with_width<T>(wide, [&](auto width) {
    constexpr int W = width();
    if (layout.last) {
      constexpr int R = 4;
      const int64_t per_row = layout.c / W;
      const int lanes = lanes_for(per_row, 32);
      const unsigned grid = blocks(ceil_div(layout.pixels(), kThreads / lanes), want_sum ? kMostParts : kMostBlocks);
      const bool fused_sum = want_sum && per_row <= R * lanes;
      const ChannelSum total(x, fused_sum, grid, layout.c);
      auto* const kernel = fused_sum ? norm_rows<T, W, R, !F::kMakesR, F> : norm_rows<T, W, R, false, F>;
      launch(kernel, dim3(grid), dim3(kThreads), f, a, bias_of<T>(bias), r, per_row, layout.pixels(), lanes, share,
             total.pointer());
      if (want_sum && !fused_sum) {
        T* const last = a.out[F::kOut - 1];
        sum = map<T>(x, layout, Identity{}, {{last}, {last}}, std::nullopt, true);
      } else {
        sum = total.finish(launch);
      }
    } else {
      // With three inputs of 8 a vector, four rows spill on sm_100.
      constexpr int TX = W == 1 ? 32 : 4, R = F::kIn == 1 ? 8 : F::kIn == 3 && W == 8 ? 3 : 4;
      const int64_t per_plane = layout.l / W, vectors = layout.n * per_plane;
      STD_TORCH_CHECK(vectors < int64_t{1} << 31, "x must have fewer than 2^31 16-byte vectors per channel, got ",
                      vectors);
      const unsigned grid = blocks(ceil_div(vectors, TX), want_sum ? kMostParts : kMostBlocks);
      const ChannelSum total(x, want_sum, grid, layout.c);
      launch(norm_planes<T, W, TX, R, F>, dim3(grid), dim3(kThreads), f, a, bias_of<T>(bias), r, layout.c,
             static_cast<int>(per_plane), static_cast<int>(vectors), share, total.pointer());
      sum = total.finish(launch);
    }
  });
  return sum;
}

Tensor pixel_statistic(const Tensor& x) {
  const auto sizes = x.sizes();
  std::vector<int64_t> of(sizes.begin(), sizes.end());
  of[1] = 1;
  return floats(x, of);
}

}  // namespace

std::tuple<Tensor, Tensor> bias_act_pixel_norm_forward(const Tensor& x, const Maybe& bias, int64_t act,
                                                       double negative_slope, double gain, double eps) {
  const Features f = features(x);
  check_bias(bias, x, f.c);
  const Tensor y = torch::stable::empty_like(x), r = pixel_statistic(x);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    norm<T>(x, f, NormForward{piecewise(act, negative_slope, gain), static_cast<float>(eps)},
            {{data<T>(x)}, {output<T>(y)}}, bias, output<float>(r), false);
  });
  return {y, r};
}

std::tuple<Tensor, Tensor> bias_act_pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, int64_t act,
                                                        double negative_slope, double gain, bool want_bias) {
  const Features f = features(y);
  check_like(dy, "dy", y, f);
  check_floats(r, "r", f.pixels());
  const Tensor dx = torch::stable::empty_like(y);
  Tensor db;
  dispatch(y, [&](auto element) {
    using T = decltype(element);
    db = norm<T>(y, f, NormBackward{piecewise(act, negative_slope, gain)},
                 {{data<T>(dy), data<T>(y)}, {output<T>(dx)}}, std::nullopt, output<float>(r), want_bias);
  });
  return {dx, db};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_pixel_norm_second_backward(const Tensor& u, const Tensor& dy,
                                                                       const Tensor& y, const Tensor& r, int64_t act,
                                                                       double negative_slope, double gain,
                                                                       bool want_bias) {
  const Features f = features(y);
  check_like(u, "u", y, f);
  check_like(dy, "dy", y, f);
  check_floats(r, "r", f.pixels());
  const Tensor gdy = torch::stable::empty_like(y), gx = torch::stable::empty_like(y);
  Tensor gb;
  dispatch(y, [&](auto element) {
    using T = decltype(element);
    gb = norm<T>(y, f, NormSecondBackward{piecewise(act, negative_slope, gain)},
                 {{data<T>(u), data<T>(dy), data<T>(y)}, {output<T>(gdy), output<T>(gx)}}, std::nullopt,
                 output<float>(r), want_bias);
  });
  return {gdy, gx, gb};
}

FASTGAN_CUDA_OP(bias_act_pixel_norm_forward);
FASTGAN_CUDA_OP(bias_act_pixel_norm_backward);
FASTGAN_CUDA_OP(bias_act_pixel_norm_second_backward);

}  // namespace fastgan
