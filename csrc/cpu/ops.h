// The functions that bindings.cpp registers, one group per op. fastgan/ops/OP.py documents what they compute.
#pragma once

#include <vector>

#include "op.h"

namespace fastgan {

Tensor bias_act_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                        double gain);
std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy, const std::optional<Tensor>& ref,
                                             const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                                             double gain, bool want_bias);
std::tuple<Tensor, Tensor, Tensor> bias_act_second_backward(const Tensor& u, const Tensor& dy, const Tensor& ref,
                                                            const std::optional<Tensor>& bias, int64_t act,
                                                            double negative_slope, double gain, bool want_bias);
Tensor conv2d_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t pad_h,
                      int64_t pad_w);
Tensor conv2d_input_gradient(const Tensor& gy, const Tensor& w, int64_t pad_h, int64_t pad_w);

Tensor winograd_forward(const Tensor& x, const Tensor& w, const std::optional<Tensor>& bias, int64_t padding,
                        int64_t scale);
Tensor winograd_input_gradient(const Tensor& gy, const Tensor& w, int64_t padding, int64_t scale);
Tensor winograd_weight_gradient(const Tensor& gy, const Tensor& x, int64_t padding, int64_t scale);

Tensor avg_pool2d_forward(const Tensor& x, int64_t kernel_size);
Tensor avg_pool2d_backward(const Tensor& dy, int64_t kernel_size, int64_t height, int64_t width);

std::tuple<Tensor, Tensor> pixel_norm_forward(const Tensor& x, double eps);
Tensor pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r);
std::tuple<Tensor, Tensor> pixel_norm_second_backward(const Tensor& u, const Tensor& dy, const Tensor& y,
                                                      const Tensor& r);

std::tuple<Tensor, Tensor> bias_act_pixel_norm_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t act,
                                                       double negative_slope, double gain, double eps);
std::tuple<Tensor, Tensor> bias_act_pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, int64_t act,
                                                        double negative_slope, double gain, bool want_bias);
std::tuple<Tensor, Tensor, Tensor> bias_act_pixel_norm_second_backward(const Tensor& u, const Tensor& dy,
                                                                       const Tensor& y, const Tensor& r, int64_t act,
                                                                       double negative_slope, double gain,
                                                                       bool want_bias);

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             bool causal, const std::optional<Tensor>& mask);
std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& o, const Tensor& lse, double scale,
                                                      bool causal, const std::optional<Tensor>& mask);
std::tuple<Tensor, Tensor, Tensor, Tensor> attention_second_backward(
    const std::optional<Tensor>& uq, const std::optional<Tensor>& uk, const std::optional<Tensor>& uv, const Tensor& dout,
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, double scale, bool causal,
    const std::optional<Tensor>& mask);

Tensor minibatch_stddev_forward(const Tensor& x, int64_t group, int64_t num_features, double eps);
std::tuple<Tensor, Tensor> minibatch_stddev_backward(const Tensor& dy, const Tensor& x, int64_t group,
                                                     int64_t num_features, double eps);
std::tuple<Tensor, Tensor> minibatch_stddev_second_backward(const Tensor& u, const Tensor& x, const Tensor& t,
                                                            int64_t group, int64_t num_features, double eps);

std::tuple<Tensor, Tensor> normalize_second_backward(const Tensor& u, const Tensor& g, const Tensor& x, double eps);

// All of w, u and v are contiguous, in float32. Returns u and v of all layers in one vector, and the norms.
std::tuple<Tensor, Tensor> spectral_norm_forward(const std::vector<Tensor>& w, const std::vector<Tensor>& u,
                                                 const std::vector<Tensor>& v, int64_t iterations, bool u_first,
                                                 double eps);
Tensor spectral_norm_backward(const Tensor& g, const Tensor& w, const Tensor& u, const Tensor& v, const Tensor& sigma);

Tensor affine_grid_sample_forward(const Tensor& x, const Tensor& theta, bool reflect);
Tensor affine_grid_sample_backward(const Tensor& dy, const Tensor& theta, bool reflect);

Tensor gather_rows(const Tensor& addresses, const Tensor& starts, const Tensor& indices, int64_t bytes);
Tensor finish_images(const Tensor& images, const std::optional<Tensor>& flips);

}  // namespace fastgan
