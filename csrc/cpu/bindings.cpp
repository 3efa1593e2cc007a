// Schemas of all ops in torch.ops.fastgan, and the CPU implementations. The CUDA library adds implementations only.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"

namespace fastgan {

// The instruction set that this library was compiled for.
std::string cpu_instructions() {
#if defined(FASTGAN_BF16)
  return "avx512_bf16";
#elif defined(FASTGAN_AVX512)
  return "avx512";
#elif defined(FASTGAN_AVX2)
  return "avx2";
#else
  return "baseline";
#endif
}

}  // namespace fastgan

STABLE_TORCH_LIBRARY(fastgan, m) {
  m.def("cpu_instructions() -> str");
  m.def("cuda_refusal() -> str");
  m.def("bias_act_forward(Tensor x, Tensor? bias, int act, float negative_slope, float gain) -> Tensor");
  m.def(
      "bias_act_backward(Tensor dy, Tensor? ref, Tensor? bias, int act, float negative_slope, float gain,"
      " bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "bias_act_second_backward(Tensor u, Tensor dy, Tensor ref, Tensor? bias, int act, float negative_slope,"
      " float gain, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def("conv2d_forward(Tensor x, Tensor w, Tensor? bias, int pad_h, int pad_w) -> Tensor");
  m.def("conv2d_input_gradient(Tensor gy, Tensor w, int pad_h, int pad_w) -> Tensor");
  m.def("winograd_forward(Tensor x, Tensor w, Tensor? bias, int padding, int scale) -> Tensor");
  m.def("winograd_input_gradient(Tensor gy, Tensor w, int padding, int scale) -> Tensor");
  m.def("winograd_weight_gradient(Tensor gy, Tensor x, int padding, int scale) -> Tensor");
  m.def("avg_pool2d_forward(Tensor x, int kernel_size) -> Tensor");
  m.def("avg_pool2d_backward(Tensor dy, int kernel_size, int height, int width) -> Tensor");
  m.def("pixel_norm_forward(Tensor x, float eps) -> (Tensor, Tensor)");
  m.def("pixel_norm_backward(Tensor dy, Tensor y, Tensor r) -> Tensor");
  m.def("pixel_norm_second_backward(Tensor u, Tensor dy, Tensor y, Tensor r) -> (Tensor, Tensor)");
  m.def(
      "bias_act_pixel_norm_forward(Tensor x, Tensor? bias, int act, float negative_slope, float gain, float eps)"
      " -> (Tensor, Tensor)");
  m.def(
      "bias_act_pixel_norm_backward(Tensor dy, Tensor y, Tensor r, int act, float negative_slope, float gain,"
      " bool want_bias) -> (Tensor, Tensor)");
  m.def(
      "bias_act_pixel_norm_second_backward(Tensor u, Tensor dy, Tensor y, Tensor r, int act, float negative_slope,"
      " float gain, bool want_bias) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_forward(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? mask=None)"
      " -> (Tensor, Tensor)");
  m.def(
      "attention_backward(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool causal,"
      " Tensor? mask=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_second_backward(Tensor? uq, Tensor? uk, Tensor? uv, Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, "
      "Tensor lse, float scale, bool causal, Tensor? mask=None) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("minibatch_stddev_forward(Tensor x, int group, int num_features, float eps) -> Tensor");
  m.def(
      "minibatch_stddev_backward(Tensor dy, Tensor x, int group, int num_features, float eps) -> (Tensor, Tensor)");
  m.def(
      "minibatch_stddev_second_backward(Tensor u, Tensor x, Tensor t, int group, int num_features, float eps)"
      " -> (Tensor, Tensor)");
  m.def("normalize_second_backward(Tensor u, Tensor g, Tensor x, float eps) -> (Tensor, Tensor)");
  m.def(
      "spectral_norm_forward(Tensor[] w, Tensor[] u, Tensor[] v, int iterations, bool u_first, float eps)"
      " -> (Tensor, Tensor)");
  m.def("spectral_norm_backward(Tensor g, Tensor w, Tensor u, Tensor v, Tensor sigma) -> Tensor");
  m.def("affine_grid_sample_forward(Tensor x, Tensor theta, bool reflect) -> Tensor");
  m.def("affine_grid_sample_backward(Tensor dy, Tensor theta, bool reflect) -> Tensor");
  m.def("gather_rows(Tensor addresses, Tensor starts, Tensor indices, int bytes) -> Tensor");
  m.def("finish_images(Tensor images, Tensor? flips) -> Tensor");
}

// An op without tensor arguments cannot be dispatched by device.
STABLE_TORCH_LIBRARY_IMPL(fastgan, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&fastgan::cpu_instructions));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan, CPU, m) {
  m.impl("bias_act_forward", TORCH_BOX(&fastgan::bias_act_forward));
  m.impl("bias_act_backward", TORCH_BOX(&fastgan::bias_act_backward));
  m.impl("bias_act_second_backward", TORCH_BOX(&fastgan::bias_act_second_backward));
  m.impl("conv2d_forward", TORCH_BOX(&fastgan::conv2d_forward));
  m.impl("conv2d_input_gradient", TORCH_BOX(&fastgan::conv2d_input_gradient));
  m.impl("winograd_forward", TORCH_BOX(&fastgan::winograd_forward));
  m.impl("winograd_input_gradient", TORCH_BOX(&fastgan::winograd_input_gradient));
  m.impl("winograd_weight_gradient", TORCH_BOX(&fastgan::winograd_weight_gradient));
  m.impl("avg_pool2d_forward", TORCH_BOX(&fastgan::avg_pool2d_forward));
  m.impl("avg_pool2d_backward", TORCH_BOX(&fastgan::avg_pool2d_backward));
  m.impl("pixel_norm_forward", TORCH_BOX(&fastgan::pixel_norm_forward));
  m.impl("pixel_norm_backward", TORCH_BOX(&fastgan::pixel_norm_backward));
  m.impl("pixel_norm_second_backward", TORCH_BOX(&fastgan::pixel_norm_second_backward));
  m.impl("bias_act_pixel_norm_forward", TORCH_BOX(&fastgan::bias_act_pixel_norm_forward));
  m.impl("bias_act_pixel_norm_backward", TORCH_BOX(&fastgan::bias_act_pixel_norm_backward));
  m.impl("bias_act_pixel_norm_second_backward", TORCH_BOX(&fastgan::bias_act_pixel_norm_second_backward));
  m.impl("attention_forward", TORCH_BOX(&fastgan::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastgan::attention_backward));
  m.impl("attention_second_backward", TORCH_BOX(&fastgan::attention_second_backward));
  m.impl("minibatch_stddev_forward", TORCH_BOX(&fastgan::minibatch_stddev_forward));
  m.impl("minibatch_stddev_backward", TORCH_BOX(&fastgan::minibatch_stddev_backward));
  m.impl("minibatch_stddev_second_backward", TORCH_BOX(&fastgan::minibatch_stddev_second_backward));
  m.impl("normalize_second_backward", TORCH_BOX(&fastgan::normalize_second_backward));
  m.impl("spectral_norm_forward", TORCH_BOX(&fastgan::spectral_norm_forward));
  m.impl("spectral_norm_backward", TORCH_BOX(&fastgan::spectral_norm_backward));
  m.impl("affine_grid_sample_forward", TORCH_BOX(&fastgan::affine_grid_sample_forward));
  m.impl("affine_grid_sample_backward", TORCH_BOX(&fastgan::affine_grid_sample_backward));
  m.impl("gather_rows", TORCH_BOX(&fastgan::gather_rows));
  m.impl("finish_images", TORCH_BOX(&fastgan::finish_images));
}
