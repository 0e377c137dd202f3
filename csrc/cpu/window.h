// Windows in space and time: a panel of a box's tokens on the vector lanes, and the blocks of tokens that meet it.
//
// It serves both directions. A panel's tokens are queries that meet the keys which they see, or keys that meet the queries which
// see them. An item's panels are stacked along the outer and the middle axis of the grid. What they meet in their span is a box,
// which is walked along the outer axis.
//
// A block is some planes of that box. It is gathered once for all panels, row by row of the middle axis, so that what one panel
// meets of it is a run of its rows. A panel's columns are whole vectors of queries or keys. Only those take part that meet any of
// the block's planes.
#pragma once

#include "grid.h"
#include "stack.h"

namespace sora::SORA_TIER {

static_assert(kStackPanels == kOuterPanels * kMiddlePanels);

inline bool holds(Interval x, Interval y) { return x.begin <= y.begin && y.end <= x.end; }
inline Interval common(Interval x, Interval y) { return {larger(x.begin, y.begin), smaller(x.end, y.end)}; }

inline int64_t grid_token(const SpanGrid& grid, int32_t x, int32_t y, int32_t z) {
  return grid.begin + x * grid.axis[0].stride + y * grid.axis[1].stride + z * grid.axis[2].stride;
}

// Tokens of a box of a span's grid, in rows along the middle axis.
struct GridBlock {
  const SpanGrid& grid;
  const Box& box;
  int count;

  // body(i, n): token n of the sample is the block's i-th.
  template <class Body>
  void each_token(Body body) const {
    const auto [x, y, z] = box.axis;
    int i = 0;
    for (int32_t b = y.begin; b < y.end; ++b)
      for (int32_t a = x.begin; a < x.end; ++a)
        for (int32_t c = z.begin; c < z.end; ++c) body(i++, grid_token(grid, a, b, c));
  }

  // Their rows, one after the other.
  template <class T>
  StridedRows<T> rows(const Rows<const T>& x, int d, T* room) const {
    each_token([&](int i, int64_t n) { memcpy(room + int64_t{i} * d, x[n], d * sizeof(T)); });
    return {room, d};
  }
};

struct WindowPanel {
  Box meets;  // the box that holds all that any of them meets
  Box all;    // and that all of them meet; may be empty
  int count;

  void start(const SpanGrid& grid, const Box& box, bool keys) {
    count = 1;
    for (int a = 0; a < 3; ++a) {
      count *= length(box.axis[a]);
      meets.axis[a] = met_by(grid.axis[a], box.axis[a], keys);
      const Interval first = met_by(grid.axis[a], {box.axis[a].begin, box.axis[a].begin + 1}, keys),
                     last = met_by(grid.axis[a], {box.axis[a].end - 1, box.axis[a].end}, keys);
      all.axis[a] = common(first, last);
    }
    int i = 0;
    const auto [x, y, z] = box.axis;
    for (int32_t a = x.begin; a < x.end; ++a)
      for (int32_t b = y.begin; b < y.end; ++b)
        for (int32_t c = z.begin; c < z.end; ++c, ++i) {
          const int32_t index[3] = {a, b, c};
          token_[i] = grid_token(grid, a, b, c);
          for (int axis = 0; axis < 3; ++axis) {
            const Interval met = met_by(grid.axis[axis], {index[axis], index[axis] + 1}, keys);
            begin_[axis][i] = met.begin, length_[axis][i] = length(met);
          }
        }
    for (; i < kStackPanel; ++i)  // a panel's last columns do as its last token
      for (int axis = 0; axis < 3; ++axis) begin_[axis][i] = begin_[axis][count - 1], length_[axis][i] = length_[axis][count - 1];
  }

  int64_t token(int lane) const { return token_[lane]; }
  template <class T>
  StridedRows<T> rows(const Rows<const T>& x, int d, T* room) const {
    for (int c = 0; c < count; ++c) memcpy(room + int64_t{c} * d, x[token_[c]], d * sizeof(T));
    return {room, d};
  }

  Interval columns() const { return {0, (count + kPanelColumns - 1) / kPanelColumns * kPanelColumns}; }

  // The columns that meet any of x of the outer axis: neighbours, as lanes are in that axis' order.
  Interval columns(Interval x) const {
    Interval c = columns();
    const auto end = [&](int lane) { return begin_[0][lane] + length_[0][lane]; };
    while (c.begin < c.end && end(c.begin + kPanelColumns - 1) <= x.begin) c.begin += kPanelColumns;
    while (c.begin < c.end && begin_[0][c.end - kPanelColumns] >= x.end) c.end -= kPanelColumns;
    return c;
  }

  // Scores [num_tokens, kStackPanel] of these columns and the block's tokens from `first` on: those of pairs that do not meet
  // become -inf.
  void apply(float* scores, const Box& block, int first, int num_tokens, Interval columns) const {
    const int32_t width = length(block.axis[2]), planes = length(block.axis[0]);
    const bool whole_rows = holds(all.axis[2], block.axis[2]);
    for (int done = 0; done < num_tokens;) {
      const int32_t row = (first + done) / width, x = block.axis[0].begin + row % planes, y = block.axis[1].begin + row / planes,
                    z = block.axis[2].begin + (first + done) % width;
      const int run = smaller(block.axis[2].end - z, num_tokens - done);
      if (!(whole_rows && holds(all.axis[0], {x, x + 1}) && holds(all.axis[1], {y, y + 1})))
        for (int c = columns.begin; c < columns.end; c += W) {
          const vi row = meets_index(0, c, x) & meets_index(1, c, y);
          for (int i = 0; i < run; ++i) {
            float* p = scores + (done + i) * kStackPanel + c;
            store(p, (row & meets_index(2, c, z + i)) != 0 ? load(p) : vf{} - __builtin_inff());
          }
        }
      done += run;
    }
  }

 private:
  int64_t token_[kStackPanel];                              // on the lanes, in the order of the axes
  int32_t begin_[3][kStackPanel], length_[3][kStackPanel];  // what each lane meets

  SORA_INLINE vi meets_index(int axis, int c, int32_t x) const {
    vu begin, length;
    memcpy(&begin, begin_[axis] + c, sizeof begin), memcpy(&length, length_[axis] + c, sizeof length);
    return vu{} + static_cast<uint32_t>(x) - begin < length;
  }
};

// The panels of an item: see stack.h.
struct WindowStack {
  const SpanGrid& grid;
  int panels = 0;
  WindowPanel panel[kStackPanels];
  Box meets;  // the box that holds all that any panel meets

  WindowStack(const SpatiotemporalAttention& a, const WindowItem& item)
      : grid(a.grids[item.span]), meets(item.box), sample_size_(a.attention.samples[item.sample].k_size) {
    const auto [outer, middle, inner] = item.box.axis;
    for (int32_t x = outer.begin; x < outer.end; x += grid.edge[0])
      for (int32_t y = middle.begin; y < middle.end; y += grid.edge[1]) {
        const Box box{{{x, smaller(x + grid.edge[0], outer.end)}, {y, smaller(y + grid.edge[1], middle.end)}, inner}};
        panel[panels++].start(grid, box, item.keys);
      }
    for (int axis = 0; axis < 3; ++axis) meets.axis[axis] = met_by(grid.axis[axis], item.box.axis[axis], item.keys);
  }

  // Every token sees but itself.
  bool alone() const {
    return sample_size_ == grid.end - grid.begin && grid.axis[0].window * grid.axis[1].window * grid.axis[2].window == 1;
  }

  template <class T>
  static int gathered(int d) {
    return clamp((1 << 15) / d / kOperandStep * kOperandStep, kOperandStep, 512);
  }

  template <class Pack, class Add>
  void walk(int, Walk by, Pack pack, Add add) const {
    walk_others(0, grid.begin, by, pack, add);
    walk_others(grid.end, sample_size_, by, pack, add);
    const Interval x = meets.axis[0];
    for (int32_t begin = x.begin; begin < x.end; begin += grid.planes)
      walk_planes({begin, smaller(begin + grid.planes, x.end)}, by, pack, add);
  }

 private:
  const int64_t sample_size_;

  static Parts one_part(int first, int count) {
    Parts parts;
    parts.add({0, first, count});
    return parts;
  }

  // Tokens [begin, end) of other spans: all meet.
  template <class Pack, class Add>
  void walk_others(int64_t begin, int64_t end, Walk by, Pack pack, Add add) const {
    for (; begin < end; begin += by.gathered) {
      const TokenRun run{begin, at_most(end - begin, by.gathered)};
      pack(0, run);
      for (int i = 0; i < panels; ++i)
        for (int first = 0; first < run.count; first += by.at_once)
          add(i, one_part(first, smaller(by.at_once, run.count - first)), panel[i].columns(), [](float*) {});
    }
  }

  template <class Pack, class Add>
  void walk_planes(Interval x, Walk by, Pack pack, Add add) const {
    const Interval ys = meets.axis[1], zs = meets.axis[2];
    const int32_t width = smaller(length(zs), by.gathered / grid.planes), height = by.gathered / grid.planes / width;
    for (int32_t y = ys.begin; y < ys.end; y += height)
      for (int32_t z = zs.begin; z < zs.end; z += width) {
        const Box block{{x, {y, smaller(y + height, ys.end)}, {z, smaller(z + width, zs.end)}}};
        const int32_t row = length(x) * length(block.axis[2]);
        bool packed = false;
        for (int i = 0; i < panels; ++i) {
          const Interval columns = panel[i].columns(x), rows = common(block.axis[1], panel[i].meets.axis[1]);
          if (length(columns) <= 0 || length(rows) <= 0) continue;
          if (!packed) pack(0, GridBlock{grid, block, length(block.axis[1]) * row});
          packed = true;
          const int end = (rows.end - y) * row;
          for (int first = (rows.begin - y) * row / by.depth * by.depth; first < end; first += by.at_once) {
            const int count = smaller(by.at_once, end - first);
            add(i, one_part(first, count), columns, [&](float* scores) { panel[i].apply(scores, block, first, count, columns); });
          }
        }
      }
  }
};

}  // namespace sora::SORA_TIER
