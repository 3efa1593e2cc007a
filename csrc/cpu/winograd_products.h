// The matrix products of minimal filtering, in words of 4 bytes: a float, or two bfloat16 that are neighbors in the sum.
// A product of two words is added to a float.
#pragma once

#include <algorithm>
#include <utility>

#include "vector.h"

namespace fastgan {

// Values in a word.
template <class T>
inline constexpr int64_t kPack = 4 / sizeof(T);

template <class T>
FASTGAN_INLINE Vec read_some(const T* p, int64_t count) {
  if (count >= kVector) return read(p);
  T some[kVector] = {};
  std::memcpy(some, p, static_cast<size_t>(count) * sizeof(T));
  return read(some);
}

template <class T>
FASTGAN_INLINE void write_some(T* p, Vec v, int64_t count) {
  if (count >= kVector) {
    write(p, v);
  } else {
    T some[kVector];
    write(some, v);
    std::memcpy(p, some, static_cast<size_t>(count) * sizeof(T));
  }
}

// Up to `count` values that are `stride` apart; zeros after them.
template <class T>
FASTGAN_INLINE Vec read_strided(const T* p, int64_t stride, int64_t count) {
  if (stride == 1) return read_some(p, count);
  float some[kVector] = {};
  for (int64_t lane = 0; lane < std::min(kVector, count); ++lane) some[lane] = load(p + lane * stride);
  return read(some);
}

// Writes up to `count` words of values that are neighbors in the sum, `stride` words apart.
template <class T>
FASTGAN_INLINE void put_strided(float* to, int64_t stride, Vec v, int64_t count) {
  alignas(64) float words[kVector];
  write(reinterpret_cast<T*>(words), v);
  for (int64_t word = 0; word < std::min(kVector / kPack<T>, count); ++word) to[word * stride] = words[word];
}

// Where the transformed channels of a tile are written, as a factor of a product that sums over channels, or, with
// OverTiles, over tiles. Tiles must come in order.
template <class T, bool OverTiles>
struct Line;

template <bool OverTiles>
struct Line<float, OverTiles> {
  float* start;
  Line(float* base, int64_t tile, int64_t channels) : start(base + tile * channels) {}
  FASTGAN_INLINE void put(int64_t offset, int64_t channel, Vec v) const { write(start + offset + channel, v); }
};

// sum + a b of words.
template <class T>
FASTGAN_INLINE Vec add_product(Vec sum, Vec a, Vec b);

template <>
FASTGAN_INLINE Vec add_product<float>(Vec sum, Vec a, Vec b) {
  return sum + a * b;
}

#if defined(FASTGAN_BF16)

template <>
struct Line<BFloat16, false> {
  float* start;
  Line(float* base, int64_t tile, int64_t channels) : start(base + tile * channels / 2) {}
  FASTGAN_INLINE void put(int64_t offset, int64_t channel, Vec v) const {
    const __m256i rounded = nearest(v);
    std::memcpy(start + offset + channel / 2, &rounded, sizeof rounded);
  }
};

// An even tile is in the lower half of a word, with zero above it, and the tile after it in the upper half.
template <>
struct Line<BFloat16, true> {
  float* start;
  bool upper;
  Line(float* base, int64_t tile, int64_t channels) : start(base + tile / 2 * channels), upper(tile % 2 == 1) {}
  FASTGAN_INLINE void put(int64_t offset, int64_t channel, Vec v) const {
    __m512i words = _mm512_cvtepu16_epi32(nearest(v));
    float* to = start + offset + channel;
    if (upper) words = _mm512_or_si512(_mm512_slli_epi32(words, 16), _mm512_loadu_si512(to));
    _mm512_storeu_si512(to, words);
  }
};

template <>
FASTGAN_INLINE Vec add_product<BFloat16>(Vec sum, Vec a, Vec b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

#endif

// R rows and V vectors of c = a b, or c += a b. a: rows `row` apart, the words of the sum `next` apart; b: V vectors for
// each word, `width` apart.
template <class T, int64_t R, int64_t V, bool Add>
void product(const float* a, int64_t row, int64_t next, const float* b, int64_t width, int64_t count, float* c,
             int64_t pitch) {
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) sum[r][v] = Add ? read(c + r * pitch + v * kVector) : Vec{};
  }
  for (int64_t k = 0; k < count; ++k, a += next, b += width) {
    Vec columns[V];
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) columns[v] = read(b + v * kVector);
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; ++r) {
      const Vec word = broadcast(a[r * row]);
#pragma GCC unroll 8
      for (int64_t v = 0; v < V; ++v) sum[r][v] = add_product<T>(sum[r][v], word, columns[v]);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int64_t v = 0; v < V; ++v) write(c + r * pitch + v * kVector, sum[r][v]);
  }
}

using Product = void (*)(const float*, int64_t, int64_t, const float*, int64_t, int64_t, float*, int64_t);

template <class T, bool Add, size_t... Index>
Product product_of(int64_t index, std::index_sequence<Index...>) {
  constexpr Product products[] = {product<T, static_cast<int64_t>(Index) / kTileVectors + 1,
                                          static_cast<int64_t>(Index) % kTileVectors + 1, Add>...};
  return products[index];
}

// The matrix c [rows, columns] = or, with `add`, += a b over `count` words; columns is a multiple of kVector. With
// `packed`, b is in panels of kTileVectors vectors, one after the other; else its rows are `columns` long.
template <class T>
void multiply(bool add, const float* a, int64_t row, int64_t next, const float* b, bool packed, int64_t rows,
              int64_t columns, int64_t count, float* c) {
  constexpr int64_t panel = kTileVectors * kVector;
  constexpr auto all = std::make_index_sequence<kTileRows * kTileVectors>();
  for (int64_t column = 0; column < columns; column += panel) {
    const int64_t vectors = std::min(panel, columns - column) / kVector;
    const float* from = packed ? b + column * count : b + column;
    const int64_t width = packed ? vectors * kVector : columns;
    for (int64_t first = 0; first < rows; first += kTileRows) {
      const int64_t index = (std::min(kTileRows, rows - first) - 1) * kTileVectors + vectors - 1;
      const Product of_tile = add ? product_of<T, true>(index, all) : product_of<T, false>(index, all);
      of_tile(a + first * row, row, next, from, width, count, c + first * columns + column, columns);
    }
  }
}

}  // namespace fastgan
