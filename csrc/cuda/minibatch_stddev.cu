// minibatch_stddev, forward and both backwards. The formulas are in fastgan/ops/minibatch_stddev.py.
//
// A thread takes W neighboring positions of one chunk of channels and loops over the samples of the group. Means and
// variances follow Welford, which stays accurate if samples are nearly equal. Each block sums its positions; a second
// kernel sums the blocks in order and writes the map.
#include "op.h"

namespace fastgan {

namespace {

// Samples of a group kept in registers; larger groups are read a second time, from the cache.
constexpr int kKept = 4;
constexpr int kMapThreads = 1024;

struct Shape {
  int64_t channels, pixels;    // C, H W
  int features, groups, group;  // F, N / G, G
  int positions, chunk_channels;  // K = C / F H W, C / F
  bool last, wide;  // channels_last; whether [N, C + F, H, W] allows 16-byte accesses as well as x
  float eps;

  __device__ __forceinline__ int64_t sample(int m, int g) const { return static_cast<int64_t>(g) * groups + m; }
  __device__ __forceinline__ int64_t in_x(int f, int q) const {
    if (!last) return static_cast<int64_t>(f) * positions + q;
    const int pixel = q / chunk_channels;
    return pixel * channels + f * chunk_channels + (q - pixel * chunk_channels);
  }
  // Offset of an element of x in a tensor [N, C + F, H, W].
  __device__ __forceinline__ int64_t in_y(int f, int q) const {
    if (!last) return static_cast<int64_t>(f) * positions + q;
    const int pixel = q / chunk_channels;
    return pixel * (channels + features) + f * chunk_channels + (q - pixel * chunk_channels);
  }
  __device__ __forceinline__ int64_t of_map(int64_t sample, int f, int64_t pixel) const {
    const int64_t all = channels + features;
    return last ? (sample * pixels + pixel) * all + channels + f : (sample * all + channels + f) * pixels + pixel;
  }
  __device__ __forceinline__ int64_t x_stride() const { return channels * pixels; }
  __device__ __forceinline__ int64_t y_stride() const { return (channels + features) * pixels; }
};

// grid: (parts, N / G * F). partial: [N / G * F, parts], sums of sigma.
template <class T, int W>
__global__ void __launch_bounds__(kThreads, 3) stddev_forward(Shape s, const T* x, T* y, float* partial) {
  const int m = static_cast<int>(blockIdx.y) / s.features, f = static_cast<int>(blockIdx.y) % s.features;
  float sum = 0.0f;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W; i < s.positions;
       i += static_cast<int64_t>(gridDim.x) * kThreads * W) {
    const int q = static_cast<int>(i);
    const int64_t from = s.in_x(f, q), to = s.in_y(f, q);
    float mean[W], squares[W];
#pragma unroll
    for (int w = 0; w < W; ++w) mean[w] = squares[w] = 0.0f;
#pragma unroll 4
    for (int g = 0; g < s.group; ++g) {
      const Vec<T, W> in = load<W>(x + s.sample(m, g) * s.x_stride() + from);
      store<W>(y + s.sample(m, g) * s.y_stride() + to, in, s.wide);
      const float share = 1.0f / static_cast<float>(g + 1);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float value = to_float(in.v[w]), d = value - mean[w];
        mean[w] += d * share;
        squares[w] += d * (value - mean[w]);
      }
    }
#pragma unroll
    for (int w = 0; w < W; ++w) sum += sqrtf(squares[w] / static_cast<float>(s.group) + s.eps);
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// grid: (N / G * F, G). Writes the mean over the chunk into the maps of y.
template <class T>
__global__ void __launch_bounds__(kThreads) write_maps(Shape s, const float* partial, int parts, T* y) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < parts; i += kThreads) sum += partial[static_cast<int64_t>(blockIdx.x) * parts + i];
  const T value = from_float<T>(block_sum<kThreads>(sum) / static_cast<float>(s.positions));
  const int m = static_cast<int>(blockIdx.x) / s.features, f = static_cast<int>(blockIdx.x) % s.features;
  for (int g = static_cast<int>(blockIdx.y); g < s.group; g += static_cast<int>(gridDim.y)) {
    for (int64_t p = threadIdx.x; p < s.pixels; p += kThreads) y[s.of_map(s.sample(m, g), f, p)] = value;
  }
}

// grid: N / G * F. t: the maps' gradients summed over samples and pixels, divided by the positions of a chunk.
template <class T>
__global__ void __launch_bounds__(kMapThreads) sum_maps(Shape s, const T* dy, float* t) {
  const int m = static_cast<int>(blockIdx.x) / s.features, f = static_cast<int>(blockIdx.x) % s.features;
  float sum = 0.0f;
  for (int g = 0; g < s.group; ++g) {
#pragma unroll 4
    for (int64_t p = threadIdx.x; p < s.pixels; p += kMapThreads) {
      sum += to_float(dy[s.of_map(s.sample(m, g), f, p)]);
    }
  }
  sum = block_sum<kMapThreads>(sum);
  if (threadIdx.x == 0) t[blockIdx.x] = sum / static_cast<float>(s.positions);
}

// grid: (parts, N / G * F).
template <class T, int W, bool Kept>
__global__ void __launch_bounds__(kThreads) stddev_backward(Shape s, const T* dy, const T* x, const float* t, T* dx) {
  const int m = static_cast<int>(blockIdx.y) / s.features, f = static_cast<int>(blockIdx.y) % s.features;
  const float members = static_cast<float>(s.group), weight = t[blockIdx.y] / members;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W; i < s.positions;
       i += static_cast<int64_t>(gridDim.x) * kThreads * W) {
    const int q = static_cast<int>(i);
    const int64_t in_x = s.in_x(f, q), in_y = s.in_y(f, q);
    float mean[W], squares[W], factor[W];
#pragma unroll
    for (int w = 0; w < W; ++w) mean[w] = squares[w] = 0.0f;
    const auto see = [&](const Vec<T, W>& in, int g) {
      const float share = 1.0f / static_cast<float>(g + 1);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float value = to_float(in.v[w]), d = value - mean[w];
        mean[w] += d * share;
        squares[w] += d * (value - mean[w]);
      }
    };
    const auto write = [&](const Vec<T, W>& in, int g) {
      const Vec<T, W> given = load<W>(dy + s.sample(m, g) * s.y_stride() + in_y, s.wide);
      Vec<T, W> out;
#pragma unroll
      for (int w = 0; w < W; ++w) {
        out.v[w] = from_float<T>(to_float(given.v[w]) + factor[w] * (to_float(in.v[w]) - mean[w]));
      }
      store<W>(dx + s.sample(m, g) * s.x_stride() + in_x, out);
    };
    Vec<T, W> kept[Kept ? kKept : 1];
    if constexpr (Kept) {
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) kept[g] = load<W>(x + s.sample(m, g) * s.x_stride() + in_x);
      }
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) see(kept[g], g);
      }
    } else {
      for (int g = 0; g < s.group; ++g) see(load<W>(x + s.sample(m, g) * s.x_stride() + in_x), g);
    }
#pragma unroll
    for (int w = 0; w < W; ++w) factor[w] = weight / sqrtf(squares[w] / members + s.eps);
    if constexpr (Kept) {
#pragma unroll
      for (int g = 0; g < kKept; ++g) make_opaque(kept[g]);
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) write(kept[g], g);
      }
    } else {
      for (int g = 0; g < s.group; ++g) write(load<W>(x + s.sample(m, g) * s.x_stride() + in_x), g);
    }
  }
}

// grid: (parts, N / G * F). partial: [N / G * F, parts], sums of <u d> / sigma.
template <class T, int W, bool Kept>
__global__ void __launch_bounds__(kThreads, 2)
    stddev_second_backward(Shape s, const T* u, const T* x, const float* t, T* gdy, T* gx, float* partial) {
  const int m = static_cast<int>(blockIdx.y) / s.features, f = static_cast<int>(blockIdx.y) % s.features;
  const float members = static_cast<float>(s.group), weight = t[blockIdx.y] / members;
  float sum = 0.0f;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * W; i < s.positions;
       i += static_cast<int64_t>(gridDim.x) * kThreads * W) {
    const int q = static_cast<int>(i);
    const int64_t in_x = s.in_x(f, q), in_y = s.in_y(f, q);
    float mean[W], squares[W], mean_u[W], products[W];
#pragma unroll
    for (int w = 0; w < W; ++w) mean[w] = squares[w] = mean_u[w] = products[w] = 0.0f;
    const auto see = [&](const Vec<T, W>& in, const Vec<T, W>& in_u, int g) {
      const float share = 1.0f / static_cast<float>(g + 1);
#pragma unroll
      for (int w = 0; w < W; ++w) {
        const float value = to_float(in.v[w]), d = value - mean[w], other = to_float(in_u.v[w]);
        mean[w] += d * share;
        squares[w] += d * (value - mean[w]);
        mean_u[w] += (other - mean_u[w]) * share;
        products[w] += d * (other - mean_u[w]);
      }
    };
    const auto write = [&](const Vec<T, W>& in, const Vec<T, W>& in_u, int g) {
      Vec<T, W> out;
#pragma unroll
      for (int w = 0; w < W; ++w) {  // here squares is 1 / sigma^2, products is <u d> / sigma^2
        const float d = to_float(in.v[w]) - mean[w];
        out.v[w] = from_float<T>(weight * sqrtf(squares[w]) *
                                 (to_float(in_u.v[w]) - mean_u[w] - d * products[w]));
      }
      store<W>(gx + s.sample(m, g) * s.x_stride() + in_x, out);
      store<W>(gdy + s.sample(m, g) * s.y_stride() + in_y, in_u, s.wide);
    };
    Vec<T, W> kept[Kept ? kKept : 1], kept_u[Kept ? kKept : 1];
    if constexpr (Kept) {
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) {
          kept[g] = load<W>(x + s.sample(m, g) * s.x_stride() + in_x);
          kept_u[g] = load<W>(u + s.sample(m, g) * s.x_stride() + in_x);
        }
      }
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) see(kept[g], kept_u[g], g);
      }
    } else {
      for (int g = 0; g < s.group; ++g) {
        const int64_t at = s.sample(m, g) * s.x_stride() + in_x;
        see(load<W>(x + at), load<W>(u + at), g);
      }
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
      const float inverse = 1.0f / (squares[w] / members + s.eps);
      products[w] = products[w] / members * inverse;
      sum += products[w] / sqrtf(inverse);
      squares[w] = inverse;
    }
    if constexpr (Kept) {
#pragma unroll
      for (int g = 0; g < kKept; ++g) make_opaque(kept[g]), make_opaque(kept_u[g]);
#pragma unroll
      for (int g = 0; g < kKept; ++g) {
        if (g < s.group) write(kept[g], kept_u[g], g);
      }
    } else {
      for (int g = 0; g < s.group; ++g) {
        const int64_t at = s.sample(m, g) * s.x_stride() + in_x;
        write(load<W>(x + at), load<W>(u + at), g);
      }
    }
  }
  sum = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.y * gridDim.x + blockIdx.x] = sum;
}

// Shape and launch configuration of a call.
struct Call {
  Shape shape;
  bool wide;  // x allows 16-byte accesses
  unsigned chunks;

  Call(const Tensor& x, int64_t group, int64_t num_features, double eps) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", x.dim(), " dimensions");
    const Features f = features(x);
    STD_TORCH_CHECK(group > 0 && f.n % group == 0, "group must be a divisor of ", f.n, ", got ", group);
    STD_TORCH_CHECK(num_features > 0 && f.c % num_features == 0, "num_features must be a divisor of ", f.c, ", got ",
                    num_features);
    const int64_t chunk_channels = f.c / num_features, positions = chunk_channels * f.l;
    const int64_t chunks_ = f.n / group * num_features;
    STD_TORCH_CHECK(positions < int64_t{1} << 31, "x must have fewer than 2^31 elements per sample and feature, got ",
                    positions);
    STD_TORCH_CHECK(chunks_ < 65536, "x must have at most 65535 groups times features, got ", chunks_);
    STD_TORCH_CHECK(f.n < int64_t{1} << 31, "x must have fewer than 2^31 samples, got ", f.n);
    shape = {f.c,
             f.l,
             static_cast<int>(num_features),
             static_cast<int>(f.n / group),
             static_cast<int>(group),
             static_cast<int>(positions),
             static_cast<int>(chunk_channels),
             f.last,
             false,
             static_cast<float>(eps)};
    chunks = static_cast<unsigned>(chunks_);
    wide = true;
  }

  // Sets the access widths. like_x: all tensors of x's shape; like_y: all tensors of y's.
  void fit(int64_t width, std::initializer_list<const void*> like_x, std::initializer_list<const void*> like_y) {
    const int64_t all = shape.channels + shape.features;
    wide = (shape.last ? shape.chunk_channels : shape.positions) % width == 0 && aligned(like_x);
    shape.wide = wide && (shape.last ? all : shape.features * shape.pixels) % width == 0 && aligned(like_y);
  }

  unsigned parts(int width) const {
    return blocks(ceil_div(shape.positions, int64_t{kThreads} * width), std::max<int64_t>(1, kMostSums / chunks));
  }
  dim3 grid(int width) const { return dim3(parts(width), chunks); }
  dim3 map_grid() const { return dim3(chunks, static_cast<unsigned>(std::min<int64_t>(shape.group, kMostAcross))); }
};

// [N, C + F, H, W] in the memory format of x.
Tensor with_maps(const Tensor& x, const Shape& s) {
  const std::vector<int64_t> sizes{x.size(0), s.channels + s.features, x.size(2), x.size(3)};
  const auto format = is_dense(x, false) ? torch::headeronly::MemoryFormat::Contiguous
                                      : torch::headeronly::MemoryFormat::ChannelsLast;
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt, format);
}

void check_with_maps(const Tensor& dy, const Tensor& x, const Shape& s) {
  check_device(dy, "dy");
  STD_TORCH_CHECK(dy.scalar_type() == x.scalar_type() && dy.dim() == 4 && dy.size(0) == x.size(0) &&
                      dy.size(1) == s.channels + s.features && dy.size(2) == x.size(2) && dy.size(3) == x.size(3) &&
                      is_dense(dy, !is_dense(x, false)),
                  "dy must be [N, C + num_features, H, W] with the dtype and memory format of x");
}

}  // namespace

Tensor minibatch_stddev_forward(const Tensor& x, int64_t group, int64_t num_features, double eps) {
  Call call(x, group, num_features, eps);
  const Tensor y = with_maps(x, call.shape);
  const Launcher launch(x);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    call.fit(kWide<T>, {data<T>(x)}, {data<T>(y)});
    with_width<T>(call.wide, [&](auto width) {
      constexpr int W = width();
      const Tensor partial = floats(x, {call.chunks, call.parts(W)});
      launch(stddev_forward<T, W>, call.grid(W), dim3(kThreads), call.shape, data<T>(x), output<T>(y),
             output<float>(partial));
      launch(write_maps<T>, call.map_grid(), dim3(kThreads), call.shape, data<float>(partial),
             static_cast<int>(call.parts(W)), output<T>(y));
    });
  });
  return y;
}

std::tuple<Tensor, Tensor> minibatch_stddev_backward(const Tensor& dy, const Tensor& x, int64_t group,
                                                     int64_t num_features, double eps) {
  Call call(x, group, num_features, eps);
  check_with_maps(dy, x, call.shape);
  const Tensor dx = torch::stable::empty_like(x);
  const Tensor t = floats(x, {call.shape.groups, call.shape.features});
  const Launcher launch(x);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    call.fit(kWide<T>, {data<T>(x), data<T>(dx)}, {data<T>(dy)});
    launch(sum_maps<T>, dim3(call.chunks), dim3(kMapThreads), call.shape, data<T>(dy), output<float>(t));
    with_width<T>(call.wide, [&](auto width) {
      constexpr int W = width();
      launch(group <= kKept ? stddev_backward<T, W, true> : stddev_backward<T, W, false>, call.grid(W), dim3(kThreads),
             call.shape, data<T>(dy), data<T>(x), data<float>(t), output<T>(dx));
    });
  });
  return {dx, t};
}

std::tuple<Tensor, Tensor> minibatch_stddev_second_backward(const Tensor& u, const Tensor& x, const Tensor& t,
                                                            int64_t group, int64_t num_features, double eps) {
  Call call(x, group, num_features, eps);
  check_like(u, "u", x, features(x));
  check_floats(t, "t", call.chunks);
  const Tensor gdy = with_maps(x, call.shape), gx = torch::stable::empty_like(x);
  const Launcher launch(x);
  dispatch(x, [&](auto element) {
    using T = decltype(element);
    call.fit(kWide<T>, {data<T>(x), data<T>(u), data<T>(gx)}, {data<T>(gdy)});
    with_width<T>(call.wide, [&](auto width) {
      constexpr int W = width();
      const Tensor partial = floats(x, {call.chunks, call.parts(W)});
      launch(group <= kKept ? stddev_second_backward<T, W, true> : stddev_second_backward<T, W, false>, call.grid(W),
             dim3(kThreads), call.shape, data<T>(u), data<T>(x), data<float>(t), output<T>(gdy), output<T>(gx),
             output<float>(partial));
      launch(write_maps<T>, call.map_grid(), dim3(kThreads), call.shape, data<float>(partial),
             static_cast<int>(call.parts(W)), output<T>(gdy));
    });
  });
  return {gdy, gx};
}

FASTGAN_CUDA_OP(minibatch_stddev_forward);
FASTGAN_CUDA_OP(minibatch_stddev_backward);
FASTGAN_CUDA_OP(minibatch_stddev_second_backward);

}  // namespace fastgan
