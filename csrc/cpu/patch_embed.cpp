// Patches of videos [C, T, H, W] of any sizes <-> packed tokens, with or without the embedding's matrix product.
//
// patch_embed_3d gathers kRows patches into an L1-sized block in float32 and multiplies it by the weight, which is transposed once
// per call into column blocks of kColumns; the Conv3d it replaces is never built and no patch matrix is written to memory. The
// backward gathers the patches once (dweight reads them for every column block) and scatters dvideos tile by tile.
//
// Work items are runs of kRows tokens of one video, or column blocks of the weight, so sums have a fixed order.
#include "gemm.h"
#include "parallel.h"

namespace sora::SORA_TIER {
namespace {

constexpr int kRows = 48;
constexpr int kColumns = 64;

struct Grid {
  int64_t t, h, w, first;  // tokens along each axis; the video's first token
  int64_t tokens() const { return t * h * w; }
};

// The videos' grids and the list of runs of at most kRows tokens.
class Runs {
 public:
  struct Run {
    int64_t video, begin, count;  // tokens within the video
  };
  Runs(const PatchEmbed& a, const Tensor* videos) {
    grids_ = static_cast<Grid*>(malloc((a.num_videos + 1) * sizeof(Grid)));
    int64_t first = 0;
    for (int64_t i = 0; i < a.num_videos; ++i) {
      Grid& g = grids_[i];
      g = {videos[i].size[1] / a.patch[0], videos[i].size[2] / a.patch[1], videos[i].size[3] / a.patch[2], first};
      first += g.tokens();
      count += (g.tokens() + kRows - 1) / kRows;
    }
    num_tokens = first;
    runs_ = static_cast<Run*>(malloc((count + 1) * sizeof(Run)));
    if (grids_ == nullptr || runs_ == nullptr) abort();
    Run* run = runs_;
    for (int64_t i = 0; i < a.num_videos; ++i)
      for (int64_t begin = 0; begin < grids_[i].tokens(); begin += kRows) {
        const int64_t rest = grids_[i].tokens() - begin;
        *run++ = {i, begin, rest < kRows ? rest : kRows};
      }
  }
  Runs(const Runs&) = delete;
  ~Runs() { free(grids_), free(runs_); }

  const Grid& grid(int64_t video) const { return grids_[video]; }
  const Run& operator[](int64_t i) const { return runs_[i]; }
  int64_t count = 0, num_tokens = 0;

 private:
  Grid* grids_;
  Run* runs_;
};

// Visits every element of the patches of a run: body(row, c, i, j, l, element of the video), l the column within the patch. For
// each line of the video it walks along, elements come in memory order.
template <class T, class Body>
SORA_INLINE void each_element(const PatchEmbed& a, const Tensor& video, const Grid& g, const Runs::Run& run, Body body) {
  const int64_t *stride = video.stride, channels = video.size[0];
  for (int64_t row = 0; row < run.count;) {
    const int64_t token = run.begin + row, w = token % g.w, h = token / g.w % g.h, t = token / g.w / g.h;
    const int64_t width = g.w - w < run.count - row ? g.w - w : run.count - row;  // tokens on this line of the grid
    for (int64_t c = 0; c < channels; ++c)
      for (int i = 0; i < a.patch[0]; ++i)
        for (int j = 0; j < a.patch[1]; ++j) {
          T* line = static_cast<T*>(video.data) + c * stride[0] + (t * a.patch[0] + i) * stride[1] +
                    (h * a.patch[1] + j) * stride[2] + w * a.patch[2] * stride[3];
          for (int64_t x = 0; x < width; ++x)
            for (int l = 0; l < a.patch[2]; ++l) body(row + x, c, i, j, l, line[(x * a.patch[2] + l) * stride[3]]);
        }
    row += width;
  }
}

// dst [run.count, ld] <- patches in the weight's order (C pt ph pw), widened.
template <class T>
void gather(const PatchEmbed& a, const Tensor& video, const Grid& g, const Runs::Run& run, float* dst, int64_t ld) {
  const int pt = a.patch[0], ph = a.patch[1], pw = a.patch[2];
  each_element<const T>(a, video, g, run, [=](int64_t row, int64_t c, int i, int j, int l, const T& x) {
    dst[row * ld + ((c * pt + i) * ph + j) * pw + l] = to_float(x);
  });
}

struct Sizes {
  int64_t d, k;  // width of a token; elements of a patch
  explicit Sizes(const Tensor& weight) : d(weight.size[0]), k(weight.size[1] * weight.size[2] * weight.size[3] * weight.size[4]) {}
};

template <class T>
void embed_forward(const PatchEmbed& a) {
  const Sizes size(a.weight);
  const Runs runs(a, a.videos);
  const int64_t d = size.d, k = size.k, blocks = (d + kColumns - 1) / kColumns;
  const T *weight = static_cast<const T*>(a.weight.data), *bias = static_cast<const T*>(a.bias.data);
  // Column block b of the transposed weight: [k, kColumns], contiguous; columns past d are zero.
  float* panels = static_cast<float*>(aligned_alloc(64, blocks * k * kColumns * sizeof(float)));
  if (panels == nullptr) abort();
  parallel_for(blocks, [&](int64_t b) {
    for (int64_t n = b * kColumns; n < (b + 1) * kColumns; ++n)
      for (int64_t i = 0; i < k; ++i)
        panels[b * k * kColumns + i * kColumns + n % kColumns] = n < d ? to_float(weight[n * k + i]) : 0;
  });
  parallel_for(runs.count, [&](int64_t item) {
    const Runs::Run& run = runs[item];
    const Grid& g = runs.grid(run.video);
    Pieces pieces{Scratch::get(padded(kRows * k) + kRows * kColumns)};
    float *patches = pieces.take(kRows * k), *product = pieces.take(kRows * kColumns);
    gather<T>(a, a.videos[run.video], g, run, patches, k);
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t begin = b * kColumns, columns = d - begin < kColumns ? d - begin : kColumns;
      gemm<Init::kZero>(run.count, columns, k, {patches, k}, panels + b * k * kColumns, kColumns, product, kColumns);
      for (int64_t row = 0; row < run.count; ++row) {
        T* out = static_cast<T*>(a.tokens.data) + (g.first + run.begin + row) * d + begin;
        each_vector(columns, [&](int64_t i, int lanes) {
          vf x = load(product + row * kColumns + i);
          if (bias != nullptr) x += load_lanes(bias + begin + i, lanes);
          store_lanes(out + i, x, lanes);
        });
      }
    }
  });
  free(panels);
}

// dweight^T [k, kColumns] of a column block = sum over tokens of patch^T dtoken; dbias the column sums.
template <class T>
void weight_gradient(const PatchEmbed& a, const Sizes& size, const float* patches, int64_t num_tokens, int64_t block) {
  const int64_t d = size.d, k = size.k, begin = block * kColumns, columns = d - begin < kColumns ? d - begin : kColumns;
  Pieces pieces{Scratch::get(padded(k * kColumns) + kRows * kColumns + kColumns)};
  float *gradient = pieces.take(k * kColumns), *dtokens = pieces.take(kRows * kColumns), *bias_sum = pieces.take(kColumns);
  memset(gradient, 0, k * kColumns * sizeof(float));
  memset(bias_sum, 0, kColumns * sizeof(float));
  memset(dtokens, 0, kRows * kColumns * sizeof(float));
  for (int64_t n = 0; n < num_tokens; n += kRows) {
    const int64_t count = num_tokens - n < kRows ? num_tokens - n : kRows;
    for (int64_t row = 0; row < count; ++row) {
      const T* from = static_cast<const T*>(a.dtokens.data) + (n + row) * a.dtokens.stride[0] + begin;
      each_vector(columns, [&](int64_t i, int lanes) {
        const vf x = load_lanes(from + i, lanes);
        store(dtokens + row * kColumns + i, x);
        store(bias_sum + i, load(bias_sum + i) + x);
      });
    }
    gemm<Init::kAdd>(k, columns, count, {patches + n * k, 1, k}, dtokens, kColumns, gradient, kColumns);
  }
  T *dweight = static_cast<T*>(a.dweight.data), *dbias = static_cast<T*>(a.dbias.data);
  for (int64_t n = 0; n < columns; ++n) {
    for (int64_t i = 0; i < k; ++i) from_float(gradient[i * kColumns + n], dweight[(begin + n) * k + i]);
    if (a.dbias) from_float(bias_sum[n], dbias[begin + n]);
  }
}

// dvideos of a run: (dtokens weight) scattered back.
template <class T>
void video_gradient(const PatchEmbed& a, const Sizes& size, const Runs& runs, const Runs::Run& run, const float* weight,
                    int64_t width) {
  const Grid& g = runs.grid(run.video);
  Pieces pieces{Scratch::get(padded(kRows * size.d) + padded(kRows * width))};
  float *dtokens = pieces.take(kRows * size.d), *dpatches = pieces.take(kRows * width);
  for (int64_t row = 0; row < run.count; ++row) {
    const T* from = static_cast<const T*>(a.dtokens.data) + (g.first + run.begin + row) * a.dtokens.stride[0];
    each_vector(size.d, [&](int64_t i, int lanes) { store_lanes(dtokens + row * size.d + i, load_lanes(from + i, lanes), lanes); });
  }
  gemm<Init::kZero>(run.count, size.k, size.d, {dtokens, size.d}, weight, width, dpatches, width);
  const int pt = a.patch[0], ph = a.patch[1], pw = a.patch[2];
  each_element<T>(a, a.dvideos[run.video], g, run, [=](int64_t row, int64_t c, int i, int j, int l, T& x) {
    from_float(dpatches[row * width + ((c * pt + i) * ph + j) * pw + l], x);
  });
}

template <class T>
void embed_backward(const PatchEmbed& a) {
  const Sizes size(a.weight);
  const Runs runs(a, a.videos);
  const int64_t d = size.d, k = size.k, width = (k + W - 1) / W * W;
  float* patches = static_cast<float*>(malloc((runs.num_tokens * k + d * width + 1) * sizeof(float)));
  if (patches == nullptr) abort();
  parallel_for(runs.count, [&](int64_t item) {
    const Runs::Run& run = runs[item];
    const Grid& g = runs.grid(run.video);
    gather<T>(a, a.videos[run.video], g, run, patches + (g.first + run.begin) * k, k);
  });
  parallel_for((d + kColumns - 1) / kColumns, [&](int64_t block) { weight_gradient<T>(a, size, patches, runs.num_tokens, block); });
  if (a.dvideos != nullptr) {
    float* weight = patches + runs.num_tokens * k;  // [d, width], columns past k zero
    for (int64_t n = 0; n < d; ++n)
      for (int64_t i = 0; i < width; ++i)
        weight[n * width + i] = i < k ? to_float(static_cast<const T*>(a.weight.data)[n * k + i]) : 0;
    parallel_for(runs.count, [&](int64_t item) { video_gradient<T>(a, size, runs, runs[item], weight, width); });
  }
  free(patches);
}

// Copies between a video and its tokens [N, pt ph pw C]; both directions visit the same elements.
template <class T, bool to_tokens>
void rearrange(const PatchEmbed& a) {
  const Runs runs(a, a.videos);
  const int ph = a.patch[1], pw = a.patch[2];
  parallel_for(runs.count, [&](int64_t item) {
    const Runs::Run& run = runs[item];
    const Tensor& video = a.videos[run.video];
    const Grid& g = runs.grid(run.video);
    const int64_t channels = video.size[0], stride = a.tokens.stride[0];
    T* tokens = static_cast<T*>(a.tokens.data) + (g.first + run.begin) * stride;
    each_element<T>(a, video, g, run, [=](int64_t row, int64_t c, int i, int j, int l, T& x) {
      T& token = tokens[row * stride + ((i * ph + j) * pw + l) * channels + c];
      if constexpr (to_tokens)
        token = x;
      else
        x = token;
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
