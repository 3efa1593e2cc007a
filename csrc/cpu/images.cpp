// Batches of images for fastgan/data/loading: gathers rows from memory, and converts bytes to floats. Single-threaded,
// as they run beside the threads that train.
#include <vector>

#include "features.h"

namespace fastgan {

namespace {

constexpr int64_t kRows = 4;     // copied in alternation
constexpr int64_t kPiece = 256;  // bytes copied of a row at a time
constexpr int64_t kLine = 64;    // bytes of a cache line

// Copies scattered rows to a contiguous `out`. Copying one row after another stalls at the start of each, where the
// hardware prefetcher cannot predict the next address. So pieces of four rows are copied in alternation, and the same
// pieces of the next four are prefetched, into the L2 cache, as L1 is no larger than such rows.
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

// Step is `step` if known at compile time, else 0.
template <int64_t Step>
void flip_pixels(const uint8_t* x, float* y, int64_t width, int64_t step) {
  const int64_t channels = Step ? Step : step;
#pragma omp simd
  for (int64_t i = 0; i < width; ++i) {
    const uint8_t* pixel = x + (width - 1 - i) * channels;
    for (int64_t c = 0; c < channels; ++c) y[i * channels + c] = static_cast<float>(pixel[c]) / 127.5f - 1.0f;
  }
}

// Width is `width` if known at compile time, else 0: for short rows the setup of a loop costs more than the loop.
template <int64_t Width>
void flip_rows(const uint8_t* x, float* y, int64_t rows, int64_t width) {
  const int64_t wide = Width ? Width : width;
  for (int64_t row = 0; row < rows; ++row, x += wide, y += wide) {
#pragma omp simd
    for (int64_t i = 0; i < wide; ++i) y[i] = static_cast<float>(x[wide - 1 - i]) / 127.5f - 1.0f;
  }
}

// Bytes to [-1, 1]: x / 127.5 - 1, rounded as torch does.
void finish_bytes(const uint8_t* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) y[i] = static_cast<float>(x[i]) / 127.5f - 1.0f;
}

// The same with each row, `width` pixels of `step` bytes, flipped horizontally.
void finish_flipped(const uint8_t* x, float* y, int64_t rows, int64_t width, int64_t step) {
  if (step == 1) {
    switch (width) {
      case 4: return flip_rows<4>(x, y, rows, width);
      case 8: return flip_rows<8>(x, y, rows, width);
      case 16: return flip_rows<16>(x, y, rows, width);
      case 32: return flip_rows<32>(x, y, rows, width);
      default: return flip_rows<0>(x, y, rows, width);
    }
  }
  for (int64_t at = 0; at < rows * width * step; at += width * step) {
    if (step == 3) {
      flip_pixels<3>(x + at, y + at, width, step);
    } else {
      flip_pixels<0>(x + at, y + at, width, step);
    }
  }
}

}  // namespace

// Gathers rows of `bytes` bytes from several arrays that are numbered as one: uint8 [n, bytes] for indices, int64 [n].
// addresses: address of each array, int64 [arrays]; starts: its first row, then the total, int64 [arrays + 1].
Tensor gather_rows(const Tensor& addresses, const Tensor& starts, const Tensor& indices, int64_t bytes) {
  const int64_t arrays = addresses.numel(), count = indices.numel();
  STD_TORCH_CHECK(addresses.is_contiguous() && starts.is_contiguous() && indices.is_contiguous(),
                  "addresses, starts and indices must be contiguous");
  STD_TORCH_CHECK(arrays > 0 && starts.numel() == arrays + 1, "starts must have one element more than addresses, got ",
                  starts.numel(), " and ", arrays);
  STD_TORCH_CHECK(bytes > 0, "bytes must be at least 1, got ", bytes);
  const int64_t *address = data<int64_t>(addresses), *start = data<int64_t>(starts), *index = data<int64_t>(indices);
  std::vector<const char*> rows(static_cast<size_t>(count));
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < start[arrays], "indices must be 0 to ", start[arrays] - 1, ", got ",
                    index[i]);
    // Among arrays that start at the same row, only the last is not empty.
    const int64_t array = std::upper_bound(start, start + arrays, index[i]) - start - 1;
    rows[static_cast<size_t>(i)] =
        reinterpret_cast<const char*>(static_cast<uintptr_t>(address[array])) + (index[i] - start[array]) * bytes;
  }
  const Tensor out = torch::stable::new_empty(indices, std::vector<int64_t>{count, bytes}, ScalarType::Byte);
  if (count > 0) copy_rows(rows.data(), count, bytes, reinterpret_cast<char*>(output<uint8_t>(out)));
  return out;
}

// uint8 [N, C, H, W] to float32 in [-1, 1], same memory format. flips, int64 [N]: 1 flips an image horizontally.
Tensor finish_images(const Tensor& images, const std::optional<Tensor>& flips) {
  STD_TORCH_CHECK(images.dim() == 4, "images must be [N, C, H, W], got ", images.dim(), " dimensions");
  const Features f = features(images);
  const int64_t h = images.size(2), w = images.size(3);
  STD_TORCH_CHECK(!flips || (flips->is_cpu() && flips->is_contiguous() && flips->numel() == f.n),
                  "flips must be contiguous with ", f.n, " elements, one for each image");
  const uint8_t* x = data<uint8_t>(images);
  const int64_t* flip = data<int64_t>(flips);
  const Tensor result = fresh_map<float>(images, ScalarType::Float, f.n, f.c, h, w, f.last);
  float* y = output<float>(result);
  const int64_t step = f.last ? f.c : 1, rows = f.last ? h : f.c * h, size = rows * w * step;
  for (int64_t first = 0, next = 0; first < f.n; first = next) {
    const bool flipped = flip != nullptr && flip[first] != 0;
    // Consecutive images with the same flip are converted in one go.
    for (next = first + 1; next < f.n && (flip != nullptr && flip[next] != 0) == flipped; ++next) continue;
    if (flipped) {
      finish_flipped(x + first * size, y + first * size, (next - first) * rows, w, step);
    } else {
      finish_bytes(x + first * size, y + first * size, (next - first) * size);
    }
  }
  return result;
}

FASTGAN_OP(gather_rows, "(Tensor addresses, Tensor starts, Tensor indices, int bytes) -> Tensor");
FASTGAN_OP(finish_images, "(Tensor images, Tensor? flips) -> Tensor");

}  // namespace fastgan
