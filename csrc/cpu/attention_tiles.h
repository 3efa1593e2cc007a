// Register-tiled products over a panel of query rows, and exp: the building blocks of attention_panels.h.
//
// Vector lanes are query rows. A panel has R = RV * kVector rows, and an array over (column j, row i) is stored as x[j
// * R + i]. Row statistics are then vertical sums, and keys and values are read in their own layout, one number at a
// time (broadcast). Only `add_to_columns`, whose results have features in the lanes, needs padded features.
#pragma once

#include "vector.h"

namespace fastgan {
namespace tiles {

typedef int32_t Ints __attribute__((vector_size(kVector * 4)));

// Vectors of rows in a panel: as many as leave registers for the accumulators.
#if defined(FASTGAN_AVX512)
inline constexpr int kPanel = 3;
inline constexpr int kFeatures = 8;  // features of one step of add_to_rows
#else
inline constexpr int kPanel = 2;
inline constexpr int kFeatures = 4;
#endif

FASTGAN_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

// exp(x) for x <= 88, to about 1 ulp; 0 below -87.3, where the result would be subnormal. NaN stays NaN.
// x = n log 2 + r with |r| <= log(2) / 2; exp(r) = 1 + r + r^2 q(r), q a minimax fit (relative error 3e-9).
FASTGAN_INLINE Vec exp(Vec x) {
  const Vec low = broadcast(-87.3f);
  const Vec clamped = x < low ? low : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  const Vec shifted = clamped * 1.44269504f + magic;
  const Vec n = shifted - magic;
  Vec r = clamped - n * 0.693145751953125f;
  r = r - n * 1.42860677e-6f;
  Vec q = r * 0x1.6a2256p-10f + 0x1.123b02p-7f;
  q = q * r + 0x1.5558f8p-5f;
  q = q * r + 0x1.555490p-3f;
  q = q * r + 0x1.fffffcp-2f;
  const Vec p = (q * r) * r + r + 1.0f;
  Ints bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  Vec power;
  std::memcpy(&power, &bits, sizeof power);
  return x < low ? Vec{} : p * power;
}

// A factor of a product, and the distance between its rows in floats.
struct Factor {
  const float* data;
  int64_t stride;
};

// a[m][r] += sum over c of x[m][c] across[c][r], for M columns m and the panel's rows r.
template <int RV, int M>
FASTGAN_INLINE void multiply(Vec (&a)[M][RV], const float* across, Factor x, int64_t features) {
  for (int64_t c = 0; c < features; ++c) {
    Vec rows[RV];
#pragma GCC unroll 8
    for (int r = 0; r < RV; ++r) rows[r] = read(across + (c * RV + r) * kVector);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float number = x.data[m * x.stride + c];
#pragma GCC unroll 8
      for (int r = 0; r < RV; ++r) a[m][r] += number * rows[r];
    }
  }
}

// a += x across_a and b += x across_b + y across_a, with shared loads.
template <int RV, int M>
FASTGAN_INLINE void multiply_with_tangent(Vec (&a)[M][RV], Vec (&b)[M][RV], const float* across_a,
                                          const float* across_b, Factor x, Factor y, int64_t features) {
  for (int64_t c = 0; c < features; ++c) {
#pragma GCC unroll 8
    for (int r = 0; r < RV; ++r) {
      const Vec row = read(across_a + (c * RV + r) * kVector);
      const Vec tangent = read(across_b + (c * RV + r) * kVector);
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const float number = x.data[m * x.stride + c];
        a[m][r] += number * row;
        b[m][r] += number * tangent;
        b[m][r] += y.data[m * y.stride + c] * row;
      }
    }
  }
}

// a += x across and b += y across.
template <int RV, int M>
FASTGAN_INLINE void multiply_both(Vec (&a)[M][RV], Vec (&b)[M][RV], const float* across, Factor x, Factor y,
                                  int64_t features) {
  for (int64_t c = 0; c < features; ++c) {
    Vec rows[RV];
#pragma GCC unroll 8
    for (int r = 0; r < RV; ++r) rows[r] = read(across + (c * RV + r) * kVector);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      const float number = x.data[m * x.stride + c];
      const float other = y.data[m * y.stride + c];
#pragma GCC unroll 8
      for (int r = 0; r < RV; ++r) {
        a[m][r] += number * rows[r];
        b[m][r] += other * rows[r];
      }
    }
  }
}

// out[c][i] += sum over terms and columns j of x[j][i] y[j][c]: a product whose result belongs to the panel's rows. x
// of a term is an array over (column, row), y are keys or values, out is [features][R]. Here and in add_to_columns each
// call sums from zero and adds to `out` at the end: pairwise sums round less than one long sum.
struct Term {
  const float* x;
  Factor y;
};

template <int RV, int NK, int TERMS>
void add_to_rows_step(float* out, const Term (&terms)[TERMS], int64_t c, int64_t columns) {
  constexpr int R = RV * kVector;
  Vec sum[NK][RV] = {};
  for (int t = 0; t < TERMS; ++t) {
    const float* x = terms[t].x;
    const float* y = terms[t].y.data + c;
    const int64_t stride = terms[t].y.stride;
    for (int64_t j = 0; j < columns; ++j) {
      Vec rows[RV];
#pragma GCC unroll 8
      for (int r = 0; r < RV; ++r) rows[r] = read(x + j * R + r * kVector);
#pragma GCC unroll 8
      for (int n = 0; n < NK; ++n) {
        const float number = y[j * stride + n];
#pragma GCC unroll 8
        for (int r = 0; r < RV; ++r) sum[n][r] += number * rows[r];
      }
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < NK; ++n)
#pragma GCC unroll 8
    for (int r = 0; r < RV; ++r) {
      float* const to = out + (c + n) * R + r * kVector;
      write(to, read(to) + sum[n][r]);
    }
}

template <int RV, int TERMS>
void add_to_rows(float* out, const Term (&terms)[TERMS], int64_t features, int64_t columns) {
  int64_t c = 0;
  for (; c + kFeatures <= features; c += kFeatures) add_to_rows_step<RV, kFeatures>(out, terms, c, columns);
  if (kFeatures > 4 && c + 4 <= features) {
    add_to_rows_step<RV, 4>(out, terms, c, columns);
    c += 4;
  }
  if (c + 2 <= features) {
    add_to_rows_step<RV, 2>(out, terms, c, columns);
    c += 2;
  }
  if (c < features) add_to_rows_step<RV, 1>(out, terms, c, columns);
}

// out[j][c] += sum over terms and rows i of x[j][i] along[i][c]: a product whose result belongs to keys or values.
// `along` and out have `padded` features, a multiple of kVector.
struct RowTerm {
  const float* x;
  const float* along;
};

template <int ND, int M, int TERMS>
FASTGAN_INLINE void add_to_columns_step(float* out, const RowTerm (&terms)[TERMS], int64_t j, int64_t c, int64_t R,
                                        int64_t padded) {
  Vec sum[M][ND] = {};
  for (int t = 0; t < TERMS; ++t) {
    const float* x = terms[t].x + j * R;
    const float* along = terms[t].along + c;
    for (int64_t i = 0; i < R; ++i) {
      Vec features[ND];
#pragma GCC unroll 8
      for (int n = 0; n < ND; ++n) features[n] = read(along + i * padded + n * kVector);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) {
        const float number = x[m * R + i];
#pragma GCC unroll 8
        for (int n = 0; n < ND; ++n) sum[m][n] += number * features[n];
      }
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
    for (int n = 0; n < ND; ++n) {
      float* const to = out + (j + m) * padded + c + n * kVector;
      write(to, read(to) + sum[m][n]);
    }
}

template <int RV, int ND, int M, int TERMS>
void add_to_columns_strip(float* out, const RowTerm (&terms)[TERMS], int64_t c, int64_t columns, int64_t padded) {
  constexpr int64_t R = RV * kVector;
  int64_t j = 0;
  for (; j + M <= columns; j += M) add_to_columns_step<ND, M>(out, terms, j, c, R, padded);
  for (; j < columns; ++j) add_to_columns_step<ND, 1>(out, terms, j, c, R, padded);
}

template <int RV, int TERMS>
void add_to_columns(float* out, const RowTerm (&terms)[TERMS], int64_t columns, int64_t padded) {
  constexpr bool wide = kVector == 16;
  int64_t c = 0;
  for (; c + 2 * kVector <= padded; c += 2 * kVector)
    add_to_columns_strip<RV, 2, wide ? 8 : 4>(out, terms, c, columns, padded);
  if (c < padded) add_to_columns_strip<RV, 1, wide ? 16 : 8>(out, terms, c, columns, padded);
}

}  // namespace tiles
}  // namespace fastgan
