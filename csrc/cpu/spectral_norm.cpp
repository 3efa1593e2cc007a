// Spectral norm on the CPU: the power iterations of many layers in one call, and the gradient of a weight that was
// divided by its norm. The formulas are in fastgan/nn/spectral_norm.py.
#include <cmath>

#include "op.h"

namespace fastgan {

namespace {

struct Matrix {
  const float* values;
  int64_t rows, columns;
};

double dot(const float* a, const float* b, int64_t size) {
  constexpr int64_t block = 4096;
  double total = 0.0;
  for (int64_t begin = 0; begin < size; begin += block) {
    const int64_t end = std::min(begin + block, size);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = begin; i < end; ++i) sum += a[i] * b[i];
    total += static_cast<double>(sum);
  }
  return total;
}

// to[row] = w v
void multiply(const Matrix& w, const float* v, float* to) {
  parallel(w.rows, 2 * w.columns, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      to[row] = static_cast<float>(dot(w.values + row * w.columns, v, w.columns));
    }
  });
}

// to[column] = w^T u
void multiply_transposed(const Matrix& w, const float* u, float* to) {
  constexpr int64_t block = 256;
  parallel((w.columns + block - 1) / block, 2 * w.rows * block, [=](int64_t begin, int64_t end) {
    for (int64_t at = begin * block; at < std::min(w.columns, end * block); at += block) {
      const int64_t count = std::min(block, w.columns - at);
      float sums[block] = {};
      const float* from = w.values + at;
      int64_t row = 0;
      for (; row + 4 <= w.rows; row += 4, from += 4 * w.columns) {  // each sum is read and written once for four rows
        const float *const b = from + w.columns, *const c = b + w.columns, *const d = c + w.columns;
        const float u0 = u[row], u1 = u[row + 1], u2 = u[row + 2], u3 = u[row + 3];
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += (u0 * from[i] + u1 * b[i]) + (u2 * c[i] + u3 * d[i]);
      }
      for (; row < w.rows; ++row, from += w.columns) {
        const float factor = u[row];
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) sums[i] += factor * from[i];
      }
      std::copy(sums, sums + count, to + at);
    }
  });
}

// x divided by its length, or by eps where that is larger; returns the product of x and the result.
double normalize(float* x, int64_t size, double eps) {
  const double length = std::sqrt(dot(x, x, size)), divisor = std::max(length, eps);
  const float by = static_cast<float>(divisor);
#pragma omp simd
  for (int64_t i = 0; i < size; ++i) x[i] /= by;
  return length * length / divisor;
}

Matrix matrix(const Tensor& w, const Tensor& u, const Tensor& v) {
  STD_TORCH_CHECK(w.is_cpu() && u.is_cpu() && v.is_cpu(), "w, u and v must be on the CPU");
  STD_TORCH_CHECK(w.is_contiguous() && u.is_contiguous() && v.is_contiguous(), "w, u and v must be contiguous");
  const Matrix m{data<float>(w), u.numel(), v.numel()};
  STD_TORCH_CHECK(w.numel() == m.rows * m.columns && m.rows > 0 && m.columns > 0, "w must be [", m.rows, ", ",
                  m.columns, "], as u and v, got ", w.numel(), " elements");
  return m;
}

}  // namespace

std::tuple<Tensor, Tensor> spectral_norm_forward(const std::vector<Tensor>& w, const std::vector<Tensor>& u,
                                                 const std::vector<Tensor>& v, int64_t iterations, bool u_first,
                                                 double eps) {
  STD_TORCH_CHECK(!w.empty() && w.size() == u.size() && w.size() == v.size(), "w, u and v must be as many, got ",
                  w.size(), ", ", u.size(), " and ", v.size());
  int64_t total = 0, at = 0;
  for (size_t i = 0; i < w.size(); ++i) {
    const Matrix m = matrix(w[i], u[i], v[i]);
    total += m.rows + m.columns;
  }
  const Tensor vectors = torch::stable::new_empty(w[0], {total});
  const Tensor sigmas = torch::stable::new_empty(w[0], {static_cast<int64_t>(w.size())});
  float *const to = output<float>(vectors), *const to_sigma = output<float>(sigmas);
  for (size_t i = 0; i < w.size(); ++i) {
    const Matrix m = matrix(w[i], u[i], v[i]);
    float *const left = to + at, *const right = left + m.rows;
    std::copy_n(data<float>(u[i]), m.rows, left);
    std::copy_n(data<float>(v[i]), m.columns, right);
    double sigma = 0.0;
    for (int64_t step = 0; step < iterations; ++step) {
      if (u_first) {
        multiply(m, right, left);
        normalize(left, m.rows, eps);
        multiply_transposed(m, left, right);
        sigma = normalize(right, m.columns, eps);
      } else {
        multiply_transposed(m, left, right);
        normalize(right, m.columns, eps);
        multiply(m, right, left);
        sigma = normalize(left, m.rows, eps);
      }
    }
    if (iterations == 0) {
      const Tensor product = torch::stable::new_empty(u[i], {m.rows});
      multiply(m, right, output<float>(product));
      sigma = dot(left, data<float>(product), m.rows);
    }
    to_sigma[i] = static_cast<float>(sigma);
    at += m.rows + m.columns;
  }
  return {vectors, sigmas};
}

Tensor spectral_norm_backward(const Tensor& g, const Tensor& w, const Tensor& u, const Tensor& v,
                              const Tensor& sigma) {
  const Matrix m = matrix(w, u, v);
  check_like(g, "g", w);
  STD_TORCH_CHECK(g.is_contiguous() && sigma.numel() == 1, "g must be contiguous, and sigma one number");
  const Tensor result = torch::stable::new_empty(w, w.sizes()), sums = torch::stable::new_empty(w, {m.rows});
  const float *const from = data<float>(g), *const left = data<float>(u), *const right = data<float>(v);
  const float divisor = data<float>(sigma)[0];
  float *const to = output<float>(result), *const of_row = output<float>(sums);
  parallel(m.rows, 2 * m.columns, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      of_row[row] = static_cast<float>(dot(from + row * m.columns, m.values + row * m.columns, m.columns));
    }
  });
  double total = 0.0;
  for (int64_t row = 0; row < m.rows; ++row) total += static_cast<double>(of_row[row]);
  const float of_sigma = static_cast<float>(total / static_cast<double>(divisor));
  parallel(m.rows, 3 * m.columns, [=](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float factor = of_sigma * left[row];
      const float* const g_row = from + row * m.columns;
      float* const to_row = to + row * m.columns;
#pragma omp simd
      for (int64_t i = 0; i < m.columns; ++i) to_row[i] = (g_row[i] - factor * right[i]) / divisor;
    }
  });
  return result;
}

FASTGAN_OP(spectral_norm_forward,
           "(Tensor[] w, Tensor[] u, Tensor[] v, int iterations, bool u_first, float eps) -> (Tensor, Tensor)");
FASTGAN_OP(spectral_norm_backward, "(Tensor g, Tensor w, Tensor u, Tensor v, Tensor sigma) -> Tensor");

}  // namespace fastgan
