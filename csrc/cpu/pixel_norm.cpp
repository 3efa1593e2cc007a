// pixel_norm is bias_act_pixel_norm without bias and activation: multiplying by a gain of 1 is free beside memory
// access.
#include "pixel_norm.h"

namespace fastgan {

namespace {
constexpr LinearAct kIdentity{1.0f};
}

std::tuple<Tensor, Tensor> pixel_norm_forward(const Tensor& x, double eps) {
  return norm_forward(x, std::nullopt, kIdentity, eps);
}

Tensor pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r) {
  return std::get<0>(norm_backward(dy, y, r, kIdentity, false));
}

std::tuple<Tensor, Tensor> pixel_norm_second_backward(const Tensor& u, const Tensor& dy, const Tensor& y,
                                                      const Tensor& r) {
  auto [gdy, gx, gb] = norm_second_backward(u, dy, y, r, kIdentity, false);
  return {gdy, gx};
}

FASTGAN_OP(pixel_norm_forward, "(Tensor x, float eps) -> (Tensor, Tensor)");
FASTGAN_OP(pixel_norm_backward, "(Tensor dy, Tensor y, Tensor r) -> Tensor");
FASTGAN_OP(pixel_norm_second_backward, "(Tensor u, Tensor dy, Tensor y, Tensor r) -> (Tensor, Tensor)");

}  // namespace fastgan
