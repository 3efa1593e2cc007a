// float32 convolution with stride 1, and the gradient of its input, without reordering whole tensors. oneDNN's kernels
// need channels in blocks of 16. For contiguous tensors with few channels the reorders cost up to half as much as the
// product, and the input gradient of a first layer is computed for 16 channels instead of 3.
//
// Each channel of an image is copied into a line: its rows, P = W + padding apart, so that the zeros after one row are
// also those before the next. Tap (ky, kx) of pixel q = y P + x is then q + ky P + kx in every row: a one-dimensional
// convolution over full vectors, whose few results between rows are discarded.
#include <utility>
#include <vector>

#include "features.h"
#include "vector.h"

namespace fastgan {

namespace {

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Convolution of [n, i, h, w] with [o, i, kh, kw]; ph and pw: rows and columns of zero padding on each side.
struct Shape {
  int64_t n, i, h, w, o, kh, kw, ph, pw;
  bool last;  // images are channels_last
  int64_t taps() const { return kh * kw; }
  int64_t oh() const { return h + 2 * ph - kh + 1; }
  int64_t ow() const { return w + 2 * pw - kw + 1; }
  int64_t pitch() const { return w + pw; }
  int64_t outputs() const { return oh() * pitch(); }
  // Floats of an input line, including what the last vector of outputs reads beyond the last row.
  int64_t line() const { return round_up((h + 2 * ph) * pitch() + kVector + kw, kVector); }
  int64_t work() const { return i * o * taps() * oh() * ow(); }
};

// Strides of an image [c, h, w], in elements.
struct Strides {
  int64_t channel, row, pixel;
};

Strides strides(bool last, int64_t c, int64_t h, int64_t w) {
  return last ? Strides{1, w * c, c} : Strides{h * w, w, 1};
}

void copy_row(const float* from, int64_t step, float* to, int64_t count) {
  if (step == 1) {
    std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = from[x * step];
  }
}

// Copies one channel of an image into a line of `size` floats, starting at row `top`, column `left`; zeros elsewhere.
void to_line(const float* from, Strides s, int64_t h, int64_t w, int64_t top, int64_t left, int64_t pitch, float* line,
             int64_t size) {
  std::fill(line, line + top * pitch + left, 0.0f);
  float* to = line + top * pitch + left;
  for (int64_t y = 0; y < h; ++y, to += pitch) {
    copy_row(from + y * s.row, s.pixel, to, w);
    if (y + 1 < h) std::fill(to + w, to + pitch, 0.0f);
  }
  std::fill(to - pitch + w, line + size, 0.0f);
}

// Packs w [o, i, kh, kw] as [block of o][i][tap][kTileRows], padded with zeros. For the gradient of the input, `adjoint`
// swaps o and i and reverses the taps.
std::vector<float> packed_weight(const Tensor& w, bool adjoint) {
  const int64_t first = w.size(0), second = w.size(1), kh = w.size(2), kw = w.size(3);
  const int64_t outputs = adjoint ? second : first, inputs = adjoint ? first : second, taps = kh * kw;
  const int64_t so = w.stride(adjoint ? 1 : 0), si = w.stride(adjoint ? 0 : 1), sy = w.stride(2), sx = w.stride(3);
  const int64_t blocks = (outputs + kTileRows - 1) / kTileRows;
  std::vector<float> packed(static_cast<size_t>(blocks * inputs * taps * kTileRows));
  const float* from = data<float>(w);
  parallel(blocks, inputs * taps * kTileRows * 4, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      float* to = packed.data() + block * inputs * taps * kTileRows;
      for (int64_t i = 0; i < inputs; ++i) {
        for (int64_t tap = 0; tap < taps; ++tap, to += kTileRows) {
          const int64_t at = adjoint ? taps - 1 - tap : tap;
          const float* one = from + i * si + (at / kw) * sy + (at % kw) * sx;
          for (int64_t o = 0; o < kTileRows; ++o) {
            const int64_t output = block * kTileRows + o;
            to[o] = output < outputs ? one[output * so] : 0.0f;
          }
        }
      }
    }
  });
  return packed;
}

// out[o][q] = bias[o] + sum over i and taps of w[i][tap][o] x[i][q + offset[tap]], for V vectors of outputs q.
template <int64_t O, int64_t V>
void multiply_tile(const float* x, int64_t line, const float* w, int64_t inputs, const std::vector<int64_t>& offsets,
                   const float* bias, float* out, int64_t stride) {
  Vec a[O][V];
#pragma GCC unroll 8
  for (int64_t o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) a[o][v] = broadcast(bias[o]);
  }
  const auto taps = static_cast<int64_t>(offsets.size());
  const int64_t* offset = offsets.data();
  for (int64_t i = 0; i < inputs; ++i, x += line) {
    for (int64_t tap = 0; tap < taps; ++tap, w += kTileRows) {
      const float* from = x + offset[tap];
      Vec pixels[V];
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) pixels[v] = read(from + v * kVector);
#pragma GCC unroll 8
      for (int64_t o = 0; o < O; ++o) {
#pragma GCC unroll 8
        for (int64_t v = 0; v < V; ++v) a[o][v] += w[o] * pixels[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int64_t o = 0; o < O; ++o) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) write(out + o * stride + v * kVector, a[o][v]);
  }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, const std::vector<int64_t>&, const float*, float*,
                      int64_t);

// The tile of `index` = (outputs - 1) * kTileVectors + vectors - 1.
template <size_t... Index>
Tile tile_of(int64_t index, std::index_sequence<Index...>) {
  constexpr Tile tiles[] = {multiply_tile<static_cast<int64_t>(Index) / kTileVectors + 1,
                                          static_cast<int64_t>(Index) % kTileVectors + 1>...};
  return tiles[index];
}

Tile tile_of(int64_t outputs, int64_t vectors) {
  return tile_of((outputs - 1) * kTileVectors + vectors - 1, std::make_index_sequence<kTileRows * kTileVectors>());
}

std::vector<int64_t> tap_offsets(const Shape& s) {
  std::vector<int64_t> offsets;
  for (int64_t tap = 0; tap < s.taps(); ++tap) offsets.push_back((tap / s.kw) * s.pitch() + tap % s.kw);
  return offsets;
}

// Copies pixels [q, q + count) of `outputs` lines, `stride` apart, from `tile` to the image.
void from_tile(const float* tile, int64_t stride, int64_t outputs, int64_t q, int64_t count, const Shape& s, float* to,
               Strides place) {
  const int64_t pitch = s.pitch(), width = s.ow();
  for (int64_t y = q / pitch; y * pitch < q + count; ++y) {
    const int64_t begin = std::max<int64_t>(q - y * pitch, 0), end = std::min(q + count - y * pitch, width);
    if (begin >= end) continue;
    const float* from = tile + y * pitch - q;
    if (place.pixel == 1) {
      for (int64_t o = 0; o < outputs; ++o) {
        copy_row(from + o * stride + begin, 1, to + o * place.channel + y * place.row + begin, end - begin);
      }
      continue;
    }
    for (int64_t x = begin; x < end; ++x) {
      for (int64_t o = 0; o < outputs; ++o) to[y * place.row + x * place.pixel + o] = from[o * stride + x];
    }
  }
}

// Computes the channel blocks [first, last) of one image from its input lines.
void convolve_image(const float* lines, const float* w, const std::vector<int64_t>& offsets, const float* bias,
                    int64_t first, int64_t last, const Shape& s, float* y) {
  alignas(64) float tile[kTileRows * kTileVectors * kVector];
  const Strides place = strides(s.last, s.o, s.oh(), s.ow());
  for (int64_t q = 0; q < s.outputs(); q += kTileVectors * kVector) {
    const int64_t vectors = std::min(kTileVectors, (s.outputs() - q + kVector - 1) / kVector);
    for (int64_t block = first; block < last; ++block) {
      const int64_t o = block * kTileRows, outputs = std::min(kTileRows, s.o - o);
      tile_of(outputs, vectors)(lines + q, s.line(), w + o * s.i * s.taps(), s.i, offsets, bias + o, tile,
                                vectors * kVector);
      from_tile(tile, vectors * kVector, outputs, q, std::min(vectors * kVector, s.outputs() - q), s,
                y + o * place.channel, place);
    }
  }
}

// y = convolution of x with the packed weight w, plus bias.
void convolve(const Tensor& input, const std::vector<float>& w, const float* bias, const Shape& s, float* y) {
  const float* x = data<float>(input);
  const std::vector<int64_t> offsets = tap_offsets(s);
  const int64_t blocks = (s.o + kTileRows - 1) / kTileRows;
  // With few images, each is also split by output channels; every part copies the lines for itself.
  const int64_t parts = std::min(blocks, (8 + s.n - 1) / s.n);
  const Strides from = strides(s.last, s.i, s.h, s.w);
  const auto range = [&](int64_t begin, int64_t end, float* lines) {
    int64_t copied = -1;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t n = item / parts, part = item % parts;
      for (int64_t i = 0; copied != n && i < s.i; ++i) {
        to_line(x + n * s.i * s.h * s.w + i * from.channel, from, s.h, s.w, s.ph, s.pw, s.pitch(),
                lines + i * s.line(), s.line());
      }
      copied = n;
      convolve_image(lines, w.data(), offsets, bias, part * blocks / parts, (part + 1) * blocks / parts, s,
                     y + n * s.o * s.oh() * s.ow());
    }
  };
  parallel_with_scratch(input, s.n * parts, s.work() / parts, s.i * s.line(), range);
}

// Checks what autograd guarantees. x is the input, or for its gradient the output's gradient; h and w are x's size.
Shape shape_of(const Tensor& x, int64_t i, int64_t h, int64_t w, int64_t o, int64_t kh, int64_t kw, int64_t ph,
               int64_t pw) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu(), "input must be Float, on the CPU");
  STD_TORCH_CHECK(x.dim() == 4, "input must be [N, C, H, W], got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(ph >= 0 && pw >= 0 && ph < kh && pw < kw, "padding must be at least 0 and less than the kernel size");
  const Shape s{x.size(0), i, h, w, o, kh, kw, ph, pw, features(x).last};
  STD_TORCH_CHECK(s.i > 0 && s.o > 0 && s.oh() > 0 && s.ow() > 0,
                  "input must not be empty, nor smaller than the kernel");
  return s;
}

void check_weight(const Tensor& w) {
  STD_TORCH_CHECK(w.scalar_type() == ScalarType::Float && w.is_cpu() && w.dim() == 4,
                  "weight must be [O, I, kH, kW], Float, on the CPU");
}

Tensor image_like(const Tensor& x, const Shape& s, int64_t c, int64_t h, int64_t w) {
  return fresh_map<float>(x, ScalarType::Float, s.n, c, h, w, s.last);
}

}  // namespace

Tensor conv2d_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t pad_h,
                      int64_t pad_w) {
  check_weight(w);
  const Shape s =
      shape_of(x, w.size(1), x.size(2), x.size(3), w.size(0), w.size(2), w.size(3), pad_h, pad_w);
  STD_TORCH_CHECK(x.size(1) == s.i, "weight must have ", x.size(1), " input channels, as input, got ", s.i);
  std::vector<float> start = bias_values(bias, x, s.o);
  const Tensor y = image_like(x, s, s.o, s.oh(), s.ow());
  convolve(x, packed_weight(w, false), start.data(), s, output<float>(y));
  return y;
}

Tensor conv2d_input_gradient(const Tensor& gy, const Tensor& w, int64_t pad_h, int64_t pad_w) {
  check_weight(w);
  const int64_t kh = w.size(2), kw = w.size(3);
  const Shape s =
      shape_of(gy, w.size(0), gy.size(2), gy.size(3), w.size(1), kh, kw, kh - 1 - pad_h, kw - 1 - pad_w);
  STD_TORCH_CHECK(gy.size(1) == s.i, "weight must have ", gy.size(1), " output channels, as gy, got ", s.i);
  const std::vector<float> start(static_cast<size_t>(s.o), 0.0f);
  const Tensor gx = image_like(gy, s, s.o, s.oh(), s.ow());
  convolve(gy, packed_weight(w, true), start.data(), s, output<float>(gx));
  return gx;
}

FASTGAN_OP(conv2d_forward, "(Tensor x, Tensor w, Tensor? bias, int pad_h, int pad_w) -> Tensor");
FASTGAN_OP(conv2d_input_gradient, "(Tensor gy, Tensor w, int pad_h, int pad_w) -> Tensor");

}  // namespace fastgan
