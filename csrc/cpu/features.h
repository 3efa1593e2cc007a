// Feature maps [N, C, ...] in memory, shared by the elementwise and norm ops: layout, outputs, sums over all but C.
#pragma once

#include <sys/mman.h>

#include <vector>

#include "op.h"

namespace fastgan {

// L pixels a sample; the C features of a pixel are neighbors where `last`, else L apart.
struct Features {
  int64_t n, c, l;
  bool last;
  int64_t pixels() const { return n * l; }
  int64_t numel() const { return n * c * l; }
};

// Whether walking the dimensions in the order N, C, ... or, where `last`, N, ..., C walks through memory.
inline bool walks(const Tensor& x, bool last) {
  const auto sizes = x.sizes(), strides = x.strides();
  const auto dims = static_cast<int64_t>(sizes.size());
  int64_t expected = 1;
  const auto dense = [&](int64_t dim) {
    const bool fits = sizes[dim] == 1 || strides[dim] == expected;
    expected *= sizes[dim];
    return fits;
  };
  if (last && !dense(1)) return false;
  for (int64_t dim = dims - 1; dim >= 2; --dim) {
    if (!dense(dim)) return false;
  }
  return (last || dense(1)) && dense(0);
}

// Layout of x, which must be dense. Where it is both contiguous and channels_last the result is for a contiguous x.
inline Features features(const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu(), "x: is not on the CPU");
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, "x: had ", sizes.size(), " dimensions; it may be [N, C, ...]");
  Features f{sizes[0], sizes[1], 1, false};
  for (size_t dim = 2; dim < sizes.size(); ++dim) f.l *= sizes[dim];
  STD_TORCH_CHECK(f.numel() > 0, "x: was empty");
  const bool contiguous = walks(x, false);
  STD_TORCH_CHECK(contiguous || walks(x, true), "x: may be dense, contiguous or channels_last");
  f.last = !contiguous;
  return f;
}

// Where a vector of features lies: at one pixel a contiguous x has it in neighbors too, and short planes make long rows.
inline Features as_rows(Features f) {
  f.last = f.last || f.l == 1;
  return f;
}

inline void check_dense_like(const Tensor& other, const char* name, const Tensor& x, bool last) {
  check_like(other, name, x);
  STD_TORCH_CHECK(walks(other, last), name, ": may be in the memory format of the op's first tensor");
}

// Large fresh memory is written faster in huge pages: the system clears 512 small ones one fault at a time. Advice only.
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
Tensor fresh(Tensor made) {
  prefer_huge_pages(made.mutable_data_ptr(), made.numel() * static_cast<int64_t>(sizeof(T)));
  return made;
}

// Uninitialized, shape, dtype and memory format of x.
template <class T>
Tensor fresh_like(const Tensor& x) {
  return fresh<T>(torch::stable::empty_like(x));
}

// Small tensor of float32 on the CPU.
inline Tensor fresh_floats(const Tensor& x, const std::vector<int64_t>& sizes) {
  return torch::stable::new_empty(x, sizes, ScalarType::Float);
}

// Float copy of a bias in float32 or x's dtype; zeros where there is none.
inline std::vector<float> bias_values(const std::optional<Tensor>& bias, const Tensor& x, int64_t channels) {
  std::vector<float> values(static_cast<size_t>(channels), 0.0f);
  if (!bias) return values;
  STD_TORCH_CHECK(bias->is_cpu(), "bias: is not on the CPU");
  STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels, "bias: may be of shape [", channels, "]");
  STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float || bias->scalar_type() == x.scalar_type(), "bias: was ",
                  torch::headeronly::toString(bias->scalar_type()), "; it may be Float or as x");
  const int64_t stride = bias->stride(0);
  dispatch(*bias, "bias", [&](auto element) {
    const auto* from = data<decltype(element)>(*bias);
    for (int64_t c = 0; c < channels; ++c) values[static_cast<size_t>(c)] = load(from + c * stride);
  });
  return values;
}

// Sum of a short stretch just written. In a loop of its own: together with a store GCC leaves some in scalars.
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

// Sum over a tensor but for C, in parts that depend on its size alone, so that the result does not depend on threads.
class BiasSum {
 public:
  BiasSum(bool wanted, int64_t parts, int64_t channels)
      : parts_(wanted ? parts : 0), channels_(channels), partial_(static_cast<size_t>(parts_ * channels), 0.0f) {}

  bool wanted() const { return parts_ > 0; }
  float* part(int64_t index) { return partial_.data() + index * channels_; }

  // float32 [C]; [0] where it is not wanted.
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

// Cuts [0, count) into at most `most` equal parts of at least `least`, by the sizes alone.
struct Parts {
  int64_t count, size, number;
  Parts(int64_t count, int64_t least, int64_t most)
      : count(count), size(std::max(least, (count + most - 1) / most)), number((count + size - 1) / size) {}
  int64_t begin(int64_t part) const { return part * size; }
  int64_t end(int64_t part) const { return std::min(count, (part + 1) * size); }
};

// Of the pixels of an x that has the features of a pixel in neighbors.
inline Parts row_parts(const Features& f) { return Parts(f.pixels(), std::max<int64_t>(1, 1024 / f.c), 1024); }

}  // namespace fastgan
