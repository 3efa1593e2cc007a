// The CUDA library's registrations. Schemas are in csrc/cpu/bindings.cpp, whose library is loaded first.
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/library.h>

#include <string>

namespace fastgan {

// Why no kernel of this library can run here: empty when they can.
std::string cuda_refusal() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess) return std::string("CUDA says: ") + cudaGetErrorString(error);
  return devices > 0 ? "" : "there is no GPU";
}

}  // namespace fastgan

STABLE_TORCH_LIBRARY_IMPL(fastgan, CompositeExplicitAutograd, m) {
  m.impl("cuda_refusal", TORCH_BOX(&fastgan::cuda_refusal));
}
