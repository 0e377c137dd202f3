// gelu(x + bias) of packed tokens [N, D], in the tanh approximation. With u = x + bias and z = sqrt(2 / pi) (u + 0.044715 u^3),
//
//   (1 + tanh z) / 2 = s = 1 / (1 + exp(-2 z)),   gelu(u) = u s,   gelu'(u) = s + u s (1 - s) 2 dz/du
//
// A work item is kTokens consecutive tokens; each element is read and written once. The backward adds up an item's part of the
// bias's gradient, and a second pass adds the items in order.
#include "parallel.h"
#include "simd_math.h"
#include "simd_stream.h"

namespace sora::SORA_TIER {
namespace {

constexpr int64_t kTokens = 64;
constexpr int64_t kGroup = 8;  // tokens whose gradients are summed before they join a longer sum: smaller rounding errors
constexpr float kSlope = 1.5957691216057308f, kCubic = 0.044715f;  // 2 z = kSlope (u + kCubic u^3)

struct Gelu {
  vf value, slope;
};

// From e = exp(-2 |z|), which cannot overflow: s = 1 / (1 + e) or, where u < 0, e / (1 + e), and s (1 - s) = e / (1 + e)^2.
template <class T>
SORA_INLINE Gelu gelu(vf u) {
  constexpr float kLog2e = 1.44269504f;
  const vf square = u * u, inner = u * (-kSlope * kLog2e - kSlope * kLog2e * kCubic * square);
  const vf e = exp2<sizeof(T) == 2>(bits<vf>(bits<vu>(inner) | 0x80000000)), r = 1.0f / (1.0f + e);
  const vf s = u < 0.0f ? e * r : r;
  const vf bounded = square < 1e4f ? square : vf{} + 1e4f;  // beyond, e is 0
  return {u * s, s + u * (e * r * r) * (kSlope + 3 * kSlope * kCubic * bounded)};
}

// body(item, begin, end, bias, room) for each item of tokens: bias [D] is float32, zeros if there is none; `scratch` floats of
// room.
template <class T, class Body>
void each_item(const BiasGelu& a, int64_t scratch, Body body) {
  const int64_t tokens = a.x.size[0], d = a.x.size[1];
  parallel_for((tokens + kTokens - 1) / kTokens, [&](int64_t item) {
    Pieces pieces{Scratch::get(padded(d) + padded(scratch))};
    float* bias = pieces.take(d);
    each_vector(d, [&](int64_t i, int lanes) {
      store_lanes(bias + i, a.bias ? load_lanes(static_cast<const T*>(a.bias.data) + i, lanes) : vf{}, lanes);
    });
    const int64_t begin = item * kTokens;
    body(item, begin, begin + kTokens < tokens ? begin + kTokens : tokens, bias, pieces.take(scratch));
    finish_streams();
  });
}

template <class T>
void forward(const BiasGelu& a) {
  const int64_t d = a.x.size[1];
  const bool stream = streams(a.out);
  each_item<T>(a, 0, [&](int64_t, int64_t begin, int64_t end, const float* bias, float*) {
    for (int64_t n = begin; n < end; ++n) {
      const T* x = row<const T>(a.x, n);
      T* out = row<T>(a.out, n);
      each_vector(d, [=](int64_t i, int lanes) {
        write_lanes(out + i, gelu<T>(load_lanes(x + i, lanes) + load_lanes(bias + i, lanes)).value, lanes, stream);
      });
    }
  });
}

template <class T>
void backward(const BiasGelu& a) {
  const int64_t tokens = a.x.size[0], d = a.x.size[1], items = (tokens + kTokens - 1) / kTokens;
  const bool stream = streams(a.dx), biased = static_cast<bool>(a.dbias);
  const Zeros partial(biased ? items : 0, d);
  each_item<T>(a, d, [&](int64_t item, int64_t begin, int64_t end, const float* bias, float* group) {
    for (int64_t first = begin; first < end; first += kGroup) {
      memset(group, 0, d * sizeof(float));
      for (int64_t n = first; n < end && n < first + kGroup; ++n) {
        const T *x = row<const T>(a.x, n), *dout = row<const T>(a.dout, n);
        T* dx = row<T>(a.dx, n);
        each_vector(d, [=](int64_t i, int lanes) {
          const vf slope = gelu<T>(load_lanes(x + i, lanes) + load_lanes(bias + i, lanes)).slope;
          const vf gradient = load_lanes(dout + i, lanes) * slope;
          write_lanes(dx + i, gradient, lanes, stream);
          if (biased) store_lanes(group + i, load_lanes(group + i, lanes) + gradient, lanes);
        });
      }
      if (biased) add_row(partial.data() + item * d, group, d);
    }
  });
  if (!biased) return;
  parallel_vectors(d, [&](int64_t i, int lanes) {
    store_lanes(static_cast<T*>(a.dbias.data) + i, column_sum(partial.data() + i, d, items, lanes), lanes);
  });
}

}  // namespace

void bias_gelu_forward(const BiasGelu& a) {
  dispatch(a.x.dtype, [&](auto t) { forward<decltype(t)>(a); });
}

void bias_gelu_backward(const BiasGelu& a) {
  dispatch(a.x.dtype, [&](auto t) { backward<decltype(t)>(a); });
}

}  // namespace sora::SORA_TIER
