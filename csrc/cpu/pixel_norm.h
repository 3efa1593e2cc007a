// pixel_norm of act(x + bias) gain with a piecewise-linear act, forward and both backwards. The formulas are in
// fastgan/ops/bias_act_pixel_norm.py. Each pass reads a pixel's features twice, for sums and then for results, in tiles
// that stay in the L2 cache in between.
#pragma once

#include "act.h"
#include "features.h"

namespace fastgan {

template <class F>
decltype(auto) with_piecewise_linear(int64_t act, double negative_slope, double gain, const F& f) {
  const auto g = static_cast<float>(gain);
  if (act == kLinear) return f(LinearAct{g});
  if (act == kRelu) return f(ReluAct{g});
  STD_TORCH_CHECK(act == kLrelu, "act must be 0 to 2 (linear, relu, lrelu), got ", act);
  return f(LreluAct{g, static_cast<float>(negative_slope * gain)});
}

inline constexpr int64_t kMostPixels = 512;

// Features are summed in groups of this many, then the groups are summed: the second derivative is a small difference
// of large numbers, and one long sum would lose accuracy in it.
inline constexpr int64_t kChain = 16;

// Pixels in a tile of a contiguous x, such that `arrays` inputs with c features stay in cache.
inline int64_t tile_pixels(const Features& f, int64_t arrays) {
  const int64_t most = (int64_t{1} << 17) / (f.c * arrays) / 64 * 64;  // 512 KiB of floats
  return std::min(std::max<int64_t>(most, 64), std::min(kMostPixels, f.l));
}

// Tiles of a contiguous x.
struct Tiles {
  Features f;
  int64_t size, per_sample;
  Tiles(const Features& f, int64_t arrays)
      : f(f), size(tile_pixels(f, arrays)), per_sample((f.l + size - 1) / size) {}
  int64_t number() const { return f.n * per_sample; }
  int64_t begin(int64_t tile) const { return tile % per_sample * size; }
  int64_t pixels(int64_t tile) const { return std::min(size, f.l - begin(tile)); }
  int64_t offset(int64_t tile) const { return tile / per_sample * f.c * f.l + begin(tile); }
  int64_t first_pixel(int64_t tile) const { return tile / per_sample * f.l + begin(tile); }
};

template <class T, class A>
void norm_forward_planes(const Features& f, const A act, const float* bias, float eps, const T* x, T* y, float* r) {
  const Tiles tiles(f, 1);
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(tiles.number(), 2 * f.c * tiles.size, [=](int64_t begin, int64_t end) {
    alignas(64) float sum[kMostPixels], part[kMostPixels];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t pixels = tiles.pixels(tile), offset = tiles.offset(tile);
      std::fill(sum, sum + pixels, 0.0f);
      for (int64_t first = 0; first < f.c; first += kChain) {
        std::fill(part, part + pixels, 0.0f);
        for (int64_t c = first; c < std::min(f.c, first + kChain); ++c) {
          const T* const from = x + offset + c * f.l;
          const float b = bias[c];
#pragma omp simd
          for (int64_t p = 0; p < pixels; ++p) {
            const float z = act.value(load(from + p) + b);
            part[p] += z * z;
          }
        }
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) sum[p] += part[p];
      }
      float* const scale = r + tiles.first_pixel(tile);
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) scale[p] = 1.0f / std::sqrt(sum[p] * share + eps);
      for (int64_t c = 0; c < f.c; ++c) {
        const T* const from = x + offset + c * f.l;
        T* const to = y + offset + c * f.l;
        const float b = bias[c];
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) store(to + p, act.value(load(from + p) + b) * scale[p]);
      }
    }
  });
}

template <class T, class A>
void norm_forward_rows(const Features& f, const A act, const float* bias, float eps, const T* x, T* y, float* r) {
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(f.pixels(), 2 * f.c, [=](int64_t begin, int64_t end) {
    for (int64_t pixel = begin; pixel < end; ++pixel) {
      const T* const from = x + pixel * f.c;
      T* const to = y + pixel * f.c;
      // Sums of whole vectors: GCC does not vectorize a reduction over the act's condition.
      float part[kVector] = {}, sum = 0.0f;
      int64_t first = 0;
      for (; first + kVector <= f.c; first += kVector) {
#pragma omp simd
        for (int64_t lane = 0; lane < kVector; ++lane) {
          const float z = act.value(load(from + first + lane) + bias[first + lane]);
          part[lane] += z * z;
        }
      }
      for (const float of_lane : part) sum += of_lane;
      for (; first < f.c; ++first) {
        const float z = act.value(load(from + first) + bias[first]);
        sum += z * z;
      }
      const float scale = 1.0f / std::sqrt(sum * share + eps);
      r[pixel] = scale;
#pragma omp simd
      for (int64_t c = 0; c < f.c; ++c) store(to + c, act.value(load(from + c) + bias[c]) * scale);
    }
  });
}

template <class T, class A>
void norm_backward_planes(const Features& f, const A act, const T* dy, const T* y, const float* r, T* dx, BiasSum& db,
                          const Tiles& tiles) {
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(tiles.number(), 3 * f.c * tiles.size, [=, &db](int64_t begin, int64_t end) {
    alignas(64) float mean[kMostPixels];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t pixels = tiles.pixels(tile), offset = tiles.offset(tile);
      const float* const scale = r + tiles.first_pixel(tile);
      std::fill(mean, mean + pixels, 0.0f);
      int64_t c = 0;
      for (; c + 2 <= f.c; c += 2) {
        const T *const a = dy + offset + c * f.l, *const b = y + offset + c * f.l;
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) {
          mean[p] += load(a + p) * load(b + p) + load(a + f.l + p) * load(b + f.l + p);
        }
      }
      for (; c < f.c; ++c) {
        const T *const a = dy + offset + c * f.l, *const b = y + offset + c * f.l;
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) mean[p] += load(a + p) * load(b + p);
      }
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) mean[p] *= share;
      for (c = 0; c < f.c; ++c) {
        const T *const a = dy + offset + c * f.l, *const b = y + offset + c * f.l;
        T* const to = dx + offset + c * f.l;
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) {
          const float out = load(b + p);
          store(to + p, act.slope(out, scale[p] * (load(a + p) - out * mean[p])));
        }
        if (db.wanted()) db.part(tile)[c] = sum_of(to, pixels);
      }
    }
  });
}

template <class T, class A>
void norm_backward_rows(const Features& f, const A act, const T* dy, const T* y, const float* r, T* dx, BiasSum& db,
                        const Parts& parts) {
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(parts.number, 3 * f.c * parts.size, [=, &db](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const sums = db.wanted() ? db.part(part) : nullptr;
      for (int64_t pixel = parts.begin(part); pixel < parts.end(part); ++pixel) {
        const T *const a = dy + pixel * f.c, *const b = y + pixel * f.c;
        T* const to = dx + pixel * f.c;
        float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t c = 0; c < f.c; ++c) mean += load(a + c) * load(b + c);
        mean *= share;
        const float scale = r[pixel];
#pragma omp simd
        for (int64_t c = 0; c < f.c; ++c) {
          const float out = load(b + c);
          store(to + c, act.slope(out, scale * (load(a + c) - out * mean)));
        }
        if (sums) add_to(sums, to, f.c);
      }
    }
  });
}

template <class T, class A>
void norm_second_planes(const Features& f, const A act, const T* u, const T* dy, const T* y, const float* r, T* gdy,
                        T* gx, BiasSum& gb, const Tiles& tiles) {
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(tiles.number(), 5 * f.c * tiles.size, [=, &gb](int64_t begin, int64_t end) {
    alignas(64) float wy[kMostPixels], dyy[kMostPixels], wdy[kMostPixels];
    alignas(64) float part_wy[kMostPixels], part_dyy[kMostPixels], part_wdy[kMostPixels];
    for (int64_t tile = begin; tile < end; ++tile) {
      const int64_t pixels = tiles.pixels(tile), offset = tiles.offset(tile);
      const float* const scale = r + tiles.first_pixel(tile);
      for (float* sum : {wy, dyy, wdy}) std::fill(sum, sum + pixels, 0.0f);
      for (int64_t first = 0; first < f.c; first += kChain) {
        for (float* sum : {part_wy, part_dyy, part_wdy}) std::fill(sum, sum + pixels, 0.0f);
        for (int64_t c = first; c < std::min(f.c, first + kChain); ++c) {
          const T *const a = u + offset + c * f.l, *const b = dy + offset + c * f.l, *const d = y + offset + c * f.l;
#pragma omp simd
          for (int64_t p = 0; p < pixels; ++p) {
            const float out = load(d + p), g = load(b + p), w = act.slope(out, load(a + p));
            part_wy[p] += w * out;
            part_dyy[p] += g * out;
            part_wdy[p] += w * g;
          }
        }
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) {
          wy[p] += part_wy[p];
          dyy[p] += part_dyy[p];
          wdy[p] += part_wdy[p];
        }
      }
#pragma omp simd
      for (int64_t p = 0; p < pixels; ++p) {
        wy[p] *= share;
        dyy[p] *= share;
        wdy[p] = 3.0f * wy[p] * dyy[p] - wdy[p] * share;  // from here: the factor of y in gx
      }
      for (int64_t c = 0; c < f.c; ++c) {
        const T *const a = u + offset + c * f.l, *const b = dy + offset + c * f.l, *const d = y + offset + c * f.l;
        T *const to_gdy = gdy + offset + c * f.l, *const to_gx = gx + offset + c * f.l;
#pragma omp simd
        for (int64_t p = 0; p < pixels; ++p) {
          const float out = load(d + p), g = load(b + p), w = act.slope(out, load(a + p)), s = scale[p];
          store(to_gdy + p, s * (w - out * wy[p]));
          store(to_gx + p, act.slope(out, s * s * (out * wdy[p] - w * dyy[p] - g * wy[p])));
        }
        if (gb.wanted()) gb.part(tile)[c] = sum_of(to_gx, pixels);
      }
    }
  });
}

template <class T, class A>
void norm_second_rows(const Features& f, const A act, const T* u, const T* dy, const T* y, const float* r, T* gdy,
                      T* gx, BiasSum& gb, const Parts& parts) {
  const float share = 1.0f / static_cast<float>(f.c);
  parallel(parts.number, 5 * f.c * parts.size, [=, &gb](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; ++part) {
      float* const sums = gb.wanted() ? gb.part(part) : nullptr;
      for (int64_t pixel = parts.begin(part); pixel < parts.end(part); ++pixel) {
        const T *const a = u + pixel * f.c, *const b = dy + pixel * f.c, *const d = y + pixel * f.c;
        T *const to_gdy = gdy + pixel * f.c, *const to_gx = gx + pixel * f.c;
        float wy = 0.0f, dyy = 0.0f, wdy = 0.0f;
#pragma omp simd reduction(+ : wy, dyy, wdy)
        for (int64_t c = 0; c < f.c; ++c) {
          const float out = load(d + c), g = load(b + c), w = act.slope(out, load(a + c));
          wy += w * out;
          dyy += g * out;
          wdy += w * g;
        }
        wy *= share;
        dyy *= share;
        const float factor = 3.0f * wy * dyy - wdy * share, s = r[pixel];
#pragma omp simd
        for (int64_t c = 0; c < f.c; ++c) {
          const float out = load(d + c), g = load(b + c), w = act.slope(out, load(a + c));
          store(to_gdy + c, s * (w - out * wy));
          store(to_gx + c, act.slope(out, s * s * (out * factor - w * dyy - g * wy)));
        }
        if (sums) add_to(sums, to_gx, f.c);
      }
    }
  });
}

inline Tensor pixel_statistic(const Tensor& x) {
  const auto sizes = x.sizes();
  std::vector<int64_t> of(sizes.begin(), sizes.end());
  of[1] = 1;
  return fresh_floats(x, of);
}

inline void check_statistic(const Tensor& r, const Features& f) {
  STD_TORCH_CHECK(r.is_cpu() && r.scalar_type() == ScalarType::Float, "r must be Float, on the CPU");
  STD_TORCH_CHECK(r.numel() == f.pixels() && is_dense(r, false), "r must be contiguous with one element per pixel");
}

template <class A>
std::tuple<Tensor, Tensor> norm_forward(const Tensor& x, const std::optional<Tensor>& bias, const A& act, double eps) {
  const Features f = as_rows(features(x));
  const std::vector<float> offsets = bias_values(bias, x, f.c);
  const Tensor r = pixel_statistic(x);
  Tensor y = dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    Tensor result = fresh_like<T>(x);
    const auto run = f.last ? norm_forward_rows<T, A> : norm_forward_planes<T, A>;
    run(f, act, offsets.data(), static_cast<float>(eps), data<T>(x), output<T>(result), output<float>(r));
    return result;
  });
  return {y, r};
}

template <class A>
std::tuple<Tensor, Tensor> norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, const A& act,
                                         bool want_bias) {
  const Features f = features(y), layout = as_rows(f);
  check_dense_like(dy, "dy", y, f.last);
  check_statistic(r, f);
  const Tiles tiles(layout, 2);
  const Parts parts = row_parts(layout);
  BiasSum db(want_bias, layout.last ? parts.number : tiles.number(), layout.c);
  Tensor dx = dispatch(y, "y", [&](auto element) {
    using T = decltype(element);
    Tensor result = fresh_like<T>(y);
    if (layout.last) {
      norm_backward_rows(layout, act, data<T>(dy), data<T>(y), data<float>(r), output<T>(result), db, parts);
    } else {
      norm_backward_planes(layout, act, data<T>(dy), data<T>(y), data<float>(r), output<T>(result), db, tiles);
    }
    return result;
  });
  return {dx, db.result(y)};
}

template <class A>
std::tuple<Tensor, Tensor, Tensor> norm_second_backward(const Tensor& u, const Tensor& dy, const Tensor& y,
                                                        const Tensor& r, const A& act, bool want_bias) {
  const Features f = features(y), layout = as_rows(f);
  check_dense_like(u, "u", y, f.last);
  check_dense_like(dy, "dy", y, f.last);
  check_statistic(r, f);
  const Tiles tiles(layout, 3);
  const Parts parts = row_parts(layout);
  BiasSum gb(want_bias, layout.last ? parts.number : tiles.number(), layout.c);
  return dispatch(y, "y", [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(element);
    Tensor gdy = fresh_like<T>(y), gx = fresh_like<T>(y);
    if (layout.last) {
      norm_second_rows(layout, act, data<T>(u), data<T>(dy), data<T>(y), data<float>(r), output<T>(gdy), output<T>(gx),
                       gb, parts);
    } else {
      norm_second_planes(layout, act, data<T>(u), data<T>(dy), data<T>(y), data<float>(r), output<T>(gdy),
                         output<T>(gx), gb, tiles);
    }
    return {gdy, gx, gb.result(y)};
  });
}

}  // namespace fastgan
