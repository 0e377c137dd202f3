// The rotation of a token's heads, alone or behind a norm: what ops that compute angles share with those that are given tables.
//
// Rows of cosines and sines are laid out as they are used. Interleaved pairs have (cos, cos) and (-sin, sin), so that a rotation is
// x * cos + swap_pairs(x) * sin. The half layout has one cos and one sin per pair. A head has d channels, of which the first
// `rotated` are rotated and the rest pass.
#pragma once

#include "parallel.h"
#include "simd_stream.h"

namespace sora::SORA_TIER {

constexpr int64_t kTokens = 64;  // of a work item
constexpr int64_t kGroup = 4;    // tokens whose weight gradients are summed before they join a longer sum: smaller rounding errors

// A head dim known at compile time, over which loops are unrolled.
template <int n>
struct Fixed {
  constexpr operator int() const { return n; }
};

// Calls body(d), with a constant for the usual head dims.
template <class Body>
void by_head_dim(int64_t d, Body body) {
  if (d == 64) return body(Fixed<64>{});
  if (d == 128) return body(Fixed<128>{});
  body(static_cast<int>(d));
}

struct Angles {
  const float *cosines, *sines;
};

// How a head is rotated. Dim and Rotated are ints or constants.
template <class Dim, class Rotated>
struct Rotation {
  bool interleaved;
  Dim d;
  Rotated rotated;
};

// Rotates one head: read(i, lanes) gives channels i.., write(i, x, lanes) takes them.
template <class Dim, class Rotated, class Read, class Write>
SORA_INLINE void rotate(const Rotation<Dim, Rotated>& turn, Angles angles, Read read, Write write) {
  const Rotated rotated = turn.rotated;
  const auto [cosines, sines] = angles;
  if (turn.interleaved) {
    each_vector(rotated, [&](int64_t i, int lanes) {
      const vf x = read(i, lanes);
      write(i, x * load_lanes(cosines + i, lanes) + swap_pairs(x) * load_lanes(sines + i, lanes), lanes);
    });
  } else {
    const int half = rotated / 2;
    each_vector(half, [&](int64_t i, int lanes) {
      const vf u = read(i, lanes), v = read(i + half, lanes), c = load_lanes(cosines + i, lanes), s = load_lanes(sines + i, lanes);
      write(i, u * c - v * s, lanes);
      write(i + half, v * c + u * s, lanes);
    });
  }
  each_vector(turn.d - rotated, [&](int64_t i, int lanes) { write(rotated + i, read(rotated + i, lanes), lanes); });
}

template <class T>
T* at(const Tensor& x, int64_t n, int64_t h) {
  return static_cast<T*>(x.data) + n * x.stride[0] + h * x.stride[1];
}

template <class T>
void zero_token(const Tensor& x, int64_t n) {
  for (int64_t h = 0; h < x.size[1]; ++h) memset(at<T>(x, n, h), 0, x.size[2] * sizeof(T));
}

// Calls body(begin, end) for pieces of kTokens of the first `used` tokens, zero(n) for each of the others.
template <class Body, class Zero>
void each_piece(int64_t used, int64_t total, Body body, Zero zero) {
  parallel_for((total + kTokens - 1) / kTokens, [&](int64_t i) {
    const int64_t begin = i * kTokens, end = begin + kTokens < total ? begin + kTokens : total;
    const int64_t middle = end < used ? end : begin < used ? used : begin;
    if (begin < middle) body(begin, middle);
    for (int64_t n = middle; n < end; ++n) zero(n);
  });
}

// angles_of(h): of head h of the token; valid until it is called again.
template <class T, class Dim, class Rotated, class AnglesOf>
SORA_INLINE void rotate_token(const Rotation<Dim, Rotated>& turn, const Tensor& x, const Tensor& out, int64_t n, AnglesOf angles_of,
                              bool stream) {
  for (int64_t h = 0; h < x.size[1]; ++h) {
    const T* from = at<const T>(x, n, h);
    T* to = at<T>(out, n, h);
    rotate(
        turn, angles_of(h), [=](int64_t i, int lanes) { return load_lanes(from + i, lanes); },
        [=](int64_t i, vf y, int lanes) { write_lanes(to + i, y, lanes, stream); });
  }
}

// Of a head, or of all heads of a token. The weight is in float32.
struct RmsNorm {
  static constexpr bool kCentred = false;
  const float* weight;
  bool across_heads;
};

// Of a head; means [H] are of the token's heads.
struct LayerNorm {
  static constexpr bool kCentred = true;
  const float *weight, *bias;
  float* means;
  static constexpr bool across_heads = false;
};

template <class Norm>
SORA_INLINE float mean_of(const Norm& norm, int64_t h) {
  if constexpr (Norm::kCentred)
    return norm.means[h];
  else
    return 0;
}

// Channels of a norm's weight: of all heads, or of one.
inline __attribute__((always_inline)) int64_t weight_size(const QkNorm& p, bool across_heads) {
  return (across_heads ? p.x.size[1] : 1) * p.x.size[2];
}

// A norm's weight or bias in float32, or `absent` everywhere.
SORA_INLINE void read_row(const Tensor& row, int64_t size, float absent, float* to) {
  if (!row) {
    each_vector(size, [&](int64_t i, int lanes) { store_lanes(to + i, broadcast(absent), lanes); });
    return;
  }
  dispatch(row.dtype, [&](auto t) {
    const auto* from = static_cast<const decltype(t)*>(row.data);
    each_vector(size, [&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(from + i, lanes), lanes); });
  });
}

namespace {  // so that none of parallel_for's code for it is a symbol that the linker merges

// A gradient of a weight or bias, if it is wanted: the sum of `count` rows from `first` on, `stride` apart, in order.
void store_sums(const Tensor& to, const float* first, int64_t stride, int64_t count) {
  if (!to) return;
  dispatch(to.dtype, [&](auto t) {
    auto* sums = static_cast<decltype(t)*>(to.data);
    parallel_vectors(to.size[0],
                     [=](int64_t i, int lanes) { store_lanes(sums + i, column_sum(first + i, stride, count, lanes), lanes); });
  });
}

}  // namespace

// Channels of a head without their mean; zero past the last one.
template <class T>
SORA_INLINE vf centred(const T* x, int lanes, float mean) {
  const vf y = load_lanes(x, lanes) - mean;
  return lanes == W ? y : lanes_below(lanes) ? y : vf{};
}

// Mean and rstd of each head of a token, in a loop over the heads for each sum, so that none waits for another one of its head.
template <class T, class Dim>
SORA_INLINE void layer_norm_statistics(const Tensor& x, int64_t n, Dim d, float eps, float* means, float* rstd) {
  const int64_t num_heads = x.size[1];
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(x, n, h);
    vf total = {};
    each_vector(d, [&](int64_t i, int lanes) { total += load_lanes(from + i, lanes); });
    means[h] = sum(total) / d;
  }
  // The mean of what is left corrects the rounding of the sum: equal channels have that very mean, and no variance.
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(x, n, h);
    const float mean = means[h];
    vf left = {};
    each_vector(d, [&](int64_t i, int lanes) { left += centred(from + i, lanes, mean); });
    means[h] = mean + sum(left) / d;
  }
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(x, n, h);
    const float mean = means[h];
    vf squares = {};
    each_vector(d, [&](int64_t i, int lanes) {
      const vf y = centred(from + i, lanes, mean);
      squares += y * y;
    });
    rstd[h] = 1 / __builtin_sqrtf(sum(squares) / d + eps);
  }
}

// Normalises and rotates the heads of a token.
template <class T, class Norm, class Dim, class Rotated, class AnglesOf>
SORA_INLINE void norm_rope_token(const Norm& norm, const Rotation<Dim, Rotated>& turn, const QkNorm& p, int64_t n,
                                 AnglesOf angles_of, float eps) {
  const Dim d = turn.d;
  const int64_t num_heads = p.x.size[1];
  const bool stream = streams(p.out), across_heads = norm.across_heads;
  float* rstd = static_cast<float*>(p.rstd.data) + n * p.rstd.size[1];
  // In two loops over the heads: in one, the rotation would wait for its head's sum, root and quotient.
  vf squares = {};
  if constexpr (Norm::kCentred) {
    layer_norm_statistics<T>(p.x, n, d, eps, norm.means, rstd);
  } else {
    for (int64_t h = 0; h < num_heads; ++h) {
      const T* from = at<const T>(p.x, n, h);
      if (!across_heads) squares = vf{};
      each_vector(d, [&](int64_t i, int lanes) {
        const vf x = load_lanes(from + i, lanes);
        squares += x * x;
      });
      if (!across_heads) rstd[h] = 1 / __builtin_sqrtf(sum(squares) / d + eps);
    }
  }
  if (across_heads) rstd[0] = 1 / __builtin_sqrtf(sum(squares) / (d * num_heads) + eps);
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(p.x, n, h);
    T* to = at<T>(p.out, n, h);
    const float *w = norm.weight + (across_heads ? h * d : 0), r = rstd[across_heads ? 0 : h], mean = mean_of(norm, h);
    rotate(
        turn, angles_of(h),
        [=](int64_t i, int lanes) {
          const vf x = load_lanes(from + i, lanes);
          if constexpr (Norm::kCentred)
            return (x - mean) * r * load_lanes(w + i, lanes) + load_lanes(norm.bias + i, lanes);
          else
            return x * r * load_lanes(w + i, lanes);
        },
        [=](int64_t i, vf y, int lanes) { write_lanes(to + i, y, lanes, stream); });
  }
}

// Where a token's backward keeps the gradient turned back [H, d] and the means of groups [H], twice of a LayerNorm, and adds up
// the gradients of weight and bias.
struct BackwardRoom {
  float *g, *means, *dweight, *dbias;
};

// With g the gradient turned back, xhat = (x - mean) * rstd, without the mean in an RMS norm, and u = g * weight:
//   dx = rstd * (u - mean(u) - xhat * mean(u * xhat)),   dweight += g * xhat,   dbias += g
// In two loops over the heads, as forward.
template <class T, class Norm, class Dim, class Rotated, class AnglesOf>
SORA_INLINE void norm_rope_backward_token(const Norm& norm, const Rotation<Dim, Rotated>& turn, const QkNorm& p, int64_t n,
                                          AnglesOf angles_of, const BackwardRoom& room) {
  const Dim d = turn.d;
  const bool stream = streams(p.dx), across_heads = norm.across_heads;
  const int64_t num_heads = p.x.size[1], next = across_heads ? d : 0;  // from one head's weight to the next one's
  const float* rstd = static_cast<const float*>(p.rstd.data) + n * p.rstd.size[1];
  vf dot = {}, total = {};
  for (int64_t h = 0; h < num_heads; ++h) {
    const T *from = at<const T>(p.dout, n, h), *x = at<const T>(p.x, n, h);
    const float *w = norm.weight + h * next, r = rstd[across_heads ? 0 : h], mean = mean_of(norm, h);
    float *to = room.g + h * d, *dw = room.dweight + h * next;
    if (!across_heads) dot = vf{}, total = vf{};
    rotate(
        turn, angles_of(h), [=](int64_t i, int lanes) { return load_lanes(from + i, lanes); },
        [&](int64_t i, vf y, int lanes) {
          vf product;
          if constexpr (Norm::kCentred) {
            product = y * (load_lanes(x + i, lanes) - mean) * r;
            total += y * load_lanes(w + i, lanes);
            store_lanes(room.dbias + i, load_lanes(room.dbias + i, lanes) + y, lanes);
          } else {
            product = y * load_lanes(x + i, lanes) * r;
          }
          dot += product * load_lanes(w + i, lanes);
          store_lanes(to + i, y, lanes);
          store_lanes(dw + i, load_lanes(dw + i, lanes) + product, lanes);
        });
    if (!across_heads) room.means[h] = sum(dot) / d;
    if constexpr (Norm::kCentred) room.means[num_heads + h] = sum(total) / d;
  }
  if (across_heads) room.means[0] = sum(dot) / (d * num_heads);
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* x = at<const T>(p.x, n, h);
    T* dx = at<T>(p.dx, n, h);
    const float *w = norm.weight + h * next, *from = room.g + h * d;
    const float r = rstd[across_heads ? 0 : h], factor = r * room.means[across_heads ? 0 : h];
    const float mean = mean_of(norm, h), level = Norm::kCentred ? room.means[num_heads + h] : 0;
    each_vector(d, [&](int64_t i, int lanes) {
      const vf u = load_lanes(from + i, lanes) * load_lanes(w + i, lanes), y = load_lanes(x + i, lanes);
      if constexpr (Norm::kCentred)
        write_lanes(dx + i, (u - level - (y - mean) * factor) * r, lanes, stream);
      else
        write_lanes(dx + i, (u - y * factor) * r, lanes, stream);
    });
  }
}

}  // namespace sora::SORA_TIER
