// Attention over packed samples, forward and backward.
//
// Everything is computed transposed: scores S^T [keys, queries] = K Q^T with queries on the vector lanes. So softmax runs down the
// lanes with no horizontal step, K and V enter the products as they lie in memory, and a head dim needs no padding to the vector
// width.
//
//   forward    an item is up to kQueryBlock queries of one head. For each block of kKeyBlock keys: widen K and V to float32 once,
//              then for each panel of kPanel queries S^T = K Q^T; P = exp(S - m); O^T = O^T * exp(m_old - m) + V^T P.
//   backward   an item is one key head of a sample, with all its query heads. For each kKeySuper keys: for each panel of queries
//              recompute P; dP^T = V dO^T; dS = P (dP - delta); dV += P dO; dK += dS Q; dQ^T += K^T dS. Nothing is shared between
//              items, so there are no atomics and the sums have a fixed order.
//
// Q carries the softmax scale. Blocks count from a sample's first token, so a sample's result does not
// depend on what it is packed with. Memory is per thread; the backward's grows with the sample's queries (dQ in float32).
#include "gemm.h"
#include "mask.h"
#include "parallel.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kPanel = 64;
constexpr int kKeyBlock = 64;
constexpr int kKeySuper = 512;

// Rows of one head of one sample: token n is at data + n * stride.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  Rows(const Tensor& x, int64_t batch, int64_t start, int64_t head) {
    const bool dense = x.ndim == 4;
    stride = x.stride[dense ? 1 : 0];
    data = static_cast<T*>(x.data) + (dense ? batch * x.stride[0] : 0) + start * stride + head * x.stride[dense ? 2 : 1];
  }
  T* operator[](int64_t n) const { return data + n * stride; }
};

// lse is [B, H, S] dense, [H, N] packed.
double* lse_row(const Tensor& lse, const Sample& s, int64_t head) {
  double* data = static_cast<double*>(lse.data);
  return lse.ndim == 3 ? data + s.q_batch * lse.stride[0] + head * lse.stride[1] : data + head * lse.stride[0] + s.q_start;
}

int heads(const Tensor& x) { return static_cast<int>(x.size[x.ndim - 2]); }

// dst [count, width] <- rows of storage type, widened; columns from d to width (whole vectors) become zero.
template <class T>
void widen_rows(Rows<T> rows, int64_t begin, int64_t count, int d, int width, float factor, float* dst) {
  for (int64_t n = 0; n < count; ++n, dst += width) {
    const T* row = rows[begin + n];
    each_vector(d, [&](int64_t i, int lanes) {
      vf x = load_lanes(row + i, lanes) * factor;
      if (width % W == 0)
        store(dst + i, x);
      else
        store_lanes(dst + i, x, lanes);
    });
  }
}

// dst [d, kPanel] <- transposed rows begin..begin+count (count <= kPanel); columns past count are zero up to a whole vector.
template <class T>
void widen_transposed(Rows<T> rows, int64_t begin, int count, int d, float factor, float* dst) {
  for (int q = 0; q < count; q += W)
    each_vector(d, [&](int64_t i, int lanes) {
      vf block[W];
      for (int j = 0; j < W; ++j) block[j] = q + j < count ? load_lanes(rows[begin + q + j] + i, lanes) * factor : vf{};
      transpose(block);
      for (int j = 0; j < lanes; ++j) store(dst + (i + j) * kPanel + q, block[j]);
    });
}

// rows begin..begin+count <- src [d, kPanel] transposed, column q times factor[q].
template <class T>
void narrow_transposed(const float* src, const float* factor, Rows<T> rows, int64_t begin, int count, int d) {
  for (int q = 0; q < count; q += W) {
    const vf f = load(factor + q);
    each_vector(d, [&](int64_t i, int lanes) {
      vf block[W];
      for (int j = 0; j < W; ++j) block[j] = j < lanes ? load(src + (i + j) * kPanel + q) * f : vf{};
      transpose(block);
      for (int j = 0; j < W && q + j < count; ++j) store_lanes(rows[begin + q + j] + i, block[j], lanes);
    });
  }
}

// What turns raw products into scores beyond the mask: soft cap, additive mask and ALiBi, for one head of one sample.
struct ScoreTerms {
  float cap;  // 0: none
  const float* bias;
  int64_t bias_q, bias_k;
  float slope;
  int64_t diagonal;  // Sk - S

  ScoreTerms(const Attention& a, const Sample& s, int head)
      : cap(a.softcap), bias(nullptr), slope(0), diagonal(s.k_size - s.q_size) {
    if (a.bias) {
      bias = static_cast<const float*>(a.bias.data) + s.q_batch * a.bias.stride[0] + head * a.bias.stride[1];
      bias_q = a.bias.stride[2], bias_k = a.bias.stride[3];
    }
    if (a.alibi) {
      const int64_t b = &s - a.samples;
      slope = static_cast<const float*>(a.alibi.data)[b * a.alibi.stride[0] + head * a.alibi.stride[1]];
    }
  }
  bool any() const { return cap > 0 || bias != nullptr || slope != 0; }

  // s [num_keys, kPanel] in place; `slopes` (or null) receives d capped / d raw.
  void apply(float* s, int64_t q_begin, int num_queries, int64_t k_begin, int num_keys, float* slopes) const {
    for (int j = 0; j < num_keys; ++j)
      for (int c = 0; c < num_queries; c += W) {
        float* p = s + j * kPanel + c;
        vf x = load(p);
        if (cap > 0) {
          vf t = tanh(x * (1 / cap));
          x = t * cap;
          if (slopes != nullptr) store(slopes + j * kPanel + c, 1.0f - t * t);
        }
        if (bias != nullptr) {
          vf b = {};
          for (int i = 0; i < W && c + i < num_queries; ++i) b[i] = bias[(q_begin + c + i) * bias_q + (k_begin + j) * bias_k];
          x += b;
        }
        if (slope != 0) {
          vf distance = __builtin_convertvector(lanes() + static_cast<int32_t>(q_begin + c + diagonal - k_begin - j), vf);
          x -= bits<vf>(bits<vu>(distance) & 0x7fffffff) * slope;
        }
        store(p, x);
      }
  }
};

// One block of keys into the running softmax of a panel: m and l are updated, s becomes P, correction the factor for O.
template <int NV>
void online_softmax(float* s, int num_keys, float* m, float* l, float* correction) {
  vf highest[NV], total[NV];
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) highest[c] = load(m + c * W);
  for (int j = 0; j < num_keys; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) highest[c] = max(highest[c], load(s + j * kPanel + c * W));
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) {
    vf before = load(m + c * W);
    store(m + c * W, highest[c]);
    highest[c] = highest[c] == -__builtin_inff() ? vf{} : highest[c];  // nothing seen yet: exp(-inf - 0) is 0, not NaN
    vf factor = exp(before - highest[c]);
    store(correction + c * W, factor);
    total[c] = load(l + c * W) * factor;
  }
  for (int j = 0; j < num_keys; ++j)
#pragma GCC unroll 4
    for (int c = 0; c < NV; ++c) {
      vf p = exp(load(s + j * kPanel + c * W) - highest[c]);
      store(s + j * kPanel + c * W, p);
      total[c] += p;
    }
#pragma GCC unroll 4
  for (int c = 0; c < NV; ++c) store(l + c * W, total[c]);
}

template <int NV = kTileVectors>
void online_softmax_columns(int columns, float* s, int num_keys, float* m, float* l, float* correction) {
  for (; columns > (NV - 1) * W; columns -= NV * W, s += NV * W, m += NV * W, l += NV * W, correction += NV * W)
    online_softmax<NV>(s, num_keys, m, l, correction);
  if constexpr (NV > 1)
    if (columns > 0) online_softmax_columns<NV - 1>(columns, s, num_keys, m, l, correction);
}

template <class T, class Mask>
void forward_item(const Attention& a, const AttentionItem& item) {
  const Sample& s = a.samples[item.sample];
  const int d = static_cast<int>(a.q.size[a.q.ndim - 1]);
  const int head_k = item.head / (heads(a.q) / heads(a.k));
  const Rows<const T> q(a.q, s.q_batch, s.q_start, item.head), k(a.k, s.k_batch, s.k_start, head_k),
      v(a.v, s.k_batch, s.k_start, head_k);
  const Rows<T> out(a.out, s.q_batch, s.q_start, item.head);
  double* lse = lse_row(a.lse, s, item.head);
  const ScoreTerms terms(a, s, item.head);
  const bool has_terms = terms.any();

  const int panels = static_cast<int>((item.q_end - item.q_begin + kPanel - 1) / kPanel);
  const int64_t tile = static_cast<int64_t>(d) * kPanel;
  Pieces pieces{Scratch::get(2 * panels * padded(tile) + 2 * padded(kKeyBlock * d) + kPanel * (kKeyBlock + 2 * panels + 1))};
  float *k_block = pieces.take(kKeyBlock * d), *v_block = pieces.take(kKeyBlock * d), *scores = pieces.take(kKeyBlock * kPanel);
  float* correction = pieces.take(kPanel);
  struct Panel {
    int64_t begin;
    int count;
    float *q, *out, *m, *l;
    bool seen;
    Mask mask;
  } panel[kQueryBlock / kPanel];
  int64_t k_begin = s.k_size, k_end = 0;
  for (int i = 0; i < panels; ++i) {
    Panel& p = panel[i];
    p.begin = item.q_begin + i * kPanel;
    p.count = static_cast<int>(item.q_end - p.begin < kPanel ? item.q_end - p.begin : kPanel);
    p.q = pieces.take(tile), p.out = pieces.take(tile), p.m = pieces.take(kPanel), p.l = pieces.take(kPanel);
    p.seen = false;
    for (int c = 0; c < kPanel; ++c) p.m[c] = -__builtin_inff(), p.l[c] = 0;
    widen_transposed(q, p.begin, p.count, d, a.scale, p.q);
    p.mask.start(a, s, p.begin, p.count);
    k_begin = p.mask.k_begin < k_begin ? p.mask.k_begin : k_begin;
    k_end = p.mask.k_end > k_end ? p.mask.k_end : k_end;
  }
  for (int64_t block = k_begin / kKeyBlock * kKeyBlock; block < k_end; block += kKeyBlock) {
    const int num_keys = static_cast<int>(s.k_size - block < kKeyBlock ? s.k_size - block : kKeyBlock);
    bool widened = false;
    for (int i = 0; i < panels; ++i) {
      Panel& p = panel[i];
      const Visible visible = p.mask.visible(block, num_keys);
      if (visible == Visible::kNone) continue;
      if (!widened) {
        widen_rows(k, block, num_keys, d, d, 1.0f, k_block);
        widen_rows(v, block, num_keys, d, d, 1.0f, v_block);
        widened = true;
      }
      gemm<Init::kZero>(num_keys, p.count, d, {k_block, d}, p.q, kPanel, scores, kPanel);
      if (has_terms) terms.apply(scores, p.begin, p.count, block, num_keys, nullptr);
      if (visible == Visible::kSome) p.mask.apply(scores, kPanel, block, num_keys);
      online_softmax_columns(p.count, scores, num_keys, p.m, p.l, correction);
      if (p.seen)
        gemm<Init::kScale>(d, p.count, num_keys, {v_block, 1, d}, scores, kPanel, p.out, kPanel, correction);
      else
        gemm<Init::kZero>(d, p.count, num_keys, {v_block, 1, d}, scores, kPanel, p.out, kPanel);
      p.seen = true;
    }
  }
  for (int i = 0; i < panels; ++i) {
    Panel& p = panel[i];
    if (!p.seen) memset(p.out, 0, tile * sizeof(float));
    for (int c = 0; c < p.count; ++c) {
      lse[p.begin + c] = p.m[c] + __builtin_log(p.l[c]);  // -inf if nothing was seen
      correction[c] = p.l[c] == 0 ? 0 : 1 / p.l[c];
    }
    narrow_transposed(p.out, correction, out, p.begin, p.count, d);
  }
}

// What the backward needs to know of each query of a panel. lse is in two floats, as the rounding of one would scale the whole row,
// and +inf where a query sees nothing; delta = dO . O is summed in float64, as it is subtracted from numbers close to it.
struct PanelStatistics {
  float lse[kPanel], lse_rest[kPanel], delta[kPanel], dlse[kPanel];
};

template <class T>
void row_statistics(const Attention& a, const Sample& s, int head, int64_t begin, int count, float* out_t, float* dout_t,
                    PanelStatistics& to) {
  const int d = static_cast<int>(a.q.size[a.q.ndim - 1]);
  widen_transposed(Rows<const T>(a.out, s.q_batch, s.q_start, head), begin, count, d, 1.0f, out_t);
  widen_transposed(Rows<const T>(a.dout, s.q_batch, s.q_start, head), begin, count, d, 1.0f, dout_t);
  for (int c = 0; c < count; c += W) {
    Total sum;
    for (int i = 0; i < d; ++i) sum.add_product(load(out_t + i * kPanel + c), load(dout_t + i * kPanel + c));
    store(to.delta + c, sum.value());
  }
  const double* lse = lse_row(a.lse, s, head) + begin;
  const double* dlse = a.dlse ? lse_row(a.dlse, s, head) + begin : nullptr;
  for (int c = 0; c < kPanel; ++c) {
    const bool seen = c < count && lse[c] != -__builtin_inf();
    to.lse[c] = seen ? static_cast<float>(lse[c]) : __builtin_inff();
    to.lse_rest[c] = seen ? static_cast<float>(lse[c] - to.lse[c]) : 0;
    to.delta[c] = seen ? to.delta[c] : 0;
    to.dlse[c] = seen && dlse ? static_cast<float>(dlse[c]) : 0;
  }
}

// Scores -> P and dP -> dS = P (dP - delta + dlse), both [num_keys, kPanel], in place. Where the block is all that the panel sees,
// delta is taken as sum_j P dP, from the very numbers it is subtracted from: a query with a single key gets exactly 0.
void score_gradients(float* p, float* ds, const float* slopes, int num_keys, int count, const PanelStatistics& row, bool whole) {
  for (int c = 0; c < count; c += W) {
    const vf lse = load(row.lse + c), rest = load(row.lse_rest + c), dlse = load(row.dlse + c);
    vf delta = whole ? vf{} : load(row.delta + c);
    if (whole)
      for (int at = c; at < num_keys * kPanel; at += kPanel) delta += exp(load(p + at) - lse - rest) * load(ds + at);
    for (int at = c; at < num_keys * kPanel; at += kPanel) {
      const vf probability = exp(load(p + at) - lse - rest);
      vf gradient = probability * (load(ds + at) - delta + dlse);
      if (slopes != nullptr) gradient *= load(slopes + at);
      store(p + at, probability);
      store(ds + at, gradient);
    }
  }
}

template <class T, class Mask>
void backward_item(const Attention& a, const AttentionItem& item) {
  const Sample& s = a.samples[item.sample];
  const int d = static_cast<int>(a.q.size[a.q.ndim - 1]), width = (d + W - 1) / W * W;
  const int group = heads(a.q) / heads(a.k);
  const Rows<const T> k(a.k, s.k_batch, s.k_start, item.head), v(a.v, s.k_batch, s.k_start, item.head);
  const Rows<T> dk(a.dk, s.k_batch, s.k_start, item.head), dv(a.dv, s.k_batch, s.k_start, item.head);

  const int panels = static_cast<int>((s.q_size + kPanel - 1) / kPanel);
  const int64_t tile = static_cast<int64_t>(d) * kPanel, rows = static_cast<int64_t>(width) * kPanel;
  const int64_t super_size = s.k_size < kKeySuper ? s.k_size : kKeySuper;
  Pieces pieces{Scratch::get(group * panels * (padded(tile) + 4 * kPanel) + 2 * padded(super_size * d) +
                             2 * padded(super_size * width) + 2 * padded(tile) + 2 * rows + 3 * kKeyBlock * kPanel + kPanel)};
  float* dq_all = pieces.take(group * panels * padded(tile));
  auto* statistics = reinterpret_cast<PanelStatistics*>(pieces.take(group * panels * 4 * kPanel));
  float *k_rows = pieces.take(super_size * d), *v_rows = pieces.take(super_size * d);
  float *dk_rows = pieces.take(super_size * width), *dv_rows = pieces.take(super_size * width);
  float *q_t = pieces.take(tile), *dout_t = pieces.take(tile), *q_rows = pieces.take(rows), *dout_rows = pieces.take(rows);
  float *p = pieces.take(kKeyBlock * kPanel), *ds = pieces.take(kKeyBlock * kPanel), *slopes = pieces.take(kKeyBlock * kPanel);
  float* scale_columns = pieces.take(kPanel);
  memset(dq_all, 0, group * panels * padded(tile) * sizeof(float));

  for (int g = 0; g < group; ++g)
    for (int i = 0; i < panels; ++i) {
      const int64_t begin = static_cast<int64_t>(i) * kPanel;
      const int count = static_cast<int>(s.q_size - begin < kPanel ? s.q_size - begin : kPanel);
      row_statistics<T>(a, s, item.head * group + g, begin, count, q_t, dout_t, statistics[g * panels + i]);
    }

  for (int64_t super = 0; super < s.k_size; super += kKeySuper) {
    const int64_t super_end = super + kKeySuper < s.k_size ? super + kKeySuper : s.k_size;
    widen_rows(k, super, super_end - super, d, d, 1.0f, k_rows);
    widen_rows(v, super, super_end - super, d, d, 1.0f, v_rows);
    memset(dk_rows, 0, (super_end - super) * width * sizeof(float));
    memset(dv_rows, 0, (super_end - super) * width * sizeof(float));
    for (int g = 0; g < group; ++g) {
      const int head = item.head * group + g;
      const Rows<const T> q(a.q, s.q_batch, s.q_start, head), dout(a.dout, s.q_batch, s.q_start, head);
      const ScoreTerms terms(a, s, head);
      for (int i = 0; i < panels; ++i) {
        const int64_t begin = static_cast<int64_t>(i) * kPanel;
        const int count = static_cast<int>(s.q_size - begin < kPanel ? s.q_size - begin : kPanel);
        Mask mask;
        mask.start(a, s, begin, count);
        if (mask.k_end <= super || mask.k_begin >= super_end) continue;
        widen_transposed(q, begin, count, d, a.scale, q_t);
        widen_transposed(dout, begin, count, d, 1.0f, dout_t);
        widen_rows(q, begin, count, d, width, a.scale, q_rows);
        widen_rows(dout, begin, count, d, width, 1.0f, dout_rows);
        float* dq_t = dq_all + (g * panels + i) * padded(tile);
        const bool whole = mask.k_begin / kKeyBlock == (mask.k_end - 1) / kKeyBlock;
        for (int64_t block = super; block < super_end; block += kKeyBlock) {
          const int num_keys = static_cast<int>(super_end - block < kKeyBlock ? super_end - block : kKeyBlock);
          const Visible visible = mask.visible(block, num_keys);
          if (visible == Visible::kNone) continue;
          const float *k_block = k_rows + (block - super) * d, *v_block = v_rows + (block - super) * d;
          gemm<Init::kZero>(num_keys, count, d, {k_block, d}, q_t, kPanel, p, kPanel);
          if (terms.any()) terms.apply(p, begin, count, block, num_keys, slopes);
          if (visible == Visible::kSome) mask.apply(p, kPanel, block, num_keys);
          // In two halves: dP - delta cancels, so rounding in a long chain of additions would show.
          const int half = d / 2;
          gemm<Init::kZero>(num_keys, count, half, {v_block, d}, dout_t, kPanel, ds, kPanel);
          gemm<Init::kAdd>(num_keys, count, d - half, {v_block + half, d}, dout_t + half * kPanel, kPanel, ds, kPanel);
          score_gradients(p, ds, terms.cap > 0 ? slopes : nullptr, num_keys, count, statistics[g * panels + i], whole);
          gemm<Init::kAdd>(num_keys, d, count, {p, kPanel}, dout_rows, width, dv_rows + (block - super) * width, width);
          gemm<Init::kAdd>(num_keys, d, count, {ds, kPanel}, q_rows, width, dk_rows + (block - super) * width, width);
          gemm<Init::kAdd>(d, count, num_keys, {k_block, 1, d}, ds, kPanel, dq_t, kPanel);
        }
      }
    }
    for (int64_t n = super; n < super_end; ++n)
      each_vector(d, [&](int64_t i, int lanes) {
        store_lanes(dk[n] + i, load(dk_rows + (n - super) * width + i), lanes);
        store_lanes(dv[n] + i, load(dv_rows + (n - super) * width + i), lanes);
      });
  }
  for (int c = 0; c < kPanel; ++c) scale_columns[c] = a.scale;
  for (int g = 0; g < group; ++g) {
    const Rows<T> dq(a.dq, s.q_batch, s.q_start, item.head * group + g);
    for (int i = 0; i < panels; ++i) {
      const int64_t begin = static_cast<int64_t>(i) * kPanel;
      const int count = static_cast<int>(s.q_size - begin < kPanel ? s.q_size - begin : kPanel);
      narrow_transposed(dq_all + (g * panels + i) * padded(tile), scale_columns, dq, begin, count, d);
    }
  }
}

// Zeroes the rows of a packed tensor [N, H, d] past the last boundary.
template <class T>
void zero_slack(const Tensor& x, int64_t used) {
  if (x.ndim == 4) return;
  for (int64_t n = used; n < x.size[0]; ++n)
    for (int64_t h = 0; h < x.size[1]; ++h) memset(Rows<T>(x, 0, n, h).data, 0, x.size[2] * sizeof(T));
}

template <class T, class Mask>
void forward(const Attention& a) {
  parallel_for(a.num_items, [&](int64_t i) { forward_item<T, Mask>(a, a.items[i]); });
  zero_slack<T>(a.out, a.q_used);
  if (a.lse.ndim == 2)
    for (int64_t h = 0; h < a.lse.size[0]; ++h)
      for (int64_t n = a.q_used; n < a.lse.size[1]; ++n)
        static_cast<double*>(a.lse.data)[h * a.lse.stride[0] + n] = -__builtin_inf();
}

template <class T, class Mask>
void backward(const Attention& a) {
  parallel_for(a.num_items, [&](int64_t i) { backward_item<T, Mask>(a, a.items[i]); });
  zero_slack<T>(a.dq, a.q_used);
  zero_slack<T>(a.dk, a.k_used);
  zero_slack<T>(a.dv, a.k_used);
}

}  // namespace

void attention_forward(const Attention& a) {
  dispatch(a.q.dtype, [&](auto t) { a.windowed ? forward<decltype(t), GridMask>(a) : forward<decltype(t), BandMask>(a); });
}

void attention_backward(const Attention& a) {
  dispatch(a.q.dtype, [&](auto t) { a.windowed ? backward<decltype(t), GridMask>(a) : backward<decltype(t), BandMask>(a); });
}

}  // namespace sora::SORA_TIER
