// adaLN: gated residual, normalisation and modulation of packed tokens [N, D], and a gated norm added to a residual. Rows of shift,
// scale and gate by cu_rows.
//
// Forward: a work item is kTokens consecutive tokens; a row of D elements stays in L1 between the mean, the variance and the
// result, so memory sees each input once. Backward: an item is up to kTokens tokens of one row r; it sums the gradients of that
// row's shift, scale and gate in float32, and a second pass adds the items of each row in order. Items count from the row's first
// token, so the result depends neither on the threads nor on what else is packed.
#include "parallel.h"
#include "simd.h"

namespace sora::SORA_TIER {
namespace {

constexpr int64_t kTokens = 64;
// What is summed before it joins a longer sum, which keeps rounding errors small: gradients of so many tokens, elements of a row.
constexpr int64_t kGroup = 8, kSegment = 1024;

// sums[k] = sum_i of values[k] that term(i, lanes, values) gives, in independent chains: one would wait for its own additions.
template <int K, class Term>
SORA_INLINE void row_sums(int64_t length, float (&sums)[K], Term term) {
  constexpr int kChains = 8 / K;
  vf total[K] = {};
  for (int64_t begin = 0; begin < length; begin += kSegment) {
    const int64_t end = begin + kSegment < length ? begin + kSegment : length;
    vf chain[kChains][K] = {}, values[K];
    int64_t i = begin;
    for (; i + kChains * W <= end; i += kChains * W)
      for (int c = 0; c < kChains; ++c) {
        term(i + c * W, W, values);
        for (int k = 0; k < K; ++k) chain[c][k] += values[k];
      }
    each_vector(end - i, [&](int64_t j, int lanes) {
      term(i + j, lanes, values);
      for (int k = 0; k < K; ++k) chain[0][k] += lanes == W ? values[k] : lanes_below(lanes) ? values[k] : vf{};
    });
    for (int k = 0; k < K; ++k)
      for (int c = 0; c < kChains; ++c) total[k] += chain[c][k];
  }
  for (int k = 0; k < K; ++k) sums[k] = sum(total[k]);
}

template <class Term>
SORA_INLINE float row_sum(int64_t length, Term term) {
  float sums[1];
  row_sums(length, sums, [&](int64_t i, int lanes, vf(&values)[1]) { values[0] = term(i, lanes); });
  return sums[0];
}

// Row r serves tokens begin(r) to begin(r + 1); without boundaries one row serves all.
struct Boundaries {
  Boundaries(const AdaLn& a, int64_t tokens)
      : cu(a.cu_rows ? a.cu_rows.ints() : nullptr), rows(a.cu_rows ? a.cu_rows.size[0] - 1 : 1), tokens(tokens) {}
  int64_t begin(int64_t r) const { return cu != nullptr ? cu[r] : r * tokens; }
  int64_t used() const { return begin(rows); }

  // The first row that ends after token n.
  int64_t find(int64_t n) const {
    int64_t low = 0, high = rows;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (begin(middle + 1) > n)
        high = middle;
      else
        low = middle + 1;
    }
    return low;
  }

  const int32_t* cu;
  int64_t rows, tokens;
};

// What `scale` is added to.
float factor_begin(const AdaLn& a) { return a.scale && a.gates_norm() ? 0 : 1; }

// What modulation and the norm's own weight and bias do to xhat for all tokens of a row r: xhat * factor + offset. The backward has
// no offset.
struct Modulation {
  Modulation(Pieces& pieces, const AdaLn& a, int64_t d)
      : factor(a.scale || a.weight ? pieces.take(d) : nullptr),
        offset(!a.dout && !a.dresidual_out && (a.shift || a.bias) ? pieces.take(d) : nullptr) {}

  template <class P>
  void read(const AdaLn& a, int64_t d, int64_t r) {
    const P *scale = row<const P>(a.scale, r), *weight = static_cast<const P*>(a.weight.data);
    const P *shift = row<const P>(a.shift, r), *bias = static_cast<const P*>(a.bias.data);
    const float begin = factor_begin(a);
    each_vector(d, [&](int64_t i, int lanes) {
      vf f = vf{} + begin, o = {};
      if (scale != nullptr) f += load_lanes(scale + i, lanes);
      if (bias != nullptr) o = f * load_lanes(bias + i, lanes);
      if (shift != nullptr) o += load_lanes(shift + i, lanes);
      if (weight != nullptr) f *= load_lanes(weight + i, lanes);
      if (factor != nullptr) store_lanes(factor + i, f, lanes);
      if (offset != nullptr) store_lanes(offset + i, o, lanes);
    });
  }
  SORA_INLINE vf modulated(vf xhat, int64_t i, int lanes) const {
    const vf y = factor != nullptr ? xhat * load_lanes(factor + i, lanes) : xhat;
    return offset != nullptr ? y + load_lanes(offset + i, lanes) : y;
  }

  float *factor, *offset;  // null: there is none
};

// Normalises and modulates token n: x_at(i, lanes) gives its elements, once; after that they are at x. put(i, lanes, y) gets the
// results.
template <class Normed, class X, class Put>
SORA_INLINE void norm_token(const AdaLn& a, const Modulation m, int64_t n, const Normed* x, X x_at, Put put) {
  const int64_t d = a.x.size[1];
  const auto square = [](vf y) { return y * y; };
  float mean = 0, variance = 0;
  if (a.rms) {
    variance = row_sum(d, [&](int64_t i, int lanes) { return square(x_at(i, lanes)); }) / d;
  } else {
    mean = row_sum(d, x_at) / d;
    float sums[2];
    row_sums(d, sums, [&](int64_t i, int lanes, vf(&values)[2]) {
      values[0] = load_lanes(x + i, lanes) - mean;
      values[1] = square(values[0]);
    });
    // The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean, and gives zeros.
    const float left = sums[0] / d;
    mean += left;
    variance = sums[1] / d - left * left;
    if (variance < 0) variance = 0;
  }
  const float rstd = 1 / __builtin_sqrtf(variance + a.eps);
  static_cast<float*>(a.mean.data)[n] = mean;
  static_cast<float*>(a.rstd.data)[n] = rstd;
  each_vector(d, [=](int64_t i, int lanes) {
    const vf xhat = (load_lanes(x + i, lanes) - mean) * rstd;
    put(i, lanes, m.modulated(xhat, i, lanes));
  });
}

// put(i, lanes, y) that writes to token n of `out`.
template <class T>
struct Writer {
  Writer(const Tensor& out, int64_t n) : to(row<T>(out, n)), stream(streams(out)) {}
  SORA_INLINE void operator()(int64_t i, int lanes, vf y) const { write_lanes(to + i, y, lanes, stream); }

  T* to;
  bool stream;
};

void zero_row(const Tensor& x, int64_t n) {
  if (x) memset(static_cast<char*>(x.data) + n * x.stride[0] * x.item_bytes, 0, x.size[1] * x.item_bytes);
}

// f(i, lanes) = residual + gate * x at elements i.. of token n, of row r.
template <class A>
auto gated(const AdaLn& a, int64_t n, int64_t r) {
  const auto* residual = row<const typename A::R>(a.residual, n);
  const auto* x = row<const typename A::T>(a.x, n);
  const auto* gate = row<const typename A::P>(a.gate, r);
  return [=](int64_t i, int lanes) {
    const vf added = load_lanes(x + i, lanes);
    return load_lanes(residual + i, lanes) + (gate != nullptr ? load_lanes(gate + i, lanes) * added : added);
  };
}

// token(n, r, modulation of r) for every token inside the boundaries; zeros in all outputs for the slack.
template <class A, class Token>
void forward(const AdaLn& a, Token token) {
  const int64_t total = a.x.size[0], d = a.x.size[1];
  const Boundaries boundaries(a, total);
  const int64_t used = boundaries.used();
  parallel_for((total + kTokens - 1) / kTokens, [&](int64_t item) {
    const int64_t end = (item + 1) * kTokens < total ? (item + 1) * kTokens : total;
    Modulation modulation = on_scratch<Modulation>(a, d);
    int64_t r = boundaries.find(item * kTokens), read = -1;
    for (int64_t n = item * kTokens; n < end; ++n) {
      if (n < used) {
        while (n >= boundaries.begin(r + 1)) ++r;
        if (a.mean && r != read) modulation.read<typename A::P>(a, d, read = r);
        token(n, r, modulation);
      } else {
        zero_row(a.out, n), zero_row(a.residual_out, n);
        if (a.mean) static_cast<float*>(a.mean.data)[n] = static_cast<float*>(a.rstd.data)[n] = 0;
      }
    }
    finish_streams();
  });
}

// Where the sums over the tokens of a row begin in a row of `length` floats, and -1 for those that nobody asked for.
struct Sums {
  Sums(const AdaLn& a, int64_t d) {
    if (a.dshift || a.dbias || (a.dscale && a.bias)) shift = take(d);
    if (a.dscale || a.dweight) scale = take(d);
    if (a.dgate) gate = take(d);
  }
  int64_t take(int64_t d) {
    length += d;
    return length - d;
  }
  static float* at(float* sums, int64_t begin) { return begin < 0 ? nullptr : sums + begin; }

  int64_t shift = -1, scale = -1, gate = -1;  // of dout; dout * xhat; d(residual) * x
  int64_t length = 0;
};

template <class A>
const Tensor& gradient_of_output(const AdaLn& a) {
  return A::kGatesNorm ? a.dresidual_out : a.dout;
}

// With u = dout (1 + scale) weight:  d(norm input) = rstd (u - mean(u) - xhat mean(u xhat)), without mean(u) for RMS.
// ALL: there is a factor, a gate and every sum, where the op has one. To ask for each vector would take some 6% of the time. Behind
// a gated norm only a bias needs the sum of dout: there ALL is without.
template <class A, bool ALL>
void backward_token(const AdaLn& a, const Modulation& m, const Sums& where, int64_t n, int64_t r, float* sums) {
  using T = typename A::T;
  using R = typename A::R;
  using X = typename A::X;
  using G = typename A::G;
  const int64_t d = gradient_of_output<A>(a).size[1];
  const bool norm = static_cast<bool>(a.mean);
  // Without a norm, dout is the residual's own gradient.
  const G* dout = norm ? row<const G>(gradient_of_output<A>(a), n) : nullptr;
  const X* normed = norm ? row<const X>(a.residual_out ? a.residual_out : a.x, n) : nullptr;
  const float mean = norm ? static_cast<const float*>(a.mean.data)[n] : 0,
              rstd = norm ? static_cast<const float*>(a.rstd.data)[n] : 0;
  const float* factor = m.factor;
  const auto scaled = [=](vf x, int64_t i, int lanes) { return ALL || factor != nullptr ? x * load_lanes(factor + i, lanes) : x; };
  const auto xhat_at = [=](int64_t i, int lanes) { return (load_lanes(normed + i, lanes) - mean) * rstd; };
  const auto add = [](float* to, vf value, int lanes) { store_lanes(to, load_lanes(to, lanes) + value, lanes); };
  float means[2] = {};  // of u, of u xhat
  if (norm) {
    float *shift_sum = Sums::at(sums, where.shift), *scale_sum = Sums::at(sums, where.scale);
    row_sums(d, means, [=](int64_t i, int lanes, vf(&values)[2]) {
      const vf g = load_lanes(dout + i, lanes), xhat = xhat_at(i, lanes);
      if (ALL ? !A::kGatesNorm : shift_sum != nullptr) add(shift_sum + i, g, lanes);
      if (ALL || scale_sum != nullptr) add(scale_sum + i, g * xhat, lanes);
      values[0] = scaled(g, i, lanes);
      values[1] = values[0] * xhat;
    });
    means[0] = a.rms ? 0 : means[0] / d, means[1] /= d;
  }
  const float mean_u = means[0], mean_ux = means[1];
  const auto through_norm = [=](int64_t i, int lanes) {
    const vf u = scaled(load_lanes(dout + i, lanes), i, lanes);
    return (u - mean_u - xhat_at(i, lanes) * mean_ux) * rstd;
  };
  T* dx = row<T>(a.dx, n);
  if (A::kGatesNorm || !a.dresidual) {
    const bool stream = streams(a.dx);
    each_vector(d, [=](int64_t i, int lanes) { write_lanes(dx + i, through_norm(i, lanes), lanes, stream); });
    if constexpr (A::kGatesNorm)
      if (a.dresidual) {
        const Writer<R> write(a.dresidual, n);
        each_vector(d, [=](int64_t i, int lanes) { write(i, lanes, load_lanes(dout + i, lanes)); });
      }
    return;
  }
  const bool stream = streams(a.dresidual), stream_x = streams(a.dx);
  const R* dresidual_out = row<const R>(norm ? a.dresidual_out : a.dout, n);
  const T* x = row<const T>(a.x, n);
  const auto* gates = a.gate ? row<const typename A::P>(a.gate, r) : nullptr;
  R* dresidual = row<R>(a.dresidual, n);
  float* gate_sum = Sums::at(sums, where.gate);
  each_vector(d, [=](int64_t i, int lanes) {
    vf gradient = load_lanes(dresidual_out + i, lanes);
    if (norm) gradient += through_norm(i, lanes);
    write_lanes(dresidual + i, gradient, lanes, stream);
    if (!ALL && gates == nullptr) return;
    add(gate_sum + i, gradient * load_lanes(x + i, lanes), lanes);
    write_lanes(dx + i, gradient * load_lanes(gates + i, lanes), lanes, stream_x);
  });
}

template <class A>
void backward(const AdaLn& a) {
  using P = typename A::P;
  const Tensor& dout = gradient_of_output<A>(a);
  const Boundaries boundaries(a, dout.size[0]);
  const int64_t rows = boundaries.rows, d = dout.size[1];
  const Sums where(a, d);
  const int64_t stride = where.length;
  const Memory<int64_t> first(rows + 1);  // first item of each row
  first[0] = 0;
  for (int64_t r = 0; r < rows; ++r)
    first[r + 1] = first[r] + (boundaries.begin(r + 1) - boundaries.begin(r) + kTokens - 1) / kTokens;
  const Zeros partial(first[rows], stride);
  const bool all_of_norm = !a.mean || ((a.scale || a.weight) && where.scale >= 0 && (where.shift < 0) == A::kGatesNorm);
  const auto token_gradients =
      all_of_norm && (A::kGatesNorm || !a.dresidual || a.gate) ? backward_token<A, true> : backward_token<A, false>;

  parallel_for(first[rows], [&](int64_t item) {
    int64_t r = 0;
    for (int64_t high = rows; r + 1 < high;) {  // the last row whose first item is at or before this one
      const int64_t middle = (r + high) / 2;
      (first[middle] <= item ? r : high) = middle;
    }
    const int64_t begin = boundaries.begin(r) + (item - first[r]) * kTokens, row_end = boundaries.begin(r + 1);
    const int64_t end = begin + kTokens < row_end ? begin + kTokens : row_end;
    Pieces pieces{Scratch::get(2 * padded(d) + padded(stride))};
    Modulation modulation(pieces, a, d);
    if (a.mean) modulation.read<P>(a, d, r);
    float *group = pieces.take(stride), *total = partial.data() + item * stride;
    for (int64_t n = begin; n < end; n += kGroup) {
      memset(group, 0, stride * sizeof(float));
      for (int64_t token = n; token < end && token < n + kGroup; ++token) token_gradients(a, modulation, where, token, r, group);
      add_row(total, group, stride);
    }
    finish_streams();
  });
  for (int64_t n = boundaries.used(); n < dout.size[0]; ++n) zero_row(a.dx, n), zero_row(a.dresidual, n);
  if (stride == 0) return;

  parallel_vectors(d, [&](int64_t i, int lanes) {
    const P *weight = static_cast<const P*>(a.weight.data), *bias = static_cast<const P*>(a.bias.data);
    Total dweight, dbias;
    for (int64_t r = 0; r < rows; ++r) {
      const auto total = [&](int64_t sum) {
        return column_sum(partial.data() + first[r] * stride + sum + i, stride, first[r + 1] - first[r], lanes);
      };
      const vf shift = where.shift < 0 ? vf{} : total(where.shift), scale = where.scale < 0 ? vf{} : total(where.scale);
      vf factor = vf{} + factor_begin(a);
      if (a.scale) factor += load_lanes(row<const P>(a.scale, r) + i, lanes);
      if (a.dshift) store_lanes(row<P>(a.dshift, r) + i, shift, lanes);
      if (a.dscale) {
        const vf dscale = weight != nullptr ? scale * load_lanes(weight + i, lanes) : scale;
        store_lanes(row<P>(a.dscale, r) + i, bias != nullptr ? dscale + shift * load_lanes(bias + i, lanes) : dscale, lanes);
      }
      if (a.dgate) store_lanes(row<P>(a.dgate, r) + i, total(where.gate), lanes);
      if (a.dweight) dweight.add(scale * factor);
      if (a.dbias) dbias.add(shift * factor);
    }
    if (a.dweight) store_lanes(static_cast<P*>(a.dweight.data) + i, dweight.value(), lanes);
    if (a.dbias) store_lanes(static_cast<P*>(a.dbias.data) + i, dbias.value(), lanes);
  });
}

// Calls body with the storage types of a call.
template <class Body>
void with_types(const AdaLn& a, Body body) {
  dispatch_adaln(a.types, [](DType dtype, auto of_type) { dispatch(dtype, of_type); }, body);
}

}  // namespace

void layer_norm_modulate_forward(const AdaLn& a) {
  with_types(a, [&](auto types) {
    using A = decltype(types);
    forward<A>(a, [&](int64_t n, int64_t, const Modulation& m) {
      const auto* x = row<const typename A::T>(a.x, n);
      const auto x_at = [=](int64_t i, int lanes) { return load_lanes(x + i, lanes); };
      norm_token(a, m, n, x, x_at, Writer<typename A::T>(a.out, n));
    });
  });
}

void gate_residual_forward(const AdaLn& a) {
  const bool stream = streams(a.out);
  with_types(a, [&](auto types) {
    using A = decltype(types);
    forward<A>(a, [&](int64_t n, int64_t r, const Modulation&) {
      auto* out = row<typename A::R>(a.out, n);
      const auto sum_at = gated<A>(a, n, r);
      each_vector(a.x.size[1], [=](int64_t i, int lanes) { write_lanes(out + i, sum_at(i, lanes), lanes, stream); });
    });
  });
}

void gate_residual_layer_norm_modulate_forward(const AdaLn& a) {
  with_types(a, [&](auto types) {
    using A = decltype(types);
    forward<A>(a, [&](int64_t n, int64_t r, const Modulation& m) {
      auto* residual = row<typename A::R>(a.residual_out, n);
      const auto sum_at = gated<A>(a, n, r);
      const auto rounded_at = [=](int64_t i, int lanes) {
        store_lanes(residual + i, sum_at(i, lanes), lanes);
        return load_lanes(residual + i, lanes);
      };
      norm_token(a, m, n, residual, rounded_at, Writer<typename A::T>(a.out, n));
    });
  });
}

void norm_gate_residual_forward(const AdaLn& a) {
  with_types(a, [&](auto types) {
    using A = decltype(types);
    forward<A>(a, [&](int64_t n, int64_t, const Modulation& m) {
      const auto* x = row<const typename A::T>(a.x, n);
      const auto* residual = row<const typename A::R>(a.residual, n);
      const Writer<typename A::R> write(a.residual_out, n);
      const auto x_at = [=](int64_t i, int lanes) { return load_lanes(x + i, lanes); };
      const auto add = [=](int64_t i, int lanes, vf y) { write(i, lanes, load_lanes(residual + i, lanes) + y); };
      norm_token(a, m, n, x, x_at, add);
    });
  });
}

void adaln_backward(const AdaLn& a) {
  with_types(a, [&](auto types) {
    using A = decltype(types);
    a.gates_norm() ? backward<typename A::GatesNorm>(a) : backward<A>(a);
  });
}

}  // namespace sora::SORA_TIER
