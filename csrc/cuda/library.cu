// What the library says of itself; its schema is in cpu/library.cpp.
#include <string>

#include "op.h"

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

STABLE_TORCH_LIBRARY_IMPL(FASTGAN_LIBRARY, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&fastgan::cuda_refusal));
}
