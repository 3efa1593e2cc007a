// pixel_norm is bias_act_pixel_norm without bias and activation: multiplying by 1 is free beside memory access.
#include "pixel_norm.h"

namespace fastgan {

std::tuple<Tensor, Tensor> pixel_norm_forward(const Tensor& x, double eps) {
  return bias_act_pixel_norm_forward(x, std::nullopt, kLinear, 0.0, 1.0, eps);
}

Tensor pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r) {
  return std::get<0>(bias_act_pixel_norm_backward(dy, y, r, kLinear, 0.0, 1.0, false));
}

std::tuple<Tensor, Tensor> pixel_norm_second_backward(const Tensor& u, const Tensor& dy, const Tensor& y,
                                                      const Tensor& r) {
  const auto [gdy, gx, gb] = bias_act_pixel_norm_second_backward(u, dy, y, r, kLinear, 0.0, 1.0, false);
  return {gdy, gx};
}

FASTGAN_CUDA_OP(pixel_norm_forward);
FASTGAN_CUDA_OP(pixel_norm_backward);
FASTGAN_CUDA_OP(pixel_norm_second_backward);

}  // namespace fastgan
