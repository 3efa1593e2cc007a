// Attention, its backward and its second backward in O(N) memory: distributes the panels of attention_panels.h over
// threads.
//
// A job is every `slices`-th panel of one head. Gradients of keys and values are summed over slices in a fixed order.
// The number of slices depends on the shape alone, so results do not depend on the number of threads.
#include "attention_panels.h"

namespace fastgan {
namespace {

// A [B, H, L, F] or [B, H, L] tensor with any strides. A missing tensor reads as zero.
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

  // Floats needed to copy one head; 0 if the products read it in place.
  int64_t copy(int64_t length, int64_t features) const {
    return std::is_same_v<T, float> && data && column == 1 ? 0 : length * features;
  }

  Matrix<T> operator()(int64_t b, int64_t h) const {
    static const T zero[1] = {};
    return data ? Matrix<T>{data + b * batch + h * head, row, column} : Matrix<T>{zero, 0, 0};
  }
};

// A mask [B, H, N, M], expanded, with any strides; or none.
struct Masks {
  Mask first;
  int64_t batch = 0, head = 0;

  Masks(const std::optional<Tensor>& x, const Sizes& size) {
    if (!x) return;
    const ScalarType type = x->scalar_type();
    STD_TORCH_CHECK(type == ScalarType::Bool || type == ScalarType::Float, "mask must be Bool or Float");
    STD_TORCH_CHECK(x->dim() == 4 && x->size(0) == size.batch && x->size(1) == size.heads && x->size(2) == size.n &&
                        x->size(3) == size.m && x->is_cpu(),
                    "mask must be [B, H, N, M], on the CPU");
    first = {x->const_data_ptr(), type == ScalarType::Bool, x->stride(2), x->stride(3), nullptr};
    batch = x->stride(0);
    head = x->stride(1);
  }

  // Floats of scratch for one panel.
  int64_t packed(const Sizes& size) const { return first.data ? size.m * kRows : 0; }

  Mask operator()(int64_t b, int64_t h, float* across) const {
    if (!first.data) return {};
    const int64_t at = (b * batch + h * head) * (first.boolean ? 1 : 4);
    return {static_cast<const char*>(first.data) + at, first.boolean, first.row, first.column, across};
  }
};

// Offsets into one thread's scratch, in floats, rounded up to cache lines.
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

// Calls f(job, scratch) for every job; each thread has its own scratch.
template <class F>
void run(const Tensor& like, int64_t jobs, int64_t scratch, const F& f) {
  constexpr int64_t kAlwaysShared = 32768;
  parallel_with_scratch(like, jobs, kAlwaysShared, scratch, [&](int64_t begin, int64_t end, float* memory) {
    for (int64_t job = begin; job < end; ++job) f(job, memory);
  });
}

// Adds the [M][padded] sums of all slices into a contiguous [M][features].
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
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4,
                  "query, key and value must be [B, H, length, features]");
  const Sizes size{q.size(0), q.size(1), q.size(2), k.size(2), q.size(3), v.size(3)};
  const auto fits = [&](const Tensor& x, int64_t length, int64_t features) {
    return x.size(0) == size.batch && x.size(1) == size.heads && x.size(2) == length && x.size(3) == features &&
           x.scalar_type() == q.scalar_type() && x.is_cpu();
  };
  STD_TORCH_CHECK(fits(q, size.n, size.d) && fits(k, size.m, size.d) && fits(v, size.m, size.dv),
                  "query, key and value must have matching shapes and dtypes and be on the CPU");
  STD_TORCH_CHECK(size.batch * size.heads * size.n * size.m * size.d * size.dv > 0,
                  "query, key and value must not be empty");
  STD_TORCH_CHECK(size.n < (int64_t{1} << 31) && size.m < (int64_t{1} << 31),
                  "query and key must be shorter than 2^31");
  return size;
}

// Checks the other inputs of the backward passes: the forward's results and the gradient of the output.
void check_outputs(const Tensor& dout, const Tensor& o, const Tensor& lse, const Tensor& q, const Sizes& size) {
  STD_TORCH_CHECK(o.dim() == 4 && o.size(0) == size.batch && o.size(1) == size.heads && o.size(2) == size.n &&
                      o.size(3) == size.dv && o.scalar_type() == q.scalar_type() && o.is_cpu(),
                  "o must be [B, H, N, dv] with the dtype of query, on the CPU");
  check_like(dout, "do", o);
  STD_TORCH_CHECK(lse.dim() == 3 && lse.size(0) == size.batch && lse.size(1) == size.heads && lse.size(2) == size.n &&
                      lse.scalar_type() == ScalarType::Float && lse.is_cpu(),
                  "lse must be [B, H, N], Float, on the CPU");
}

Tensor like_output(const Tensor& q, const Tensor& v) {
  return torch::stable::new_empty(q, {q.size(0), q.size(1), q.size(2), v.size(3)});
}

Tensor contiguous_like(const Tensor& x) { return torch::stable::new_empty(x, x.sizes()); }

}  // namespace

std::tuple<Tensor, Tensor> attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
                                             bool causal, const std::optional<Tensor>& mask) {
  const Sizes size = sizes(q, k, v);
  const Tensor o = like_output(q, v);
  const Tensor lse = torch::stable::new_empty(q, {size.batch, size.heads, size.n}, ScalarType::Float);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> qs(q), ks(k), vs(v);
    const Masks masks(mask, size);
    T* const os = output<T>(o);
    float* const lses = output<float>(lse);
    Layout layout;
    const int64_t k_at = layout.take(ks.copy(size.m, size.d)), v_at = layout.take(vs.copy(size.m, size.dv));
    const int64_t across = layout.take(size.d * kRows), tile = layout.take(kColumns * kRows);
    const int64_t result = layout.take(size.dv * kRows), mask_at = layout.take(masks.packed(size));
    // The forward sums nothing over rows, so every slice of every head is independent.
    const int64_t slices = size.slices();
    run(q, size.all_heads() * slices, layout.size, [&](int64_t job, float* scratch) {
      const int64_t head = job / slices, b = head / size.heads, h = head % size.heads;
      const ForwardPanel<T> panel{qs(b, h),
                                  factor(ks(b, h), size.m, size.d, scratch + k_at),
                                  factor(vs(b, h), size.m, size.dv, scratch + v_at),
                                  size,
                                  static_cast<float>(scale),
                                  causal,
                                  masks(b, h, scratch + mask_at),
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

// Runs the panel f(head, scratch, sums for keys, sums for values) of every job, then writes the sums.
template <class T, class F>
void backward_jobs(const Tensor& q, const Sizes& size, Layout layout, const Tensor& to_k, const Tensor& to_v,
                   const F& f) {
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
                                                      bool causal, const std::optional<Tensor>& mask) {
  const Sizes size = sizes(q, k, v);
  check_outputs(dout, o, lse, q, size);
  const Tensor dq = contiguous_like(q), dk = contiguous_like(k), dv = contiguous_like(v);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> dos(dout), qs(q), ks(k), vs(v), os(o);
    const Heads<float> lses(lse);
    const Masks masks(mask, size);
    T* const dqs = output<T>(dq);
    Layout layout;
    const int64_t k_at = layout.take(ks.copy(size.m, size.d)), v_at = layout.take(vs.copy(size.m, size.dv));
    const int64_t across_q = layout.take(size.d * kRows), across_do = layout.take(size.dv * kRows);
    const int64_t along_q = layout.take(padded(size.d) * kRows), along_do = layout.take(padded(size.dv) * kRows);
    const int64_t p = layout.take(size.m * kRows), t = layout.take(size.m * kRows);
    const int64_t rows_dq = layout.take(size.d * kRows), mask_at = layout.take(masks.packed(size));
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
                              masks(b, h, scratch + mask_at),
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
    const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o, const Tensor& lse, double scale, bool causal,
    const std::optional<Tensor>& mask) {
  const Sizes size = sizes(q, k, v);
  check_outputs(dout, o, lse, q, size);
  if (uq) check_like(*uq, "uq", q);
  if (uk) check_like(*uk, "uk", k);
  if (uv) check_like(*uv, "uv", v);
  const Tensor gq = contiguous_like(q), gk = contiguous_like(k), gv = contiguous_like(v), gdo = contiguous_like(dout);
  dispatch(q, "query", [&](auto element) {
    using T = decltype(element);
    const Heads<T> uqs(uq), uks(uk), uvs(uv), dos(dout), qs(q), ks(k), vs(v), os(o);
    const Heads<float> lses(lse);
    const Masks masks(mask, size);
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
    const int64_t mask_at = layout.take(masks.packed(size));
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
                            masks(b, h, scratch + mask_at),
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

FASTGAN_OP(attention_forward,
           "(Tensor q, Tensor k, Tensor v, float scale, bool causal, Tensor? mask=None) -> (Tensor, Tensor)");
FASTGAN_OP(attention_backward,
           "(Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float scale, bool causal, Tensor? "
           "mask=None)"
           " -> (Tensor, Tensor, Tensor)");
FASTGAN_OP(attention_second_backward,
           "(Tensor? uq, Tensor? uk, Tensor? uv, Tensor do, Tensor q, Tensor k, Tensor v, Tensor o, Tensor lse, float "
           "scale, bool causal, Tensor? mask=None)"
           " -> (Tensor, Tensor, Tensor, Tensor)");

}  // namespace fastgan
