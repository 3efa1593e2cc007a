// Attention, its backward and its second backward, in O(N) memory: fastgan/ops/attention_chunked.py has the equations.
//
// A panel of query rows meets all its columns in one sweep, which leaves P and what else has a row sum in a panel of
// scratch that stays in the caches; when the row sums are known, a second sweep makes the results. So no product is
// computed twice. P is recomputed from lse and then divided by its own row sum, as the rounding of lse is the same for a
// whole row and would add up; D = sum(dO * O) is subtracted from dP, and what is left of its row mean then, for the same
// reason. A job is every `slices`-th panel of one head; results for
// keys and values are summed over slices in their order. The number of slices follows from the shape alone, and so do
// all results: the number of threads changes nothing.
#include <atomic>
#include <cmath>
#include <limits>

#include "attention_tiles.h"
#include "ops.h"

namespace fastgan {
namespace {

using namespace tiles;

constexpr int64_t kColumns = 32;             // columns of a tile: with its keys and values it fits the first cache
constexpr int64_t kRows = kPanel * kVector;  // rows of a full panel
constexpr int64_t kJobs = 8;                 // fewer heads than this are cut into slices

int64_t padded(int64_t features) { return (features + kVector - 1) / kVector * kVector; }

// One head's matrix, by elements.
template <class T>
struct Matrix {
  const T* data;
  int64_t row, column;
};

// A [B, H, L, F] or [B, H, L] tensor of any strides; an absent one is zero everywhere.
template <class T>
struct Heads {
  const T* data = nullptr;
  int64_t batch = 0, head = 0, row = 0, column = 0;

  explicit Heads(const Tensor& x)
      : data(fastgan::data<T>(x)),
        batch(x.stride(0)),
        head(x.stride(1)),
        row(x.stride(2)),
        column(x.dim() == 4 ? x.stride(3) : 1) {}

  explicit Heads(const std::optional<Tensor>& x) {
    if (x) *this = Heads(*x);
  }

  // Floats that a copy of one head takes; none where products read it in place.
  int64_t copy(int64_t length, int64_t features) const {
    return std::is_same_v<T, float> && data && column == 1 ? 0 : length * features;
  }

  Matrix<T> operator()(int64_t b, int64_t h) const {
    static const T zero[1] = {};
    return data ? Matrix<T>{data + b * batch + h * head, row, column} : Matrix<T>{zero, 0, 0};
  }
};

struct Sizes {
  int64_t batch, heads, n, m, d, dv;

  int64_t all_heads() const { return batch * heads; }
  int64_t panels() const { return (n + kRows - 1) / kRows; }
  int64_t slices() const { return std::min(panels(), std::max<int64_t>(1, kJobs / all_heads())); }
};

// Offsets into one thread's scratch, in floats; whole cache lines.
struct Layout {
  int64_t size = 0;

  int64_t take(int64_t floats) {
    const int64_t at = size;
    size += (floats + 15) / 16 * 16;
    return at;
  }
};

Tensor floats(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Float);
}

// f(job, scratch) for every job; each thread has a scratch of its own.
template <class F>
void run(const Tensor& like, int64_t jobs, int64_t scratch, const F& f) {
  const int64_t threads = std::min<int64_t>(jobs, torch::stable::get_num_threads());
  const Tensor memory = floats(like, std::max<int64_t>(1, threads) * scratch);
  float* const base = output<float>(memory);
  std::atomic<int64_t> next{0};
  const auto work = [&, base](int64_t begin, int64_t end) {
    float* const mine = base + next.fetch_add(1) * scratch;
    for (int64_t job = begin; job < end; ++job) f(job, mine);
  };
  if (threads <= 1) {
    work(0, jobs);
  } else {
    torch::stable::parallel_for(0, jobs, (jobs + threads - 1) / threads, work);
  }
}

// Keys or values as the products read them: in place where they are floats with features side by side, else a copy.
template <class T>
Factor factor(Matrix<T> x, int64_t length, int64_t features, float* copy) {
  if constexpr (std::is_same_v<T, float>) {
    if (x.column == 1) return {x.data, x.row};
  }
  for (int64_t j = 0; j < length; ++j)
    for (int64_t c = 0; c < features; ++c) copy[j * features + c] = load(x.data + j * x.row + c * x.column);
  return {copy, features};
}

// Rows of a panel times `scale` as [features][R], rows beyond the last one zero.
template <class T>
void pack_across(Matrix<T> x, int64_t rows, int64_t R, int64_t features, float scale, float* across) {
  for (int64_t c = 0; c < features; ++c) {
    for (int64_t i = 0; i < rows; ++i) across[c * R + i] = scale * load(x.data + i * x.row + c * x.column);
    for (int64_t i = rows; i < R; ++i) across[c * R + i] = 0.0f;
  }
}

// Rows of a panel, row i times factor[i], as [R][padded(features)], the rest zero.
template <class T>
void pack_along(Matrix<T> x, int64_t rows, int64_t R, int64_t features, const float* factor, float* along) {
  const int64_t width = padded(features);
  for (int64_t i = 0; i < R; ++i) {
    const int64_t count = i < rows ? features : 0;
    for (int64_t c = 0; c < count; ++c) along[i * width + c] = factor[i] * load(x.data + i * x.row + c * x.column);
    for (int64_t c = count; c < width; ++c) along[i * width + c] = 0.0f;
  }
}

// sum(dO * O) for the rows of a panel.
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

// across [features][R], row i times factor[i], to `rows` rows of a contiguous [rows][features].
template <class T>
void unpack(const float* across, int64_t rows, int64_t R, int64_t features, const float* factor, T* to) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < features; ++c) store(to + i * features + c, across[c * R + i] * factor[i]);
}

// Sums of one quantity over the columns, for the rows of a panel: short sums, collected with their rounding errors.
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

// Which rows of a panel lie before column j, where causal attention sees nothing.
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

// ---------------------------------------------------------------------------------------------------------------------

template <class T>
struct ForwardPanel {
  Matrix<T> q;
  Factor k, v;
  Sizes size;
  float scale;
  bool causal;
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
    const int64_t columns = causal ? std::min(size.m, first + rows) : size.m;
    Vec top[RV], sum[RV] = {};
    for (Vec& x : top) x = all(-std::numeric_limits<float>::infinity());
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
        if (crosses) s[m][r] = order.where_seen(s[m][r], r, j0 + j + m, all(-std::numeric_limits<float>::infinity()));
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
  float *across_q, *across_do, *along_q, *along_do;  // [d][R], [dv][R], [R][padded(d)], [R][padded(dv)]
  float *p, *t, *rows_dq;                            // [M][R], [M][R], [d][R]
  T* dq;
  float *dk, *dv;  // [M][padded(d)], [M][padded(dv)]: added to

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
    const int64_t columns = causal ? std::min(size.m, first + rows) : size.m;
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
        Vec weight = exp(s[m][r] - log[r]);
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
  float *across_uq, *across_q, *across_do;  // [d][R], [d][R], [dv][R]
  float *along_uq, *along_q, *along_do;     // [R][padded(d)], ...
  float *p, *t, *pe, *g;                    // [M][R]: P, then T and dS, P E and A, G and gS
  float *rows_gq, *rows_gdo;                // [d][R], [dv][R]
  T *gq, *gdo;
  float *gk, *gv;  // [M][padded(d)], [M][padded(dv)]: added to

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
    const int64_t columns = causal ? std::min(size.m, first + rows) : size.m;
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
    // With P not yet divided by its sum z, T = P dP and G = P F + E T, where dP has lost most of its row mean and D is
    // what is left of it: dS = T - D P, A = P E - e P, gS = G - D P E - e T + (2 e D - sum(G) / z) P.
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
        Vec weight = exp(s[m][r] - log[r]);
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

// Panels slice, slice + slices, ... of a head.
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

// [M][padded] sums of all slices to a contiguous [M][features].
template <class T>
void add_slices(const float* sums, int64_t slices, int64_t m, int64_t features, T* to) {
  const int64_t width = padded(features);
  for (int64_t j = 0; j < m; ++j)
    for (int64_t c = 0; c < features; ++c) {
      float total = 0.0f;
      for (int64_t s = 0; s < slices; ++s) total += sums[(s * m + j) * width + c];
      store(to + j * features + c, total);
    }
}

Sizes sizes(const Tensor& q, const Tensor& k, const Tensor& v) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "query, key, value: may be [B, H, length, features]");
  const Sizes size{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  const auto fits = [&](const Tensor& x, int64_t length, int64_t features) {
    return x.size(0) == size.batch && x.size(1) == size.heads && x.size(2) == length && x.size(3) == features &&
           x.scalar_type() == q.scalar_type() && x.is_cpu();
  };
  STD_TORCH_CHECK(fits(q, size.n, size.d) && fits(k, size.m, size.d) && fits(v, size.m, size.dv),
                  "query, key, value: dtypes or shapes do not fit each other, or not on the CPU");
  STD_TORCH_CHECK(size.batch * size.heads * size.n * size.m * size.d * size.dv > 0, "query, key, value: empty");
  STD_TORCH_CHECK(size.n < (int64_t{1} << 31) && size.m < (int64_t{1} << 31), "query, key: longer than 2^31 - 1");
  return size;
}

void check_lse(const Tensor& lse, const Sizes& size) {
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == size.batch && lse.size(1) == size.heads && lse.size(2) == size.n &&
                      lse.scalar_type() == ScalarType::Float && lse.is_cpu(),
                  "lse: may be a float [B, H, N]");
}

Tensor like_output(const Tensor& q, const Tensor& v) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
}

Tensor contiguous_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             bool causal) {
  const Sizes size = sizes(q, k, v);
  const Tensor o = like_output(q, v);
  const Tensor lse = torch::stable::new_empty(q, {size.batch, size.heads, size.n}, ScalarType::Float);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> qs(q), ks(k), vs(v);
    T* const os = output<T>(o);
    float* const lses = output<float>(lse);
    Layout layout;
    const int64_t k_at = layout.take(ks.copy(size.m, size.d)), v_at = layout.take(vs.copy(size.m, size.dv));
    const int64_t across = layout.take(size.d * kRows), tile = layout.take(kColumns * kRows);
    const int64_t result = layout.take(size.dv * kRows);
    // No sums over rows here: every panel of every head can be a job.
    const int64_t slices = size.slices();
    run(q, size.all_heads() * slices, layout.size, [&](int64_t job, float* scratch) {
      const int64_t head = job / slices, b = head / size.heads, h = head % size.heads;
      const ForwardPanel<T> panel{qs(b, h),
                                  factor(ks(b, h), size.m, size.d, scratch + k_at),
                                  factor(vs(b, h), size.m, size.dv, scratch + v_at),
                                  size,
                                  static_cast<float>(scale),
                                  causal,
                                  scratch + across,
                                  scratch + tile,
                                  scratch + result,
                                  os + head * size.n * size.dv,
                                  lses + head * size.n};
      sweep(panel, size.n, job % slices, slices);
    });
  });
  return {o, lse};
}

// Runs make(head, slice, scratch, sums for keys, sums for values) -> panel over all jobs, and writes the sums.
template <class T, class F>
void backward_jobs(const Tensor& q, const Sizes& size, Layout layout, const Tensor& to_k, const Tensor& to_v, const F& f) {
  const int64_t slices = size.slices(), heads = size.all_heads();
  const int64_t floats_k = size.m * padded(size.d), floats_v = size.m * padded(size.dv);
  const int64_t k_at = layout.take(slices == 1 ? floats_k : 0), v_at = layout.take(slices == 1 ? floats_v : 0);
  const Tensor shared = floats(q, slices == 1 ? 0 : heads * slices * (floats_k + floats_v));
  float* const sums = output<float>(shared);
  T *const ks = output<T>(to_k), *const vs = output<T>(to_v);
  run(q, heads * slices, layout.size, [&](int64_t job, float* scratch) {
    const int64_t head = job / slices, slice = job % slices;
    float* const k_sums = slices == 1 ? scratch + k_at : sums + job * floats_k;
    float* const v_sums = slices == 1 ? scratch + v_at : sums + heads * slices * floats_k + job * floats_v;
    std::fill(k_sums, k_sums + floats_k, 0.0f);
    std::fill(v_sums, v_sums + floats_v, 0.0f);
    sweep(f(head, scratch, k_sums, v_sums), size.n, slice, slices);
    if (slices == 1) {
      add_slices(k_sums, 1, size.m, size.d, ks + head * size.m * size.d);
      add_slices(v_sums, 1, size.m, size.dv, vs + head * size.m * size.dv);
    }
  });
  if (slices == 1) return;
  parallel(2 * heads, size.m * slices * size.d, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; ++at) {
      const int64_t head = at / 2;
      if (at % 2 == 0) {
        add_slices(sums + head * slices * floats_k, slices, size.m, size.d, ks + head * size.m * size.d);
      } else {
        add_slices(sums + heads * slices * floats_k + head * slices * floats_v, slices, size.m, size.dv,
                   vs + head * size.m * size.dv);
      }
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& o, const Tensor& lse, double scale,
                                                      bool causal) {
  const Sizes size = sizes(q, k, v);
  check_like(dout, "do", o);
  check_lse(lse, size);
  const Tensor dq = contiguous_like(q), dk = contiguous_like(k), dv = contiguous_like(v);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> dos(dout), qs(q), ks(k), vs(v), os(o);
    const Heads<float> lses(lse);
    T* const dqs = output<T>(dq);
    Layout layout;
    const int64_t k_at = layout.take(ks.copy(size.m, size.d)), v_at = layout.take(vs.copy(size.m, size.dv));
    const int64_t across_q = layout.take(size.d * kRows), across_do = layout.take(size.dv * kRows);
    const int64_t along_q = layout.take(padded(size.d) * kRows), along_do = layout.take(padded(size.dv) * kRows);
    const int64_t p = layout.take(size.m * kRows), t = layout.take(size.m * kRows);
    const int64_t rows_dq = layout.take(size.d * kRows);
    backward_jobs<T>(q, size, layout, dk, dv, [&](int64_t head, float* scratch, float* k_sums, float* v_sums) {
      const int64_t b = head / size.heads, h = head % size.heads;
      return BackwardPanel<T>{dos(b, h),
                              qs(b, h),
                              os(b, h),
                              factor(ks(b, h), size.m, size.d, scratch + k_at),
                              factor(vs(b, h), size.m, size.dv, scratch + v_at),
                              lses(b, h),
                              size,
                              static_cast<float>(scale),
                              causal,
                              scratch + across_q,
                              scratch + across_do,
                              scratch + along_q,
                              scratch + along_do,
                              scratch + p,
                              scratch + t,
                              scratch + rows_dq,
                              dqs + head * size.n * size.d,
                              k_sums,
                              v_sums};
    });
  });
  return {dq, dk, dv};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> attention_second_backward(
    const std::optional<Tensor>& uq, const std::optional<Tensor>& uk, const std::optional<Tensor>& uv, const Tensor& dout,
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, double scale, bool causal) {
  const Sizes size = sizes(q, k, v);
  check_like(dout, "do", o);
  check_lse(lse, size);
  if (uq) check_like(*uq, "uq", q);
  if (uk) check_like(*uk, "uk", k);
  if (uv) check_like(*uv, "uv", v);
  const Tensor gq = contiguous_like(q), gk = contiguous_like(k), gv = contiguous_like(v), gdo = contiguous_like(dout);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> uqs(uq), uks(uk), uvs(uv), dos(dout), qs(q), ks(k), vs(v), os(o);
    const Heads<float> lses(lse);
    T *const gqs = output<T>(gq), *const gdos = output<T>(gdo);
    Layout layout;
    const int64_t k_at = layout.take(ks.copy(size.m, size.d)), v_at = layout.take(vs.copy(size.m, size.dv));
    const int64_t uk_at = layout.take(uks.copy(size.m, size.d)), uv_at = layout.take(uvs.copy(size.m, size.dv));
    const int64_t across_uq = layout.take(size.d * kRows), across_q = layout.take(size.d * kRows);
    const int64_t across_do = layout.take(size.dv * kRows);
    const int64_t along_uq = layout.take(padded(size.d) * kRows), along_q = layout.take(padded(size.d) * kRows);
    const int64_t along_do = layout.take(padded(size.dv) * kRows);
    const int64_t p = layout.take(size.m * kRows), t = layout.take(size.m * kRows);
    const int64_t pe = layout.take(size.m * kRows), g = layout.take(size.m * kRows);
    const int64_t rows_gq = layout.take(size.d * kRows), rows_gdo = layout.take(size.dv * kRows);
    backward_jobs<T>(q, size, layout, gk, gv, [&](int64_t head, float* scratch, float* k_sums, float* v_sums) {
      const int64_t b = head / size.heads, h = head % size.heads;
      return SecondPanel<T>{uqs(b, h),
                            dos(b, h),
                            qs(b, h),
                            os(b, h),
                            factor(uks(b, h), size.m, size.d, scratch + uk_at),
                            factor(uvs(b, h), size.m, size.dv, scratch + uv_at),
                            factor(ks(b, h), size.m, size.d, scratch + k_at),
                            factor(vs(b, h), size.m, size.dv, scratch + v_at),
                            lses(b, h),
                            size,
                            static_cast<float>(scale),
                            causal,
                            scratch + across_uq,
                            scratch + across_q,
                            scratch + across_do,
                            scratch + along_uq,
                            scratch + along_q,
                            scratch + along_do,
                            scratch + p,
                            scratch + t,
                            scratch + pe,
                            scratch + g,
                            scratch + rows_gq,
                            scratch + rows_gdo,
                            gqs + head * size.n * size.d,
                            gdos + head * size.n * size.dv,
                            k_sums,
                            v_sums};
    });
  });
  return {gq, gk, gv, gdo};
}

}  // namespace fastgan
