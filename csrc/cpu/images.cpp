// Batches of images for fastgan/data: rows gathered from memory, and bytes made floats. One thread each, as they run
// beside the threads that compute.
#include <vector>

#include "features.h"
#include "ops.h"

namespace fastgan {

namespace {

constexpr int64_t kRows = 4;     // copied in turns
constexpr int64_t kPiece = 256;  // bytes of a row at a time
constexpr int64_t kLine = 64;    // bytes of a cache line

// Rows that lie anywhere, one below the other at `out`. A core that copies one row after another waits at the begin of
// each: its prefetcher knows nothing of the next. So pieces of four rows are copied in turns, and the same pieces of the
// next four are asked for, into the second level of cache, as the first is no larger than such rows.
void copy_rows(const char* const* rows, int64_t count, int64_t bytes, char* out) {
  for (int64_t first = 0; first < count; first += kRows) {
    const int64_t beyond = std::min(first + kRows, count);
    for (int64_t at = 0; at < bytes; at += kPiece) {
      const int64_t length = std::min(kPiece, bytes - at);
      for (int64_t row = first; row < beyond; ++row) {
#if defined(__GNUC__)
        if (row + kRows < count) {
          for (int64_t line = 0; line < length; line += kLine) __builtin_prefetch(rows[row + kRows] + at + line, 0, 2);
        }
#endif
        std::memcpy(out + row * bytes + at, rows[row] + at, static_cast<size_t>(length));
      }
    }
  }
}

// Step is `step` where that is known to the compiler, else 0.
template <int64_t Step>
void turn_pixels(const uint8_t* x, float* y, int64_t width, int64_t step) {
  const int64_t channels = Step ? Step : step;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const uint8_t* pixel = x + (width - 1 - i) * channels;
    for (int64_t c = 0; c < channels; ++c) y[i * channels + c] = static_cast<float>(pixel[c]) / 127.5f - 1.0f;
  }
}

// Width is `width` where that is known to the compiler, else 0: a short row takes longer to begin than to turn.
template <int64_t Width>
void turn_rows(const uint8_t* x, float* y, int64_t rows, int64_t width) {
  const int64_t wide = Width ? Width : width;
  for (int64_t row = 0; row < rows; ++row, x += wide, y += wide) {
#pragma omp simd
    for (int64_t i = 0; i < wide; ++i) y[i] = static_cast<float>(x[wide - 1 - i]) / 127.5f - 1.0f;
  }
}

// Bytes in [-1, 1] as torch has them: divided and then lowered.
void finish_bytes(const uint8_t* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(x[i]) / 127.5f - 1.0f;
}

// The same, rows of `width` pixels of `step` bytes turned round.
void finish_turned(const uint8_t* x, float* y, int64_t rows, int64_t width, int64_t step) {
  if (step == 1) {
    switch (width) {
      case 4: return turn_rows<4>(x, y, rows, width);
      case 8: return turn_rows<8>(x, y, rows, width);
      case 16: return turn_rows<16>(x, y, rows, width);
      case 32: return turn_rows<32>(x, y, rows, width);
      default: return turn_rows<0>(x, y, rows, width);
    }
  }
  for (int64_t at = 0; at < rows * width * step; at += width * step) {
    if (step == 3) {
      turn_pixels<3>(x + at, y + at, width, step);
    } else {
      turn_pixels<0>(x + at, y + at, width, step);
    }
  }
}

}  // namespace

// Rows of `bytes` bytes of arrays that lie one below the other: uint8 [n, bytes] of `indices` (int64 [n]).
// addresses: where each array begins, int64 [arrays]; starts: its first row, and the number of all, int64 [arrays + 1].
Tensor gather_rows(const Tensor& addresses, const Tensor& starts, const Tensor& indices, int64_t bytes) {
  const int64_t arrays = addresses.numel(), count = indices.numel();
  STD_TORCH_CHECK(addresses.is_contiguous() && starts.is_contiguous() && indices.is_contiguous(), "may be contiguous");
  STD_TORCH_CHECK(arrays > 0 && starts.numel() == arrays + 1, "starts: may have one more element than addresses");
  STD_TORCH_CHECK(bytes > 0, "bytes: was ", bytes, "; it may be 1 or more");
  const int64_t *address = data<int64_t>(addresses), *start = data<int64_t>(starts), *index = data<int64_t>(indices);
  std::vector<const char*> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < start[arrays], "indices: was ", index[i], "; it may be 0 to ",
                    start[arrays] - 1);
    // Of arrays that start at the same row only the last has any.
    const int64_t array = std::upper_bound(start, start + arrays, index[i]) - start - 1;
    rows[static_cast<size_t>(i)] =
        reinterpret_cast<const char*>(static_cast<uintptr_t>(address[array])) + (index[i] - start[array]) * bytes;
  }
  const Tensor out = torch::stable::new_empty(indices, std::vector<int64_t>{count, bytes}, ScalarType::Byte);
  if (count > 0) copy_rows(rows.data(), count, bytes, reinterpret_cast<char*>(output<uint8_t>(out)));
  return out;
}

// uint8 [N, C, H, W] to float32 in [-1, 1] of the same memory format, those with 1 in `flips` (int64 [N]) turned round.
Tensor finish_images(const Tensor& images, const std::optional<Tensor>& flips) {
  STD_TORCH_CHECK(images.dim() == 4, "images: had ", images.dim(), " dimensions; it may be [N, C, H, W]");
  const Features f = features(images);
  const int64_t h = images.size(2), w = images.size(3);
  STD_TORCH_CHECK(!flips || (flips->is_cpu() && flips->is_contiguous() && flips->numel() == f.n),
                  "flips: may be contiguous, one for each image");
  const uint8_t* x = data<uint8_t>(images);
  const int64_t* flip = data<int64_t>(flips);
  const auto sizes = f.last ? std::vector<int64_t>{f.n, h, w, f.c} : std::vector<int64_t>{f.n, f.c, h, w};
  const Tensor made = fresh<float>(torch::stable::new_empty(images, sizes, ScalarType::Float));
  float* y = output<float>(made);
  const int64_t step = f.last ? f.c : 1, rows = f.last ? h : f.c * h, size = rows * w * step;
  for (int64_t first = 0, next = 0; first < f.n; first = next) {
    const bool turned = flip != nullptr && flip[first] != 0;
    // Images that are alike in this are finished as one.
    for (next = first + 1; next < f.n && (flip != nullptr && flip[next] != 0) == turned; ++next) continue;
    if (turned) {
      finish_turned(x + first * size, y + first * size, (next - first) * rows, w, step);
    } else {
      finish_bytes(x + first * size, y + first * size, (next - first) * size);
    }
  }
  return f.last ? torch::stable::transpose(torch::stable::transpose(made, 2, 3), 1, 2) : made;
}

}  // namespace fastgan
