// adaLN: gated residual, normalisation and modulation of packed tokens [N, D], rows of shift, scale and gate by cu_seqlens.
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

template <class T>
T* row(const Tensor& x, int64_t n) {
  return static_cast<T*>(x.data) + n * x.stride[0];
}

// sum_i term(i) over a row, in four independent chains: one would wait for its own additions.
template <class Term>
SORA_INLINE float row_sum(int64_t length, Term term) {
  vf total = {};
  for (int64_t begin = 0; begin < length; begin += kSegment) {
    const int64_t end = begin + kSegment < length ? begin + kSegment : length;
    vf chain[4] = {};
    int64_t i = begin;
    for (; i + 4 * W <= end; i += 4 * W)
      for (int c = 0; c < 4; ++c) chain[c] += term(i + c * W, W);
    each_vector(end - i, [&](int64_t j, int lanes) {
      vf x = term(i + j, lanes);
      if (lanes < W) x = lanes_below(lanes) ? x : vf{};
      chain[0] += x;
    });
    total += chain[0] + chain[1] + (chain[2] + chain[3]);
  }
  return sum(total);
}

int64_t num_rows(const AdaLn& a) { return a.cu_seqlens.size[0] - 1; }
int64_t used_tokens(const AdaLn& a) { return a.cu_seqlens.ints()[num_rows(a)]; }

// The first row that ends after token n.
int64_t find_row(const AdaLn& a, int64_t n) {
  const int32_t* cu = a.cu_seqlens.ints();
  int64_t low = 0, high = num_rows(a);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (cu[middle + 1] > n)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The norm's own weight and bias.
template <class T>
SORA_INLINE vf affine(const AdaLn& a, vf xhat, int64_t i, int lanes) {
  if (a.weight) xhat *= load_lanes(static_cast<const T*>(a.weight.data) + i, lanes);
  if (a.bias) xhat += load_lanes(static_cast<const T*>(a.bias.data) + i, lanes);
  return xhat;
}

template <class T>
void norm_token(const AdaLn& a, const T* x, int64_t n, int64_t r) {
  const int64_t d = a.x.size[1];
  float mean = 0;
  if (!a.rms) mean = row_sum(d, [&](int64_t i, int lanes) { return load_lanes(x + i, lanes); }) / d;
  const float variance = row_sum(d,
                                 [&](int64_t i, int lanes) {
                                   const vf c = load_lanes(x + i, lanes) - mean;
                                   return c * c;
                                 }) /
                         d;
  const float rstd = 1 / __builtin_sqrtf(variance + a.eps);
  static_cast<float*>(a.mean.data)[n] = mean;
  static_cast<float*>(a.rstd.data)[n] = rstd;
  const T *scale = row<const T>(a.scale, r), *shift = row<const T>(a.shift, r);
  T* out = row<T>(a.out, n);
  const bool stream = streams(a.out);
  each_vector(d, [&](int64_t i, int lanes) {
    const vf y = affine<T>(a, (load_lanes(x + i, lanes) - mean) * rstd, i, lanes);
    write_lanes(out + i, y * (1.0f + load_lanes(scale + i, lanes)) + load_lanes(shift + i, lanes), lanes, stream);
  });
}

template <class T>
void gate_token(const AdaLn& a, const Tensor& out, bool stream, int64_t n, int64_t r) {
  const T *residual = row<const T>(a.residual, n), *x = row<const T>(a.x, n), *gate = row<const T>(a.gate, r);
  T* to = row<T>(out, n);
  each_vector(a.x.size[1], [&](int64_t i, int lanes) {
    write_lanes(to + i, load_lanes(residual + i, lanes) + load_lanes(gate + i, lanes) * load_lanes(x + i, lanes), lanes, stream);
  });
}

template <class T>
void zero_row(const Tensor& x, int64_t n) {
  if (x) memset(row<T>(x, n), 0, x.size[1] * sizeof(T));
}

// token(n, r) for every token inside the boundaries; zeros in all outputs for the slack.
template <class T, class Token>
void forward(const AdaLn& a, Token token) {
  const int64_t total = a.x.size[0], used = used_tokens(a);
  const int32_t* cu = a.cu_seqlens.ints();
  parallel_for((total + kTokens - 1) / kTokens, [&](int64_t item) {
    const int64_t end = (item + 1) * kTokens < total ? (item + 1) * kTokens : total;
    int64_t r = find_row(a, item * kTokens);
    for (int64_t n = item * kTokens; n < end; ++n) {
      if (n < used) {
        while (n >= cu[r + 1]) ++r;
        token(n, r);
      } else {
        zero_row<T>(a.out, n), zero_row<T>(a.residual_out, n);
        if (a.mean) static_cast<float*>(a.mean.data)[n] = static_cast<float*>(a.rstd.data)[n] = 0;
      }
    }
    finish_streams();
  });
}

// The sums over the tokens of a row r that the second pass needs.
enum Sum { kShift, kScale, kGate, kSums };  // dout; dout * xhat; d(residual) * x

// With u = dout (1 + scale) weight:  d(norm input) = rstd (u - mean(u) - xhat mean(u xhat)), without mean(u) for RMS.
template <class T>
void backward_token(const AdaLn& a, int64_t n, int64_t r, float* sums) {
  const int64_t d = a.x.size[1];
  const bool norm = static_cast<bool>(a.scale), gated = static_cast<bool>(a.gate);
  // Without a norm, dout is the residual's own gradient.
  const T* dout = norm ? row<const T>(a.dout, n) : nullptr;
  const T* normed = norm ? row<const T>(gated ? a.residual_out : a.x, n) : nullptr;
  const T* scale = norm ? row<const T>(a.scale, r) : nullptr;
  const T* weight = static_cast<const T*>(a.weight.data);
  const float mean = norm ? static_cast<const float*>(a.mean.data)[n] : 0,
              rstd = norm ? static_cast<const float*>(a.rstd.data)[n] : 0;
  float mean_u = 0, mean_ux = 0;
  const auto xhat_at = [&](int64_t i, int lanes) { return (load_lanes(normed + i, lanes) - mean) * rstd; };
  const auto u_at = [&](int64_t i, int lanes) {
    vf u = load_lanes(dout + i, lanes) * (1.0f + load_lanes(scale + i, lanes));
    return weight != nullptr ? u * load_lanes(weight + i, lanes) : u;
  };
  if (norm) {
    vf total_u = {}, total_ux = {};
    each_vector(d, [&](int64_t i, int lanes) {
      const vf g = load_lanes(dout + i, lanes), u = u_at(i, lanes), xhat = xhat_at(i, lanes);
      total_u += u, total_ux += u * xhat;
      float *shift_sum = sums + kShift * d + i, *scale_sum = sums + kScale * d + i;
      store_lanes(shift_sum, load_lanes(shift_sum, lanes) + g, lanes);
      store_lanes(scale_sum, load_lanes(scale_sum, lanes) + g * xhat, lanes);
    });
    mean_u = a.rms ? 0 : sum(total_u) / d, mean_ux = sum(total_ux) / d;
  }
  const T *dresidual_out = gated ? row<const T>(norm ? a.dresidual_out : a.dout, n) : nullptr, *x = row<const T>(a.x, n);
  const T* gate = gated ? row<const T>(a.gate, r) : nullptr;
  T *dresidual = gated ? row<T>(a.dresidual, n) : nullptr, *dx = row<T>(a.dx, n);
  each_vector(d, [&](int64_t i, int lanes) {
    vf gradient = {};
    if (norm) gradient = (u_at(i, lanes) - mean_u - xhat_at(i, lanes) * mean_ux) * rstd;
    if (gated) {
      gradient += load_lanes(dresidual_out + i, lanes);
      store_lanes(dresidual + i, gradient, lanes);
      float* gate_sum = sums + kGate * d + i;
      store_lanes(gate_sum, load_lanes(gate_sum, lanes) + gradient * load_lanes(x + i, lanes), lanes);
      gradient *= load_lanes(gate + i, lanes);
    }
    store_lanes(dx + i, gradient, lanes);
  });
}

template <class T>
void backward(const AdaLn& a) {
  const int64_t rows = num_rows(a), d = a.x.size[1], stride = kSums * d;
  const int32_t* cu = a.cu_seqlens.ints();
  int64_t* first = static_cast<int64_t*>(malloc((rows + 1) * sizeof(int64_t)));  // first item of each row
  if (first == nullptr) abort();
  first[0] = 0;
  for (int64_t r = 0; r < rows; ++r) first[r + 1] = first[r] + (cu[r + 1] - cu[r] + kTokens - 1) / kTokens;
  float* partial = static_cast<float*>(calloc(first[rows] * stride + 1, sizeof(float)));
  if (partial == nullptr) abort();

  parallel_for(first[rows], [&](int64_t item) {
    int64_t r = 0;
    for (int64_t high = rows; r + 1 < high;) {  // the last row whose first item is at or before this one
      const int64_t middle = (r + high) / 2;
      (first[middle] <= item ? r : high) = middle;
    }
    const int64_t begin = cu[r] + (item - first[r]) * kTokens, end = begin + kTokens < cu[r + 1] ? begin + kTokens : cu[r + 1];
    float *total = partial + item * stride, *group = Scratch::get(stride);
    for (int64_t n = begin; n < end; n += kGroup) {
      memset(group, 0, stride * sizeof(float));
      for (int64_t m = n; m < end && m < n + kGroup; ++m) backward_token<T>(a, m, r, group);
      each_vector(stride, [&](int64_t i, int lanes) {
        store_lanes(total + i, load_lanes(total + i, lanes) + load_lanes(group + i, lanes), lanes);
      });
    }
  });
  for (int64_t n = used_tokens(a); n < a.x.size[0]; ++n) zero_row<T>(a.dx, n), zero_row<T>(a.dresidual, n);

  parallel_for((d + 4 * W - 1) / (4 * W), [&](int64_t block) {
    const int64_t column = block * 4 * W;
    each_vector(d - column < 4 * W ? d - column : 4 * W, [&](int64_t offset, int lanes) {
      const int64_t i = column + offset;
      const vf one = vf{} + 1.0f;
      const vf weight = a.weight ? load_lanes(static_cast<const T*>(a.weight.data) + i, lanes) : one;
      const vf bias = a.bias ? load_lanes(static_cast<const T*>(a.bias.data) + i, lanes) : vf{};
      Total dweight, dbias;
      for (int64_t r = 0; r < rows; ++r) {
        Total totals[kSums];
        for (int64_t item = first[r]; item < first[r + 1]; ++item)
          for (int k = 0; k < kSums; ++k) totals[k].add(load_lanes(partial + item * stride + k * d + i, lanes));
        const vf total[kSums] = {totals[kShift].value(), totals[kScale].value(), totals[kGate].value()};
        if (a.scale) {
          store_lanes(row<T>(a.dshift, r) + i, total[kShift], lanes);
          store_lanes(row<T>(a.dscale, r) + i, total[kScale] * weight + total[kShift] * bias, lanes);
          const vf factor = 1.0f + load_lanes(row<const T>(a.scale, r) + i, lanes);
          dweight.add(total[kScale] * factor), dbias.add(total[kShift] * factor);
        }
        if (a.gate) store_lanes(row<T>(a.dgate, r) + i, total[kGate], lanes);
      }
      if (a.dweight) store_lanes(static_cast<T*>(a.dweight.data) + i, dweight.value(), lanes);
      if (a.dbias) store_lanes(static_cast<T*>(a.dbias.data) + i, dbias.value(), lanes);
    });
  });
  free(partial);
  free(first);
}

}  // namespace

void layer_norm_modulate_forward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    forward<T>(a, [&](int64_t n, int64_t r) { norm_token(a, row<const T>(a.x, n), n, r); });
  });
}

void gate_residual_forward(const AdaLn& a) {
  const bool stream = streams(a.out);
  dispatch(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    forward<T>(a, [&](int64_t n, int64_t r) { gate_token<T>(a, a.out, stream, n, r); });
  });
}

void gate_residual_layer_norm_modulate_forward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    forward<T>(a, [&](int64_t n, int64_t r) {
      gate_token<T>(a, a.residual_out, false, n, r);  // the norm reads it at once
      norm_token(a, row<const T>(a.residual_out, n), n, r);
    });
  });
}

void adaln_backward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace sora::SORA_TIER
