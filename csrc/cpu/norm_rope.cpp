// RoPE of tokens [N, H, d] from given tables, alone or behind a norm; or the norm alone.
//
// A work item is kTokens consecutive tokens. A token's row of the tables is expanded once for all its heads, or once per head where
// each has angles of its own, into rows that stay in L1; rotate.h says how they look. Each element is read and written once, each
// number of the tables read once per sample.
#include "rotate.h"

namespace sora::SORA_TIER {
namespace {

// x0 x0 x1 x1 ..., of the first or the second half of a vector.
SORA_INLINE vf twice_low(vf x) {
  return shuffle(x, x, [](int i) { return i / 2; });
}
SORA_INLINE vf twice_high(vf x) {
  return shuffle(x, x, [](int i) { return W / 2 + i / 2; });
}

// The angles of a token's heads.
class GivenAngles {
 public:
  static constexpr int64_t room(int64_t rotated) { return 2 * (padded(rotated) + 2 * W); }

  GivenAngles(const RopeTables& tables, float* room)
      : tables_(tables),
        pairs_(tables.cos ? tables.cos.size[tables.cos.ndim - 1] : 0),
        cosines_(room),
        sines_(room + padded(2 * pairs_) + 2 * W) {
    const bool alternate = tables.interleaved;
    for (int i = 0; i < W; ++i) sign_[i] = ((alternate && i % 2 == 0) != tables.inverse) ? -1 : 1;
  }

  SORA_INLINE void seek(int64_t n) {
    if (!tables_.cos) return;
    token_ = n % tables_.cos.size[0];
    if (tables_.cos.ndim == 2) expand(0);
  }

  SORA_INLINE Angles of(int64_t h) {
    if (tables_.cos && tables_.cos.ndim == 3) expand(h);
    return {cosines_, sines_};
  }

 private:
  SORA_INLINE static const float* row(const Tensor& table, int64_t n, int64_t h) {
    return static_cast<const float*>(table.data) + n * table.stride[0] + (table.ndim == 3 ? h * table.stride[1] : 0);
  }

  SORA_INLINE void expand(int64_t h) {
    const float *cosines = row(tables_.cos, token_, h), *sines = row(tables_.sin, token_, h);
    if (tables_.interleaved) {
      each_vector(pairs_, [&](int64_t i, int lanes) {
        const vf c = load_lanes(cosines + i, lanes), s = load_lanes(sines + i, lanes);
        store(cosines_ + 2 * i, twice_low(c)), store(cosines_ + 2 * i + W, twice_high(c));
        store(sines_ + 2 * i, twice_low(s) * sign_), store(sines_ + 2 * i + W, twice_high(s) * sign_);
      });
    } else {
      each_vector(pairs_, [&](int64_t i, int lanes) {
        store(cosines_ + i, load_lanes(cosines + i, lanes));
        store(sines_ + i, load_lanes(sines + i, lanes) * sign_);
      });
    }
  }

  const RopeTables& tables_;
  int64_t pairs_, token_ = 0;
  float *cosines_, *sines_;
  vf sign_;
};

int64_t rotated_channels(const RopeTables& tables) { return tables.cos ? 2 * tables.cos.size[tables.cos.ndim - 1] : 0; }

// Calls body(Rotation) for heads of d channels, with constants for the usual head dims, all of it rotated.
template <class Body>
void by_rotation(const RopeTables& tables, int64_t d, Body body) {
  const int64_t rotated = rotated_channels(tables);
  if (rotated == d && d == 64) return body(Rotation<Fixed<64>, Fixed<64>>{tables.interleaved, {}, {}});
  if (rotated == d && d == 128) return body(Rotation<Fixed<128>, Fixed<128>>{tables.interleaved, {}, {}});
  body(Rotation<int, int>{tables.interleaved, static_cast<int>(d), static_cast<int>(rotated)});
}

template <class Body>
void each_item(int64_t tokens, Body body) {
  each_piece(tokens, tokens, body, [](int64_t) {});
}

template <class T, class Turn>
void rope_forward(const RopeTables& tables, const Turn& turn, const Tensor& x, const Tensor& out) {
  const bool stream = streams(out);
  each_item(x.size[0], [&](int64_t begin, int64_t end) {
    GivenAngles angles(tables, Scratch::get(GivenAngles::room(turn.rotated)));
    for (int64_t n = begin; n < end; ++n) {
      angles.seek(n);
      rotate_token<T>(turn, x, out, n, [&](int64_t h) { return angles.of(h); }, stream);
    }
    finish_streams();
  });
}

float* means(const NormRope& a, int64_t n) { return static_cast<float*>(a.mean.data) + n * a.mean.size[1]; }

// Calls body(norm) with the norm of token n.
template <bool layer, class Body>
SORA_INLINE void with_norm(const NormRope& a, int64_t n, const float* weight, const float* bias, Body body) {
  if constexpr (layer)
    body(LayerNorm{weight, bias, means(a, n)});
  else
    body(RmsNorm{weight, a.across_heads});
}

template <bool layer, class T, class Turn>
void forward(const NormRope& a, const Turn& turn) {
  const QkNorm& p = a.part;
  const int64_t size = weight_size(p, a.across_heads), angle_room = GivenAngles::room(turn.rotated);
  each_item(p.x.size[0], [&](int64_t begin, int64_t end) {
    Pieces scratch{Scratch::get(padded(angle_room) + (1 + layer) * padded(size))};
    GivenAngles angles(a.tables, scratch.take(angle_room));
    float *weight = scratch.take(size), *bias = nullptr;
    read_row(p.weight, size, 1, weight);
    if constexpr (layer) read_row(a.bias, size, 0, bias = scratch.take(size));
    for (int64_t n = begin; n < end; ++n) {
      angles.seek(n);
      with_norm<layer>(a, n, weight, bias, [&](const auto& norm) {
        norm_rope_token<T>(norm, turn, p, n, [&](int64_t h) { return angles.of(h); }, a.eps);
      });
    }
    finish_streams();
  });
}

template <bool layer, class T, class Turn>
void backward(const NormRope& a, const Turn& turn) {
  const QkNorm& p = a.part;
  const int64_t tokens = p.x.size[0], heads = p.x.size[1], pieces = (tokens + kTokens - 1) / kTokens;
  const int64_t size = weight_size(p, a.across_heads), width = (1 + layer) * size, angle_room = GivenAngles::room(turn.rotated);
  // Each piece sums its own gradients of weight and bias; adding those in order makes the result independent of the threads.
  const Zeros partial(pieces, width);
  each_item(tokens, [&](int64_t begin, int64_t end) {
    const int64_t grads = heads * turn.d;
    Pieces scratch{Scratch::get(padded(angle_room) + padded(size) + padded(grads) + padded(2 * heads) + padded(width))};
    GivenAngles angles(a.tables, scratch.take(angle_room));
    float *weight = scratch.take(size), *g = scratch.take(grads), *means = scratch.take(2 * heads), *group = scratch.take(width);
    float* total = partial.data() + begin / kTokens * width;
    read_row(p.weight, size, 1, weight);
    memset(group, 0, width * sizeof(float));
    for (int64_t n = begin; n < end; ++n) {
      angles.seek(n);
      with_norm<layer>(a, n, weight, nullptr, [&](const auto& norm) {
        norm_rope_backward_token<T>(norm, turn, p, n, [&](int64_t h) { return angles.of(h); }, {g, means, group, group + size});
      });
      if ((n + 1 - begin) % kGroup == 0 || n + 1 == end) {
        add_row(total, group, width);
        memset(group, 0, width * sizeof(float));
      }
    }
    finish_streams();
  });
  store_sums(p.dweight, partial.data(), width, pieces);
  store_sums(a.dbias, partial.data() + size, width, pieces);
}

// Calls body(constant with the value `layer`, storage type's value, Rotation).
template <class Body>
void by_types(const NormRope& a, Body body) {
  dispatch(a.part.x.dtype, [&](auto t) {
    by_rotation(a.tables, a.part.x.size[2], [&](const auto& turn) {
      if (a.layer)
        body(Fixed<1>{}, t, turn);
      else
        body(Fixed<0>{}, t, turn);
    });
  });
}

}  // namespace

void apply_rope(const RopeTables& tables, const Tensor& x, const Tensor& out) {
  dispatch(x.dtype, [&](auto t) {
    by_rotation(tables, x.size[2], [&](const auto& turn) { rope_forward<decltype(t)>(tables, turn, x, out); });
  });
}

void norm_rope_forward(const NormRope& a) {
  by_types(a, [&](auto layer, auto t, const auto& turn) { forward<layer != 0, decltype(t)>(a, turn); });
}

void norm_rope_backward(const NormRope& a) {
  by_types(a, [&](auto layer, auto t, const auto& turn) { backward<layer != 0, decltype(t)>(a, turn); });
}

}  // namespace sora::SORA_TIER
