// Mean over non-overlapping kernel_size x kernel_size windows, and its gradient, which spreads each value over its
// window. Limited by memory bandwidth; on contiguous planes ATen's forward takes 4 times as long, its nearest
// upsampling 5 times.
#include "features.h"

namespace fastgan {

namespace {

struct Planes {
  int64_t n, c, h, w, k;
  int64_t oh() const { return h / k; }
  int64_t ow() const { return w / k; }
};

// K is k if known at compile time, else 0.
template <int64_t K, class T>
void pool_row(const T* x, int64_t stride, T* y, int64_t width, int64_t k) {
  const int64_t side = K ? K : k;
  const float scale = 1.0f / static_cast<float>(side * side);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    float sum = 0.0f;
    for (int64_t a = 0; a < side; ++a) {
      for (int64_t b = 0; b < side; ++b) sum += load(x + a * stride + j * side + b);
    }
    store(y + j, sum * scale);
  }
}

template <int64_t K, class T>
void spread_row(const T* dy, T* dx, int64_t width, int64_t k) {
  const int64_t side = K ? K : k;
  const float scale = 1.0f / static_cast<float>(side * side);
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) {
    const float value = load(dy + j) * scale;
    for (int64_t b = 0; b < side; ++b) store(dx + j * side + b, value);
  }
}

template <class T>
void zero(T* p, int64_t count) {
  if (count > 0) std::memset(static_cast<void*>(p), 0, static_cast<size_t>(count) * sizeof(T));
}

template <class T>
void pool_planes(const T* x, T* y, const Planes& p) {
  parallel(p.n * p.c * p.oh(), p.w * p.k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + ((row / p.oh()) * p.h + (row % p.oh()) * p.k) * p.w;
      if (p.k == 2) {
        pool_row<2>(from, p.w, y + row * p.ow(), p.ow(), p.k);
      } else {
        pool_row<0>(from, p.w, y + row * p.ow(), p.ow(), p.k);
      }
    }
  });
}

template <class T>
void spread_planes(const T* dy, T* dx, const Planes& p) {
  parallel(p.n * p.c * p.h, p.w * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = dx + row * p.w;
      const int64_t above = (row % p.h) / p.k;
      if (above >= p.oh()) {
        zero(to, p.w);
        continue;
      }
      const T* from = dy + ((row / p.h) * p.oh() + above) * p.ow();
      if (p.k == 2) {
        spread_row<2>(from, to, p.ow(), p.k);
      } else {
        spread_row<0>(from, to, p.ow(), p.k);
      }
      zero(to + p.ow() * p.k, p.w - p.ow() * p.k);
    }
  });
}

// Above this size, in bytes, the next pixels are prefetched explicitly: the hardware prefetcher does not follow that
// many short runs.
constexpr int64_t kFar = int64_t{1} << 24;

template <class T>
void prefetch(const T* p, int64_t count) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
#endif
}

// channels_last, c channels: y[j] is the mean over a window of side x side pixels.
template <int64_t K, class T>
void pool_row_of_pixels(const T* x, int64_t stride, T* y, int64_t width, int64_t c, int64_t k, bool far) {
  const int64_t side = K ? K : k;
  const float scale = 1.0f / static_cast<float>(side * side);
  for (int64_t j = 0; j < width; ++j, x += side * c, y += c) {
    for (int64_t a = 0; far && j + 1 < width && a < side; ++a) prefetch(x + a * stride + side * c, side * c);
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      float sum = 0.0f;
      for (int64_t a = 0; a < side; ++a) {
        for (int64_t b = 0; b < side; ++b) sum += load(x + a * stride + b * c + i);
      }
      store(y + i, sum * scale);
    }
  }
}

template <int64_t K, class T>
void spread_row_of_pixels(const T* dy, T* dx, int64_t width, int64_t c, int64_t k) {
  const int64_t side = K ? K : k;
  const float scale = 1.0f / static_cast<float>(side * side);
  for (int64_t j = 0; j < width; ++j, dy += c, dx += side * c) {
#pragma omp simd
    for (int64_t i = 0; i < c; ++i) {
      const float value = load(dy + i) * scale;
      for (int64_t b = 0; b < side; ++b) store(dx + b * c + i, value);
    }
  }
}

template <class T>
void pool_pixels(const T* x, T* y, const Planes& p) {
  const bool far = p.n * p.c * p.h * p.w * static_cast<int64_t>(sizeof(T)) > kFar;
  parallel(p.n * p.oh(), p.w * p.c * p.k * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* from = x + ((row / p.oh()) * p.h + (row % p.oh()) * p.k) * p.w * p.c;
      (p.k == 2 ? pool_row_of_pixels<2, T> : pool_row_of_pixels<0, T>)(from, p.w * p.c, y + row * p.ow() * p.c, p.ow(),
                                                                       p.c, p.k, far);
    }
  });
}

template <class T>
void spread_pixels(const T* dy, T* dx, const Planes& p) {
  parallel(p.n * p.h, p.w * p.c * static_cast<int64_t>(sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* to = dx + row * p.w * p.c;
      const int64_t above = (row % p.h) / p.k;
      if (above >= p.oh()) {
        zero(to, p.w * p.c);
        continue;
      }
      const T* from = dy + ((row / p.h) * p.oh() + above) * p.ow() * p.c;
      (p.k == 2 ? spread_row_of_pixels<2, T> : spread_row_of_pixels<0, T>)(from, to, p.ow(), p.c, p.k);
      zero(to + p.ow() * p.k * p.c, (p.w - p.ow() * p.k) * p.c);
    }
  });
}

// An uninitialized image with x's dtype, channels and memory format.
template <class T>
Tensor sized(const Tensor& x, bool last, int64_t height, int64_t width) {
  return fresh_map<T>(x, x.scalar_type(), x.size(0), x.size(1), height, width, last);
}

void check_planes(const Tensor& x, const char* name, int64_t kernel_size) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(kernel_size >= 1, "kernel_size must be at least 1, got ", kernel_size);
}

}  // namespace

Tensor avg_pool2d_forward(const Tensor& x, int64_t kernel_size) {
  check_planes(x, "x", kernel_size);
  const Features f = features(x);
  const Planes p{f.n, f.c, x.size(2), x.size(3), kernel_size};
  STD_TORCH_CHECK(p.oh() > 0 && p.ow() > 0, "x must be at least ", kernel_size, " x ", kernel_size,
                  ", the window, got ", p.h, " x ", p.w);
  return dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const Tensor y = sized<T>(x, f.last, p.oh(), p.ow());
    (f.last ? pool_pixels<T> : pool_planes<T>)(data<T>(x), output<T>(y), p);
    return y;
  });
}

Tensor avg_pool2d_backward(const Tensor& dy, int64_t kernel_size, int64_t height, int64_t width) {
  check_planes(dy, "dy", kernel_size);
  const Features f = features(dy);
  const Planes p{f.n, f.c, height, width, kernel_size};
  STD_TORCH_CHECK(p.oh() == dy.size(2) && p.ow() == dy.size(3), "dy must be ", p.oh(), " x ", p.ow(),
                  ", the size of the pooled image, got ", dy.size(2), " x ", dy.size(3));
  return dispatch(dy, "dy", [&](auto element) {
    using T = decltype(element);
    const Tensor dx = sized<T>(dy, f.last, height, width);
    (f.last ? spread_pixels<T> : spread_planes<T>)(data<T>(dy), output<T>(dx), p);
    return dx;
  });
}

FASTGAN_OP(avg_pool2d_forward, "(Tensor x, int kernel_size) -> Tensor");
FASTGAN_OP(avg_pool2d_backward, "(Tensor dy, int kernel_size, int height, int width) -> Tensor");

}  // namespace fastgan
