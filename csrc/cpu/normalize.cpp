// The second backward of a normalization of rows, as in layer, group and instance norm. The formulas are in
// fastgan/ops/norms.py. A row is read five times and mostly from the cache; memory is swept once.
#include <cmath>

#include "op.h"

namespace fastgan {

namespace {

// Elements whose sum is kept in float32; sums of blocks are added in double.
constexpr int64_t kBlock = 1024;

template <class T>
double sum_of(const T* x, int64_t size) {
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += load(x + i);
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
double squares_of(const T* x, int64_t size, float mean) {
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) {
      const float d = load(x + i) - mean;
      sum += d * d;
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
void second_backward_of_row(const T* u, const T* g, const T* x, int64_t size, double eps, T* gg, T* gx) {
  const double count = static_cast<double>(size);
  const float mean = static_cast<float>(sum_of(x, size) / count);
  const float r = static_cast<float>(1.0 / std::sqrt(squares_of(x, size, mean) / count + eps));
  const float mean_u = static_cast<float>(sum_of(u, size) / count);
  const float mean_g = static_cast<float>(sum_of(g, size) / count);
  double total_a = 0.0, total_b = 0.0, total_s = 0.0;
  for (int64_t begin = 0; begin < size; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, size);
    float a = 0.0f, b = 0.0f, s = 0.0f;
#pragma omp simd reduction(+ : a, b, s)
    for (int64_t i = begin; i < end; ++i) {
      const float y = (load(x + i) - mean) * r, du = load(u + i) - mean_u, dg = load(g + i) - mean_g;
      a += dg * y;
      b += du * y;
      s += du * dg;
    }
    total_a += static_cast<double>(a);
    total_b += static_cast<double>(b);
    total_s += static_cast<double>(s);
  }
  const float a = static_cast<float>(total_a / count), b = static_cast<float>(total_b / count);
  const float c = static_cast<float>(total_s / count) - 3.0f * a * b, factor = -r * r;
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) {
    const float y = (load(x + i) - mean) * r, du = load(u + i) - mean_u, dg = load(g + i) - mean_g;
    store(gg + i, r * (du - y * b));
    store(gx + i, factor * (a * du + b * dg + c * y));
  }
}

}  // namespace

std::tuple<Tensor, Tensor> normalize_second_backward(const Tensor& u, const Tensor& g, const Tensor& x, double eps) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [rows, size], got ", x.dim(), " dimensions");
  check_like(u, "u", x);
  check_like(g, "g", x);
  STD_TORCH_CHECK(x.is_contiguous() && u.is_contiguous() && g.is_contiguous(), "u, g and x must be contiguous");
  const int64_t rows = x.size(0), size = x.size(1);
  STD_TORCH_CHECK(size > 0, "x must not be empty");
  const Tensor gg = torch::stable::new_empty(x, x.sizes()), gx = torch::stable::new_empty(x, x.sizes());
  dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const T *const from_u = data<T>(u), *const from_g = data<T>(g), *const from_x = data<T>(x);
    T *const to_g = output<T>(gg), *const to_x = output<T>(gx);
    parallel(rows, 20 * size, [=](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t at = row * size;
        second_backward_of_row(from_u + at, from_g + at, from_x + at, size, eps, to_g + at, to_x + at);
      }
    });
  });
  return {gg, gx};
}

FASTGAN_OP(normalize_second_backward, "(Tensor u, Tensor g, Tensor x, float eps) -> (Tensor, Tensor)");

}  // namespace fastgan
