// Feature maps [N, C, ...] for the elementwise and normalization ops: memory layout, outputs, sums over all but C.
#pragma once

#include <sys/mman.h>

#include <optional>
#include <vector>

#include <torch/headeronly/core/MemoryFormat.h>

#include "op.h"

namespace fastgan {

inline Features features(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "x must be on the CPU");
  return dense_features(x);
}

// With one pixel per sample, a contiguous x also has the features of a pixel next to each other.
inline Features as_rows(Features f) {
  f.last = f.last || f.l == 1;
  return f;
}

inline void check_dense_like(const Tensor& other, const char* name, const Tensor& x, bool last) {
  check_like(other, name, x);
  STD_TORCH_CHECK(is_dense(other, last), name, " must have the memory format of the op's first tensor");
}

// Advises huge pages for large new tensors: one page fault instead of 512 makes the first write faster.
inline void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = uintptr_t{1} << 21;
  if (bytes < int64_t{8} << 20) return;
  const auto begin = (reinterpret_cast<uintptr_t>(data) + page - 1) & ~(page - 1);
  const auto end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(page - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

template <class T>
Tensor fresh(Tensor result) {
  prefer_huge_pages(result.mutable_data_ptr(), result.numel() * static_cast<int64_t>(sizeof(T)));
  return result;
}

// An uninitialized map on the device of `like`. Not a transposed view of other memory: autograd refuses to let the result
// of an op be changed in place if it is a view.
template <class T>
Tensor fresh_map(const Tensor& like, ScalarType dtype, int64_t n, int64_t c, int64_t h, int64_t w, bool last) {
  const auto format = last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  const std::vector<int64_t> sizes{n, c, h, w};
  return fresh<T>(torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt, format));
}

// An uninitialized tensor with the shape, dtype and memory format of x.
template <class T>
Tensor fresh_like(const Tensor& x) {
  return fresh<T>(torch::stable::empty_like(x));
}

// An uninitialized float32 tensor on the CPU.
inline Tensor fresh_floats(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

// Copies a bias, in float32 or x's dtype, to float; zeros if there is no bias.
inline std::vector<float> bias_values(const std::optional<Tensor>& bias, const Tensor& x, int64_t channels) {
  std::vector<float> values(static_cast<size_t>(channels), 0.0f);
  if (!bias) return values;
  STD_TORCH_CHECK(bias->is_cpu(), "bias must be on the CPU");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "bias must be [", channels, "]");
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type(),
                  "bias must be Float or ", torch::headeronly::toString(x.scalar_type()), ", as x, got ",
                  torch::headeronly::toString(bias->scalar_type()));
  const int64_t stride = bias->stride(0);
  dispatch(*bias, "bias", [&](auto element) {
    const auto* from = data<decltype(element)>(*bias);
    for (int64_t c = 0; c < channels; ++c) values[static_cast<size_t>(c)] = load(from + c * stride);
  });
  return values;
}

// Sum of a short run that was just written. A separate loop: fused with the store, GCC does not vectorize all of it.
template <class T>
float sum_of(const T* from, int64_t count) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += load(from + i);
  return sum;
}

template <class T>
void add_to(float* sums, const T* from, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) sums[i] += load(from + i);
}

// Sum over all dimensions but C, in parts that depend on sizes alone, so that the result does not depend on threads.
class BiasSum {
 public:
  BiasSum(bool wanted, int64_t parts, int64_t channels)
      : parts_(wanted ? parts : 0), channels_(channels), partial_(static_cast<size_t>(parts_ * channels), 0.0f) {}

  bool wanted() const { return parts_ > 0; }
  float* part(int64_t index) { return partial_.data() + index * channels_; }

  // float32 [C], or [0] if not wanted.
  Tensor result(const Tensor& x) const {
    Tensor sum = fresh_floats(x, {wanted() ? channels_ : 0});
    if (wanted()) {
      float* to = output<float>(sum);
      for (int64_t c = 0; c < channels_; ++c) {
        double total = 0.0;
        for (int64_t part = 0; part < parts_; ++part) total += partial_[static_cast<size_t>(part * channels_ + c)];
        to[c] = static_cast<float>(total);
      }
    }
    return sum;
  }

 private:
  int64_t parts_, channels_;
  std::vector<float> partial_;
};

// Splits [0, count) into at most `most` equal parts of at least `least` items.
struct Parts {
  int64_t count, size, number;
  Parts(int64_t count, int64_t least, int64_t most)
      : count(count), size(std::max(least, (count + most - 1) / most)), number((count + size - 1) / size) {}
  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part) const { return std::min(count, (part + 1) * size); }
};

// Parts of the pixels of a channels_last tensor.
inline Parts row_parts(const Features& f) { return Parts(f.pixels(), std::max<int64_t>(1, 1024 / f.c), 1024); }

}  // namespace fastgan
