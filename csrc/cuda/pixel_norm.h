// pixel_norm of act(x + bias) gain with a piecewise-linear act, forward and both backwards. The formulas are in
// fastgan/ops/bias_act_pixel_norm.py. A pixel's features are read once, kept in registers while their sums are formed,
// and written once. Features that do not fit in registers are read a second time, from the cache.
#pragma once

#include "op.h"

namespace fastgan {

// value(v) = act(v) gain, and slope(y, d) = d act' gain, where only the sign of y matters: it is that of act(v).
struct Piecewise {
  float positive, negative;  // slopes, gain included
  bool relu;
  __device__ __forceinline__ float value(float v) const {
    return relu && v <= 0.0f ? 0.0f : v * (v > 0.0f ? positive : negative);  // preserves NaN
  }
  __device__ __forceinline__ float slope(float y, float d) const {
    // Selected rather than multiplied by 0, which would turn infinity into NaN. The gradient passes through a NaN, as
    // in PyTorch.
    if (relu) return y <= 0.0f ? 0.0f : d * positive;
    return d * (y > 0.0f ? positive : negative);
  }
};

// Each of the three passes has kIn inputs, kOut outputs, and kSums sums over a pixel's features: `add` adds a feature
// to the sums, `finish` turns them into what `write` needs. The forward computes r, the others read it.

// in: x. out: y, r.
struct NormForward {
  static constexpr int kIn = 1, kOut = 1, kSums = 1;
  static constexpr bool kMakesR = true;
  Piecewise act;
  float eps;
  __device__ __forceinline__ void add(const float (&in)[1], float bias, float (&sums)[1]) const {
    const float z = act.value(in[0] + bias);
    sums[0] += z * z;
  }
  __device__ __forceinline__ void finish(float (&sums)[1], float share, float& r) const {
    r = 1.0f / sqrtf(sums[0] * share + eps);
  }
  __device__ __forceinline__ void write(const float (&in)[1], float bias, const float (&)[1], float r,
                                        float (&out)[1]) const {
    out[0] = act.value(in[0] + bias) * r;
  }
};

// in: dy, y. out: dx.
struct NormBackward {
  static constexpr int kIn = 2, kOut = 1, kSums = 1;
  static constexpr bool kMakesR = false;
  Piecewise act;
  __device__ __forceinline__ void add(const float (&in)[2], float, float (&sums)[1]) const { sums[0] += in[0] * in[1]; }
  __device__ __forceinline__ void finish(float (&sums)[1], float share, float&) const { sums[0] *= share; }
  __device__ __forceinline__ void write(const float (&in)[2], float, const float (&mean)[1], float r,
                                        float (&out)[1]) const {
    out[0] = act.slope(in[1], r * (in[0] - in[1] * mean[0]));
  }
};

// in: u, dy, y. out: gdy, gx.
struct NormSecondBackward {
  static constexpr int kIn = 3, kOut = 2, kSums = 3;
  static constexpr bool kMakesR = false;
  Piecewise act;
  __device__ __forceinline__ void add(const float (&in)[3], float, float (&sums)[3]) const {
    const float w = act.slope(in[2], in[0]);
    sums[0] += w * in[2];
    sums[1] += in[1] * in[2];
    sums[2] += w * in[1];
  }
  // The sums become mean(w y), mean(dy y), and the factor of y in gx.
  __device__ __forceinline__ void finish(float (&sums)[3], float share, float&) const {
    sums[0] *= share;
    sums[1] *= share;
    sums[2] = 3.0f * sums[0] * sums[1] - sums[2] * share;
  }
  __device__ __forceinline__ void write(const float (&in)[3], float, const float (&k)[3], float r,
                                        float (&out)[2]) const {
    const float w = act.slope(in[2], in[0]);
    out[0] = r * (w - in[2] * k[0]);
    out[1] = act.slope(in[2], r * r * (in[2] * k[2] - w * k[1] - in[1] * k[0]));
  }
};

template <int W, class T, int In>
__device__ __forceinline__ void load_all(const T* const (&from)[In], int64_t offset, Vec<T, W> (&to)[In]) {
#pragma unroll
  for (int i = 0; i < In; ++i) to[i] = load<W>(from[i] + offset);
}

template <class T, int W, int In>
__device__ __forceinline__ void floats_of(const Vec<T, W> (&in)[In], int w, float (&out)[In]) {
#pragma unroll
  for (int i = 0; i < In; ++i) out[i] = to_float(in[i].v[w]);
}

// Contiguous. A block takes TX neighboring vectors of W pixels at a time. Thread row ty of TY has features ty, ty + TY,
// ..., the first R of which stay in registers. partial: [blocks, C] for the sum of the last output, or nullptr; each
// thread writes only its own features.
template <class T, int W, int TX, int R, class F>
__global__ void __launch_bounds__(kThreads, 2)
    norm_planes(F f, Arrays<T, F::kIn, F::kOut> a, Bias<T> bias, float* r, int64_t channels, int per_plane,
                int vectors, float share, float* partial) {
  constexpr int TY = kThreads / TX;
  __shared__ float shared[F::kSums][kWarps][TX * W];
  const int tx = static_cast<int>(threadIdx.x) % TX, ty = static_cast<int>(threadIdx.x) / TX;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t tile = blockIdx.x; tile * TX < vectors; tile += gridDim.x) {
    const int64_t v = tile * TX + tx;
    const bool active = v < vectors;
    const int n = static_cast<int>(v) / per_plane;
    const int64_t step = static_cast<int64_t>(per_plane) * W;
    int64_t base = n * channels * step + static_cast<int64_t>(static_cast<int>(v) - n * per_plane) * W;

    Vec<T, W> kept[R][F::kIn];
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t c = ty + k * TY;
      if (active && c < channels) load_all<W>(a.in, base + c * step, kept[k]);
    }
    float sums[W][F::kSums];
#pragma unroll
    for (int w = 0; w < W; ++w) {
#pragma unroll
      for (int s = 0; s < F::kSums; ++s) sums[w][s] = 0.0f;
    }
    const auto add = [&](const Vec<T, W>(&in)[F::kIn], int64_t c) {
      const float b = bias(c);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        float from[F::kIn];
        floats_of(in, w, from);
        f.add(from, b, sums[w]);
      }
    };
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t c = ty + k * TY;
      if (active && c < channels) add(kept[k], c);
    }
    if (active) {
#pragma unroll(F::kIn == 3 ? 1 : 2)
      for (int64_t c = ty + R * TY; c < channels; c += TY) {
        Vec<T, W> in[F::kIn];
        load_all<W>(a.in, base + c * step, in);
        add(in, c);
      }
    }

    // Sum over the lanes of a warp that share a pixel, then over the warps.
#pragma unroll
    for (int w = 0; w < W; ++w) {
#pragma unroll
      for (int s = 0; s < F::kSums; ++s) {
#pragma unroll
        for (int offset = TX; offset < 32; offset *= 2) sums[w][s] += __shfl_xor_sync(kAll, sums[w][s], offset);
        if (lane < TX) shared[s][warp][lane * W + w] = sums[w][s];
      }
    }
    __syncthreads();
    float scale[W];
#pragma unroll
    for (int w = 0; w < W; ++w) {
#pragma unroll
      for (int s = 0; s < F::kSums; ++s) {
        sums[w][s] = 0.0f;
#pragma unroll
        for (int i = 0; i < kWarps; ++i) sums[w][s] += shared[s][i][tx * W + w];
      }
      scale[w] = 0.0f;
      if (!F::kMakesR && active) scale[w] = r[v * W + w];
      f.finish(sums[w], share, scale[w]);
      if (F::kMakesR && active && ty == 0) r[v * W + w] = scale[w];
    }
    __syncthreads();  // before the next tile overwrites the sums

    make_opaque(base);
#pragma unroll
    for (int k = 0; k < R; ++k) {
#pragma unroll
      for (int i = 0; i < F::kIn; ++i) make_opaque(kept[k][i]);
    }
    const auto write = [&](const Vec<T, W>(&in)[F::kIn], int64_t c) {
      Vec<T, W> out[F::kOut];
      const float b = bias(c);
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        float from[F::kIn], to[F::kOut];
        floats_of(in, w, from);
        f.write(from, b, sums[w], scale[w], to);
#pragma unroll
        for (int i = 0; i < F::kOut; ++i) out[i].v[w] = from_float<T>(to[i]);
        sum += to[F::kOut - 1];
      }
#pragma unroll
      for (int i = 0; i < F::kOut; ++i) store<W>(a.out[i] + base + c * step, out[i]);
      return sum;
    };
    const auto keep = [&](float sum, int64_t c) {  // called by full warps
#pragma unroll
      for (int offset = TX / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
      if (tx == 0 && c < channels) {
        float* const to = partial + blockIdx.x * channels + c;
        *to = tile == blockIdx.x ? sum : *to + sum;
      }
    };
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t c = ty + k * TY;
      const float sum = active && c < channels ? write(kept[k], c) : 0.0f;
      if (partial != nullptr) keep(sum, c);
    }
#pragma unroll(F::kIn == 3 ? 1 : 2)
    for (int64_t first = R * TY; first < channels; first += TY) {
      const int64_t c = first + ty;
      float sum = 0.0f;
      if (active && c < channels) {
        Vec<T, W> in[F::kIn];
        load_all<W>(a.in, base + c * step, in);
        sum = write(in, c);
      }
      if (partial != nullptr) keep(sum, c);
    }
  }
}

// channels_last. `lanes` threads of a warp, a power of two, take one pixel: vectors lane, lane + lanes, ... of its C /
// W, the first R of which stay in registers. Sum: the last output is summed into partial, [blocks, C]; C / W must then
// be at most R * lanes.
template <class T, int W, int R, bool Sum, class F>
__global__ void __launch_bounds__(kThreads, 2)
    norm_rows(F f, Arrays<T, F::kIn, F::kOut> a, Bias<T> bias, float* r, int64_t per_row, int64_t pixels, int lanes,
              float share, float* partial) {
  __shared__ float shared[kThreads];
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = kThreads / lanes;
  float totals[R][W];
#pragma unroll
  for (int k = 0; k < R; ++k) {
#pragma unroll
    for (int w = 0; w < W; ++w) totals[k][w] = 0.0f;
  }
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * groups; first < pixels;
       first += static_cast<int64_t>(gridDim.x) * groups) {
    const int64_t pixel = first + group;
    const bool active = pixel < pixels;
    int64_t base = pixel * per_row * W;

    Vec<T, W> kept[R][F::kIn];
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t v = lane + k * lanes;
      if (active && v < per_row) load_all<W>(a.in, base + v * W, kept[k]);
    }
    float sums[F::kSums];
#pragma unroll
    for (int s = 0; s < F::kSums; ++s) sums[s] = 0.0f;
    const auto add = [&](const Vec<T, W>(&in)[F::kIn], int64_t v) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        float from[F::kIn];
        floats_of(in, w, from);
        f.add(from, bias(v * W + w), sums);
      }
    };
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t v = lane + k * lanes;
      if (active && v < per_row) add(kept[k], v);
    }
    if (active) {
      for (int64_t v = lane + R * lanes; v < per_row; v += lanes) {
        Vec<T, W> in[F::kIn];
        load_all<W>(a.in, base + v * W, in);
        add(in, v);
      }
    }
#pragma unroll
    for (int s = 0; s < F::kSums; ++s) {
      for (int offset = lanes / 2; offset > 0; offset /= 2) sums[s] += __shfl_xor_sync(kAll, sums[s], offset);
    }
    float scale = !F::kMakesR && active ? r[pixel] : 0.0f;
    f.finish(sums, share, scale);
    if (!active) continue;  // ends the loop: this was the block's last iteration
    if (F::kMakesR && lane == 0) r[pixel] = scale;

    make_opaque(base);
#pragma unroll
    for (int k = 0; k < R; ++k) {
#pragma unroll
      for (int i = 0; i < F::kIn; ++i) make_opaque(kept[k][i]);
    }
    const auto write = [&](const Vec<T, W>(&in)[F::kIn], int64_t v, float (&total)[W]) {
      Vec<T, W> out[F::kOut];
#pragma unroll
      for (int w = 0; w < W; ++w) {
        float from[F::kIn], to[F::kOut];
        floats_of(in, w, from);
        f.write(from, bias(v * W + w), sums, scale, to);
#pragma unroll
        for (int i = 0; i < F::kOut; ++i) out[i].v[w] = from_float<T>(to[i]);
        total[w] += to[F::kOut - 1];
      }
#pragma unroll
      for (int i = 0; i < F::kOut; ++i) store<W>(a.out[i] + base + v * W, out[i]);
    };
#pragma unroll
    for (int k = 0; k < R; ++k) {
      const int64_t v = lane + k * lanes;
      if (v < per_row) write(kept[k], v, totals[k]);
    }
    for (int64_t v = lane + R * lanes; v < per_row; v += lanes) {
      Vec<T, W> in[F::kIn];
      float unused[W] = {};
      load_all<W>(a.in, base + v * W, in);
      write(in, v, unused);
    }
  }
  if constexpr (Sum) {
#pragma unroll
    for (int k = 0; k < R; ++k) {
#pragma unroll
      for (int w = 0; w < W; ++w) {
        shared[threadIdx.x] = totals[k][w];
        for (int half = groups / 2; half > 0; half /= 2) {
          __syncthreads();
          if (group < half) shared[threadIdx.x] += shared[threadIdx.x + half * lanes];
        }
        __syncthreads();
        const int64_t v = lane + k * lanes;
        if (group == 0 && v < per_row) partial[(blockIdx.x * per_row + v) * W + w] = shared[threadIdx.x];
        __syncthreads();
      }
    }
  }
}

// Of bias_act_pixel_norm.cu, as pixel_norm.cu calls them.
std::tuple<Tensor, Tensor> bias_act_pixel_norm_forward(const Tensor& x, const Maybe& bias, int64_t act,
                                                       double negative_slope, double gain, double eps);
std::tuple<Tensor, Tensor> bias_act_pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, int64_t act,
                                                        double negative_slope, double gain, bool want_bias);
std::tuple<Tensor, Tensor, Tensor> bias_act_pixel_norm_second_backward(const Tensor& u, const Tensor& dy,
                                                                       const Tensor& y, const Tensor& r, int64_t act,
                                                                       double negative_slope, double gain,
                                                                       bool want_bias);

}  // namespace fastgan
