// What the compiled libraries say of themselves, without tensors; the ops are registered in their own files.
#include <string>

#include "op.h"

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
  m.def("cuda_refusal() -> str");  // in cuda/library.cu
}

// An op without tensor arguments cannot be dispatched by device.
STABLE_TORCH_LIBRARY_IMPL(fastgan, CompositeExplicitAutograd, m) {
  m.impl("cpu_instructions", TORCH_BOX(&fastgan::cpu_instructions));
}
