// Registers the CUDA implementations. The schemas are in csrc/cpu/bindings.cpp, whose library is loaded first.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"

namespace fastgan {

// Why the kernels of this library cannot run on this machine; empty if they can.
std::string cuda_refusal() {
#ifndef FASTGAN_EMULATED
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("CUDA error: ") + cudaGetErrorString(error);
  if (devices == 0) return "there is no GPU";
  // A GPU older than the architectures compiled for finds neither machine code nor PTX that it can run.
  cudaFuncAttributes attributes;
  const cudaError_t missing = cudaFuncGetAttributes(&attributes, sum_parts<32>);
  if (missing != cudaSuccess) return std::string("CUDA error: ") + cudaGetErrorString(missing);
#endif
  return "";
}

}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&fastgan::cuda_refusal));
}

STABLE_TORCH_LIBRARY_IMPL(fastgan, CUDA, m) {
  m.impl("bias_act_forward", TORCH_BOX(&fastgan::bias_act_forward));
  m.impl("bias_act_backward", TORCH_BOX(&fastgan::bias_act_backward));
  m.impl("bias_act_second_backward", TORCH_BOX(&fastgan::bias_act_second_backward));
  m.impl("pixel_norm_forward", TORCH_BOX(&fastgan::pixel_norm_forward));
  m.impl("pixel_norm_backward", TORCH_BOX(&fastgan::pixel_norm_backward));
  m.impl("pixel_norm_second_backward", TORCH_BOX(&fastgan::pixel_norm_second_backward));
  m.impl("bias_act_pixel_norm_forward", TORCH_BOX(&fastgan::bias_act_pixel_norm_forward));
  m.impl("bias_act_pixel_norm_backward", TORCH_BOX(&fastgan::bias_act_pixel_norm_backward));
  m.impl("bias_act_pixel_norm_second_backward", TORCH_BOX(&fastgan::bias_act_pixel_norm_second_backward));
  m.impl("minibatch_stddev_forward", TORCH_BOX(&fastgan::minibatch_stddev_forward));
  m.impl("minibatch_stddev_backward", TORCH_BOX(&fastgan::minibatch_stddev_backward));
  m.impl("minibatch_stddev_second_backward", TORCH_BOX(&fastgan::minibatch_stddev_second_backward));
}
