// Shared by all CPU ops: tensors of torch's stable ABI, dtypes, threads. csrc/README.md shows how to write an op.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>
#include <type_traits>

#include "common.h"

// The library is compiled once per instruction set, and Python loads the one that ATen uses (fastgan/ops/dispatch/extension.py).
// An op is ordinary C++: loops under `#pragma omp simd`, and intrinsics behind these macros.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define FASTGAN_AVX512 1
#if defined(__AVX512BF16__)
#define FASTGAN_BF16 1  // products of bfloat16
#endif
#elif defined(__AVX2__) && defined(__FMA__)
#define FASTGAN_AVX2 1
#endif

// Registers a function of this namespace under its name: FASTGAN_OP(f, "(Tensor x, float eps) -> Tensor"). CUDA
// implementations share the schema.
#define FASTGAN_OP(function, schema)                                             \
  STABLE_TORCH_LIBRARY_FRAGMENT(FASTGAN_LIBRARY, m) { m.def(#function schema); } \
  STABLE_TORCH_LIBRARY_IMPL(FASTGAN_LIBRARY, CPU, m) { m.impl(#function, TORCH_BOX(&function)); }

namespace fastgan {

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Floats in a vector register.
#if defined(FASTGAN_AVX512)
inline constexpr int64_t kVector = 16;
#elif defined(FASTGAN_AVX2)
inline constexpr int64_t kVector = 8;
#else
inline constexpr int64_t kVector = 4;
#endif

// Storage is float or BFloat16, arithmetic is float. The conversions are bit operations, so that loops vectorize.
// BFloat16 is read and written through its type: a memcpy may alias anything, and would force reloads after each
// element.
inline float load(const float* p) { return *p; }

inline float load(const BFloat16* p) {
  const uint32_t bits = uint32_t{p->x} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void store(float* p, float value) { *p = value; }

inline void store(BFloat16* p, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  p->x = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : nearest_even);
}

// Calls f with a value of x's element type: dispatch(x, "x", [&](auto element) { using T = decltype(element); });
template <class F>
decltype(auto) dispatch(const Tensor& x, const char* name, const F& f) {
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return f(float{});
  STD_TORCH_CHECK(type == ScalarType::BFloat16, name, " must be Float or BFloat16, got ",
                  torch::headeronly::toString(type));
  return f(BFloat16{});
}

// Address of the first element, for reading; throws if the dtype is not T. output() is for writing.
template <class T>
const T* data(const Tensor& x) {
  return x.const_data_ptr<T>();
}

// nullptr if there is no tensor.
template <class T>
const T* data(const std::optional<Tensor>& x) {
  return x ? x->const_data_ptr<T>() : nullptr;
}

template <class T>
T* output(const Tensor& x) {
  return x.mutable_data_ptr<T>();
}

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto s = a.sizes(), t = b.sizes();
  return s.size() == t.size() && std::equal(s.begin(), s.end(), t.begin());
}

inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto s = a.strides(), t = b.strides();
  return s.size() == t.size() && std::equal(s.begin(), s.end(), t.begin());
}

// Checks that `other` has the shape and dtype of x, on the CPU. Autograd ensures it, a caller of torch.ops need not.
inline void check_like(const Tensor& other, const char* name, const Tensor& x) {
  STD_TORCH_CHECK(other.is_cpu(), name, " must be on the CPU");
  STD_TORCH_CHECK(other.scalar_type() == x.scalar_type(), name, " must be ",
                  torch::headeronly::toString(x.scalar_type()), ", as the op's first tensor, got ",
                  torch::headeronly::toString(other.scalar_type()));
  STD_TORCH_CHECK(same_sizes(other, x), name, " must have the shape of the op's first tensor");
}

// Calls f(begin, end) over [0, count) in torch's threads (torch.set_num_threads). `work` is the cost of one item, in
// float operations or bytes moved; below a total of about 32768 a second thread does not pay. The ranges depend on the
// number of threads, and results must not: each item should write its own output.
template <class F>
void parallel(int64_t count, int64_t work, const F& f) {
  if (count <= 0) return;
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  if (count <= grain) {
    f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// As `parallel`, with scratch for each thread: f(begin, end, scratch), `floats` uninitialized floats at scratch. It is
// allocated before the threads start, where an exception can be caught.
template <class F>
void parallel_with_scratch(const Tensor& like, int64_t count, int64_t work, int64_t floats, const F& f) {
  if (count <= 0) return;
  const int64_t least = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, work));
  const int64_t threads = std::max<int64_t>(1, std::min<int64_t>(count / least, torch::stable::get_num_threads()));
  floats = (floats + 15) / 16 * 16;  // whole cache lines
  const Tensor memory = torch::stable::new_empty(like, {threads * floats}, ScalarType::Float);
  float* const base = output<float>(memory);
  if (threads == 1) {
    f(int64_t{0}, count, base);
    return;
  }
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, count, (count + threads - 1) / threads, [&](int64_t begin, int64_t end) {
    f(begin, end, base + next.fetch_add(1) * floats);
  });
}

}  // namespace fastgan
