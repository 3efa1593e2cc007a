// float32 convolution with a 3x3 kernel and stride 1 in channels_last, and its gradients, by minimal filtering
// (Winograd; Lavin and Gray 2015, "Fast algorithms for convolutional neural networks"): 16 products of channels for four
// pixels where the direct sum takes 36. oneDNN has no such kernel any more.
//
//   y = A'[(G g G') * (B' d B)] A
//
// for tiles of 2x2 pixels y, the 4x4 pixels d around them and the kernel g. In the middle is an elementwise product over
// the 16 positions, which summed over channels is one matrix product for each position. The transforms are linear, so
// gradients are the transposed maps: that of d is the convolution with the kernel turned and its channels exchanged, and
// that of g is G'[(A y A') * (B' d B)] G, summed over tiles.
//
// Tiles are taken in blocks whose transforms stay in a core's cache.
#include <utility>
#include <vector>

#include "features.h"
#include "ops.h"
#include "vector.h"

namespace fastgan {

namespace {

inline constexpr int64_t kPositions = 16;
// Accumulators of a product: rows by vectors of outputs, as many as fit in registers.
#if defined(FASTGAN_AVX512)
inline constexpr int64_t kRows = 6;
inline constexpr int64_t kColumns = 4;
#else
inline constexpr int64_t kRows = 4;
inline constexpr int64_t kColumns = 2;
#endif
// Floats of the transforms of a block of tiles: most of a second-level cache of 1 MB, beside the kernel's.
inline constexpr int64_t kBlockFloats = int64_t{100} << 10;
// Parts of the tiles whose contributions to the kernel's gradient are summed apart; it does not depend on threads.
inline constexpr int64_t kGradientParts = 8;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Channels i and o of x [n, i, h, w] and y [n, o, oh, ow]; p: rows and columns of zero padding on each side.
struct Shape {
  int64_t n, i, o, h, w, p;
  int64_t oh() const { return h + 2 * p - 2; }
  int64_t ow() const { return w + 2 * p - 2; }
  int64_t rows() const { return (oh() + 1) / 2; }
  int64_t columns() const { return (ow() + 1) / 2; }
  int64_t tiles() const { return n * rows() * columns(); }
  int64_t ip() const { return round_up(i, kVector); }
  int64_t op() const { return round_up(o, kVector); }
  // Tiles of a block.
  int64_t block() const {
    const int64_t fit = kBlockFloats / (kPositions * (ip() + op()));
    return std::min(std::max<int64_t>(fit / kRows, 1) * kRows, round_up(tiles(), kRows));
  }
  int64_t blocks() const { return (tiles() + block() - 1) / block(); }
  // Floats from one position to the next, a cache line more than needed: at a multiple of a page all would share a set.
  int64_t step(int64_t channels) const { return block() * channels + 16; }
  int64_t work() const { return block() * kPositions * ip() * op(); }
};

FASTGAN_INLINE Vec read_some(const float* p, int64_t count) {
  if (count >= kVector) return read(p);
  Vec v{};
  std::memcpy(&v, p, static_cast<size_t>(count) * sizeof(float));
  return v;
}

FASTGAN_INLINE void write_some(float* p, Vec v, int64_t count) {
  if (count >= kVector) {
    write(p, v);
  } else {
    std::memcpy(p, &v, static_cast<size_t>(count) * sizeof(float));
  }
}

struct Place {
  int64_t n, y, x;  // image, and the first row and column of the tile in y
};

Place place(const Shape& s, int64_t tile) {
  const int64_t in_image = s.rows() * s.columns(), rest = tile % in_image;
  return {tile / in_image, 2 * (rest / s.columns()), 2 * (rest % s.columns())};
}

// B' d B of tiles [begin, end) of x, to v[position][tile][channel].
void transform_input(const float* x, const Shape& s, int64_t begin, int64_t end, float* v) {
  const int64_t step = s.step(s.ip());
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const float* from[4][4];
    for (int64_t r = 0; r < 4; ++r) {
      for (int64_t c = 0; c < 4; ++c) {
        const int64_t y = at.y - s.p + r, col = at.x - s.p + c;
        const bool inside = y >= 0 && y < s.h && col >= 0 && col < s.w;
        from[r][c] = inside ? x + ((at.n * s.h + y) * s.w + col) * s.i : nullptr;
      }
    }
    float* to = v + (tile - begin) * s.ip();
    for (int64_t channel = 0; channel < s.ip(); channel += kVector) {
      const int64_t count = s.i - channel;
      Vec t[4][4];
#pragma GCC unroll 4
      for (int64_t c = 0; c < 4; ++c) {
        Vec d[4];
#pragma GCC unroll 4
        for (int64_t r = 0; r < 4; ++r) d[r] = from[r][c] ? read_some(from[r][c] + channel, count) : Vec{};
        t[0][c] = d[0] - d[2];
        t[1][c] = d[1] + d[2];
        t[2][c] = d[2] - d[1];
        t[3][c] = d[1] - d[3];
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) {
        float* row = to + channel + 4 * r * step;
        write(row, t[r][0] - t[r][2]);
        write(row + step, t[r][1] + t[r][2]);
        write(row + 2 * step, t[r][2] - t[r][1]);
        write(row + 3 * step, t[r][1] - t[r][3]);
      }
    }
  }
}

// A' m A of tiles [begin, end), plus bias, to y.
void transform_output(const float* m, const Shape& s, int64_t begin, int64_t end, const float* bias, float* y) {
  const int64_t step = s.step(s.op());
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const float* from = m + (tile - begin) * s.op();
    const bool second_row = at.y + 1 < s.oh(), second_column = at.x + 1 < s.ow();
    float* to = y + ((at.n * s.oh() + at.y) * s.ow() + at.x) * s.o;
    for (int64_t channel = 0; channel < s.o; channel += kVector) {
      const int64_t count = s.o - channel;
      Vec t[2][4];
#pragma GCC unroll 4
      for (int64_t c = 0; c < 4; ++c) {
        const float* column = from + channel + c * step;
        const Vec one = read(column + 4 * step), two = read(column + 8 * step);
        t[0][c] = read(column) + one + two;
        t[1][c] = one - two - read(column + 12 * step);
      }
      const Vec start = read(bias + channel);
#pragma GCC unroll 2
      for (int64_t r = 0; r < 2; ++r) {
        if (r == 1 && !second_row) break;
        float* pixel = to + r * s.ow() * s.o + channel;
        write_some(pixel, start + t[r][0] + t[r][1] + t[r][2], count);
        if (second_column) write_some(pixel + s.o, start + t[r][1] - t[r][2] - t[r][3], count);
      }
    }
  }
}

// A y A' of tiles [begin, end) of the output's gradient, to d[position][tile][channel].
void transform_output_gradient(const float* gy, const Shape& s, int64_t begin, int64_t end, float* d) {
  const int64_t step = s.step(s.op());
  for (int64_t tile = begin; tile < end; ++tile) {
    const Place at = place(s, tile);
    const bool second_row = at.y + 1 < s.oh(), second_column = at.x + 1 < s.ow();
    const float* from = gy + ((at.n * s.oh() + at.y) * s.ow() + at.x) * s.o;
    float* to = d + (tile - begin) * s.op();
    for (int64_t channel = 0; channel < s.op(); channel += kVector) {
      const int64_t count = s.o - channel;
      Vec t[4][2];
#pragma GCC unroll 2
      for (int64_t c = 0; c < 2; ++c) {
        const bool there = c == 0 || second_column;
        const Vec a = there ? read_some(from + c * s.o + channel, count) : Vec{};
        const Vec b = there && second_row ? read_some(from + (s.ow() + c) * s.o + channel, count) : Vec{};
        t[0][c] = a;
        t[1][c] = a + b;
        t[2][c] = a - b;
        t[3][c] = -b;
      }
#pragma GCC unroll 4
      for (int64_t r = 0; r < 4; ++r) {
        float* row = to + channel + 4 * r * step;
        write(row, t[r][0]);
        write(row + step, t[r][0] + t[r][1]);
        write(row + 2 * step, t[r][0] - t[r][1]);
        write(row + 3 * step, -t[r][1]);
      }
    }
  }
}

// R rows and V vectors of c = a b, or c += a b. a: rows `row` apart, the elements of the sum `next` apart; b: V vectors
// for each element, `width` apart.
template <int64_t R, int64_t V, bool Add>
void product(const float* a, int64_t row, int64_t next, const float* b, int64_t width, int64_t count, float* c,
             int64_t pitch) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) sum[r][v] = Add ? read(c + r * pitch + v * kVector) : Vec{};
  }
  for (int64_t k = 0; k < count; ++k, a += next, b += width) {
    Vec columns[V];
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) columns[v] = read(b + v * kVector);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) sum[r][v] += a[r * row] * columns[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) write(c + r * pitch + v * kVector, sum[r][v]);
  }
}

using Product = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <bool Add, size_t... Index>
Product product_of(int64_t index, std::index_sequence<Index...>) {
  constexpr Product products[] = {product<static_cast<int64_t>(Index) / kColumns + 1,
                                          static_cast<int64_t>(Index) % kColumns + 1, Add>...};
  return products[index];
}

template <bool Add>
Product product_of(int64_t rows, int64_t vectors) {
  return product_of<Add>((rows - 1) * kColumns + vectors - 1, std::make_index_sequence<kRows * kColumns>());
}

// The matrix c [rows, columns] = or += a b over `count` elements; columns is a multiple of kVector. With `packed`, b is
// in panels of kColumns vectors, one after the other; else its rows are `columns` long.
template <bool Add>
void multiply(const float* a, int64_t row, int64_t next, const float* b, bool packed, int64_t rows, int64_t columns,
              int64_t count, float* c) {
  constexpr int64_t panel = kColumns * kVector;
  for (int64_t column = 0; column < columns; column += panel) {
    const int64_t vectors = std::min(panel, columns - column) / kVector;
    const float* from = packed ? b + column * count : b + column;
    const int64_t width = packed ? vectors * kVector : columns;
    for (int64_t first = 0; first < rows; first += kRows) {
      product_of<Add>(std::min(kRows, rows - first), vectors)(a + first * row, row, next, from, width, count,
                                                              c + first * columns + column, columns);
    }
  }
}

// G g, and G' t, of one column; T is float or Vec.
template <class T>
FASTGAN_INLINE void widen(const T (&g)[3], T (&t)[4]) {
  const T ends = 0.5f * (g[0] + g[2]), middle = 0.5f * g[1];
  t[0] = g[0];
  t[1] = ends + middle;
  t[2] = ends - middle;
  t[3] = g[2];
}

template <class T>
FASTGAN_INLINE void narrow(const T (&t)[4], T (&g)[3]) {
  const T sum = 0.5f * (t[1] + t[2]);
  g[0] = t[0] + sum;
  g[1] = 0.5f * (t[1] - t[2]);
  g[2] = sum + t[3];
}

// G g G' of w [o, i, 3, 3], to u[position][panel of o][i][o]. For the gradient of the input, `adjoint` swaps o and i and
// turns the kernel.
Tensor transformed_weight(const Tensor& w, bool adjoint, const Shape& s) {
  const Tensor u = torch::stable::new_empty(w, std::vector<int64_t>{kPositions * s.i * s.op()});
  const int64_t so = w.stride(adjoint ? 1 : 0), si = w.stride(adjoint ? 0 : 1), sy = w.stride(2), sx = w.stride(3);
  const float* from = data<float>(w);
  float* to = output<float>(u);
  constexpr int64_t panel = kColumns * kVector;
  parallel(s.i, s.op() * 100, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = 0; o < s.op(); ++o) {
        const int64_t column = o / panel * panel, width = std::min(panel, s.op() - column);
        float* place = to + column * s.i + i * width + o - column;
        float t[3][4] = {};  // columns of G g
        for (int64_t x = 0; o < s.o && x < 3; ++x) {
          float g[3];
          for (int64_t y = 0; y < 3; ++y) {
            g[y] = from[o * so + i * si + (adjoint ? 2 - y : y) * sy + (adjoint ? 2 - x : x) * sx];
          }
          widen(g, t[x]);
        }
        for (int64_t r = 0; r < 4; ++r) {
          const float row[3] = {t[0][r], t[1][r], t[2][r]};
          float wide[4];
          widen(row, wide);
          for (int64_t c = 0; c < 4; ++c) place[(4 * r + c) * s.i * s.op()] = wide[c];
        }
      }
    }
  });
  return u;
}

// G' (sum of the parts of u) G, to gw [o, i, 3, 3] in channels_last; u[part][position][i][o].
void transform_weight_gradient(const float* u, int64_t parts, const Shape& s, float* gw) {
  const int64_t position = s.i * s.op();
  parallel(s.i, s.op() * parts * kPositions, [&](int64_t begin, int64_t end) {
    alignas(64) float lanes[9][kVector];
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t o = 0; o < s.o; o += kVector) {
        Vec t[4][3];  // columns of G' u
        for (int64_t c = 0; c < 4; ++c) {
          Vec column[4] = {};
          for (int64_t part = 0; part < parts; ++part) {
            const float* from = u + part * kPositions * position + c * position + i * s.op() + o;
            for (int64_t r = 0; r < 4; ++r) column[r] += read(from + 4 * r * position);
          }
          narrow(column, t[c]);
        }
        for (int64_t y = 0; y < 3; ++y) {
          const Vec row[4] = {t[0][y], t[1][y], t[2][y], t[3][y]};
          Vec g[3];
          narrow(row, g);
          for (int64_t x = 0; x < 3; ++x) write(lanes[3 * y + x], g[x]);
        }
        for (int64_t lane = 0; lane < std::min(kVector, s.o - o); ++lane) {
          for (int64_t tap = 0; tap < 9; ++tap) gw[((o + lane) * 9 + tap) * s.i + i] = lanes[tap][lane];
        }
      }
    }
  });
}

Tensor channels_last(const Tensor& like, int64_t n, int64_t c, int64_t h, int64_t w) {
  const Tensor result = torch::stable::new_empty(like, std::vector<int64_t>{n, h, w, c});
  return torch::stable::transpose(torch::stable::transpose(fresh<float>(result), 2, 3), 1, 2);
}

// y = convolution of x with the kernel u, plus bias, of op() floats.
void convolve(const Tensor& input, const Tensor& u, const float* bias, const Shape& s, float* y) {
  const float *x = data<float>(input), *kernel = data<float>(u);
  const int64_t from = s.step(s.ip()), to = s.step(s.op());
  const auto range = [&](int64_t begin, int64_t end, float* scratch) {
    float *v = scratch, *m = scratch + kPositions * from;
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * s.block(), last = std::min(first + s.block(), s.tiles());
      transform_input(x, s, first, last, v);
      for (int64_t position = 0; position < kPositions; ++position) {
        multiply<false>(v + position * from, s.ip(), 1, kernel + position * s.i * s.op(), true, last - first, s.op(),
                        s.i, m + position * to);
      }
      transform_output(m, s, first, last, bias, y);
    }
  };
  parallel_with_scratch(input, s.blocks(), s.work(), kPositions * (from + to), range);
}

void check_map(const Tensor& x, const char* name) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu(), name, " must be Float, on the CPU");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, name, " must be [N, C, H, W] and not empty");
  STD_TORCH_CHECK(is_dense(x, true), name, " must be dense, in channels_last");
}

void check_weight(const Tensor& w, int64_t channels, int64_t dim, int64_t padding) {
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float && w.is_cpu() && w.dim() == 4 && w.size(2) == 3 && w.size(3) == 3,
                  "weight must be [O, I, 3, 3], Float, on the CPU");
  STD_TORCH_CHECK(w.size(dim) == channels, "weight must have ", channels, " channels, got ", w.size(dim));
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "padding must be 0, 1 or 2, got ", padding);
}

void check_size(const Shape& s) {
  STD_TORCH_CHECK(s.oh() > 0 && s.ow() > 0, "input must not be smaller than the kernel");
}

}  // namespace

Tensor winograd_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t padding) {
  check_map(x, "x");
  check_weight(w, x.size(1), 1, padding);
  const Shape s{x.size(0), x.size(1), w.size(0), x.size(2), x.size(3), padding};
  check_size(s);
  std::vector<float> start = bias_values(bias, x, s.o);
  start.resize(static_cast<size_t>(s.op()), 0.0f);
  const Tensor y = channels_last(x, s.n, s.o, s.oh(), s.ow());
  convolve(x, transformed_weight(w, false, s), start.data(), s, output<float>(y));
  return y;
}

Tensor winograd_input_gradient(const Tensor& gy, const Tensor& w, int64_t padding) {
  check_map(gy, "gy");
  check_weight(w, gy.size(1), 0, padding);
  const Shape s{gy.size(0), gy.size(1), w.size(1), gy.size(2), gy.size(3), 2 - padding};
  check_size(s);
  const std::vector<float> start(static_cast<size_t>(s.op()), 0.0f);
  const Tensor gx = channels_last(gy, s.n, s.o, s.oh(), s.ow());
  convolve(gy, transformed_weight(w, true, s), start.data(), s, output<float>(gx));
  return gx;
}

Tensor winograd_weight_gradient(const Tensor& gy, const Tensor& x, int64_t padding) {
  check_map(gy, "gy");
  check_map(x, "x");
  STD_TORCH_CHECK(padding >= 0 && padding <= 2, "padding must be 0, 1 or 2, got ", padding);
  const Shape s{x.size(0), x.size(1), gy.size(1), x.size(2), x.size(3), padding};
  check_size(s);
  STD_TORCH_CHECK(gy.size(0) == s.n && gy.size(2) == s.oh() && gy.size(3) == s.ow(),
                  "gy must have the size of the convolution of x");
  const float *from_x = data<float>(x), *from_y = data<float>(gy);
  const Parts parts(s.blocks(), 1, kGradientParts);
  const int64_t numel = kPositions * s.i * s.op(), of_x = s.step(s.ip()), of_y = s.step(s.op());
  const Tensor partial = torch::stable::new_empty(x, std::vector<int64_t>{parts.number * numel});
  float* sums = output<float>(partial);
  const auto range = [&](int64_t begin, int64_t end, float* scratch) {
    float *v = scratch, *d = scratch + kPositions * of_x;
    for (int64_t part = begin; part < end; ++part) {
      float* sum = sums + part * numel;
      std::fill(sum, sum + numel, 0.0f);
      for (int64_t block = parts.begin(part); block < parts.end(part); ++block) {
        const int64_t first = block * s.block(), last = std::min(first + s.block(), s.tiles());
        transform_input(from_x, s, first, last, v);
        transform_output_gradient(from_y, s, first, last, d);
        for (int64_t position = 0; position < kPositions; ++position) {
          multiply<true>(v + position * of_x, 1, s.ip(), d + position * of_y, false, s.i, s.op(), last - first,
                         sum + position * s.i * s.op());
        }
      }
    }
  };
  parallel_with_scratch(x, parts.number, parts.size * s.work(), kPositions * (of_x + of_y), range);
  const Tensor gw = channels_last(x, s.o, s.i, 3, 3);
  transform_weight_gradient(sums, parts.number, s, output<float>(gw));
  return gw;
}

}  // namespace fastgan
