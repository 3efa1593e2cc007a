// Forward, backward and second backward of attention over a panel of query rows. The equations are in
// fastgan/ops/attention_chunked.py.
//
// The backward passes sweep a panel's columns twice. The first sweep stores P, and every other matrix that needs a row
// sum, in scratch that stays in cache; the second uses the row sums to form the results. No product is computed twice.
// The rounding error of lse is common to a whole row and would accumulate, so the recomputed P is divided by its own
// row sum. For the same reason the remaining row mean is subtracted from dP after D = sum(dO * O).
#pragma once

#include <cmath>
#include <limits>

#include "attention_tiles.h"

namespace fastgan {
namespace {

using namespace tiles;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr int64_t kColumns = 32;             // columns of a tile; with its keys and values it fits the L1 cache
constexpr int64_t kRows = kPanel * kVector;  // rows of a full panel
constexpr int64_t kJobs = 8;                 // heads are cut into slices if there are fewer than this

int64_t padded(int64_t features) { return (features + kVector - 1) / kVector * kVector; }

// The matrix of one head, with strides in elements.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

struct Sizes {
  int64_t batch, heads, n, m, d, dv;

  int64_t all_heads() const { return batch * heads; }
  int64_t panels() const { return (n + kRows - 1) / kRows; }
  int64_t slices() const { return std::min(panels(), std::max<int64_t>(1, kJobs / all_heads())); }
};

// Keys or values as the products read them: in place if they are floats with contiguous features, else a float copy.
template <class T>
Factor factor(Matrix<T> x, int64_t length, int64_t features, float* copy) {
  if constexpr (std::is_same_v<T, float>) {
    if (x.column == 1) return {x.data, x.row};
  }
  for (int64_t j = 0; j < length; ++j)
    for (int64_t c = 0; c < features; ++c) copy[j * features + c] = load(x.data + j * x.row + c * x.column);
  return {copy, features};
}

// Packs the rows of a panel, times `scale`, as [features][R]; rows beyond the last are zero.
template <class T>
void pack_across(Matrix<T> x, int64_t rows, int64_t R, int64_t features, float scale, float* across) {
  for (int64_t c = 0; c < features; ++c) {
    for (int64_t i = 0; i < rows; ++i) across[c * R + i] = scale * load(x.data + i * x.row + c * x.column);
    for (int64_t i = rows; i < R; ++i) across[c * R + i] = 0.0f;
  }
}

// Packs the rows of a panel, row i times factor[i], as [R][padded(features)]; padding is zero.
template <class T>
void pack_along(Matrix<T> x, int64_t rows, int64_t R, int64_t features, const float* factor, float* along) {
  const int64_t width = padded(features);
  for (int64_t i = 0; i < R; ++i) {
    const int64_t count = i < rows ? features : 0;
    for (int64_t c = 0; c < count; ++c) along[i * width + c] = factor[i] * load(x.data + i * x.row + c * x.column);
    for (int64_t c = count; c < width; ++c) along[i * width + c] = 0.0f;
  }
}

// Row sums of x * y, as in D = sum(dO * O), for the rows of a panel.
template <class T>
void row_products(Matrix<T> x, Matrix<T> y, int64_t first, int64_t rows, int64_t R, int64_t features, Vec* sums) {
  for (int64_t i = 0; i < R; ++i) {
    float sum = 0.0f;
    if (i < rows) {
      const T *const a = x.data + (first + i) * x.row, *const b = y.data + (first + i) * y.row;
      for (int64_t c = 0; c < features; ++c) sum += load(a + c * x.column) * load(b + c * y.column);
    }
    sums[i / kVector][i % kVector] = sum;
  }
}

// Writes across [features][R], row i times factor[i], to a contiguous [rows][features].
template <class T>
void unpack(const float* across, int64_t rows, int64_t R, int64_t features, const float* factor, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < features; ++c) store(to + i * features + c, across[c * R + i] * factor[i]);
}

// Sum over the columns for each row of a panel: short partial sums, added with Kahan compensation.
template <int RV>
struct RowSum {
  Vec part[2][RV] = {};
  Vec sum[RV] = {}, lost[RV] = {};

  FASTGAN_INLINE void add(int at, int r, Vec x) { part[at][r] += x; }

  FASTGAN_INLINE void collect() {
    for (int r = 0; r < RV; ++r) {
      const Vec x = part[0][r] + part[1][r] - lost[r];
      const Vec total = sum[r] + x;
      lost[r] = (total - sum[r]) - x;
      sum[r] = total;
      part[0][r] = part[1][r] = Vec{};
    }
  }
};

// Causal mask: row i does not attend to columns j > i.
template <int RV>
struct Causal {
  Ints index[RV];

  explicit Causal(int64_t first) {
    for (int r = 0; r < RV; ++r)
      for (int lane = 0; lane < kVector; ++lane) index[r][lane] = static_cast<int32_t>(first + r * kVector + lane);
  }

  FASTGAN_INLINE Vec where_seen(Vec x, int r, int64_t j, Vec otherwise) const {
    return index[r] < static_cast<int32_t>(j) ? otherwise : x;
  }
};

// A mask of one head: bool, true where a query attends to a key, or added to the logits.
struct Mask {
  const void* data = nullptr;  // nullptr: none
  bool boolean = false;
  int64_t row = 0, column = 0;
  float* across = nullptr;  // [M][R], scratch: what is added to the logits of a panel

  // Finite, so that no difference of two is NaN; exp() of anything less the logit of a key that is seen is 0.
  static constexpr float kHidden = -1e30f;

  // Packs the rows of a panel; returns the number of columns up to the last that one of them attends to. Of a row
  // without keys the first counts as seen: its softmax is finite, and the caller replaces its results by zeros.
  int64_t pack(int64_t first, int64_t rows, int64_t R, int64_t m) const {
    if (boolean) {
      const bool* const from = static_cast<const bool*>(data) + first * row;
      return pack(rows, R, m, [=](int64_t i, int64_t j) { return from[i * row + j * column] ? 0.0f : -kInfinity; });
    }
    const float* const from = static_cast<const float*>(data) + first * row;
    return pack(rows, R, m, [=](int64_t i, int64_t j) { return from[i * row + j * column]; });
  }

  template <class F>
  int64_t pack(int64_t rows, int64_t R, int64_t m, const F& value) const {
    constexpr int64_t block = 16;
    int64_t seen[kRows] = {}, last = 0;
    for (int64_t j0 = 0; j0 < m; j0 += block)
      for (int64_t i = 0; i < R; ++i)
        for (int64_t j = j0; j < std::min(j0 + block, m); ++j) {
          const float x = i < rows ? value(i, j) : -kInfinity;
          if (x != -kInfinity) seen[i] = j + 1;
          across[j * R + i] = x < kHidden ? kHidden : x;
        }
    for (int64_t i = 0; i < R; ++i) {
      if (seen[i] == 0) across[i] = 0.0f;
      last = std::max({last, seen[i], int64_t{1}});
    }
    return last;
  }

  template <int RV>
  FASTGAN_INLINE Vec add_to(Vec logit, int64_t j, int r) const {
    return data ? logit + read(across + (j * RV + r) * kVector) : logit;
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardPanel {
  Matrix<T> q;
  Factor k, v;
  Sizes size;
  float scale;
  bool causal;
  Mask mask;
  float *across, *tile, *result;  // [d][R], [kColumns][R], [dv][R]
  T* o;
  float* lse;

  template <int RV>
  void run(int64_t first, int64_t rows) const {
    constexpr int64_t R = RV * kVector;
    constexpr int M = kVector == 16 ? 8 : 4;
    pack_across(Matrix<T>{q.data + first * q.row, q.row, q.column}, rows, R, size.d, scale, across);
    std::fill(result, result + size.dv * R, 0.0f);
    const Causal<RV> order(first);
    const int64_t unmasked = causal ? std::min(size.m, first + rows) : size.m;
    const int64_t columns = mask.data ? mask.pack(first, rows, R, size.m) : unmasked;
    Vec top[RV], sum[RV] = {};
    for (Vec& x : top) x = broadcast(-kInfinity);
    for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
      const int64_t count = std::min(kColumns, columns - j0);
      Vec best[RV];
      for (int r = 0; r < RV; ++r) best[r] = top[r];
      int64_t j = 0;
      for (; j + M <= count; j += M) logits<RV, M>(j0, j, first, order, best);
      for (; j < count; ++j) logits<RV, 1>(j0, j, first, order, best);
      bool moved = false;
      Vec shrink[RV], parts[2][RV] = {};
      for (int r = 0; r < RV; ++r) {
        shrink[r] = exp(top[r] - best[r]);
        top[r] = best[r];
        for (int lane = 0; lane < kVector; ++lane) moved |= shrink[r][lane] != 1.0f;
      }
      for (j = 0; j < count; ++j)
        for (int r = 0; r < RV; ++r) {
          float* const at = tile + j * R + r * kVector;
          const Vec p = exp(read(at) - top[r]);
          parts[j & 1][r] += p;
          write(at, p);
        }
      for (int r = 0; r < RV; ++r) sum[r] = sum[r] * shrink[r] + (parts[0][r] + parts[1][r]);
      if (moved)
        for (int64_t c = 0; c < size.dv; ++c)
          for (int r = 0; r < RV; ++r) {
            float* const at = result + (c * RV + r) * kVector;
            write(at, read(at) * shrink[r]);
          }
      const Term terms[] = {{tile, {v.data + j0 * v.stride, v.stride}}};
      add_to_rows<RV>(result, terms, size.dv, count);
    }
    float inverse[R];
    for (int64_t i = 0; i < R; ++i) {
      const float total = sum[i / kVector][i % kVector];
      inverse[i] = 1.0f / total;
      if (i < rows) lse[first + i] = static_cast<float>(top[i / kVector][i % kVector] + std::log(double{total}));
    }
    unpack(result, rows, R, size.dv, inverse, o + first * size.dv);
  }

  template <int RV, int M>
  FASTGAN_INLINE void logits(int64_t j0, int64_t j, int64_t first, const Causal<RV>& order, Vec (&best)[RV]) const {
    Vec s[M][RV] = {};
    multiply<RV, M>(s, across, {k.data + (j0 + j) * k.stride, k.stride}, size.d);
    const bool crosses = causal && j0 + j + M - 1 > first;
    for (int m = 0; m < M; ++m)
      for (int r = 0; r < RV; ++r) {
        if (crosses) s[m][r] = order.where_seen(s[m][r], r, j0 + j + m, broadcast(-kInfinity));
        s[m][r] = mask.template add_to<RV>(s[m][r], j0 + j + m, r);
        best[r] = larger(s[m][r], best[r]);
        write(tile + ((j + m) * RV + r) * kVector, s[m][r]);
      }
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct BackwardPanel {
  Matrix<T> dout, q, o;
  Factor k, v;
  Matrix<float> lse;
  Sizes size;
  float scale;
  bool causal;
  Mask mask;
  float *across_q, *across_do, *along_q, *along_do;  // [d][R], [dv][R], [R][padded(d)], [R][padded(dv)]
  float *p, *t, *rows_dq;                            // [M][R], [M][R], [d][R]
  T* dq;
  float *dk, *dv;  // [M][padded(d)], [M][padded(dv)]: accumulated

  template <int RV>
  void run(int64_t first, int64_t rows) const {
    constexpr int64_t R = RV * kVector;
    constexpr int M = kVector == 16 ? 4 : 2;
    const Matrix<T> q_rows{q.data + first * q.row, q.row, q.column};
    const Matrix<T> do_rows{dout.data + first * dout.row, dout.row, dout.column};
    pack_across(q_rows, rows, R, size.d, scale, across_q);
    pack_across(do_rows, rows, R, size.dv, 1.0f, across_do);
    Vec log[RV];
    for (int64_t i = 0; i < R; ++i) log[i / kVector][i % kVector] = i < rows ? lse.data[(first + i) * lse.row] : 0.0f;
    Vec near[RV];
    row_products(dout, o, first, rows, R, size.dv, near);
    const int64_t unmasked = causal ? std::min(size.m, first + rows) : size.m;
    const int64_t columns = mask.data ? mask.pack(first, rows, R, size.m) : unmasked;
    RowSum<RV> z, d;
    for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
      const int64_t end = std::min(j0 + kColumns, columns);
      int64_t j = j0;
      for (; j + M <= end; j += M) scores<RV, M>(j, first, log, near, z, d);
      for (; j < end; ++j) scores<RV, 1>(j, first, log, near, z, d);
      z.collect();
      d.collect();
    }
    Vec mean[RV];
    float inverse[R], scaled[R];
    for (int64_t i = 0; i < R; ++i) {
      const int r = i / kVector, lane = i % kVector;
      inverse[i] = 1.0f / z.sum[r][lane];
      scaled[i] = inverse[i] * scale;
      mean[r][lane] = d.sum[r][lane] * inverse[i];
    }
    pack_along(q_rows, rows, R, size.d, scaled, along_q);
    pack_along(do_rows, rows, R, size.dv, inverse, along_do);
    std::fill(rows_dq, rows_dq + size.d * R, 0.0f);
    for (int64_t j = 0; j < columns; j += kColumns) {
      const int64_t count = std::min(kColumns, columns - j);
      for (int64_t at = j * R; at < (j + count) * R; at += R)
        for (int r = 0; r < RV; ++r) {
          float* const x = t + at + r * kVector;
          write(x, read(x) - mean[r] * read(p + at + r * kVector));
        }
      const Term to_q[] = {{t + j * R, {k.data + j * k.stride, k.stride}}};
      add_to_rows<RV>(rows_dq, to_q, size.d, count);
      const RowTerm to_k[] = {{t + j * R, along_q}}, to_v[] = {{p + j * R, along_do}};
      add_to_columns<RV>(dk + j * padded(size.d), to_k, count, padded(size.d));
      add_to_columns<RV>(dv + j * padded(size.dv), to_v, count, padded(size.dv));
    }
    unpack(rows_dq, rows, R, size.d, scaled, dq + first * size.d);
  }

  template <int RV, int M>
  FASTGAN_INLINE void scores(int64_t j, int64_t first, const Vec (&log)[RV], const Vec (&near)[RV], RowSum<RV>& z,
                              RowSum<RV>& d) const {
    Vec s[M][RV] = {}, dp[M][RV] = {};
    multiply<RV, M>(s, across_q, {k.data + j * k.stride, k.stride}, size.d);
    multiply<RV, M>(dp, across_do, {v.data + j * v.stride, v.stride}, size.dv);
    const bool crosses = causal && j + M - 1 > first;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < RV; ++r) {
        Vec weight = exp(mask.template add_to<RV>(s[m][r], j + m, r) - log[r]);
        if (crosses) weight = Causal<RV>(first).where_seen(weight, r, j + m, Vec{});
        const Vec product = weight * (dp[m][r] - near[r]);
        z.add(m & 1, r, weight);
        d.add(m & 1, r, product);
        write(p + ((j + m) * RV + r) * kVector, weight);
        write(t + ((j + m) * RV + r) * kVector, product);
      }
  }
};

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct SecondPanel {
  Matrix<T> uq, dout, q, o;
  Factor uk, uv, k, v;
  Matrix<float> lse;
  Sizes size;
  float scale;
  bool causal;
  Mask mask;
  float *across_uq, *across_q, *across_do;  // [d][R], [d][R], [dv][R]
  float *along_uq, *along_q, *along_do;     // [R][padded(d)], ...
  float *p, *t, *pe, *g;                    // [M][R]: P; T, then dS; P E, then A; G, then gS
  float *rows_gq, *rows_gdo;                // [d][R], [dv][R]
  T *gq, *gdo;
  float *gk, *gv;  // [M][padded(d)], [M][padded(dv)]: accumulated

  template <int RV>
  struct Sums {
    RowSum<RV> z, d, e, g;
  };

  template <int RV>
  void run(int64_t first, int64_t rows) const {
    constexpr int64_t R = RV * kVector;
    constexpr int M = 2;
    const Matrix<T> uq_rows{uq.data + first * uq.row, uq.row, uq.column};
    const Matrix<T> q_rows{q.data + first * q.row, q.row, q.column};
    const Matrix<T> do_rows{dout.data + first * dout.row, dout.row, dout.column};
    pack_across(uq_rows, rows, R, size.d, scale, across_uq);
    pack_across(q_rows, rows, R, size.d, scale, across_q);
    pack_across(do_rows, rows, R, size.dv, 1.0f, across_do);
    Vec log[RV];
    for (int64_t i = 0; i < R; ++i) log[i / kVector][i % kVector] = i < rows ? lse.data[(first + i) * lse.row] : 0.0f;
    Vec near[RV];
    row_products(dout, o, first, rows, R, size.dv, near);
    const int64_t unmasked = causal ? std::min(size.m, first + rows) : size.m;
    const int64_t columns = mask.data ? mask.pack(first, rows, R, size.m) : unmasked;
    Sums<RV> sums;
    for (int64_t j0 = 0; j0 < columns; j0 += kColumns) {
      const int64_t end = std::min(j0 + kColumns, columns);
      int64_t j = j0;
      for (; j + M <= end; j += M) scores<RV, M>(j, first, log, near, sums);
      for (; j < end; ++j) scores<RV, 1>(j, first, log, near, sums);
      sums.z.collect();
      sums.d.collect();
      sums.e.collect();
      sums.g.collect();
    }
    // P is not yet divided by its row sum z, and the D of the forward's output is already subtracted from dP; below, D
    // is the row mean that remains. With T = P dP and G = P F + E T:
    // dS = T - D P, A = P E - e P, gS = G - D P E - e T + (2 e D - sum(G) / z) P.
    Vec d[RV], e[RV], rest[RV];
    float inverse[R], scaled[R];
    for (int64_t i = 0; i < R; ++i) {
      const int r = i / kVector, lane = i % kVector;
      const float one = 1.0f / sums.z.sum[r][lane];
      inverse[i] = one;
      scaled[i] = one * scale;
      d[r][lane] = sums.d.sum[r][lane] * one;
      e[r][lane] = sums.e.sum[r][lane] * one;
      rest[r][lane] = 2.0f * e[r][lane] * d[r][lane] - sums.g.sum[r][lane] * one;
    }
    pack_along(uq_rows, rows, R, size.d, scaled, along_uq);
    pack_along(q_rows, rows, R, size.d, scaled, along_q);
    pack_along(do_rows, rows, R, size.dv, inverse, along_do);
    std::fill(rows_gq, rows_gq + size.d * R, 0.0f);
    std::fill(rows_gdo, rows_gdo + size.dv * R, 0.0f);
    for (int64_t j = 0; j < columns; j += kColumns) {
      const int64_t count = std::min(kColumns, columns - j), at = j * R;
      for (int64_t x = at; x < (j + count) * R; x += R)
#pragma GCC unroll 8
        for (int r = 0; r < RV; ++r) {
          const int64_t y = x + r * kVector;
          const Vec weight = read(p + y), product = read(t + y), tangent = read(pe + y);
          write(t + y, product - d[r] * weight);
          write(pe + y, tangent - e[r] * weight);
          write(g + y, read(g + y) - d[r] * tangent - e[r] * product + rest[r] * weight);
        }
      const Factor kj{k.data + j * k.stride, k.stride}, ukj{uk.data + j * uk.stride, uk.stride};
      const Factor vj{v.data + j * v.stride, v.stride}, uvj{uv.data + j * uv.stride, uv.stride};
      const Term to_q[] = {{g + at, kj}, {t + at, ukj}}, to_do[] = {{pe + at, vj}, {p + at, uvj}};
      add_to_rows<RV>(rows_gq, to_q, size.d, count);
      add_to_rows<RV>(rows_gdo, to_do, size.dv, count);
      const RowTerm to_k[] = {{g + at, along_q}, {t + at, along_uq}}, to_v[] = {{pe + at, along_do}};
      add_to_columns<RV>(gk + j * padded(size.d), to_k, count, padded(size.d));
      add_to_columns<RV>(gv + j * padded(size.dv), to_v, count, padded(size.dv));
    }
    unpack(rows_gq, rows, R, size.d, scaled, gq + first * size.d);
    unpack(rows_gdo, rows, R, size.dv, inverse, gdo + first * size.dv);
  }

  template <int RV, int M>
  FASTGAN_INLINE void scores(int64_t j, int64_t first, const Vec (&log)[RV], const Vec (&near)[RV],
                              Sums<RV>& sums) const {
    Vec s[M][RV] = {}, e[M][RV] = {}, dp[M][RV] = {}, f[M][RV] = {};
    multiply_with_tangent<RV, M>(s, e, across_q, across_uq, {k.data + j * k.stride, k.stride},
                                 {uk.data + j * uk.stride, uk.stride}, size.d);
    multiply_both<RV, M>(dp, f, across_do, {v.data + j * v.stride, v.stride}, {uv.data + j * uv.stride, uv.stride},
                         size.dv);
    const bool crosses = causal && j + M - 1 > first;
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 8
      for (int r = 0; r < RV; ++r) {
        Vec weight = exp(mask.template add_to<RV>(s[m][r], j + m, r) - log[r]);
        if (crosses) weight = Causal<RV>(first).where_seen(weight, r, j + m, Vec{});
        const Vec product = weight * (dp[m][r] - near[r]), tangent = weight * e[m][r];
        const Vec both = weight * f[m][r] + e[m][r] * product;
        sums.z.add(m, r, weight);
        sums.d.add(m, r, product);
        sums.e.add(m, r, tangent);
        sums.g.add(m, r, both);
        const int64_t at = ((j + m) * RV + r) * kVector;
        write(p + at, weight);
        write(t + at, product);
        write(pe + at, tangent);
        write(g + at, both);
      }
  }
};

// Runs panels slice, slice + slices, ... of a head.
template <class Panel>
void sweep(const Panel& panel, int64_t n, int64_t slice, int64_t slices) {
  for (int64_t first = slice * kRows; first < n; first += slices * kRows) {
    const int64_t rows = std::min(kRows, n - first);
    const int64_t vectors = (rows + kVector - 1) / kVector;
    if (vectors == 1) {
      panel.template run<1>(first, rows);
    } else if (vectors == 2 || kPanel == 2) {
      panel.template run<2>(first, rows);
    } else {
      panel.template run<kPanel>(first, rows);
    }
  }
}

}  // namespace
}  // namespace fastgan
