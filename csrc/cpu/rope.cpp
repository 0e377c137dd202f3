// 3D RoPE of packed tokens [N, H, d], alone or behind an RMS norm.
//
// cos and sin are computed in double once per index along each axis of a span: T + H + W rows instead of T * H * W. A work item is
// kTokens consecutive tokens. Each token's row of cos and sin (d floats, which stay in L1) joins its three axis rows, of which
// usually only W's has changed. It serves all heads of q and k. Each element is read and written once.
//
// Table rows are laid out as they are used. Interleaved pairs have (cos, cos) and (-sin, sin), so that a rotation is
// x * cos + swap_pairs(x) * sin. The half layout has one cos and one sin per pair.
#include <cmath>

#include "parallel.h"
#include "simd_stream.h"

namespace sora::SORA_TIER {
namespace {

constexpr int64_t kTokens = 64;
constexpr int64_t kGroup = 4;  // tokens whose weight gradients are summed before they join a longer sum: smaller rounding errors

class AngleTables {
 public:
  explicit AngleTables(const Rope& rope) : rope_(rope), spans_(rope.grid.size[0]), offset_(3 * spans_), data_(make_offsets() + W) {
    parallel_for(3 * spans_, [&](int64_t i) { fill(i / 3, i % 3); });
  }

  int width(int axis) const { return width_[axis]; }
  // width(axis) cosines, then as many sines.
  const float* row(int64_t span, int axis, int64_t index) const {
    return data_.data() + offset_[3 * span + axis] + index * 2 * width_[axis];
  }

 private:
  // Indices along an axis of a span; none of a span without tokens, whose other sides may be of any length.
  int64_t length(int64_t span, int64_t axis) const {
    const int32_t* cu = rope_.cu_spans.ints() + span;
    return cu[1] > cu[0] ? rope_.grid.ints()[3 * span + axis] : 0;
  }

  // Where each axis of each span begins; returns the floats of all.
  int64_t make_offsets() {
    int64_t floats = 0;
    for (int axis = 0; axis < 3; ++axis) width_[axis] = rope_.interleaved ? rope_.axes_dim[axis] : rope_.axes_dim[axis] / 2;
    for (int64_t i = 0; i < 3 * spans_; ++i) {
      offset_[i] = floats;
      floats += length(i / 3, i % 3) * 2 * width_[i % 3];
    }
    return floats;
  }

  void fill(int64_t span, int axis) {
    const double origin = static_cast<const float*>(rope_.origin.data)[3 * span + axis];
    const double step = static_cast<const float*>(rope_.step.data)[3 * span + axis];
    const int pairs = rope_.axes_dim[axis] / 2;
    for (int p = 0; p < pairs; ++p) {
      const double frequency = std::pow(rope_.theta[axis], -static_cast<double>(p) / pairs);
      for (int64_t index = 0; index < length(span, axis); ++index) {
        const double angle = (origin + step * index) * frequency;
        const float c = static_cast<float>(std::cos(angle)),
                    s = static_cast<float>(rope_.inverse ? -std::sin(angle) : std::sin(angle));
        float *cosines = data_.data() + offset_[3 * span + axis] + index * 2 * width_[axis], *sines = cosines + width_[axis];
        if (rope_.interleaved) {
          cosines[2 * p] = cosines[2 * p + 1] = c;
          sines[2 * p] = -s, sines[2 * p + 1] = s;
        } else {
          cosines[p] = c, sines[p] = s;
        }
      }
    }
  }

  const Rope& rope_;
  int64_t spans_;
  int width_[3];
  Memory<int64_t> offset_;
  Memory<float> data_;
};

// Copies length floats and up to W - 1 more, so that there is no tail to take care of.
SORA_INLINE void copy_vectors(float* to, const float* from, int length) {
  for (int i = 0; i < length; i += W) store(to + i, load(from + i));
}

constexpr int64_t angle_row_size(int64_t d) { return 2 * (padded(d) + 16); }

// Calls body(n, cosines, sines) for each token of an item, the rows [d] or [d / 2] being valid during the call.
template <class Body>
void each_token(const Rope& rope, const AngleTables& tables, int64_t begin, int64_t end, float* rows, Body body) {
  const int32_t* cu = rope.cu_spans.ints();
  const int32_t* grid = rope.grid.ints();
  const int total = tables.width(0) + tables.width(1) + tables.width(2);
  float *cosines = rows, *sines = rows + padded(total) + 16;
  int64_t span = 0, spans = rope.grid.size[0];
  for (int64_t high = spans; span + 1 < high;) {  // the last span that starts at or before the token
    const int64_t middle = (span + high) / 2;
    (cu[middle] <= begin ? span : high) = middle;
  }
  for (int64_t n = begin; n < end; ++n) {
    bool all = n == begin;
    while (n >= cu[span + 1]) ++span, all = true;
    const int32_t *size = grid + 3 * span, offset = static_cast<int32_t>(n - cu[span]);
    const int32_t index[3] = {offset / (size[1] * size[2]), offset / size[2] % size[1], offset % size[2]};
    all |= offset == 0;
    for (int axis = 0, at = 0; axis < 3; at += tables.width(axis++)) {
      const bool changed = axis == 2 || index[2] == 0 || all;
      if (!changed) continue;
      const float* row = tables.row(span, axis, index[axis]);
      copy_vectors(cosines + at, row, tables.width(axis));
      copy_vectors(sines + at, row + tables.width(axis), tables.width(axis));
    }
    body(n, cosines, sines);
  }
}

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

// Rotates one head: read(i, lanes) gives channels i.., write(i, x, lanes) takes them.
template <class Dim, class Read, class Write>
SORA_INLINE void rotate(bool interleaved, Dim d, const float* cosines, const float* sines, Read read, Write write) {
  if (interleaved) {
    each_vector(d, [&](int64_t i, int lanes) {
      const vf x = read(i, lanes);
      write(i, x * load_lanes(cosines + i, lanes) + swap_pairs(x) * load_lanes(sines + i, lanes), lanes);
    });
  } else {
    const int half = d / 2;
    each_vector(half, [&](int64_t i, int lanes) {
      const vf u = read(i, lanes), v = read(i + half, lanes), c = load_lanes(cosines + i, lanes), s = load_lanes(sines + i, lanes);
      write(i, u * c - v * s, lanes);
      write(i + half, v * c + u * s, lanes);
    });
  }
}

template <class T>
T* at(const Tensor& x, int64_t n, int64_t h) {
  return static_cast<T*>(x.data) + n * x.stride[0] + h * x.stride[1];
}

template <class T>
void zero_token(const Tensor& x, int64_t n) {
  for (int64_t h = 0; h < x.size[1]; ++h) memset(at<T>(x, n, h), 0, x.size[2] * sizeof(T));
}

int64_t used_tokens(const Rope& rope) { return rope.cu_spans.ints()[rope.cu_spans.size[0] - 1]; }

// Calls body(begin, end) for pieces of kTokens of the tokens inside the spans, zero(n) for each token of the slack.
template <class Body, class Zero>
void each_piece(int64_t used, int64_t total, Body body, Zero zero) {
  parallel_for((total + kTokens - 1) / kTokens, [&](int64_t i) {
    const int64_t begin = i * kTokens, end = begin + kTokens < total ? begin + kTokens : total;
    const int64_t middle = end < used ? end : begin < used ? used : begin;
    if (begin < middle) body(begin, middle);
    for (int64_t n = middle; n < end; ++n) zero(n);
  });
}

template <class T, class Dim>
void rope_forward(const Rope& rope, Dim d, const Tensor& x, const Tensor& out) {
  const AngleTables tables(rope);
  const bool stream = streams(out);
  each_piece(
      used_tokens(rope), x.size[0],
      [&](int64_t begin, int64_t end) {
        each_token(rope, tables, begin, end, Scratch::get(angle_row_size(d)), [&](int64_t n, const float* c, const float* s) {
          for (int64_t h = 0; h < x.size[1]; ++h) {
            const T* from = at<const T>(x, n, h);
            T* to = at<T>(out, n, h);
            rotate(
                rope.interleaved, d, c, s, [=](int64_t i, int lanes) { return load_lanes(from + i, lanes); },
                [=](int64_t i, vf y, int lanes) { write_lanes(to + i, y, lanes, stream); });
          }
        });
        finish_streams();
      },
      [&](int64_t n) { zero_token<T>(out, n); });
}

// Channels of a norm's weight: of all heads, or of one.
int64_t weight_size(const QkNorm& p, bool across_heads) { return (across_heads ? p.x.size[1] : 1) * p.x.size[2]; }

// The norm's weight in float32; ones if there is none.
void read_weight(const QkNorm& p, bool across_heads, float* to) {
  const int64_t size = weight_size(p, across_heads);
  if (!p.weight) {
    each_vector(size, [&](int64_t i, int lanes) { store_lanes(to + i, broadcast(1), lanes); });
    return;
  }
  dispatch(p.weight.dtype, [&](auto t) {
    const auto* weight = static_cast<const decltype(t)*>(p.weight.data);
    each_vector(size, [&](int64_t i, int lanes) { store_lanes(to + i, load_lanes(weight + i, lanes), lanes); });
  });
}

template <class T, class Dim>
void norm_rope_token(const Rope& rope, Dim d, const QkNorm& p, bool across_heads, float eps, int64_t n, const float* c,
                     const float* s, const float* weight) {
  const int64_t num_heads = p.x.size[1];
  const bool stream = streams(p.out);
  float* rstd = static_cast<float*>(p.rstd.data) + n * p.rstd.size[1];
  // In two loops over the heads: in one, the rotation would wait for its head's sum, root and quotient.
  vf squares = {};
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(p.x, n, h);
    if (!across_heads) squares = vf{};
    each_vector(d, [&](int64_t i, int lanes) {
      const vf x = load_lanes(from + i, lanes);
      squares += x * x;
    });
    if (!across_heads) rstd[h] = 1 / __builtin_sqrtf(sum(squares) / d + eps);
  }
  if (across_heads) rstd[0] = 1 / __builtin_sqrtf(sum(squares) / (d * num_heads) + eps);
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* from = at<const T>(p.x, n, h);
    T* to = at<T>(p.out, n, h);
    const float *w = weight + (across_heads ? h * d : 0), r = rstd[across_heads ? 0 : h];
    rotate(
        rope.interleaved, d, c, s, [=](int64_t i, int lanes) { return load_lanes(from + i, lanes) * r * load_lanes(w + i, lanes); },
        [=](int64_t i, vf y, int lanes) { write_lanes(to + i, y, lanes, stream); });
  }
}

template <class T, class Dim>
void norm_rope_forward(const Rope& rope, Dim d, QkNorm (&parts)[2], bool across_heads, float eps) {
  const AngleTables tables(rope);
  const int64_t sizes[2] = {weight_size(parts[0], across_heads), weight_size(parts[1], across_heads)};
  each_piece(
      used_tokens(rope), parts[0].x.size[0],
      [&](int64_t begin, int64_t end) {
        Pieces scratch{Scratch::get(angle_row_size(d) + padded(sizes[0]) + padded(sizes[1]))};
        float *rows = scratch.take(angle_row_size(d)), *weights[2] = {scratch.take(sizes[0]), scratch.take(sizes[1])};
        for (int i = 0; i < 2; ++i) read_weight(parts[i], across_heads, weights[i]);
        each_token(rope, tables, begin, end, rows, [&](int64_t n, const float* c, const float* s) {
          for (int i = 0; i < 2; ++i) norm_rope_token<T>(rope, d, parts[i], across_heads, eps, n, c, s, weights[i]);
        });
        finish_streams();
      },
      [&](int64_t n) {
        for (const QkNorm& p : parts) {
          zero_token<T>(p.out, n);
          memset(static_cast<float*>(p.rstd.data) + n * p.rstd.size[1], 0, p.rstd.size[1] * sizeof(float));
        }
      });
}

// With g the gradient turned back, xhat = x * rstd and u = g * weight:
//   dx = rstd * (u - xhat * mean(u * xhat)),   dweight += g * xhat
// In two loops over the heads, as forward.
template <class T, class Dim>
void norm_rope_backward_token(const Rope& rope, Dim d, const QkNorm& p, bool across_heads, int64_t n, const float* c,
                              const float* s, const float* weight, float* g, float* mean, float* dweight) {
  const int64_t num_heads = p.x.size[1], next = across_heads ? d : 0;  // from one head's weight to the next one's
  const float* rstd = static_cast<const float*>(p.rstd.data) + n * p.rstd.size[1];
  const bool stream = streams(p.dx);
  vf dot = {};
  for (int64_t h = 0; h < num_heads; ++h) {
    const T *from = at<const T>(p.dout, n, h), *x = at<const T>(p.x, n, h);
    const float *w = weight + h * next, r = rstd[across_heads ? 0 : h];
    float *to = g + h * d, *dw = dweight + h * next;
    if (!across_heads) dot = vf{};
    rotate(
        rope.interleaved, d, c, s, [=](int64_t i, int lanes) { return load_lanes(from + i, lanes); },
        [&](int64_t i, vf y, int lanes) {
          const vf product = y * load_lanes(x + i, lanes) * r;
          dot += product * load_lanes(w + i, lanes);
          store_lanes(to + i, y, lanes);
          store_lanes(dw + i, load_lanes(dw + i, lanes) + product, lanes);
        });
    if (!across_heads) mean[h] = sum(dot) / d;
  }
  if (across_heads) mean[0] = sum(dot) / (d * num_heads);
  for (int64_t h = 0; h < num_heads; ++h) {
    const T* x = at<const T>(p.x, n, h);
    T* dx = at<T>(p.dx, n, h);
    const float *w = weight + h * next, *from = g + h * d;
    const float r = rstd[across_heads ? 0 : h], factor = r * mean[across_heads ? 0 : h];
    each_vector(d, [&](int64_t i, int lanes) {
      const vf u = load_lanes(from + i, lanes) * load_lanes(w + i, lanes);
      write_lanes(dx + i, (u - load_lanes(x + i, lanes) * factor) * r, lanes, stream);
    });
  }
}

template <class T, class Dim>
void norm_rope_backward(const Rope& rope, Dim d, QkNorm (&parts)[2], bool across_heads) {
  const AngleTables tables(rope);
  const int64_t tokens = parts[0].x.size[0], pieces = (tokens + kTokens - 1) / kTokens;
  // Each piece sums its own weight gradients; adding those in order makes the result independent of the threads.
  const int64_t sizes[2] = {weight_size(parts[0], across_heads), weight_size(parts[1], across_heads)};
  const int64_t both = sizes[0] + sizes[1];
  const int64_t heads = parts[0].x.size[1] > parts[1].x.size[1] ? parts[0].x.size[1] : parts[1].x.size[1];
  const Zeros partial(pieces, both);
  each_piece(
      used_tokens(rope), tokens,
      [&](int64_t begin, int64_t end) {
        Pieces scratch{Scratch::get(angle_row_size(d) + padded(heads * d) + padded(heads) + 2 * padded(both))};
        float *rows = scratch.take(angle_row_size(d)), *g = scratch.take(heads * d), *mean = scratch.take(heads);
        float *weights = scratch.take(both), *group = scratch.take(both);
        float* total = partial.data() + begin / kTokens * both;
        memset(group, 0, both * sizeof(float));
        for (int i = 0; i < 2; ++i) read_weight(parts[i], across_heads, weights + i * sizes[0]);
        each_token(rope, tables, begin, end, rows, [&](int64_t n, const float* c, const float* s) {
          for (int i = 0; i < 2; ++i) {
            const int64_t first = i * sizes[0];
            norm_rope_backward_token<T>(rope, d, parts[i], across_heads, n, c, s, weights + first, g, mean, group + first);
          }
          if ((n + 1 - begin) % kGroup == 0 || n + 1 == end) {
            add_row(total, group, both);
            memset(group, 0, both * sizeof(float));
          }
        });
        finish_streams();
      },
      [&](int64_t n) {
        for (const QkNorm& p : parts) zero_token<T>(p.dx, n);
      });
  for (int part = 0; part < 2; ++part) {
    if (!parts[part].dweight) continue;
    const float* first = partial.data() + part * sizes[0];
    dispatch(parts[part].dweight.dtype, [&](auto t) {
      auto* dweight = static_cast<decltype(t)*>(parts[part].dweight.data);
      parallel_vectors(sizes[part],
                       [&](int64_t i, int lanes) { store_lanes(dweight + i, column_sum(first + i, both, pieces, lanes), lanes); });
    });
  }
}

}  // namespace

void rope_3d(const Rope& rope, const Tensor& x, const Tensor& out) {
  dispatch(x.dtype, [&](auto t) { by_head_dim(x.size[2], [&](auto d) { rope_forward<decltype(t)>(rope, d, x, out); }); });
}

void qk_norm_rope_3d_forward(const Rope& rope, QkNorm (&parts)[2], bool across_heads, float eps) {
  dispatch(parts[0].x.dtype, [&](auto t) {
    by_head_dim(parts[0].x.size[2], [&](auto d) { norm_rope_forward<decltype(t)>(rope, d, parts, across_heads, eps); });
  });
}

void qk_norm_rope_3d_backward(const Rope& rope, QkNorm (&parts)[2], bool across_heads) {
  dispatch(parts[0].x.dtype, [&](auto t) {
    by_head_dim(parts[0].x.size[2], [&](auto d) { norm_rope_backward<decltype(t)>(rope, d, parts, across_heads); });
  });
}

}  // namespace sora::SORA_TIER
