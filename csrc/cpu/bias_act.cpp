// bias_act on the CPU: act(x + bias) gain, forward and both backwards. The formulas are in fastgan/ops/bias_act.py.
#include "act.h"
#include "features.h"

namespace fastgan {

namespace {

template <class F>
decltype(auto) with_curved(int64_t act, double gain, const F& f) {
  const auto g = static_cast<float>(gain), inverse = static_cast<float>(1.0 / gain);
  if (act == kTanh) return f(TanhAct{g, inverse});
  if (act == kSigmoid) return f(SigmoidAct{g, inverse});
  STD_TORCH_CHECK(act == kSilu, "act must be 3 to 5 (tanh, sigmoid, silu), got ", act);
  return f(SiluAct{g});
}

template <class F>
decltype(auto) with_act(int64_t act, double negative_slope, double gain, const F& f) {
  const auto g = static_cast<float>(gain);
  if (act == kLinear) return f(LinearAct{g});
  if (act == kRelu) return f(ReluAct{g});
  if (act == kLrelu) return f(LreluAct{g, static_cast<float>(negative_slope * gain)});
  return with_curved(act, gain, f);
}

// The bias of a run of elements that all belong to one channel.
struct Same {
  float value;
  float operator[](int64_t) const { return value; }
};

Parts bias_parts(const Features& f) {
  return f.last ? row_parts(f) : Parts(f.n, 1, f.n);
}

// Calls body(first element, elements, bias, sums) for runs of contiguous elements that cover x. The gradient of element
// i's bias is added to sums[i], or to *sums if the bias is `Same`. Runs depend on sizes alone, and so do the sums.
// `arrays` is the number of tensors read and written.
template <class F>
void for_runs(const Features& f, const float* bias, BiasSum& sum, int64_t arrays, const F& body) {
  constexpr int64_t block = 4096;
  if (bias == nullptr && !sum.wanted()) {
    const int64_t numel = f.numel(), blocks = (numel + block - 1) / block;
    parallel(blocks, arrays * block, [=](int64_t begin, int64_t end) {
      for (int64_t at = begin * block; at < std::min(numel, end * block); at += block) {
        body(at, std::min(block, numel - at), Same{0.0f}, nullptr);
      }
    });
  } else if (f.last && !sum.wanted()) {
    // With few channels a run has several pixels, and the bias is repeated for each.
    const int64_t rows = std::max<int64_t>(1, 512 / f.c), pixels = f.pixels();
    std::vector<float> repeated;
    for (int64_t row = 0; row < rows; ++row) repeated.insert(repeated.end(), bias, bias + f.c);
    const float* const given = repeated.data();
    parallel((pixels + rows - 1) / rows, arrays * f.c * rows, [=](int64_t begin, int64_t end) {
      for (int64_t pixel = begin * rows; pixel < std::min(pixels, end * rows); pixel += rows) {
        body(pixel * f.c, std::min(rows, pixels - pixel) * f.c, given, nullptr);
      }
    });
  } else if (f.last) {
    const Parts parts = bias_parts(f);
    parallel(parts.number, arrays * f.c * parts.size, [=, &sum](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; ++part) {
        float* const sums = sum.wanted() ? sum.part(part) : nullptr;
        for (int64_t pixel = parts.begin(part); pixel < parts.end(part); ++pixel) body(pixel * f.c, f.c, bias, sums);
      }
    });
  } else {
    parallel(f.n * f.c, arrays * f.l, [=, &sum](int64_t begin, int64_t end) {
      for (int64_t plane = begin; plane < end; ++plane) {
        const int64_t c = plane % f.c;
        float* const sums = sum.wanted() ? sum.part(plane / f.c) + c : nullptr;
        body(plane * f.l, f.l, Same{bias ? bias[c] : 0.0f}, sums);
      }
    });
  }
}

// to[i] = f(i), summed into `sums` (see `for_runs`).
template <class T, class B, class F>
void write(T* to, int64_t count, const B&, float* sums, const F& f) {
  constexpr int64_t block = 512;
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += block) {
    const int64_t end = std::min(count, begin + block);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) store(to + i, f(i));
    if (sums == nullptr) continue;
    if constexpr (std::is_same_v<B, Same>) {
      total += sum_of(to + begin, end - begin);
    } else {
      add_to(sums + begin, to + begin, end - begin);
    }
  }
  if (sums != nullptr && std::is_same_v<B, Same>) *sums = static_cast<float>(total);
}

}  // namespace

Tensor bias_act_forward(const Tensor& x, const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                        double gain) {
  const Features f = as_rows(features(x));
  const std::vector<float> offsets = bias_values(bias, x, f.c);
  BiasSum none(false, 0, 0);
  return dispatch(x, "x", [&](auto element) {
    using T = decltype(element);
    const Tensor y = fresh_like<T>(x);
    const T* const from = data<T>(x);
    T* const to = output<T>(y);
    with_act(act, negative_slope, gain, [&](auto a) {
      const float* const given = bias ? offsets.data() : nullptr;
      for_runs(f, given, none, 2, [=](int64_t at, int64_t count, auto b, float*) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(to + at + i, a.value(load(from + at + i) + b[i]));
      });
    });
    return y;
  });
}

std::tuple<Tensor, Tensor> bias_act_backward(const Tensor& dy, const std::optional<Tensor>& ref,
                                             const std::optional<Tensor>& bias, int64_t act, double negative_slope,
                                             double gain, bool want_bias) {
  const Features f = features(dy), layout = as_rows(f);
  STD_TORCH_CHECK(ref || act == kLinear, "ref must be a tensor unless act is linear, got None");
  if (ref) check_dense_like(*ref, "ref", dy, f.last);
  const std::vector<float> offsets = bias_values(bias, dy, f.c);
  BiasSum db(want_bias, bias_parts(layout).number, f.c);
  Tensor dx = dispatch(dy, "dy", [&](auto element) {
    using T = decltype(element);
    const Tensor result = fresh_like<T>(dy);
    const T *const from = data<T>(dy), *const reference = ref ? data<T>(*ref) : from;
    T* const to = output<T>(result);
    with_act(act, negative_slope, gain, [&](auto a) {
      const float* const given = bias || (layout.last && want_bias) ? offsets.data() : nullptr;
      for_runs(layout, given, db, 3, [=](int64_t at, int64_t count, auto b, float* sums) {
        write(to + at, count, b, sums,
              [=](int64_t i) { return a.slope(load(reference + at + i) + b[i], load(from + at + i)); });
      });
    });
    return result;
  });
  return {dx, db.result(dy)};
}

std::tuple<Tensor, Tensor, Tensor> bias_act_second_backward(const Tensor& u, const Tensor& dy, const Tensor& ref,
                                                            const std::optional<Tensor>& bias, int64_t act,
                                                            double negative_slope, double gain, bool want_bias) {
  const Features f = features(ref), layout = as_rows(f);
  check_dense_like(u, "u", ref, f.last);
  check_dense_like(dy, "dy", ref, f.last);
  const std::vector<float> offsets = bias_values(bias, ref, f.c);
  BiasSum gb(want_bias, bias_parts(layout).number, f.c);
  return dispatch(ref, "ref", [&](auto element) -> std::tuple<Tensor, Tensor, Tensor> {
    using T = decltype(element);
    const Tensor gdy = fresh_like<T>(ref), gx = fresh_like<T>(ref);
    const T *const along = data<T>(u), *const from = data<T>(dy), *const reference = data<T>(ref);
    T *const to_gdy = output<T>(gdy), *const to_gx = output<T>(gx);
    with_curved(act, gain, [&](auto a) {
      const float* const given = bias || (layout.last && want_bias) ? offsets.data() : nullptr;
      for_runs(layout, given, gb, 5, [=](int64_t at, int64_t count, auto b, float* sums) {
        write(to_gx + at, count, b, sums, [=](int64_t i) {
          const float v = load(reference + at + i) + b[i], w = load(along + at + i);
          store(to_gdy + at + i, a.slope(v, w));
          return a.curvature(v, w * load(from + at + i));
        });
      });
    });
    return {gdy, gx, gb.result(ref)};
  });
}

FASTGAN_OP(bias_act_forward, "(Tensor x, Tensor? bias, int act, float negative_slope, float gain) -> Tensor");
FASTGAN_OP(bias_act_backward,
           "(Tensor dy, Tensor? ref, Tensor? bias, int act, float negative_slope, float gain, bool want_bias)"
           " -> (Tensor, Tensor)");
FASTGAN_OP(bias_act_second_backward,
           "(Tensor u, Tensor dy, Tensor ref, Tensor? bias, int act, float negative_slope, float gain, bool want_bias)"
           " -> (Tensor, Tensor, Tensor)");

}  // namespace fastgan
