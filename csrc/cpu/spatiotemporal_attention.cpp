// Attention through windows in space and time, forward: of the spans that do not see all of their samples; the others are
// attention.cpp's.
//
// An item is a stack of panels of queries of one head; window.h says which keys it meets in which order. What a query sees does not
// depend on its item or on what its sample is packed with, and nor does the order in which it is summed.
#include "softmax.h"
#include "window.h"

namespace sora::SORA_TIER {
namespace {

static_assert(kPanel == kWindowPanel);

// A thread's memory for an item.
template <class T>
struct Room {
  using M = Multiplier<T>;
  T* rows;
  float *k, *v;
  ScoreRoom<M> block;
  QueryPanel<M> panel[kWindowPanels];

  Room(Pieces& pieces, int d, int panels)
      : rows(reinterpret_cast<T*>(pieces.take(gathered_size(d)))),
        k(pieces.take(M::left_size(gathered(d), d))),
        v(pieces.take(M::left_size(d, gathered(d)))),
        block(pieces) {
    for (int i = 0; i < panels; ++i) panel[i].take_room(pieces, d);
  }
};

template <class T>
void forward(const SpatiotemporalAttention& w, const WindowItem& item) {
  using M = Multiplier<T>;
  const typename M::Session session;
  const Attention& a = w.attention;
  const Sample& s = a.samples[item.sample];
  const int d = head_dim(a.q), head_k = item.head / (heads(a.q) / heads(a.k));
  const ScoreTerms terms(a, s, item.head);
  const WindowStack stack(w, item);
  Room<T> room(on_scratch<Room<T>>(d, stack.panels));

  const Rows<const T> q(a.q, 0, s.q_start, item.head);
  for (int i = 0; i < stack.panels; ++i) {
    stack.panel[i].gather(q, d, room.rows);
    room.panel[i].start(room.rows, d, stack.panel[i].count, d);
  }

  const Rows<const T> k(a.k, 0, s.k_start, head_k), v(a.v, 0, s.k_start, head_k);
  typename M::Left k_block, v_block;
  const auto pack = [&](const SpanGrid& grid, const Box& box, int count) {
    gather(k, grid, box, d, room.rows);
    k_block = M::left(room.rows, d, count, d, room.k);
    gather(v, grid, box, d, room.rows);
    v_block = M::left_transposed(room.rows, d, count, d, room.v);
  };
  const auto add = [&](int i, int first, int count, Interval columns, auto mask) {
    room.panel[i].add(columns.begin, columns.end, count, d, M::from_row(k_block, first), M::from_depth(v_block, first),
                      terms.log2_scale, room.block, [&](float* scores) {
                        if (terms.any) terms.apply(scores, kPanel, 0, columns.end, 0, count, nullptr);
                        mask(scores);
                      });
  };
  stack.walk(s.k_size, gathered(d), kKeyBlock, M::kDepth, pack, add);

  const Rows<T> out(a.out, 0, s.q_start, item.head);
  float *maximum = query_row(a.maximum, s, item.head), *sum = query_row(a.sum, s, item.head);
  for (int i = 0; i < stack.panels; ++i) {
    const int64_t* token = stack.panel[i].token;
    room.panel[i].finish(
        stack.panel[i].count, d, room.block, [&](int c) { return out[token[c]]; },
        [&](int c, float m, float l) { maximum[token[c]] = m, sum[token[c]] = l; });
  }
}

}  // namespace

void spatiotemporal_attention_forward(const SpatiotemporalAttention& w) {
  dispatch(w.attention.q.dtype,
           [&](auto t) { parallel_for(w.num_items, [&](int64_t i) { forward<decltype(t)>(w, w.items[i]); }); });
}

}  // namespace sora::SORA_TIER
