// minibatch_stddev on the CPU, forward and both backwards. The formulas are in fastgan/ops/minibatch_stddev.py. Each
// pass sweeps memory once: a block of positions is read for all samples of its group, and the appended maps are written
// last.
#include <cmath>

#include "features.h"

namespace fastgan {

namespace {

constexpr int64_t kBlock = 256;

// Layout of x [N, C, H, W] and y [N, C + F, H, W], in the same memory format, with M strided groups of G samples.
struct Grouping {
  Features f;
  int64_t group, groups, maps, chunk;  // G, M, F, C / F
  int64_t in_sample, out_sample;       // elements per sample of x and of y
  int64_t parts;                       // units of work per group

  Grouping(const Tensor& x, int64_t group, int64_t num_features) : f(features(x)), group(group), maps(num_features) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(group >= 1 && f.n % group == 0, "group must be a divisor of ", f.n, ", got ", group);
    STD_TORCH_CHECK(maps >= 1 && f.c % maps == 0, "num_features must be a divisor of ", f.c, ", got ", maps);
    groups = f.n / group;
    chunk = f.c / maps;
    in_sample = f.c * f.l;
    out_sample = (f.c + maps) * f.l;
    parts = f.last ? pixels().number : maps * positions().number;
  }

  int64_t per_map() const { return chunk * f.l; }
  Parts positions() const { return Parts(per_map(), 4096, 1024); }
  Parts pixels() const { return Parts(f.l, std::max<int64_t>(1, 4096 / f.c), 1024); }

  // Calls body(map, offset in a sample of x, offset in a sample of y, elements) for the contiguous runs of a part.
  template <class B>
  void for_runs(int64_t part, const B& body) const {
    if (f.last) {
      const Parts range = pixels();
      for (int64_t pixel = range.begin(part); pixel < range.end(part); ++pixel) {
        for (int64_t map = 0; map < maps; ++map) {
          body(map, pixel * f.c + map * chunk, pixel * (f.c + maps) + map * chunk, chunk);
        }
      }
    } else {
      const Parts range = positions();
      const int64_t map = part / range.number, begin = range.begin(part % range.number);
      const int64_t end = range.end(part % range.number), offset = map * per_map();
      body(map, offset + begin, offset + begin, end - begin);
    }
  }

  // Offset of an appended map in a sample of y, and the distance between its pixels.
  int64_t map_offset(int64_t map) const { return f.last ? f.c + map : (f.c + map) * f.l; }
  int64_t map_stride() const { return f.last ? f.c + maps : 1; }
};

// Sums per group and map, in parts that depend on sizes alone.
class MapSums {
 public:
  explicit MapSums(const Grouping& g)
      : g_(g), partial_(static_cast<size_t>(g.groups * g.parts * g.maps), 0.0) {}

  double* part(int64_t unit) { return partial_.data() + unit * g_.maps; }

  // [M, F]: each sum divided by the number of its elements.
  std::vector<float> means() const {
    std::vector<float> result(static_cast<size_t>(g_.groups * g_.maps));
    for (int64_t m = 0; m < g_.groups; ++m) {
      for (int64_t map = 0; map < g_.maps; ++map) {
        double sum = 0.0;
        for (int64_t part = 0; part < g_.parts; ++part) {
          sum += partial_[static_cast<size_t>((m * g_.parts + part) * g_.maps + map)];
        }
        result[static_cast<size_t>(m * g_.maps + map)] = static_cast<float>(sum / static_cast<double>(g_.per_map()));
      }
    }
    return result;
  }

 private:
  const Grouping& g_;
  std::vector<double> partial_;
};

// Mean over the samples of a group, and variance + eps, at `count` positions of which x is the first sample's first.
template <class T>
void moments(const T* x, int64_t group, int64_t stride, int64_t count, float eps, float* mean, float* variance) {
  const auto samples = static_cast<float>(group);
  std::fill(mean, mean + count, 0.0f);
  std::fill(variance, variance + count, 0.0f);
  for (int64_t g = 0; g < group; ++g) {
    const T* const from = x + g * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) mean[i] += load(from + i);
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) mean[i] /= samples;
  for (int64_t g = 0; g < group; ++g) {
    const T* const from = x + g * stride;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) {
      const float d = load(from + i) - mean[i];
      variance[i] += d * d;
    }
  }
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) variance[i] = variance[i] / samples + eps;
}

template <class T>
void append(const Grouping& g, const std::vector<float>& values, T* y) {
  const int64_t stride = g.map_stride();
  const float* const value = values.data();
  parallel(g.f.n, g.maps * g.f.l, [=, &g](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      for (int64_t map = 0; map < g.maps; ++map) {
        T* const to = y + n * g.out_sample + g.map_offset(map);
        T stored;
        store(&stored, value[n % g.groups * g.maps + map]);
        for (int64_t l = 0; l < g.f.l; ++l) to[l * stride] = stored;
      }
    }
  });
}

// Calls f(group, unit of work, map, offset in x, offset in y, elements) for all blocks of all groups.
template <class F>
void blocks(const Grouping& g, int64_t arrays, const F& f) {
  const int64_t work = arrays * g.group * (g.in_sample / g.parts + 1);
  parallel(g.groups * g.parts, work, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      g.for_runs(unit % g.parts, [&](int64_t map, int64_t in, int64_t out, int64_t count) {
        for (int64_t i = 0; i < count; i += kBlock) {
          f(unit / g.parts, unit, map, in + i, out + i, std::min(kBlock, count - i));
        }
      });
    }
  });
}

template <class T>
Tensor fresh_appended(const Tensor& x, const Grouping& g) {
  using torch::headeronly::MemoryFormat;
  const auto sizes = x.sizes();
  const std::vector<int64_t> of{sizes[0], g.f.c + g.maps, sizes[2], sizes[3]};
  return fresh<T>(torch::stable::empty(of, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                                       g.f.last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous));
}

}  // namespace

Tensor minibatch_stddev_forward(const Tensor& x, int64_t group, int64_t num_features, double eps) {
  const Grouping g(x, group, num_features);
  return dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const Tensor y = fresh_appended<T>(x, g);
    const T* const from = data<T>(x);
    T* const to = output<T>(y);
    const int64_t in_stride = g.groups * g.in_sample, out_stride = g.groups * g.out_sample;
    MapSums sums(g);
    blocks(g, 2, [&](int64_t m, int64_t unit, int64_t map, int64_t in, int64_t out, int64_t count) {
      alignas(64) float mean[kBlock], variance[kBlock];
      const T* const first = from + m * g.in_sample + in;
      moments(first, g.group, in_stride, count, static_cast<float>(eps), mean, variance);
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += std::sqrt(variance[i]);
      sums.part(unit)[map] += sum;
      for (int64_t k = 0; k < g.group; ++k) {
        std::copy_n(first + k * in_stride, count, to + m * g.out_sample + out + k * out_stride);
      }
    });
    append(g, sums.means(), to);
    return y;
  });
}

std::tuple<Tensor, Tensor> minibatch_stddev_backward(const Tensor& dy, const Tensor& x, int64_t group,
                                                     int64_t num_features, double eps) {
  const Grouping g(x, group, num_features);
  STD_TORCH_CHECK(dy.is_cpu() && dy.scalar_type() == x.scalar_type(), "dy must have the dtype and device of x");
  STD_TORCH_CHECK(dy.dim() == 4 && dy.size(0) == x.size(0) && dy.size(1) == g.f.c + g.maps &&
                      dy.size(2) == x.size(2) && dy.size(3) == x.size(3) && is_dense(dy, g.f.last),
                  "dy must be [N, C + num_features, H, W] in the memory format of x");
  const Tensor t = fresh_floats(x, {g.groups, g.maps});
  return dispatch(x, "x", [&](auto element) -> std::tuple<Tensor, Tensor> {
    using T = decltype(element);
    const Tensor dx = fresh_like<T>(x);
    const T *const from = data<T>(x), *const gradient = data<T>(dy);
    T* const to = output<T>(dx);
    float* const totals = output<float>(t);
    const int64_t in_stride = g.groups * g.in_sample, out_stride = g.groups * g.out_sample;

    std::vector<double> of_sample(static_cast<size_t>(g.f.n * g.maps));
    parallel(g.f.n, g.maps * g.f.l * (g.f.last ? 16 : 1), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        for (int64_t map = 0; map < g.maps; ++map) {
          const T* const map_gradient = gradient + n * g.out_sample + g.map_offset(map);
          double sum = 0.0;
          for (int64_t l = 0; l < g.f.l; ++l) sum += load(map_gradient + l * g.map_stride());
          of_sample[static_cast<size_t>(n * g.maps + map)] = sum;
        }
      }
    });
    for (int64_t at = 0; at < g.groups * g.maps; ++at) {
      double sum = 0.0;
      for (int64_t k = 0; k < g.group; ++k) sum += of_sample[static_cast<size_t>(k * g.groups * g.maps + at)];
      totals[at] = static_cast<float>(sum / static_cast<double>(g.per_map()));
    }

    blocks(g, 3, [&](int64_t m, int64_t, int64_t map, int64_t in, int64_t out, int64_t count) {
      alignas(64) float mean[kBlock], inverse[kBlock];
      const T* const first = from + m * g.in_sample + in;
      moments(first, g.group, in_stride, count, static_cast<float>(eps), mean, inverse);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) inverse[i] = 1.0f / std::sqrt(inverse[i]);
      const float factor = totals[m * g.maps + map] / static_cast<float>(g.group);
      for (int64_t k = 0; k < g.group; ++k) {
        const T *const a = first + k * in_stride, *const b = gradient + m * g.out_sample + out + k * out_stride;
        T* const c = to + m * g.in_sample + in + k * in_stride;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(c + i, load(b + i) + factor * inverse[i] * (load(a + i) - mean[i]));
      }
    });
    return {dx, t};
  });
}

std::tuple<Tensor, Tensor> minibatch_stddev_second_backward(const Tensor& u, const Tensor& x, const Tensor& t,
                                                            int64_t group, int64_t num_features, double eps) {
  const Grouping g(x, group, num_features);
  check_dense_like(u, "u", x, g.f.last);
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == ScalarType::Float && t.dim() == 2 && t.size(0) == g.groups &&
                      t.size(1) == g.maps && is_dense(t, false),
                  "t must be [N / group, num_features], Float, contiguous, on the CPU");
  const float* const totals = data<float>(t);
  return dispatch(x, "x", [&](auto element) -> std::tuple<Tensor, Tensor> {
    using T = decltype(element);
    const Tensor gdy = fresh_appended<T>(x, g), gx = fresh_like<T>(x);
    const T *const from = data<T>(x), *const along = data<T>(u);
    T *const to_gdy = output<T>(gdy), *const to_gx = output<T>(gx);
    const int64_t in_stride = g.groups * g.in_sample, out_stride = g.groups * g.out_sample;
    const auto samples = static_cast<float>(g.group);
    MapSums sums(g);
    blocks(g, 4, [&](int64_t m, int64_t unit, int64_t map, int64_t in, int64_t out, int64_t count) {
      alignas(64) float mean[kBlock], inverse[kBlock], u_mean[kBlock], ud_mean[kBlock];
      const int64_t at = m * g.in_sample + in;
      moments(from + at, g.group, in_stride, count, static_cast<float>(eps), mean, inverse);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) inverse[i] = 1.0f / std::sqrt(inverse[i]);
      // Because the mean is rounded, x - mean does not sum to 0 over the group; this matters if sigma is small.
      float rest[kBlock];
      std::fill(rest, rest + count, 0.0f);
      std::fill(u_mean, u_mean + count, 0.0f);
      std::fill(ud_mean, ud_mean + count, 0.0f);
      for (int64_t k = 0; k < g.group; ++k) {
        const T *const a = from + at + k * in_stride, *const b = along + at + k * in_stride;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          rest[i] += load(a + i) - mean[i];
          u_mean[i] += load(b + i);
        }
      }
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        rest[i] /= samples;
        u_mean[i] /= samples;
      }
      // mean((u - mean(u)) d) equals mean(u d), with less rounding.
      for (int64_t k = 0; k < g.group; ++k) {
        const T *const a = from + at + k * in_stride, *const b = along + at + k * in_stride;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) ud_mean[i] += (load(b + i) - u_mean[i]) * (load(a + i) - mean[i] - rest[i]);
      }
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < count; ++i) sum += ud_mean[i] * inverse[i];
      sums.part(unit)[map] += sum / samples;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) ud_mean[i] *= inverse[i] * inverse[i] / samples;
      const float factor = totals[m * g.maps + map] / samples;
      for (int64_t k = 0; k < g.group; ++k) {
        const T *const a = from + at + k * in_stride, *const b = along + at + k * in_stride;
        T* const c = to_gx + at + k * in_stride;
        std::copy_n(b, count, to_gdy + m * g.out_sample + out + k * out_stride);
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) {
          const float d = load(a + i) - mean[i] - rest[i];
          store(c + i, factor * inverse[i] * (load(b + i) - u_mean[i] - d * ud_mean[i]));
        }
      }
    });
    append(g, sums.means(), to_gdy);
    return {gdy, gx};
  });
}

FASTGAN_OP(minibatch_stddev_forward, "(Tensor x, int group, int num_features, float eps) -> Tensor");
FASTGAN_OP(minibatch_stddev_backward,
           "(Tensor dy, Tensor x, int group, int num_features, float eps) -> (Tensor, Tensor)");
FASTGAN_OP(minibatch_stddev_second_backward,
           "(Tensor u, Tensor x, Tensor t, int group, int num_features, float eps) -> (Tensor, Tensor)");

}  // namespace fastgan
