// The worked example of csrc/README.md: y[r, :] = x[r, :] * scale[r], where scale is optional and 1 by default.
#define FASTGAN_LIBRARY fastgan_example
#include "op.h"

namespace example {

using namespace fastgan;

Tensor scale_rows_forward(const Tensor& x, const std::optional<Tensor>& scale) {
  STD_TORCH_CHECK(x.dim() == 2, "x must be [R, C], got ", x.dim(), " dimensions");
  const int64_t rows = x.size(0), columns = x.size(1), row = x.stride(0), column = x.stride(1);
  const Tensor y = torch::stable::new_empty(x, x.sizes());
  dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const T* const from = data<T>(x);
    const float* const factors = data<float>(scale);
    T* const to = output<T>(y);
    parallel(rows, columns, [=](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const float factor = factors ? factors[r] : 1.0f;
        const T* const source = from + r * row;
        T* const target = to + r * columns;
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) store(target + c, load(source + c * column) * factor);
      }
    });
  });
  return y;
}

// Gradients that are not needed are not computed, and are None in Python.
std::tuple<std::optional<Tensor>, std::optional<Tensor>> scale_rows_backward(
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& scale, bool need_x, bool need_scale) {
  check_like(grad, "grad", x);
  const int64_t rows = x.size(0), columns = x.size(1);
  std::optional<Tensor> grad_x, grad_scale;
  if (need_x) grad_x = scale_rows_forward(grad, scale);
  if (need_scale) {
    grad_scale = torch::stable::new_empty(x, {rows}, ScalarType::Float);
    const Tensor g = torch::stable::contiguous(grad), in = torch::stable::contiguous(x);
    dispatch(x, "x", [&](auto element) {
      using T = decltype(element);
      const T *const a = data<T>(g), *const b = data<T>(in);
      float* const to = output<float>(*grad_scale);
      parallel(rows, 2 * columns, [=](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < columns; ++c) sum += load(a + r * columns + c) * load(b + r * columns + c);
          to[r] = sum;
        }
      });
    });
  }
  return {grad_x, grad_scale};
}

int64_t vector_width() { return kVector; }

FASTGAN_OP(scale_rows_forward, "(Tensor x, Tensor? scale) -> Tensor");
FASTGAN_OP(scale_rows_backward,
           "(Tensor grad, Tensor x, Tensor? scale, bool need_x, bool need_scale) -> (Tensor?, Tensor?)");

}  // namespace example

// Without a tensor it cannot be dispatched by device.
STABLE_TORCH_LIBRARY_FRAGMENT(FASTGAN_LIBRARY, m) { m.def("vector_width() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(FASTGAN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("vector_width", TORCH_BOX(&example::vector_width));
}
