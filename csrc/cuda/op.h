// Shared by all CUDA ops: 16-byte accesses in three dtypes, sums over a block, layouts, launches on torch's stream.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"

#ifdef FASTGAN_EMULATED
#include "emulator.h"  // in tests/ops/csrc: runs kernels as plain C++, one fiber per thread of a block
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#endif

// Registers the CUDA implementation of a function, whose schema is in the file of its name in csrc/cpu.
#ifndef FASTGAN_KEY  // the emulation is on the CPU
#define FASTGAN_KEY CUDA
#endif
#define FASTGAN_CUDA_OP(function) \
  STABLE_TORCH_LIBRARY_IMPL(FASTGAN_LIBRARY, FASTGAN_KEY, m) { m.impl(#function, TORCH_BOX(&function)); }

namespace fastgan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr unsigned kAll = 0xffffffffu;

// Upper limits of grid sizes: blocks with sums in a normalization, blocks with sums elsewhere, other blocks,
// blockIdx.y.
#ifdef FASTGAN_EMULATED  // small, so that every grid-stride loop runs more than once
inline constexpr int64_t kMostParts = 3, kMostSums = 6, kMostBlocks = 6, kMostAcross = 5;
#else
inline constexpr int64_t kMostParts = 1024, kMostSums = 4096, kMostBlocks = 1 << 20, kMostAcross = 32768;
#endif

// Storage types. Arithmetic is float.
struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

__device__ __forceinline__ float to_float(float x) { return x; }
template <class T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}

#ifdef FASTGAN_EMULATED
inline float to_float(Bf16 x) { return emulator::to_float<torch::headeronly::BFloat16>(x.bits); }
inline float to_float(Fp16 x) { return emulator::to_float<torch::headeronly::Half>(x.bits); }
template <>
inline Bf16 from_float<Bf16>(float x) {
  return {emulator::from_float<torch::headeronly::BFloat16>(x)};
}
template <>
inline Fp16 from_float<Fp16>(float x) {
  return {emulator::from_float<torch::headeronly::Half>(x)};
}
#else
__device__ __forceinline__ float to_float(Bf16 x) { return __bfloat162float(__ushort_as_bfloat16(x.bits)); }
__device__ __forceinline__ float to_float(Fp16 x) { return __half2float(__ushort_as_half(x.bits)); }
template <>
__device__ __forceinline__ Bf16 from_float<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ Fp16 from_float<Fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
#endif

// W neighboring elements, read and written in one access: 16 bytes, or one element if alignment or sizes require it.
template <class T, int W>
struct alignas(sizeof(T) * W) Vec {
  T v[W];
};

template <class T>
inline constexpr int kWide = 16 / static_cast<int>(sizeof(T));

template <int W, class T>
__device__ __forceinline__ Vec<T, W> load(const T* p) {
  return *reinterpret_cast<const Vec<T, W>*>(p);
}

template <int W, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, W>& x) {
  *reinterpret_cast<Vec<T, W>*>(p) = x;
}

// load and store with an alignment known only at run time, and the same for all threads.
template <int W, class T>
__device__ __forceinline__ Vec<T, W> load(const T* p, bool wide) {
  if (wide) return load<W>(p);
  Vec<T, W> x;
#pragma unroll
  for (int w = 0; w < W; ++w) x.v[w] = p[w];
  return x;
}

template <int W, class T>
__device__ __forceinline__ void store(T* p, const Vec<T, W>& x, bool wide) {
  if (wide) return store<W>(p, x);
#pragma unroll
  for (int w = 0; w < W; ++w) p[w] = x.v[w];
}

// Hides from the compiler where a value came from. It then recomputes what it derived from the value (floats,
// addresses) instead of keeping all of it between two passes, which would spill registers.
template <class T, int W>
__device__ __forceinline__ void make_opaque(Vec<T, W>& x) {
#ifndef FASTGAN_EMULATED
  if constexpr (sizeof(x) % 4 == 0) {
    uint32_t* const words = reinterpret_cast<uint32_t*>(&x);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(x) / 4); ++i) asm volatile("" : "+r"(words[i]));
  }
#endif
}

__device__ __forceinline__ void make_opaque(int64_t& x) {
#ifndef FASTGAN_EMULATED
  asm volatile("" : "+l"(x));
#endif
}

// An optional bias in T or float.
template <class T>
struct Bias {
  const void* data;
  bool is_float;
  __device__ __forceinline__ float operator()(int64_t c) const {
    if (data == nullptr) return 0.0f;
    return is_float ? static_cast<const float*>(data)[c] : to_float(static_cast<const T*>(data)[c]);
  }
};

template <class T, int In, int Out>
struct Arrays {
  const T* in[In];
  T* out[Out];
};

// Sum over the N threads of a block, returned to all of them. Every thread must call it.
template <int N>
__device__ __forceinline__ float block_sum(float x) {
  __shared__ float warps[N / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(kAll, x, offset);
  __syncthreads();  // other threads may still be reading the previous sum
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < N / 32; ++i) sum += warps[i];
  return sum;
}

inline void check_device(const Tensor& x, const char* name) {
#ifndef FASTGAN_EMULATED
  STD_TORCH_CHECK(x.is_cuda(), name, " must be on a GPU");
#endif
}

// Layout of x, which must be dense. With one pixel per sample the features of a pixel are contiguous in any case.
inline Features features(const Tensor& x) {
  check_device(x, "x");
  Features f = dense_features(x);
  f.last = f.last || f.l == 1;
  return f;
}

inline void check_like(const Tensor& other, const char* name, const Tensor& x, const Features& f) {
  check_device(other, name);
  const auto s = other.sizes(), t = x.sizes();
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type() && other.get_device_index() == x.get_device_index(), name,
                  " must have the dtype and device of the op's first tensor");
  const bool same_sizes = s.size() == t.size() && std::equal(s.begin(), s.end(), t.begin());
  STD_TORCH_CHECK(same_sizes && is_dense(other, f.last && f.l > 1), name,
                  " must have the shape and memory format of the op's first tensor");
}

inline void check_floats(const Tensor& x, const char* name, int64_t numel) {
  check_device(x, name);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous() && x.numel() == numel, name,
                  " must be Float, contiguous, with ", numel, " elements");
}

inline void check_bias(const std::optional<Tensor>& bias, const Tensor& x, int64_t channels) {
  if (!bias) return;
  check_device(*bias, "bias");
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type(),
                  "bias must be Float or ", torch::headeronly::toString(x.scalar_type()), ", as x, got ",
                  torch::headeronly::toString(bias->scalar_type()));
  STD_TORCH_CHECK(bias->is_contiguous() && bias->dim() == 1 && bias->size(0) == channels,
                  "bias must be [", channels, "], contiguous");
}

template <class T>
Bias<T> bias_of(const std::optional<Tensor>& bias) {
  if (!bias) return {nullptr, false};
  return {bias->const_data_ptr(), bias->scalar_type() == ScalarType::Float};
}

// Calls f with a value of x's storage type.
template <class F>
decltype(auto) dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return f(float{});
    case ScalarType::BFloat16:
      return f(Bf16{});
    case ScalarType::Half:
      return f(Fp16{});
    default:
      STD_TORCH_CHECK(false, "x must be Float, BFloat16 or Half, got ", torch::headeronly::toString(x.scalar_type()));
  }
}

// Calls f with an integral constant: the elements of a 16-byte access if `wide`, else 1.
template <class T, class F>
void with_width(bool wide, const F& f) {
  if (wide) {
    f(std::integral_constant<int, kWide<T>>{});
  } else {
    f(std::integral_constant<int, 1>{});
  }
}

inline bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; });
}

template <class T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}

template <class T>
T* output(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

inline Tensor floats(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

// Number of blocks for `work` blocks of items. It depends on sizes alone: results must not depend on the device.
inline unsigned blocks(int64_t work, int64_t most) {
  return static_cast<unsigned>(std::max<int64_t>(1, std::min(work, most)));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Launches on the current stream of x's device.
class Launcher {
 public:
#ifdef FASTGAN_EMULATED
  explicit Launcher(const Tensor&) {}
  template <class... P, class... A>
  void operator()(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) const {
    emulator::launch(grid, block, [=] { kernel(arguments...); });
  }
#else
  explicit Launcher(const Tensor& x) : guard_(x.get_device_index()) {
    // The CUDA runtime linked into this library is not torch's copy, so it needs the device as well.
    check(cudaSetDevice(x.get_device_index()));
    using Current = int32_t (*)(int32_t, void**);
    static const auto current = reinterpret_cast<Current>(symbol("aoti_torch_get_current_cuda_stream"));
    STD_TORCH_CHECK(current != nullptr, "torch has no CUDA streams: it is not built with CUDA");
    void* stream = nullptr;
    STD_TORCH_CHECK(current(x.get_device_index(), &stream) == 0, "torch has no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... P, class... A>
  void operator()(void (*kernel)(P...), dim3 grid, dim3 block, A... arguments) const {
    kernel<<<grid, block, 0, stream_>>>(arguments...);
    check(cudaGetLastError());
  }

 private:
  // Looked up at run time: the library must load where there is no libtorch_cuda.
  static void* symbol(const char* name) {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return dlsym(library != nullptr ? library : RTLD_DEFAULT, name);
  }

  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

// out[c] = sum over parts of partial[part][c], in a fixed order: 32 channels per block, `Slices` threads per channel.
template <int Slices>
__global__ void __launch_bounds__(32 * Slices)
    sum_parts(const float* partial, int64_t parts, int64_t channels, float* out) {
  __shared__ float shared[Slices][32];
  const int lane = static_cast<int>(threadIdx.x) % 32, slice = static_cast<int>(threadIdx.x) / 32;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  float sum = 0.0f;
  if (c < channels) {
#pragma unroll 4
    for (int64_t part = slice; part < parts; part += Slices) sum += partial[part * channels + c];
  }
  shared[slice][lane] = sum;
  __syncthreads();
  if (slice != 0 || c >= channels) return;
  for (int i = 1; i < Slices; ++i) sum += shared[i][lane];
  out[c] = sum;
}

// Sum over all dimensions but C: kernels write partial sums, sum_parts adds them. float32 [C], or [0] if not wanted.
struct ChannelSum {
  int64_t parts, channels;
  Tensor partial, sum;
  ChannelSum(const Tensor& x, bool wanted, int64_t parts, int64_t channels)
      : parts(wanted ? parts : 0),
        channels(channels),
        partial(floats(x, {this->parts * channels})),
        sum(floats(x, {wanted ? channels : 0})) {}
  float* pointer() const { return parts > 0 ? output<float>(partial) : nullptr; }
  Tensor finish(const Launcher& launch) const {
    if (parts > 0) {
      constexpr int kSlices = 32;
      launch(sum_parts<kSlices>, dim3(static_cast<unsigned>(ceil_div(channels, 32))), dim3(32 * kSlices),
             data<float>(partial), parts, channels, output<float>(sum));
    }
    return sum;
  }
};

}  // namespace fastgan
