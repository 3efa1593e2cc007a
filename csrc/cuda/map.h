// Elementwise kernels over feature maps, which can sum their last output over all dimensions but C in the same pass.
//
// A function F has kIn inputs and kOut outputs: f(in, bias of the channel, out). A missing input (nullptr) reads as 0.
#pragma once

#include "op.h"

namespace fastgan {

template <int W, class T, class F>
__device__ __forceinline__ void map_vector(const F& f, const Arrays<T, F::kIn, F::kOut>& a, int64_t offset,
                                           const float (&bias)[W], float (&sums)[W]) {
  Vec<T, W> in[F::kIn], out[F::kOut];
#pragma unroll
  for (int i = 0; i < F::kIn; ++i) {
    if (a.in[i] != nullptr) in[i] = load<W>(a.in[i] + offset);
  }
#pragma unroll
  for (int w = 0; w < W; ++w) {
    float from[F::kIn], to[F::kOut];
#pragma unroll
    for (int i = 0; i < F::kIn; ++i) from[i] = a.in[i] != nullptr ? to_float(in[i].v[w]) : 0.0f;
    f(from, bias[w], to);
#pragma unroll
    for (int i = 0; i < F::kOut; ++i) out[i].v[w] = from_float<T>(to[i]);
    sums[w] += to[F::kOut - 1];
  }
#pragma unroll
  for (int i = 0; i < F::kOut; ++i) store<W>(a.out[i] + offset, out[i]);
}

// Contiguous: a block loops over the pixels of one channel in all samples; per_plane = L / W.
template <class T, int W, class F>
__global__ void __launch_bounds__(kThreads)
    map_planes(F f, Arrays<T, F::kIn, F::kOut> a, Bias<T> bias, int64_t channels, int per_plane, int per_channel,
               float* partial) {
  for (int64_t c = blockIdx.y; c < channels; c += gridDim.y) {
    float offsets[W], sums[W];
    const float offset = bias(c);
#pragma unroll
    for (int w = 0; w < W; ++w) offsets[w] = offset, sums[w] = 0.0f;
    for (int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; j < per_channel;
         j += static_cast<int64_t>(gridDim.x) * kThreads) {
      const int n = static_cast<int>(j) / per_plane, p = static_cast<int>(j) - n * per_plane;
      map_vector<W>(f, a, ((n * channels + c) * per_plane + p) * W, offsets, sums);
    }
    if (partial != nullptr) {
      float sum = 0.0f;
#pragma unroll
      for (int w = 0; w < W; ++w) sum += sums[w];
      sum = block_sum<kThreads>(sum);
      if (threadIdx.x == 0) partial[blockIdx.x * channels + c] = sum;
    }
  }
}

// channels_last: `lanes` neighboring threads, a power of two, share a pixel's features; per_row = C / W.
template <class T, int W, class F>
__global__ void __launch_bounds__(kThreads, 3)
    map_rows(F f, Arrays<T, F::kIn, F::kOut> a, Bias<T> bias, int64_t per_row, int64_t pixels, int lanes,
             float* partial) {
  __shared__ float shared[kThreads][W];
  const int lane = static_cast<int>(threadIdx.x) % lanes, group = static_cast<int>(threadIdx.x) / lanes;
  const int groups = kThreads / lanes;
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * lanes; first < per_row;
       first += static_cast<int64_t>(gridDim.y) * lanes) {
    const int64_t v = first + lane;
    float offsets[W], sums[W];
#pragma unroll
    for (int w = 0; w < W; ++w) sums[w] = 0.0f;
    if (v < per_row) {
#pragma unroll
      for (int w = 0; w < W; ++w) offsets[w] = bias(v * W + w);
      for (int64_t pixel = static_cast<int64_t>(blockIdx.x) * groups + group; pixel < pixels;
           pixel += static_cast<int64_t>(gridDim.x) * groups) {
        map_vector<W>(f, a, (pixel * per_row + v) * W, offsets, sums);
      }
    }
    if (partial != nullptr) {
#pragma unroll
      for (int w = 0; w < W; ++w) shared[threadIdx.x][w] = sums[w];
      for (int half = groups / 2; half > 0; half /= 2) {
        __syncthreads();
        if (group < half) {
#pragma unroll
          for (int w = 0; w < W; ++w) shared[threadIdx.x][w] += shared[threadIdx.x + half * lanes][w];
        }
      }
      __syncthreads();
      if (group == 0 && v < per_row) {
#pragma unroll
        for (int w = 0; w < W; ++w) partial[(blockIdx.x * per_row + v) * W + w] = shared[threadIdx.x][w];
      }
      __syncthreads();
    }
  }
}

inline int lanes_for(int64_t vectors, int most) {
  int lanes = 1;
  while (lanes < vectors && lanes < most) lanes *= 2;
  return lanes;
}

// Runs f over tensors with the layout of x; returns the sum of its last output over all dimensions but C, if wanted.
template <class T, class F>
Tensor map(const Tensor& x, const Features& layout, const F& f, const Arrays<T, F::kIn, F::kOut>& a,
           const std::optional<Tensor>& bias, bool want_sum) {
  const Launcher launch(x);
  bool wide = (layout.last ? layout.c : layout.l) % kWide<T> == 0;
  for (const T* p : a.in) wide = wide && aligned({p});
  for (const T* p : a.out) wide = wide && aligned({p});
  Tensor sum;
  with_width<T>(wide, [&](auto width) {
    constexpr int W = width();
    const int64_t side = std::min(layout.c, kMostAcross);
    if (layout.last) {
      const int64_t per_row = layout.c / W;
      const int lanes = lanes_for(per_row, kThreads);
      const int64_t tiles = std::min(ceil_div(per_row, lanes), kMostAcross);
      const unsigned parts =
          blocks(ceil_div(layout.pixels(), kThreads / lanes * 4), std::max<int64_t>(1, kMostSums / tiles));
      const ChannelSum total(x, want_sum, parts, layout.c);
      launch(map_rows<T, W, F>, dim3(parts, static_cast<unsigned>(tiles)), dim3(kThreads), f, a, bias_of<T>(bias),
             per_row, layout.pixels(), lanes, total.pointer());
      sum = total.finish(launch);
    } else {
      const int64_t per_plane = layout.l / W, per_channel = layout.n * per_plane;
      STD_TORCH_CHECK(per_channel < (int64_t{1} << 31), "x must have fewer than 2^31 16-byte vectors per channel, got ",
                      per_channel);
      const unsigned parts = blocks(ceil_div(per_channel, kThreads * 4), std::max<int64_t>(1, kMostSums / side));
      const ChannelSum total(x, want_sum, parts, layout.c);
      launch(map_planes<T, W, F>, dim3(parts, static_cast<unsigned>(side)), dim3(kThreads), f, a, bias_of<T>(bias),
             layout.c, static_cast<int>(per_plane), static_cast<int>(per_channel), total.pointer());
      sum = total.finish(launch);
    }
  });
  return sum;
}

}  // namespace fastgan
