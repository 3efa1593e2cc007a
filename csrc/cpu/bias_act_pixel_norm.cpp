#include "pixel_norm.h"

namespace fastgan {

std::tuple<Tensor, Tensor> bias_act_pixel_norm_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t act,
                                                       double negative_slope, double gain, double eps) {
  return with_piecewise_linear(act, negative_slope, gain, [&](auto a) { return norm_forward(x, bias, a, eps); });
}

std::tuple<Tensor, Tensor> bias_act_pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, int64_t act,
                                                        double negative_slope, double gain, bool want_bias) {
  return with_piecewise_linear(act, negative_slope, gain, [&](auto a) { return norm_backward(dy, y, r, a, want_bias); });
}

std::tuple<Tensor, Tensor, Tensor> bias_act_pixel_norm_second_backward(const Tensor& u, const Tensor& dy,
                                                                       const Tensor& y, const Tensor& r, int64_t act,
                                                                       double negative_slope, double gain,
                                                                       bool want_bias) {
  return with_piecewise_linear(act, negative_slope, gain,
                               [&](auto a) { return norm_second_backward(u, dy, y, r, a, want_bias); });
}

FASTGAN_OP(bias_act_pixel_norm_forward,
           "(Tensor x, Tensor? bias, int act, float negative_slope, float gain, float eps) -> (Tensor, Tensor)");
FASTGAN_OP(bias_act_pixel_norm_backward,
           "(Tensor dy, Tensor y, Tensor r, int act, float negative_slope, float gain, bool want_bias)"
           " -> (Tensor, Tensor)");
FASTGAN_OP(bias_act_pixel_norm_second_backward,
           "(Tensor u, Tensor dy, Tensor y, Tensor r, int act, float negative_slope, float gain, bool want_bias)"
           " -> (Tensor, Tensor, Tensor)");

}  // namespace fastgan
