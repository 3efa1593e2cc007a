// Shared by the CPU and the CUDA library: their name, indices of activations, and the memory layout of feature maps
// [N, C, ...].
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#ifndef FASTGAN_LIBRARY
#define FASTGAN_LIBRARY fastgan  // the functions are torch.ops.fastgan.*; tests have names of their own
#endif

namespace fastgan {

using torch::stable::Tensor;

// Indices into fastgan.ops.bias_act.ACTS.
enum Act : int { kLinear, kRelu, kLrelu, kTanh, kSigmoid, kSilu };

// l: pixels per sample. last: channels_last, where the c features of a pixel are contiguous; else they are l apart.
struct Features {
  int64_t n, c, l;
  bool last;
  int64_t pixels() const { return n * l; }
  int64_t numel() const { return n * c * l; }
};

// Whether x is dense with its dimensions in the order N, C, ... or, if `last`, in the order N, ..., C.
inline bool is_dense(const Tensor& x, bool last) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto dense = [&](int64_t dim) {
    const bool fits = sizes[dim] == 1 || strides[dim] == expected;
    expected *= sizes[dim];
    return fits;
  };
  if (last && !dense(1)) return false;
  for (int64_t dim = x.dim() - 1; dim >= 2; --dim) {
    if (!dense(dim)) return false;
  }
  return (last || dense(1)) && dense(0);
}

// Layout of x, which must be dense. If x is both contiguous and channels_last, the layout is contiguous.
inline Features dense_features(const Tensor& x) {
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() >= 2, "x must be [N, C, ...], got ", sizes.size(), " dimensions");
  Features f{sizes[0], sizes[1], 1, false};
  for (size_t dim = 2; dim < sizes.size(); ++dim) f.l *= sizes[dim];
  STD_TORCH_CHECK(f.numel() > 0, "x must not be empty");
  f.last = !is_dense(x, false);
  STD_TORCH_CHECK(!f.last || is_dense(x, true), "x must be dense, contiguous or channels_last");
  return f;
}

}  // namespace fastgan
