// The functions that bindings.cu registers, one group per op. fastgan/ops/OP.py documents what they compute.
#pragma once

#include "op.h"

namespace fastgan {

using Maybe = std::optional<Tensor>;

Tensor bias_act_forward(const Tensor& x, const Maybe& bias, int64_t act, double negative_slope, double gain);
std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy, const Maybe& ref, const Maybe& bias, int64_t act,
                                             double negative_slope, double gain, bool want_bias);
std::tuple<Tensor, Tensor, Tensor> bias_act_second_backward(const Tensor& u, const Tensor& dy, const Tensor& ref,
                                                            const Maybe& bias, int64_t act, double negative_slope,
                                                            double gain, bool want_bias);

std::tuple<Tensor, Tensor> pixel_norm_forward(const Tensor& x, double eps);
Tensor pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r);
std::tuple<Tensor, Tensor> pixel_norm_second_backward(const Tensor& u, const Tensor& dy, const Tensor& y,
                                                      const Tensor& r);

std::tuple<Tensor, Tensor> bias_act_pixel_norm_forward(const Tensor& x, const Maybe& bias, int64_t act,
                                                       double negative_slope, double gain, double eps);
std::tuple<Tensor, Tensor> bias_act_pixel_norm_backward(const Tensor& dy, const Tensor& y, const Tensor& r, int64_t act,
                                                        double negative_slope, double gain, bool want_bias);
std::tuple<Tensor, Tensor, Tensor> bias_act_pixel_norm_second_backward(const Tensor& u, const Tensor& dy,
                                                                       const Tensor& y, const Tensor& r, int64_t act,
                                                                       double negative_slope, double gain,
                                                                       bool want_bias);

Tensor minibatch_stddev_forward(const Tensor& x, int64_t group, int64_t num_features, double eps);
std::tuple<Tensor, Tensor> minibatch_stddev_backward(const Tensor& dy, const Tensor& x, int64_t group,
                                                     int64_t num_features, double eps);
std::tuple<Tensor, Tensor> minibatch_stddev_second_backward(const Tensor& u, const Tensor& x, const Tensor& t,
                                                            int64_t group, int64_t num_features, double eps);

}  // namespace fastgan
