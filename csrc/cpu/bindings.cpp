// Schemas of every op of torch.ops.fastgan, and the CPU library's registrations. The CUDA library only registers.
#include <torch/csrc/stable/library.h>

#include <string>

#include "ops.h"

namespace fastgan {

// The instruction set this library was compiled for.
std::string cpu_instructions() {
#if defined(FASTGAN_AVX512)
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
}

// An op without tensors has no device to be dispatched by.
STABLE_TORCH_LIBRARY_IMPL(fastgan, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&fastgan::cpu_instructions));
}
