// 3D RoPE of packed tokens [N, H, d], alone or behind an RMS norm.
//
// cos and sin are computed in double once per index along each axis of a span: T + H + W rows instead of T * H * W. A work item is
// kTokens consecutive tokens. Each token's row of cos and sin (d floats, which stay in L1) joins its three axis rows, of which
// usually only W's has changed. It serves all heads of q and k; rotate.h says how it looks. Each element
// is read and written once.
#include <cmath>

#include "rotate.h"

namespace sora::SORA_TIER {
namespace {

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

// Calls body(n, angles) for each token of an item, the rows [d] or [d / 2] being valid during the call.
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
    body(n, Angles{cosines, sines});
  }
}

int64_t used_tokens(const Rope& rope) { return rope.cu_spans.ints()[rope.cu_spans.size[0] - 1]; }

template <class T, class Dim>
void rope_forward(const Rope& rope, Dim d, const Tensor& x, const Tensor& out) {
  const AngleTables tables(rope);
  const Rotation<Dim, Dim> turn{rope.interleaved, d, d};
  const bool stream = streams(out);
  each_piece(
      used_tokens(rope), x.size[0],
      [&](int64_t begin, int64_t end) {
        each_token(rope, tables, begin, end, Scratch::get(angle_row_size(d)),
                   [&](int64_t n, Angles angles) { rotate_token<T>(turn, x, out, n, [=](int64_t) { return angles; }, stream); });
        finish_streams();
      },
      [&](int64_t n) { zero_token<T>(out, n); });
}

template <class T, class Dim>
void norm_rope_forward(const Rope& rope, Dim d, QkNorm (&parts)[2], bool across_heads, float eps) {
  const AngleTables tables(rope);
  const Rotation<Dim, Dim> turn{rope.interleaved, d, d};
  const int64_t sizes[2] = {weight_size(parts[0], across_heads), weight_size(parts[1], across_heads)};
  each_piece(
      used_tokens(rope), parts[0].x.size[0],
      [&](int64_t begin, int64_t end) {
        Pieces scratch{Scratch::get(angle_row_size(d) + padded(sizes[0]) + padded(sizes[1]))};
        float *rows = scratch.take(angle_row_size(d)), *weights[2] = {scratch.take(sizes[0]), scratch.take(sizes[1])};
        for (int i = 0; i < 2; ++i) read_row(parts[i].weight, sizes[i], 1, weights[i]);
        each_token(rope, tables, begin, end, rows, [&](int64_t n, Angles angles) {
          for (int i = 0; i < 2; ++i)
            norm_rope_token<T>(RmsNorm{weights[i], across_heads}, turn, parts[i], n, [=](int64_t) { return angles; }, eps);
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

template <class T, class Dim>
void norm_rope_backward(const Rope& rope, Dim d, QkNorm (&parts)[2], bool across_heads) {
  const AngleTables tables(rope);
  const Rotation<Dim, Dim> turn{rope.interleaved, d, d};
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
        for (int i = 0; i < 2; ++i) read_row(parts[i].weight, sizes[i], 1, weights + i * sizes[0]);
        each_token(rope, tables, begin, end, rows, [&](int64_t n, Angles angles) {
          for (int i = 0; i < 2; ++i) {
            const int64_t first = i * sizes[0];
            const RmsNorm norm{weights + first, across_heads};
            norm_rope_backward_token<T>(norm, turn, parts[i], n, [=](int64_t) { return angles; },
                                        {g, mean, group + first, nullptr});
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
  for (int part = 0; part < 2; ++part) store_sums(parts[part].dweight, partial.data() + part * sizes[0], both, pieces);
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
