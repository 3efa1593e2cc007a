// Bilinear sampling of images on affine grids, and its adjoint, which adds each value to the four pixels around its
// position. Both compute the positions anew instead of storing them: an image has few channels.
#include <cmath>

#include "features.h"

namespace fastgan {

namespace {

// For a row of output pixels: offsets of the four pixels around each position, in elements, and their weights.
struct Corners {
  int32_t* at[4];
  float* weight[4];

  static int64_t floats(int64_t width) { return 8 * width; }
  Corners(float* scratch, int64_t width) {
    for (int64_t a = 0; a < 4; ++a) {
      weight[a] = scratch + a * width;
      at[a] = reinterpret_cast<int32_t*>(scratch + (4 + a) * width);
    }
  }
};

// The two pixels around a position along one axis, and their weights. Pixels outside of the image have weight 0.
struct Pair {
  int32_t low, high;
  float below, above;
};

// No branches: loops over it vectorize. NaN becomes a valid pixel with a weight of NaN.
template <bool Reflect>
inline Pair pair_at(float at, int32_t size) {
  const float count = static_cast<float>(size);
  if constexpr (Reflect) {
    // Twice the size is a period; in each, the second half is the mirror image of the first.
    const float period = 2.0f * count;
    at += 0.5f;
    at -= period * std::floor(at / period);
    at = std::min(at, period - at) - 0.5f;
  }
  const float inside =
      Reflect ? std::min(std::max(0.0f, at), count - 1.0f) : std::min(std::max(-2.0f, at), count + 1.0f);
  const float low = std::floor(inside);
  const float above = (inside - low) + 0.0f * at, below = 1.0f - above;  // infinity becomes NaN, as in PyTorch
  const int32_t first = static_cast<int32_t>(low), second = first + 1, last = size - 1;
  return {std::min(std::max(first, 0), last), std::min(std::max(second, 0), last),
          first >= 0 && first <= last ? below : 0.0f * below, second >= 0 && second <= last ? above : 0.0f * above};
}

// The map of one image: output pixel to input position, in pixels from the center, so that permutations are exact.
class Map {
 public:
  Map(const float* theta, int64_t height, int64_t width)
      : h_(static_cast<int32_t>(height)), w_(static_cast<int32_t>(width)), cx_(0.5f * static_cast<float>(width - 1)),
        cy_(0.5f * static_cast<float>(height - 1)) {
    const float h = static_cast<float>(height), w = static_cast<float>(width);
    xx_ = theta[0], xy_ = theta[1] * (w / h), x0_ = theta[2] * (0.5f * w) + cx_;
    yx_ = theta[3] * (h / w), yy_ = theta[4], y0_ = theta[5] * (0.5f * h) + cy_;
    identity_ = theta[0] == 1.0f && theta[1] == 0.0f && theta[2] == 0.0f && theta[3] == 0.0f && theta[4] == 1.0f &&
                theta[5] == 0.0f;
  }

  // Images that are copied: at low strengths of an augmentation, most.
  bool identity() const { return identity_; }

  // Corners of the output pixels of row i, for pixels that are `step` elements apart.
  template <bool Reflect>
  void row(int64_t i, int32_t step, const Corners& corners) const {
    const float y = static_cast<float>(i) - cy_;
    int32_t *p0 = corners.at[0], *p1 = corners.at[1], *p2 = corners.at[2], *p3 = corners.at[3];
    float *q0 = corners.weight[0], *q1 = corners.weight[1], *q2 = corners.weight[2], *q3 = corners.weight[3];
#pragma omp simd
    for (int32_t j = 0; j < w_; ++j) {
      const float x = static_cast<float>(j) - cx_;
      const Pair column = pair_at<Reflect>(xx_ * x + xy_ * y + x0_, w_);
      const Pair line = pair_at<Reflect>(yx_ * x + yy_ * y + y0_, h_);
      p0[j] = (line.low * w_ + column.low) * step, q0[j] = line.below * column.below;
      p1[j] = (line.low * w_ + column.high) * step, q1[j] = line.below * column.above;
      p2[j] = (line.high * w_ + column.low) * step, q2[j] = line.above * column.below;
      p3[j] = (line.high * w_ + column.high) * step, q3[j] = line.above * column.above;
    }
  }

 private:
  int32_t h_, w_;
  bool identity_;
  float cx_, cy_, xx_, xy_, x0_, yx_, yy_, y0_;
};

// Strides, in elements, of a pixel and of a channel of an image.
struct Strides {
  int64_t pixel, channel;
};

template <class T>
void sample_row(const T* x, const Corners& k, T* y, int64_t width, int64_t channels, const Strides& s) {
  const int32_t *p0 = k.at[0], *p1 = k.at[1], *p2 = k.at[2], *p3 = k.at[3];
  const float *q0 = k.weight[0], *q1 = k.weight[1], *q2 = k.weight[2], *q3 = k.weight[3];
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = x + c * s.channel;
    T* to = y + c * s.channel;
    for (int64_t j = 0; j < width; ++j) {
      store(to + j * s.pixel, q0[j] * load(from + p0[j]) + q1[j] * load(from + p1[j]) + q2[j] * load(from + p2[j]) +
                                  q3[j] * load(from + p3[j]));
    }
  }
}

template <class T>
void spread_row(const T* dy, const Corners& k, float* dx, int64_t width, int64_t channels, const Strides& s) {
  for (int64_t c = 0; c < channels; ++c) {
    const T* from = dy + c * s.channel;
    float* to = dx + c * s.channel;
    for (int64_t j = 0; j < width; ++j) {
      const float value = load(from + j * s.pixel);
      for (int64_t a = 0; a < 4; ++a) to[k.at[a][j]] += k.weight[a][j] * value;
    }
  }
}

Features check(const Tensor& x, const char* name, const Tensor& theta) {
  STD_TORCH_CHECK(x.dim() == 4, name, " must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(theta.is_cpu() && theta.scalar_type() == ScalarType::Float && theta.is_contiguous() &&
                      theta.numel() == 6 * x.size(0),
                  "theta must be Float [", x.size(0), ", 2, 3], contiguous on the CPU");
  const Features f = features(x);
  STD_TORCH_CHECK(f.c * f.l < int64_t{1} << 31, name, " must have less than 2**31 elements in an image");
  return f;
}

template <bool Reflect, class T>
void sample(const T* x, const float* theta, T* y, const Features& f, int64_t h, int64_t w, const Tensor& like) {
  const Strides s = f.last ? Strides{f.c, 1} : Strides{1, f.l};
  const int64_t size = f.c * f.l;
  parallel_with_scratch(like, f.n * h, w * (16 + 8 * f.c), Corners::floats(w), [&](int64_t begin, int64_t end,
                                                                                   float* scratch) {
    const Corners corners(scratch, w);
    for (int64_t row = begin; row < end; ++row) {
      const int64_t image = row / h, i = row % h;
      const T* from = x + image * size;
      T* to = y + image * size + i * w * s.pixel;
      const Map map(theta + 6 * image, h, w);
      if (map.identity()) {
        const int64_t runs = f.last ? 1 : f.c, length = f.last ? w * f.c : w;
        for (int64_t c = 0; c < runs; ++c) {
          std::copy_n(from + i * w * s.pixel + c * s.channel, length, to + c * s.channel);
        }
      } else {
        map.row<Reflect>(i, static_cast<int32_t>(s.pixel), corners);
        sample_row(from, corners, to, w, f.c, s);
      }
    }
  });
}

template <bool Reflect, class T>
void spread(const T* dy, const float* theta, T* dx, const Features& f, int64_t h, int64_t w, const Tensor& like) {
  const Strides s = f.last ? Strides{f.c, 1} : Strides{1, f.l};
  const int64_t size = f.c * f.l;
  constexpr bool in_place = std::is_same_v<T, float>;
  const int64_t floats = Corners::floats(w) + (in_place ? 0 : size);
  // A whole image for each thread: rows of one image add to the same pixels.
  parallel_with_scratch(like, f.n, h * w * (16 + 12 * f.c), floats, [&](int64_t begin, int64_t end, float* scratch) {
    const Corners corners(scratch, w);
    for (int64_t image = begin; image < end; ++image) {
      const T* from = dy + image * size;
      T* to = dx + image * size;
      const Map map(theta + 6 * image, h, w);
      if (map.identity()) {
        std::copy_n(from, size, to);
        continue;
      }
      float* sums;
      if constexpr (in_place) {
        sums = to;
      } else {
        sums = scratch + Corners::floats(w);
      }
      std::fill_n(sums, size, 0.0f);
      for (int64_t i = 0; i < h; ++i) {
        map.row<Reflect>(i, static_cast<int32_t>(s.pixel), corners);
        spread_row(from + i * w * s.pixel, corners, sums, w, f.c, s);
      }
      if constexpr (!in_place) {
        for (int64_t k = 0; k < size; ++k) store(to + k, sums[k]);
      }
    }
  });
}

}  // namespace

Tensor affine_grid_sample_forward(const Tensor& x, const Tensor& theta, bool reflect) {
  const Features f = check(x, "x", theta);
  return dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const Tensor y = fresh_like<T>(x);
    (reflect ? sample<true, T> : sample<false, T>)(data<T>(x), data<float>(theta), output<T>(y), f, x.size(2),
                                                   x.size(3), x);
    return y;
  });
}

Tensor affine_grid_sample_backward(const Tensor& dy, const Tensor& theta, bool reflect) {
  const Features f = check(dy, "dy", theta);
  return dispatch(dy, "dy", [&](auto element) {
    using T = decltype(element);
    const Tensor dx = fresh_like<T>(dy);
    (reflect ? spread<true, T> : spread<false, T>)(data<T>(dy), data<float>(theta), output<T>(dx), f, dy.size(2),
                                                   dy.size(3), dy);
    return dx;
  });
}

FASTGAN_OP(affine_grid_sample_forward, "(Tensor x, Tensor theta, bool reflect) -> Tensor");
FASTGAN_OP(affine_grid_sample_backward, "(Tensor dy, Tensor theta, bool reflect) -> Tensor");

}  // namespace fastgan
