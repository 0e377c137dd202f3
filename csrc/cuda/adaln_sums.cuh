// The sums over the tokens of a row that the backward of adaLN needs. A block sums over a chunk of kTokens tokens.
//
// A row of one chunk is finished in its block. Other chunks leave their sums in `partial`, which sum_chunks adds in order and
// finishes; those of rows of more than 64 chunks gather_chunks adds first, 64 to a block, or a batch of a few long rows would leave
// most of the GPU idle. With 16 tokens a chunk that is a sixth to an eighth of what the tokens move (2-byte types). Longer chunks
// would move less and round more, as their sums are single chains of additions. weight and bias get theirs in sum_rows, from the
// rows'.
//
// The boundaries are on the device only, so the host launches as many blocks as there could be chunks. Block b finds its row r as
// the last one with cu[r] / kTokens + r <= b: these first blocks of rows are far enough apart for all chunks of a row.
#pragma once

#include "common.cuh"

namespace sora::cuda {

constexpr int kTokens = 16;                                  // of a chunk
constexpr int kTogether = 64;                                // chunks that gather_chunks adds
constexpr int kShift = 0, kScale = 1, kGate = 2, kSums = 3;  // of dout, dout * xhat and g * x

template <class A>
struct Backward {
  using T = typename A::T;
  using P = typename A::P;
  using R = typename A::R;
  Rows<const R> dresidual_out;
  Rows<const typename A::X> normed;
  Rows<const typename A::G> dout;
  Rows<const T> x;
  Rows<const P> gate, scale;
  const P *weight, *bias;
  const float *mean, *rstd;
  const int32_t* cu;
  Rows<R> dresidual;
  Rows<T> dx;
  Rows<P> dshift, dscale, dgate;
  P *dweight, *dbias;
  float* partial;                      // [slots, sums, D]; row r starts at slot b + min(r, b), where b = begin(r) / kTokens
  float *weight_totals, *bias_totals;  // [R, D] each, of dweight and dbias; null where they are
  int64_t tokens;
  int num_rows, width;
  int sums, place[kSums];  // how many are wanted, and which one each is, -1 if it is not
  bool rms;

  // Boundaries are clamped: wrong ones give wrong numbers but touch no memory outside.
  __device__ int64_t begin(int r) const {
    if (r > num_rows) return tokens;
    return cu == nullptr ? r * tokens : max(int64_t{0}, min(static_cast<int64_t>(cu[r]), tokens));
  }
  __device__ int64_t length(int r) const { return max(int64_t{0}, begin(r + 1) - begin(r)); }
  __device__ float* slot(int r) const {
    const int64_t before = begin(r) / kTokens;
    return partial + (before + min(static_cast<int64_t>(r), before)) * stride;
  }
  int64_t stride;  // of a slot: sums * D
};

struct Chunk {
  int row;    // num_rows: the slack
  int index;  // in its row
  int64_t begin, end;
};

// Chunk number blockIdx.x of K tokens.
template <int K, class A>
__device__ __forceinline__ Chunk find_chunk(const Backward<A>& a) {
  const int64_t block = blockIdx.x;
  int low = 0, high = a.num_rows;
  while (low < high) {
    const int middle = low + (high - low + 1) / 2;
    if (a.begin(middle) / K + middle <= block)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t first = a.begin(low), index = block - (first / K + low), begin = first + index * K;
  return {low, static_cast<int>(index), begin, min(begin + K, a.begin(low + 1))};
}

// Gradients of row r at vector i from its sums.
template <int VEC, class A>
__device__ __forceinline__ void finish_row(const Backward<A>& a, int r, int i, const float (&total)[kSums][VEC]) {
  using P = typename A::P;
  Vector<P, VEC> out;
  if (a.dscale.data != nullptr) {
    float dscale[VEC];
    for (int k = 0; k < VEC; ++k) dscale[k] = total[kScale][k];
    if (a.weight != nullptr) {
      const auto weight = load<VEC>(a.weight + i * VEC);
      for (int k = 0; k < VEC; ++k) dscale[k] *= weight[k];
    }
    if (a.bias != nullptr) {
      const auto bias = load<VEC>(a.bias + i * VEC);
      for (int k = 0; k < VEC; ++k) dscale[k] = fmaf(total[kShift][k], bias[k], dscale[k]);
    }
    for (int k = 0; k < VEC; ++k) out.set(k, dscale[k]);
    store(a.dscale[r] + i * VEC, out);
  }
  const auto store_sum = [&](const Rows<P>& to, int s) {
    if (to.data == nullptr) return;
    for (int k = 0; k < VEC; ++k) out.set(k, total[s][k]);
    store(to[r] + i * VEC, out);
  };
  store_sum(a.dshift, kShift), store_sum(a.dgate, kGate);
  const int64_t at = static_cast<int64_t>(r) * a.width + i * VEC;
  if (a.weight_totals != nullptr) store_floats(a.weight_totals + at, total[kScale]);
  if (a.bias_totals != nullptr) store_floats(a.bias_totals + at, total[kShift]);
}

// A block owns 32 columns of kTogether chunks of one row that has more, and leaves their sums in the first one's slot.
template <class A>
__global__ void __launch_bounds__(kWarp* kLanes, 1) gather_chunks(const __grid_constant__ Backward<A> a) {
  const Chunk group = find_chunk<kTokens * kTogether>(a);
  if (group.begin >= group.end || group.row == a.num_rows || a.length(group.row) <= kTokens * kTogether) return;
  const int column = blockIdx.y * kWarp + threadIdx.x;
  const int64_t chunks = (group.end - group.begin + kTokens - 1) / kTokens;
  float* first = a.slot(group.row) + static_cast<int64_t>(group.index) * kTogether * a.stride + column;
  float sums[kSums];
  column_sums(column < a.width ? chunks : 0, sums, [&](int64_t c, float (&x)[kSums]) {
    for (int s = 0; s < kSums; ++s)
      if (s < a.sums) x[s] += first[c * a.stride + s * a.width];
  });
  if (threadIdx.y == 0 && column < a.width)
    for (int s = 0; s < kSums; ++s)
      if (s < a.sums) first[s * a.width] = sums[s];
}

// A block owns 32 columns of every gridDim.y-th row. The rows that norm_backward or column_backward finished are most of them when
// rows are short, so a warp looks at 32 rows at once.
template <class A>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_chunks(const __grid_constant__ Backward<A> a) {
  const int column = blockIdx.x * kWarp + threadIdx.x, step = gridDim.y;
  for (int64_t first = blockIdx.y; first < a.num_rows; first += static_cast<int64_t>(kWarp) * step) {
    const int64_t mine = first + static_cast<int64_t>(threadIdx.x) * step;
    const int64_t length = mine < a.num_rows ? a.length(static_cast<int>(mine)) : 1;
    unsigned pending = __ballot_sync(kAllLanes, length == 0 || length > kTokens);
    for (; pending != 0; pending &= pending - 1) {
      const int r = static_cast<int>(first + static_cast<int64_t>(__ffs(pending) - 1) * step);
      const int64_t together = a.length(r) > kTokens * kTogether ? kTogether : 1;
      const int64_t parts = (a.length(r) + together * kTokens - 1) / (together * kTokens);
      float sums[kSums], total[kSums][1];
      column_sums(column < a.width ? parts : 0, sums, [&](int64_t part, float (&x)[kSums]) {
        for (int s = 0; s < kSums; ++s)
          if (a.place[s] >= 0) x[s] += a.slot(r)[part * together * a.stride + a.place[s] * a.width + column];
      });
      for (int s = 0; s < kSums; ++s) total[s][0] = sums[s];
      if (threadIdx.y == 0 && column < a.width) finish_row(a, r, column, total);
    }
  }
}

// A block owns 32 columns of dweight and dbias.
template <class A>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_rows(const __grid_constant__ Backward<A> a) {
  const int column = blockIdx.x * kWarp + threadIdx.x;
  float sums[2];
  column_sums(column < a.width ? a.num_rows : 0, sums, [&](int64_t r, float (&x)[2]) {
    const float factor = a.scale.data != nullptr ? (A::kGatesNorm ? 0 : 1) + to_float(a.scale[r][column]) : 1;
    if (a.bias_totals != nullptr) x[kShift] = fmaf(a.bias_totals[r * a.width + column], factor, x[kShift]);
    if (a.weight_totals != nullptr) x[kScale] = fmaf(a.weight_totals[r * a.width + column], factor, x[kScale]);
  });
  if (threadIdx.y != 0 || column >= a.width) return;
  if (a.dweight != nullptr) a.dweight[column] = to<typename A::P>(sums[kScale]);
  if (a.dbias != nullptr) a.dbias[column] = to<typename A::P>(sums[kShift]);
}

// What is left to do behind the chunks.
template <class A>
void launch_sums(const Launch& on, const Backward<A>& b) {
  if (b.sums == 0) return;

  const unsigned tiles = static_cast<unsigned>(ceil_div(b.width, kWarp));
  constexpr int64_t kGroup = kTokens * kTogether;
  if (b.tokens > kGroup)
    launch(on, gather_chunks<A>, dim3(static_cast<unsigned>(b.tokens / kGroup + b.num_rows + 1), tiles), dim3(kWarp, kLanes),
           column_sums_bytes<kSums>, b);
  launch(on, sum_chunks<A>, dim3(tiles, std::min(b.num_rows, 64)), dim3(kWarp, kLanes), column_sums_bytes<kSums>, b);
  if (b.dweight != nullptr || b.dbias != nullptr) launch(on, sum_rows<A>, tiles, dim3(kWarp, kLanes), column_sums_bytes<2>, b);
}

}  // namespace sora::cuda
