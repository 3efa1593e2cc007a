// Convolution with a 3x3 kernel and stride 1 in channels_last, and its gradients, by minimal filtering (Winograd; Lavin
// and Gray 2015, "Fast algorithms for convolutional neural networks"): 16 products of channels for four pixels where the
// direct sum takes 36. oneDNN has no such kernel any more.
//
//   y = A'[(G g G') * (B' d B)] A
//
// for tiles of 2x2 pixels y, the 4x4 pixels d around them and the kernel g. In the middle is an elementwise product over
// the 16 points, which summed over channels is one matrix product for each point. The transforms are linear, so
// gradients are the transposed maps: that of d is the convolution with the kernel turned and its channels exchanged, and
// that of g is G'[(A y A') * (B' d B)] G, summed over tiles.
//
// Before averaging over 2x2 pixels, and after nearest-neighbor upsampling by 2, one of the four points of each direction
// has the weight or the value 0: 9 products are left for each pixel of the smaller image, where one convolution of
// stride 2 takes 16.
//
// Tiles are taken in blocks whose transforms stay in a core's cache. Transforms and sums are float32; with bfloat16 maps
// the transformed values are rounded to bfloat16, two of which a product takes at once (winograd_products.h).
#include <vector>

#include "features.h"
#include "winograd_filters.h"
#include "winograd_products.h"

namespace fastgan {

namespace {

// Words of the transforms of a block of tiles: half of a second-level cache of 1 MB; the kernel is in the other half.
inline constexpr int64_t kBlockWords = int64_t{100} << 10;
// Parts of the tiles whose contributions to the kernel's gradient are summed apart; it does not depend on threads.
inline constexpr int64_t kGradientParts = 8;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Channels i and o of x [n, i, h, w] and y [n, o, oh, ow]; p: rows and columns of zero padding on each side.
template <class Filter, class T>
struct Shape {
  int64_t n, i, o, h, w, p;
  static constexpr int64_t pack = kPack<T>;
  static constexpr int64_t points = Filter::kPoints * Filter::kPoints;
  static int64_t scaled(int64_t size, int64_t padding) {
    if (Filter::kTaps == 3) return 2 * size;
    return Filter::kOutputs == 1 ? size / 2 : size + 2 * padding - 2;
  }
  int64_t oh() const { return scaled(h, p); }
  int64_t ow() const { return scaled(w, p); }
  int64_t rows() const { return (oh() + Filter::kOutputs - 1) / Filter::kOutputs; }
  int64_t columns() const { return (ow() + Filter::kOutputs - 1) / Filter::kOutputs; }
  int64_t tiles() const { return n * rows() * columns(); }
  int64_t ip() const { return round_up(i, kVector); }
  int64_t op() const { return round_up(o, kVector); }
  // Tiles of a block.
  int64_t block() const {
    const int64_t fit = kBlockWords / (points * (ip() / pack + op()));
    return std::min(std::max<int64_t>(fit / kTileRows, 1) * kTileRows, round_up(tiles(), kTileRows));
  }
  int64_t blocks() const { return (tiles() + block() - 1) / block(); }
  // Words that hold the channels of x, and those of the transformed kernel at one point.
  int64_t input_words() const { return (i + pack - 1) / pack; }
  int64_t kernel_words() const { return input_words() * op(); }
  // Words from one point to the next, a cache line more than needed: at a multiple of a page all would share a set.
  int64_t input_step() const { return block() * ip() / pack + 16; }
  int64_t output_step() const { return Filter::kOnePoint ? 0 : block() * op() + 16; }
  int64_t scratch() const { return points * (input_step() + output_step()) + block() * op(); }
  int64_t work() const { return block() * points * ip() * op(); }
};

struct Place {
  int64_t n, row, column;  // image, and the number of the tile in each direction
};

template <class Filter, class T>
Place place(const Shape<Filter, T>& s, int64_t tile) {
  const int64_t in_image = s.rows() * s.columns(), rest = tile % in_image;
  return {tile / in_image, rest / s.columns(), rest % s.columns()};
}

// B' d B of tiles [begin, end) of x, to v[point][tile][channel].
template <bool OverTiles, class Filter, class T>
void transform_input(const T* x, const Shape<Filter, T>& s, int64_t begin, int64_t end, float* v) {
  constexpr int64_t taps = Filter::kTaps, points = Filter::kPoints;
  const int64_t step = s.input_step();
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const T* from[taps][taps];
    for (int64_t r = 0; r < taps; ++r) {
      for (int64_t c = 0; c < taps; ++c) {
        const int64_t y = at.row * Filter::kStride - s.p + r, col = at.column * Filter::kStride - s.p + c;
        const bool inside = y >= 0 && y < s.h && col >= 0 && col < s.w;
        from[r][c] = inside ? x + ((at.n * s.h + y) * s.w + col) * s.i : nullptr;
      }
    }
    const Line<T, OverTiles> to(v, tile - begin, s.ip());
    for (int64_t channel = 0; channel < s.ip(); channel += kVector) {
      const int64_t count = s.i - channel;
      Vec t[points][taps];
#pragma GCC unroll 4
      for (int64_t c = 0; c < taps; ++c) {
        Vec d[taps], column[points];
#pragma GCC unroll 4
        for (int64_t r = 0; r < taps; ++r) d[r] = from[r][c] ? read_some(from[r][c] + channel, count) : Vec{};
        Filter::input(d, column);
#pragma GCC unroll 4
        for (int64_t r = 0; r < points; ++r) t[r][c] = column[r];
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < points; ++r) {
        Vec row[points];
        Filter::input(t[r], row);
#pragma GCC unroll 4
        for (int64_t c = 0; c < points; ++c) to.put((points * r + c) * step, channel, row[c]);
      }
    }
  }
}

// A' m A of tiles [begin, end), plus bias, to y.
template <class Filter, class T>
void transform_output(const float* m, const Shape<Filter, T>& s, int64_t begin, int64_t end, const float* bias, T* y) {
  constexpr int64_t outputs = Filter::kOutputs, points = Filter::kPoints;
  const int64_t step = s.output_step();
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const float* from = m + (tile - begin) * s.op();
    const bool second_row = outputs * at.row + 1 < s.oh(), second_column = outputs * at.column + 1 < s.ow();
    T* to = y + ((at.n * s.oh() + outputs * at.row) * s.ow() + outputs * at.column) * s.o;
    for (int64_t channel = 0; channel < s.o; channel += kVector) {
      const int64_t count = s.o - channel;
      const Vec start = read(bias + channel);
      if constexpr (Filter::kOnePoint) {
        write_some(to + channel, start + read(from + channel), count);
      } else {
        Vec t[2][points];
#pragma GCC unroll 4
        for (int64_t c = 0; c < points; ++c) {
          Vec column[points], pixels[2];
#pragma GCC unroll 4
          for (int64_t r = 0; r < points; ++r) column[r] = read(from + channel + (points * r + c) * step);
          Filter::output(column, pixels);
          t[0][c] = pixels[0];
          t[1][c] = pixels[1];
        }
#pragma GCC unroll 2
        for (int64_t r = 0; r < 2; ++r) {
          if (r == 1 && !second_row) break;
          T* pixel = to + r * s.ow() * s.o + channel;
          Vec pixels[2];
          Filter::output(t[r], pixels);
          write_some(pixel, start + pixels[0], count);
          if (second_column) write_some(pixel + s.o, start + pixels[1], count);
        }
      }
    }
  }
}

// A y A' of tiles [begin, end) of the output's gradient, to d[point][tile][channel].
template <class Filter, class T>
void transform_output_gradient(const T* gy, const Shape<Filter, T>& s, int64_t begin, int64_t end, float* d) {
  constexpr int64_t outputs = Filter::kOutputs, points = Filter::kPoints;
  const int64_t step = s.output_step();
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const bool second_row = outputs * at.row + 1 < s.oh(), second_column = outputs * at.column + 1 < s.ow();
    const T* from = gy + ((at.n * s.oh() + outputs * at.row) * s.ow() + outputs * at.column) * s.o;
    const Line<T, true> to(d, tile - begin, s.op());
    for (int64_t channel = 0; channel < s.op(); channel += kVector) {
      const int64_t count = s.o - channel;
      if constexpr (Filter::kOnePoint) {
        to.put(0, channel, read_some(from + channel, count));
      } else {
        Vec t[points][2];
#pragma GCC unroll 2
        for (int64_t c = 0; c < 2; ++c) {
          const bool there = c == 0 || second_column;
          Vec pixels[2], column[points];
          pixels[0] = there ? read_some(from + c * s.o + channel, count) : Vec{};
          pixels[1] = there && second_row ? read_some(from + (s.ow() + c) * s.o + channel, count) : Vec{};
          Filter::output_gradient(pixels, column);
#pragma GCC unroll 4
          for (int64_t r = 0; r < points; ++r) t[r][c] = column[r];
        }
#pragma GCC unroll 4
        for (int64_t r = 0; r < points; ++r) {
          Vec row[points];
          Filter::output_gradient(t[r], row);
#pragma GCC unroll 4
          for (int64_t c = 0; c < points; ++c) to.put((points * r + c) * step, channel, row[c]);
        }
      }
    }
  }
}

// `factor` G g G' of w [o, i, 3, 3], to u[point][panel of outputs][word of inputs][output]. For the gradient of the input,
// `adjoint` takes o for inputs and i for outputs, and turns the kernel.
template <class Filter, class T>
Tensor transformed_weight(const Tensor& w, bool adjoint, float factor, const Shape<Filter, T>& s) {
  constexpr int64_t points = Filter::kPoints, panel = kTileVectors * kVector;
  const int64_t rows = w.size(0), columns = w.size(1), inputs = s.input_words();
  const int64_t so = w.stride(0), si = w.stride(1), sy = w.stride(2), sx = w.stride(3);
  const Tensor u = fresh_floats(w, {s.points * s.kernel_words()});
  const T* from = data<T>(w);
  float* to = output<float>(u);
  if (s.op() != s.o) std::fill(to, to + u.numel(), 0.0f);
  parallel((rows + s.pack - 1) / s.pack, s.pack * columns * 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * s.pack; o < std::min(rows, end * s.pack); ++o) {
      for (int64_t i = 0; i < columns; i += kVector) {
        Vec t[3][points];  // columns of G g
        for (int64_t x = 0; x < 3; ++x) {
          Vec g[3];
          for (int64_t y = 0; y < 3; ++y) {
            const T* taps = from + o * so + i * si + (adjoint ? 2 - y : y) * sy + (adjoint ? 2 - x : x) * sx;
            g[y] = factor * read_strided(taps, si, columns - i);
          }
          Filter::kernel(g, t[x]);
        }
        const int64_t out = adjoint ? i : o, first = out / panel * panel, width = std::min(panel, s.op() - first);
        float* place = to + first * inputs + (adjoint ? 0 : i / s.pack * width) + out - first;
        for (int64_t r = 0; r < points; ++r) {
          const Vec row[3] = {t[0][r], t[1][r], t[2][r]};
          Vec wide[points];
          Filter::kernel(row, wide);
          for (int64_t c = 0; c < points; ++c, place += s.kernel_words()) {
            if (adjoint) {
              Line<T, true>(place, o, width).put(0, 0, wide[c]);
            } else {
              put_strided<T>(place, width, wide[c], inputs - i / s.pack);
            }
          }
        }
      }
    }
  });
  return u;
}

// G' (sum of the parts of u) G, to gw [o, i, 3, 3] in channels_last; u[part][point][i][o].
template <class Filter, class T>
void transform_weight_gradient(const float* u, int64_t parts, const Shape<Filter, T>& s, T* gw) {
  constexpr int64_t points = Filter::kPoints;
  const int64_t point = s.i * s.op();
  parallel(s.i, s.op() * parts * s.points, [&](int64_t begin, int64_t end) {
    alignas(64) float lanes[9][kVector];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = 0; o < s.o; o += kVector) {
        Vec t[points][3];  // columns of G' u
        for (int64_t c = 0; c < points; ++c) {
          Vec column[points] = {};
          for (int64_t part = 0; part < parts; ++part) {
            const float* from = u + part * s.points * point + c * point + i * s.op() + o;
            for (int64_t r = 0; r < points; ++r) column[r] += read(from + points * r * point);
          }
          Filter::kernel_gradient(column, t[c]);
        }
        for (int64_t y = 0; y < 3; ++y) {
          Vec row[points], g[3];
          for (int64_t c = 0; c < points; ++c) row[c] = t[c][y];
          Filter::kernel_gradient(row, g);
          for (int64_t x = 0; x < 3; ++x) write(lanes[3 * y + x], g[x]);
        }
        for (int64_t lane = 0; lane < std::min(kVector, s.o - o); ++lane) {
          for (int64_t tap = 0; tap < 9; ++tap) store(gw + ((o + lane) * 9 + tap) * s.i + i, lanes[tap][lane]);
        }
      }
    }
  });
}

template <class T>
Tensor channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  return fresh_map<T>(like, like.scalar_type(), n, c, h, w, true);
}

// f with a value of the element type, as `dispatch`; bfloat16 where the library was compiled for its instructions.
template <class F>
Tensor of_type(const Tensor& x, const F& f) {
#if defined(FASTGAN_BF16)
  return dispatch(x, "input", f);
#else
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "input must be Float, got ",
                  torch::headeronly::toString(x.scalar_type()));
  return f(float{});
#endif
}

void check_map(const Tensor& x, const char* name, ScalarType dtype) {
  STD_TORCH_CHECK(x.scalar_type() == dtype && x.is_cpu(), name, " must be ", torch::headeronly::toString(dtype),
                  ", on the CPU");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, " must be [N, C, H, W] and not empty");
  STD_TORCH_CHECK(is_dense(x, true), name, " must be dense, in channels_last");
}

void check_scale(int64_t padding, int64_t scale) {
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "padding must be 0, 1 or 2, got ", padding);
  STD_TORCH_CHECK(scale >= -1 && scale <= 1, "scale must be -1, 0 or 1, got ", scale);
  STD_TORCH_CHECK(scale == 0 || padding == 1, "padding must be 1 where the scale changes, got ", padding);
}

template <class Filter, class T>
void check_size(const Shape<Filter, T>& s) {
  STD_TORCH_CHECK(s.oh() > 0 && s.ow() > 0, "input must not be smaller than the kernel");
  STD_TORCH_CHECK(!Filter::kOnePoint || (s.h % 2 == 0 && s.w % 2 == 0), "input must have an even height and width");
}

// The convolution of x with w, or with `adjoint` that whose input gradient it is, times `factor`, plus bias.
template <class Filter, class T>
Tensor convolve(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t padding, bool adjoint,
                float factor) {
  check_map(x, "input", x.scalar_type());
  STD_TORCH_CHECK(w.scalar_type() == x.scalar_type() && w.is_cpu() && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3,
                  "weight must be [O, I, 3, 3], of the input's dtype, on the CPU");
  const int64_t channels = w.size(adjoint ? 0 : 1);
  STD_TORCH_CHECK(channels == x.size(1), "weight must have ", x.size(1), " channels, as input, got ", channels);
  const Shape<Filter, T> s{x.size(0), x.size(1), w.size(adjoint ? 1 : 0), x.size(2), x.size(3), padding};
  check_size(s);
  std::vector<float> start = bias_values(bias, x, s.o);
  start.resize(static_cast<size_t>(s.op()), 0.0f);
  const Tensor y = channels_last<T>(x, s.n, s.o, s.oh(), s.ow()), u = transformed_weight(w, adjoint, factor, s);
  const T* from = data<T>(x);
  const float* kernel = data<float>(u);
  T* to = output<T>(y);
  const auto range = [&](int64_t begin, int64_t end, float* scratch) {
    float *v = scratch, *m = scratch + s.points * s.input_step();
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * s.block(), last = std::min(first + s.block(), s.tiles());
      transform_input<false>(from, s, first, last, v);
      for (int64_t point = 0; point < s.points; ++point) {
        multiply<T>(Filter::kOnePoint && point > 0, v + point * s.input_step(), s.ip() / s.pack, 1,
                    kernel + point * s.kernel_words(), true, last - first, s.op(), s.input_words(),
                    m + point * s.output_step());
      }
      transform_output(m, s, first, last, start.data(), to);
    }
  };
  parallel_with_scratch(x, s.blocks(), s.work(), s.scratch(), range);
  return y;
}

template <class Filter, class T>
Tensor weight_gradient(const Tensor& gy, const Tensor& x, int64_t padding) {
  check_map(x, "x", x.scalar_type());
  check_map(gy, "gy", x.scalar_type());
  const Shape<Filter, T> s{x.size(0), x.size(1), gy.size(1), x.size(2), x.size(3), padding};
  check_size(s);
  STD_TORCH_CHECK(gy.size(0) == s.n && gy.size(2) == s.oh() && gy.size(3) == s.ow(),
                  "gy must have the size of the convolution of x");
  const T *from_x = data<T>(x), *from_y = data<T>(gy);
  const Parts parts(s.blocks(), 1, kGradientParts);
  const int64_t numel = s.points * s.i * s.op();
  const Tensor partial = fresh_floats(x, std::vector<int64_t>{parts.number * numel});
  float* sums = output<float>(partial);
  const auto range = [&](int64_t begin, int64_t end, float* scratch) {
    float *v = scratch, *d = scratch + s.points * s.input_step();
    for (int64_t part = begin; part < end; ++part) {
      float* sum = sums + part * numel;
      for (int64_t block = parts.begin(part); block < parts.end(part); ++block) {
        const int64_t first = block * s.block(), last = std::min(first + s.block(), s.tiles());
        transform_input<true>(from_x, s, first, last, v);
        transform_output_gradient(from_y, s, first, last, d);
        for (int64_t point = 0; point < s.points; ++point) {
          multiply<T>(block > parts.begin(part), v + point * s.input_step(), 1, s.ip(), d + point * s.output_step(),
                      false, s.i, s.op(), (last - first + s.pack - 1) / s.pack, sum + point * s.i * s.op());
        }
      }
    }
  };
  parallel_with_scratch(x, parts.number, parts.size * s.work(), s.scratch(), range);
  const Tensor gw = channels_last<T>(x, s.o, s.i, 3, 3);
  transform_weight_gradient(sums, parts.number, s, output<T>(gw));
  return gw;
}

}  // namespace

Tensor winograd_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t padding,
                        int64_t scale) {
  check_scale(padding, scale);
  return of_type(x, [&](auto element) {
    using T = decltype(element);
    const auto of = scale == 0 ? convolve<Same, T> : scale < 0 ? convolve<Down, T> : convolve<Up, T>;
    return of(x, w, bias, padding, false, 1.0f);
  });
}

Tensor winograd_input_gradient(const Tensor& gy, const Tensor& w, int64_t padding, int64_t scale) {
  check_scale(padding, scale);
  return of_type(gy, [&](auto element) {
    using T = decltype(element);
    // The gradient of averaging is a quarter of upsampling, and that of upsampling is four times averaging.
    const auto of = scale == 0 ? convolve<Same, T> : scale < 0 ? convolve<Up, T> : convolve<Down, T>;
    return of(gy, w, std::nullopt, 2 - padding, true, scale == 0 ? 1.0f : scale < 0 ? 0.25f : 4.0f);
  });
}

Tensor winograd_weight_gradient(const Tensor& gy, const Tensor& x, int64_t padding, int64_t scale) {
  check_scale(padding, scale);
  return of_type(x, [&](auto element) {
    using T = decltype(element);
    if (scale == 0) return weight_gradient<Same, T>(gy, x, padding);
    return scale < 0 ? weight_gradient<Down, T>(gy, x, padding) : weight_gradient<Up, T>(gy, x, padding);
  });
}

FASTGAN_OP(winograd_forward, "(Tensor x, Tensor w, Tensor? bias, int padding, int scale) -> Tensor");
FASTGAN_OP(winograd_input_gradient, "(Tensor gy, Tensor w, int padding, int scale) -> Tensor");
FASTGAN_OP(winograd_weight_gradient, "(Tensor gy, Tensor x, int padding, int scale) -> Tensor");

}  // namespace fastgan
