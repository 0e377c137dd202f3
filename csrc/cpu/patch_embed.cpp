// Patches of videos [C, T, H, W] of any sizes <-> packed tokens, with or without the embedding's matrix product.
//
// patch_embed_3d gathers kRows patches into a small block and multiplies it by the weight. The weight becomes operands of kColumns
// columns once per call. No patch matrix is written to memory. The backward gathers the patches once, as dweight reads them for
// every column block, and scatters dvideos block by block.
//
// Work items are runs of kRows tokens of one video, or column blocks of the weight, so sums have a fixed order.
#include "multiplier.h"
#include "simd_stream.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kRows = 96;
constexpr int kColumns = 64;

struct PatchGrid {
  int64_t t, h, w, first;  // tokens along each axis; the video's first token
  int64_t tokens() const { return t * h * w; }
};

// The videos' grids and the list of runs of at most kRows tokens.
class Runs {
 public:
  struct Run {
    int64_t video, begin, count;  // tokens within the video
  };
  explicit Runs(const PatchEmbed& a) : grids_(a.num_videos), count_(make_grids(a)), runs_(count_) {
    int64_t at = 0;
    for (int64_t i = 0; i < a.num_videos; ++i)
      for (int64_t begin = 0; begin < grids_[i].tokens(); begin += kRows) {
        const int64_t rest = grids_[i].tokens() - begin;
        runs_[at++] = {i, begin, rest < kRows ? rest : kRows};
      }
  }

  const PatchGrid& grid(int64_t video) const { return grids_[video]; }
  const Run& operator[](int64_t i) const { return runs_[i]; }
  int64_t count() const { return count_; }

 private:
  // Makes the grids and returns how many runs there are.
  int64_t make_grids(const PatchEmbed& a) const {
    int64_t first = 0, runs = 0;
    for (int64_t i = 0; i < a.num_videos; ++i) {
      const Tensor& video = a.videos[i];
      grids_[i] = {video.size[1] / a.patch[0], video.size[2] / a.patch[1], video.size[3] / a.patch[2], first};
      first += grids_[i].tokens();
      runs += (grids_[i].tokens() + kRows - 1) / kRows;
    }
    return runs;
  }

  const Memory<PatchGrid> grids_;
  const int64_t count_;
  const Memory<Run> runs_;
};

// Calls body(row, width, c, i, j, line) for each stretch of a video's line that the patches of a run hold: of channel c, row (i, j)
// of the patches of `width` tokens from `row` on. Element l of token row + x is line[(x * patch + l) * video.stride[3]].
template <class T, class Body>
SORA_INLINE void each_line(const PatchEmbed& a, const Tensor& video, const PatchGrid& g, const Runs::Run& run, Body body) {
  const int64_t *stride = video.stride, channels = video.size[0];
  for (int64_t row = 0; row < run.count;) {
    const int64_t token = run.begin + row, w = token % g.w, h = token / g.w % g.h, t = token / g.w / g.h;
    const int64_t width = g.w - w < run.count - row ? g.w - w : run.count - row;
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < a.patch[0]; ++i)
        for (int j = 0; j < a.patch[1]; ++j)
          body(row, width, c, i, j,
               static_cast<T*>(video.data) + c * stride[0] + (t * a.patch[0] + i) * stride[1] + (h * a.patch[1] + j) * stride[2] +
                   w * a.patch[2] * stride[3]);
    row += width;
  }
}

// Where element l of token x of a line is: data[x * next + l * step].
template <class T>
struct Line {
  T* data;
  int64_t next, step;
};

// Copies `patch` elements of each of `width` tokens; a constant size spares most of the work there is.
template <int size, class T>
SORA_INLINE void copy_line(int64_t width, int patch, Line<T> to, Line<const T> from) {
  const int count = size > 0 ? size : patch;
  for (int64_t x = 0; x < width; ++x)
    for (int l = 0; l < count; ++l) to.data[x * to.next + l * to.step] = from.data[x * from.next + l * from.step];
}
template <class T>
void copy_line(int64_t width, int patch, Line<T> to, Line<const T> from) {
  if (patch == 1) return copy_line<1, T>(width, patch, to, from);
  if (patch == 2) return copy_line<2, T>(width, patch, to, from);
  copy_line<0, T>(width, patch, to, from);
}

// dst [run.count, ld] <- patches in the weight's order (C pt ph pw).
template <class T>
void gather(const PatchEmbed& a, const Tensor& video, const PatchGrid& g, const Runs::Run& run, T* dst, int64_t ld) {
  const int pt = a.patch[0], ph = a.patch[1], pw = a.patch[2];
  const int64_t step = video.stride[3];
  each_line<const T>(a, video, g, run, [=](int64_t row, int64_t width, int64_t c, int i, int j, const T* line) {
    copy_line<T>(width, pw, {dst + row * ld + ((c * pt + i) * ph + j) * pw, ld, 1}, {line, pw * step, step});
  });
}

struct Sizes {
  int64_t d, k;  // width of a token; elements of a patch
  explicit Sizes(const Tensor& weight) : d(weight.size[0]), k(weight.size[1] * weight.size[2] * weight.size[3] * weight.size[4]) {}
};

// The operand A = x [rows, k], contiguous. It is written to `room` unless x serves as it is.
template <class T>
typename Multiplier<T>::Left left_of(T* x, int rows, int k, float* room) {
  if constexpr (Multiplier<T>::kInPlace && sizeof(T) == sizeof(float))
    return {x, k};
  else
    return Multiplier<T>::left(x, k, rows, k, room);
}

// Where the product of patches and a column block of the weight goes: into tokens, with the bias.
template <class T>
struct ToTokens {
  T* tokens;
  int64_t stride;
  const float* bias;
  int columns;
  bool stream;
  SORA_INLINE ToTokens at(int i, int j) const { return {tokens + i * stride + j, stride, bias + j, columns - j, stream}; }
  SORA_INLINE void put(int i, int j, vf x) const {
    write_lanes(tokens + i * stride + j, x + load(bias + j), columns - j < W ? columns - j : W, stream);
  }
};

template <class T>
struct ForwardRoom {
  T* patches;
  float *left, *product;
  ForwardRoom(Pieces& pieces, int64_t k) {
    patches = reinterpret_cast<T*>(pieces.take(kRows * k));
    left = pieces.take(Multiplier<T>::left_size(kRows, k)), product = pieces.take(kRows * kColumns);
  }
};

template <class T>
void embed_forward(const PatchEmbed& a) {
  using M = Multiplier<T>;
  const Sizes size(a.weight);
  const Runs runs(a);
  const int d = static_cast<int>(size.d), k = static_cast<int>(size.k), blocks = (d + kColumns - 1) / kColumns;
  const T* weight = static_cast<const T*>(a.weight.data);
  const int64_t weight_size = M::right_size(k, kColumns);
  const Memory<float> weights(blocks, weight_size);  // column block b of the transposed weight, an operand [k, kColumns]
  const Memory<float> bias(blocks, kColumns);
  each_vector(d, [&](int64_t i, int lanes) {
    store(bias.data() + i, a.bias ? load_lanes(static_cast<const T*>(a.bias.data) + i, lanes) : vf{});
  });
  const auto columns_of = [=](int64_t b) { return static_cast<int>(d - b * kColumns < kColumns ? d - b * kColumns : kColumns); };
  parallel_for(blocks, [&](int64_t b) {
    M::right_transposed(weight + b * kColumns * k, k, columns_of(b), k, weights.data() + b * weight_size);
  });
  const bool stream = streams(a.tokens);
  parallel_for(runs.count(), [&](int64_t item) {
    const typename M::Session session;
    const Runs::Run& run = runs[item];
    const PatchGrid& g = runs.grid(run.video);
    const int rows = static_cast<int>(run.count);
    const auto room = on_scratch<ForwardRoom<T>>(k);
    gather<T>(a, a.videos[run.video], g, run, room.patches, k);
    const typename M::Left patches = left_of(room.patches, rows, k, room.left);
    for (int64_t b = 0; b < blocks; ++b) {
      const int columns = columns_of(b);
      const typename M::Right right = M::right_room(weights.data() + b * weight_size, k, columns);
      T* tokens = static_cast<T*>(a.tokens.data) + (g.first + run.begin) * d + b * kColumns;
      M::multiply_to(ToTokens<T>{tokens, d, bias.data() + b * kColumns, columns, stream}, rows, columns, k, patches, right,
                     room.product);
    }
    if (stream) finish_streams();
  });
}

// What the gradients read: patches as operands [k, kRows] of each run, the weight as one [d, k].
template <class T>
struct Operands {
  const int d, k;
  const int64_t patches_size;
  const Memory<float> patches, weight;
  Operands(const Sizes& size, int64_t runs, bool with_weight)
      : d(static_cast<int>(size.d)),
        k(static_cast<int>(size.k)),
        patches_size(Multiplier<T>::left_size(k, kRows)),
        patches(runs, patches_size),
        weight(with_weight ? Multiplier<T>::right_size(d, k) : 0) {}
};

template <class T>
struct WeightRoom {
  float *dtokens, *gradient, *bias;
  double *gradient_total, *bias_total;
  WeightRoom(Pieces& pieces, int k) {
    dtokens = pieces.take(Multiplier<T>::right_size(kRows, kColumns));
    gradient = pieces.take((k + 15) / 16 * 16 * kColumns), bias = pieces.take(kColumns);
    gradient_total = reinterpret_cast<double*>(pieces.take(int64_t{2} * k * kColumns));
    bias_total = reinterpret_cast<double*>(pieces.take(2 * kColumns));
  }
};

// Runs whose products are summed in float32 before they join the others in float64.
constexpr int64_t kGroup = 64;

// total += sum, both [length], and sum = 0.
SORA_INLINE void move_sum(double* total, float* sum, int64_t length) {
  for (int64_t i = 0; i < length; ++i) total[i] += sum[i], sum[i] = 0;
}

// dweight^T [k, kColumns] of a column block = sum over tokens of patch^T dtoken; dbias the column sums.
template <class T>
void weight_gradient(const PatchEmbed& a, const Operands<T>& operands, const Runs& runs, int64_t block) {
  using M = Multiplier<T>;
  const typename M::Session session;
  const int d = operands.d, k = operands.k, begin = static_cast<int>(block) * kColumns;
  const int columns = d - begin < kColumns ? d - begin : kColumns;
  const auto room = on_scratch<WeightRoom<T>>(k);
  memset(room.gradient, 0, k * kColumns * sizeof(float));
  memset(room.bias, 0, kColumns * sizeof(float));
  memset(room.gradient_total, 0, k * kColumns * sizeof(double));
  memset(room.bias_total, 0, kColumns * sizeof(double));
  for (int64_t i = 0; i < runs.count(); ++i) {
    const int rows = static_cast<int>(runs[i].count);
    const int64_t stride = a.dtokens.stride[0], first = runs.grid(runs[i].video).first + runs[i].begin;
    const T* from = static_cast<const T*>(a.dtokens.data) + first * stride + begin;
    for (int row = 0; row < rows; ++row)
      each_vector(columns, [&](int64_t c, int lanes) {
        store(room.bias + c, load(room.bias + c) + load_lanes(from + row * stride + c, lanes));
      });
    const typename M::Right dtokens = M::right(from, stride, rows, columns, room.dtokens);
    const typename M::Left patches = M::left_transposed_at(operands.patches.data() + i * operands.patches_size, k, rows);
    M::template multiply<Init::kAdd>(k, columns, rows, patches, dtokens, room.gradient, kColumns);
    move_sum(room.bias_total, room.bias, columns);
    if (i % kGroup == kGroup - 1 || i == runs.count() - 1) move_sum(room.gradient_total, room.gradient, k * kColumns);
  }
  T *dweight = static_cast<T*>(a.dweight.data), *dbias = static_cast<T*>(a.dbias.data);
  for (int n = 0; n < columns; ++n) {
    for (int i = 0; i < k; ++i)
      from_float(static_cast<float>(room.gradient_total[i * kColumns + n]), dweight[int64_t{begin + n} * k + i]);
    if (a.dbias) from_float(static_cast<float>(room.bias_total[n]), dbias[begin + n]);
  }
}

template <class T>
struct VideoRoom {
  float *dtokens, *dpatches;
  VideoRoom(Pieces& pieces, int d, int64_t width) {
    dtokens = pieces.take(Multiplier<T>::left_size(kRows, d)), dpatches = pieces.take(kRows * width);
  }
};

// dvideos of a run: (dtokens weight) scattered back.
template <class T>
void video_gradient(const PatchEmbed& a, const Operands<T>& operands, const Runs& runs, const Runs::Run& run) {
  using M = Multiplier<T>;
  const typename M::Session session;
  const int d = operands.d, k = operands.k, rows = static_cast<int>(run.count);
  const int64_t stride = a.dtokens.stride[0], width = padded(k);
  const PatchGrid& g = runs.grid(run.video);
  const auto room = on_scratch<VideoRoom<T>>(d, width);
  const T* from = static_cast<const T*>(a.dtokens.data) + (g.first + run.begin) * stride;
  const typename M::Left dtokens = M::left(from, stride, rows, d, room.dtokens);
  // The sum over d may be the longest of this op's, and one sum of it rounds more than plain PyTorch's.
  M::multiply_precisely(rows, k, d, dtokens, M::right_room(operands.weight.data(), d, k), room.dpatches, width);
  const int pt = a.patch[0], ph = a.patch[1], pw = a.patch[2];
  const float* dpatches = room.dpatches;
  const Tensor& video = a.dvideos[run.video];
  each_line<T>(a, video, g, run, [=, &video](int64_t row, int64_t tokens, int64_t c, int i, int j, T* line) {
    for (int64_t x = 0; x < tokens; ++x)
      for (int l = 0; l < pw; ++l)
        from_float(dpatches[(row + x) * width + ((c * pt + i) * ph + j) * pw + l], line[(x * pw + l) * video.stride[3]]);
  });
}

template <class T>
void embed_backward(const PatchEmbed& a) {
  using M = Multiplier<T>;
  const Runs runs(a);
  const Operands<T> operands(Sizes(a.weight), runs.count(), a.dvideos != nullptr);
  const int d = operands.d, k = operands.k;
  parallel_for(runs.count(), [&](int64_t i) {
    T* patches = reinterpret_cast<T*>(Scratch::get(kRows * k));
    gather<T>(a, a.videos[runs[i].video], runs.grid(runs[i].video), runs[i], patches, k);
    M::left_transposed(patches, k, static_cast<int>(runs[i].count), k, operands.patches.data() + i * operands.patches_size);
  });
  parallel_for((d + kColumns - 1) / kColumns, [&](int64_t block) { weight_gradient<T>(a, operands, runs, block); });
  if (a.dvideos == nullptr) return;
  M::right(static_cast<const T*>(a.weight.data), k, d, k, operands.weight.data());
  parallel_for(runs.count(), [&](int64_t i) { video_gradient<T>(a, operands, runs, runs[i]); });
}

// Copies between a video and its tokens [N, pt ph pw C]; both directions visit the same elements.
template <class T, bool to_tokens>
void rearrange(const PatchEmbed& a) {
  const Runs runs(a);
  const int ph = a.patch[1], pw = a.patch[2];
  parallel_for(runs.count(), [&](int64_t item) {
    const Runs::Run& run = runs[item];
    const Tensor& video = a.videos[run.video];
    const PatchGrid& g = runs.grid(run.video);
    const int64_t channels = video.size[0], stride = a.tokens.stride[0];
    T* tokens = static_cast<T*>(a.tokens.data) + (g.first + run.begin) * stride;
    each_line<T>(a, video, g, run, [=, &video](int64_t row, int64_t width, int64_t c, int i, int j, T* line) {
      const Line<T> token{tokens + row * stride + (i * ph + j) * pw * channels + c, stride, channels},
          element{line, pw * video.stride[3], video.stride[3]};
      const auto read = [](const Line<T>& from) { return Line<const T>{from.data, from.next, from.step}; };
      if constexpr (to_tokens)
        copy_line<T>(width, pw, token, read(element));
      else
        copy_line<T>(width, pw, element, read(token));
    });
  });
}

}  // namespace

void patch_embed_3d_forward(const PatchEmbed& a) {
  dispatch(a.weight.dtype, [&](auto t) { embed_forward<decltype(t)>(a); });
}

void patch_embed_3d_backward(const PatchEmbed& a) {
  dispatch(a.weight.dtype, [&](auto t) { embed_backward<decltype(t)>(a); });
}

void patchify_3d(const PatchEmbed& a) {
  dispatch(a.tokens.dtype, [&](auto t) { rearrange<decltype(t), true>(a); });
}

void unpatchify_3d(const PatchEmbed& a) {
  dispatch(a.tokens.dtype, [&](auto t) { rearrange<decltype(t), false>(a); });
}

}  // namespace sora::SORA_TIER
