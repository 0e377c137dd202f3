// adaLN, backward. With xhat the normed row without its affine part and u = dout (1 + scale) weight:
//
//   g = rstd (u - mean(u) - xhat mean(u xhat)) + dresidual_out     without mean(u) for RMS; g = dresidual_out without a norm
//   dresidual = g,  dx = g gate                                    dx = g without a gate
//   dshift[r] = sum dout,  dscale[r] = sum dout (weight xhat + bias),  dgate[r] = sum g x
//   dweight = sum_r (1 + scale[r]) sum dout xhat,  dbias = sum_r (1 + scale[r]) sum dout
//
// A block owns a chunk: up to kTokens tokens of one row r, counted from the row's first token, so that sums do not depend on what
// else is packed. It goes through them one by one; a thread owns the same columns of each and adds their sums in float32.
//   norm_backward    a token's vectors stay in registers between the two passes over it, the sums in shared memory: each input
//                    and output moves once, 3 (norm) or 6 (both) times D elements a token.
//   column_backward  for gate_residual, whose gradient has one pass and whose sums stay in registers; and for rows that are too
//                    long or cannot be moved in vectors, which it reads once more for the means of the first pass.
// A row of one chunk is finished there. Other chunks leave their sums in `partial`, which sum_chunks adds in order and finishes;
// those of rows of more than 64 chunks gather_chunks adds first, 64 to a block, or a batch of a few long rows would leave most of
// the GPU idle. With 16 tokens a chunk that is a sixth to an eighth of what the tokens move (2-byte types). Longer chunks would
// move less and round more, as their sums are single chains of additions. weight and bias get theirs in sum_rows, from the rows'.
//
// The boundaries are on the device only, so the host launches as many blocks as there could be chunks. Block b finds its row r as
// the last one with cu[r] / kTokens + r <= b: these first blocks of rows are far enough apart for all chunks of a row.
#include "common.cuh"
#include "kernels.h"

namespace sora::cuda {
namespace {

constexpr int kTokens = 16;    // of a chunk
constexpr int kTogether = 64;  // chunks that gather_chunks adds
template <class T>
constexpr int kVectors = sizeof(T) == 4 ? 3 : 2;  // held by a thread of norm_backward: as many as fit into 128 registers
constexpr int kShift = 0, kScale = 1;             // sums of dout and dout * xhat; that of g * x comes last

template <bool GATE, bool NORM>
constexpr int kSums = (NORM ? 2 : 0) + (GATE ? 1 : 0);

template <class T>
struct Backward {
  Rows<const T> dresidual_out, dout, normed, x, gate, scale;
  const T *weight, *bias;
  const float *mean, *rstd;
  const int32_t* cu;
  Rows<T> dresidual, dx, dshift, dscale, dgate;
  T *dweight, *dbias;
  float* partial;     // [slots, kSums, D]; row r starts at slot b + min(r, b), where b = begin(r) / kTokens
  float* row_totals;  // [R, 2, D]; null if there is neither weight nor bias
  int64_t tokens;
  int num_rows, width;
  bool rms;

  // Boundaries are clamped: wrong ones give wrong numbers but touch no memory outside.
  __device__ int64_t begin(int r) const {
    return r > num_rows ? tokens : max(int64_t{0}, min(static_cast<int64_t>(cu[r]), tokens));
  }
  __device__ int64_t length(int r) const { return max(int64_t{0}, begin(r + 1) - begin(r)); }
  __device__ float* slot(int r) const {
    const int64_t before = begin(r) / kTokens;
    return partial + (before + min(static_cast<int64_t>(r), before)) * stride;
  }
  int64_t stride;  // of a slot: kSums * D
};

struct Chunk {
  int row;    // num_rows: the slack
  int index;  // in its row
  int64_t begin, end;
};

// Chunk number blockIdx.x of K tokens.
template <int K, class T>
__device__ __forceinline__ Chunk find_chunk(const Backward<T>& a) {
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

template <int VEC, class T>
__device__ __forceinline__ void zero_chunk(const Backward<T>& a, const Chunk& chunk) {
  for (int64_t n = chunk.begin; n < chunk.end; ++n)
    each_vector<0>(a.width / VEC, [&](int, int i) {
      store_zeros<VEC>(a.dx[n] + i * VEC);
      if (a.dresidual.data != nullptr) store_zeros<VEC>(a.dresidual[n] + i * VEC);
    });
}

// Gradients of row r at vector i from its sums.
template <bool GATE, bool NORM, int VEC, class T>
__device__ __forceinline__ void finish_row(const Backward<T>& a, int r, int i, const float (&total)[kSums<GATE, NORM>][VEC]) {
  Vector<T, VEC> out;
  if constexpr (NORM) {
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
    for (int k = 0; k < VEC; ++k) out.set(k, total[kShift][k]);
    store(a.dshift[r] + i * VEC, out);
    if (a.row_totals != nullptr)
      for (int s : {kShift, kScale}) store_floats(a.row_totals + (2 * static_cast<int64_t>(r) + s) * a.width + i * VEC, total[s]);
  }
  if constexpr (GATE) {
    for (int k = 0; k < VEC; ++k) out.set(k, total[kSums<GATE, NORM> - 1][k]);
    store(a.dgate[r] + i * VEC, out);
  }
}

// What a chunk found out about vector i of its row.
template <bool GATE, bool NORM, int VEC, class T>
__device__ __forceinline__ void finish_chunk(const Backward<T>& a, const Chunk& chunk, int i,
                                             const float (&total)[kSums<GATE, NORM>][VEC]) {
  if (a.length(chunk.row) <= kTokens) return finish_row<GATE, NORM>(a, chunk.row, i, total);
  float* slot = a.slot(chunk.row) + chunk.index * a.stride + i * VEC;
  for (int s = 0; s < kSums<GATE, NORM>; ++s) store_floats(slot + s * a.width, total[s]);
}

// One vector of a token: what is read, and its share of the two means.
template <class T, int VEC, bool GATE, bool NORM>
struct Piece {
  Vector<T, VEC> dout, normed, dresidual_out, x;

  __device__ __forceinline__ void read(const Backward<T>& a, int64_t n, int i) {
    if constexpr (NORM) dout = load<VEC>(a.dout[n] + i * VEC), normed = load<VEC>(a.normed[n] + i * VEC);
    if constexpr (GATE) dresidual_out = load<VEC>(a.dresidual_out[n] + i * VEC), x = load<VEC>(a.x[n] + i * VEC);
  }
  __device__ __forceinline__ void add_means(float mean, float rstd, const float (&factor)[VEC], float (&sums)[2]) const {
    float u_sum = 0, ux_sum = 0;
    for (int k = 0; k < VEC; ++k) {
      const float u = dout[k] * factor[k];
      u_sum += u, ux_sum = fmaf(u, (normed[k] - mean) * rstd, ux_sum);
    }
    sums[0] += u_sum, sums[1] += ux_sum;
  }
};

// (1 + scale) weight, a factor of all tokens of row r.
template <int VEC, class T>
__device__ __forceinline__ void row_factor(const Backward<T>& a, int r, int i, float (&factor)[VEC]) {
  const auto scale = load<VEC>(a.scale[r] + i * VEC);
  for (int k = 0; k < VEC; ++k) factor[k] = 1 + scale[k];
  if (a.weight == nullptr) return;
  const auto weight = load<VEC>(a.weight + i * VEC);
  for (int k = 0; k < VEC; ++k) factor[k] *= weight[k];
}

struct Token {
  float mean, rstd, mean_u, mean_ux;
};

// Writes the gradients of vector i of token n and gives its terms of the row's sums.
template <class T, int VEC, bool GATE, bool NORM>
__device__ __forceinline__ void token_gradient(const Backward<T>& a, int64_t n, int r, int i, const Token& token,
                                               const Piece<T, VEC, GATE, NORM>& piece, const float (&factor)[VEC],
                                               float (&terms)[kSums<GATE, NORM>][VEC]) {
  float g[VEC] = {};
  if constexpr (NORM)
    for (int k = 0; k < VEC; ++k) {
      const float xhat = (piece.normed[k] - token.mean) * token.rstd, dout = piece.dout[k];
      g[k] = fmaf(-xhat, token.mean_ux, fmaf(dout, factor[k], -token.mean_u)) * token.rstd;
      terms[kShift][k] = dout, terms[kScale][k] = dout * xhat;
    }
  Vector<T, VEC> out;
  if constexpr (GATE) {
    const auto gate = load<VEC>(a.gate[r] + i * VEC);
    for (int k = 0; k < VEC; ++k) {
      g[k] += piece.dresidual_out[k];
      out.set(k, g[k]);
      terms[kSums<GATE, NORM> - 1][k] = g[k] * piece.x[k];
      g[k] *= gate[k];
    }
    store(a.dresidual[n] + i * VEC, out);
  }
  for (int k = 0; k < VEC; ++k) out.set(k, g[k]);
  store(a.dx[n] + i * VEC, out);
}

template <class T, int VEC, bool GATE>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_backward(const __grid_constant__ Backward<T> a) {
  constexpr int kCount = kSums<GATE, true>, kQuads = VEC / 4;
  const Chunk chunk = find_chunk<kTokens>(a);
  if (chunk.begin >= chunk.end) return;
  if (chunk.row == a.num_rows) return zero_chunk<VEC>(a, chunk);
  const int vectors = a.width / VEC, r = chunk.row;
  // Each thread's own sums, in fours and interleaved by thread, which keeps shared memory free of bank conflicts.
  float* totals = reinterpret_cast<float*>(shared_memory);
  const auto quad = [&](int s, int j, int q) {
    return totals + (((s * kVectors<T> + j) * kQuads + q) * blockDim.x + threadIdx.x) * 4;
  };
  float* scratch = totals + kCount * kVectors<T> * VEC * blockDim.x;  // two floats per warp, twice

  float factor[kVectors<T>][VEC];
  each_vector<kVectors<T>>(vectors, [&](int j, int i) {
    row_factor<VEC>(a, r, i, factor[j]);
    for (int s = 0; s < kCount; ++s)
      for (int q = 0; q < kQuads; ++q) store_zeros<4>(quad(s, j, q));
  });
  for (int64_t n = chunk.begin; n < chunk.end; ++n) {
    Piece<T, VEC, GATE, true> piece[kVectors<T>];
    each_vector<kVectors<T>>(vectors, [&](int j, int i) { piece[j].read(a, n, i); });
    const float mean = a.mean[n], rstd = a.rstd[n];
    float sums[2] = {};
    each_vector<kVectors<T>>(vectors, [&](int j, int) { piece[j].add_means(mean, rstd, factor[j], sums); });
    row_sums(sums, scratch + n % 2 * (2 * blockDim.x / kWarp));
    const Token token = {mean, rstd, a.rms ? 0 : sums[0] / a.width, sums[1] / a.width};
    each_vector<kVectors<T>>(vectors, [&](int j, int i) {
      keep_packed(piece[j].dout), keep_packed(piece[j].normed);
      float terms[kCount][VEC];
      token_gradient(a, n, r, i, token, piece[j], factor[j], terms);
      for (int s = 0; s < kCount; ++s)
        for (int q = 0; q < kQuads; ++q) {
          auto total = load<4>(quad(s, j, q));
          for (int k = 0; k < 4; ++k) total.x[k] += terms[s][4 * q + k];
          store(quad(s, j, q), total);
        }
    });
  }
  each_vector<kVectors<T>>(vectors, [&](int j, int i) {
    float total[kCount][VEC];
    for (int s = 0; s < kCount; ++s)
      for (int k = 0; k < VEC; ++k) total[s][k] = quad(s, j, k / 4)[k % 4];
    finish_chunk<GATE, true>(a, chunk, i, total);
  });
}

template <class T, int VEC, bool GATE, bool NORM>
__global__ void __launch_bounds__(kMaxThreads, 1) column_backward(const __grid_constant__ Backward<T> a) {
  constexpr int kCount = kSums<GATE, NORM>;
  const Chunk chunk = find_chunk<kTokens>(a);
  if (chunk.begin >= chunk.end) return;
  if (chunk.row == a.num_rows) return zero_chunk<VEC>(a, chunk);
  const int vectors = a.width / VEC, r = chunk.row;
  Piece<T, VEC, GATE, NORM> piece;
  float factor[VEC];
  float* means = reinterpret_cast<float*>(shared_memory);  // [kTokens, 2]

  if constexpr (NORM) {  // a token to a warp
    for (int64_t n = chunk.begin + threadIdx.x / kWarp; n < chunk.end; n += blockDim.x / kWarp) {
      float sums[2] = {};
      for (int i = threadIdx.x % kWarp; i < vectors; i += kWarp) {
        row_factor<VEC>(a, r, i, factor);
        piece.read(a, n, i);
        piece.add_means(a.mean[n], a.rstd[n], factor, sums);
      }
      for (int s = 0; s < 2; ++s) sums[s] = warp_sum(sums[s]);
      if (threadIdx.x % kWarp == 0)
        for (int s = 0; s < 2; ++s) means[2 * (n - chunk.begin) + s] = sums[s] / a.width;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < vectors; i += blockDim.x) {
    float total[kCount][VEC] = {}, terms[kCount][VEC];
    if constexpr (NORM) row_factor<VEC>(a, r, i, factor);
    for (int64_t n = chunk.begin; n < chunk.end; ++n) {
      piece.read(a, n, i);
      Token token{};
      if constexpr (NORM) {
        const float* mean = means + 2 * (n - chunk.begin);
        token = {a.mean[n], a.rstd[n], a.rms ? 0 : mean[0], mean[1]};
      }
      token_gradient(a, n, r, i, token, piece, factor, terms);
      for (int s = 0; s < kCount; ++s)
        for (int k = 0; k < VEC; ++k) total[s][k] += terms[s][k];
    }
    finish_chunk<GATE, NORM>(a, chunk, i, total);
  }
}

// A block owns 32 columns of kTogether chunks of one row that has more, and leaves their sums in the first one's slot.
template <class T, bool GATE, bool NORM>
__global__ void __launch_bounds__(kWarp* kLanes, 1) gather_chunks(const __grid_constant__ Backward<T> a) {
  constexpr int kCount = kSums<GATE, NORM>;
  const Chunk group = find_chunk<kTokens * kTogether>(a);
  if (group.begin >= group.end || group.row == a.num_rows || a.length(group.row) <= kTokens * kTogether) return;
  const int column = blockIdx.y * kWarp + threadIdx.x;
  const int64_t chunks = (group.end - group.begin + kTokens - 1) / kTokens;
  float* first = a.slot(group.row) + static_cast<int64_t>(group.index) * kTogether * a.stride + column;
  float sums[kCount];
  column_sums(column < a.width ? chunks : 0, sums, [&](int64_t c, float (&x)[kCount]) {
    for (int s = 0; s < kCount; ++s) x[s] += first[c * a.stride + s * a.width];
  });
  if (threadIdx.y == 0 && column < a.width)
    for (int s = 0; s < kCount; ++s) first[s * a.width] = sums[s];
}

// A block owns 32 columns of every gridDim.y-th row. The rows that norm_backward or column_backward finished are most of them when
// rows are short, so a warp looks at 32 rows at once.
template <class T, bool GATE, bool NORM>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_chunks(const __grid_constant__ Backward<T> a) {
  constexpr int kCount = kSums<GATE, NORM>;
  const int column = blockIdx.x * kWarp + threadIdx.x, step = gridDim.y;
  for (int64_t first = blockIdx.y; first < a.num_rows; first += static_cast<int64_t>(kWarp) * step) {
    const int64_t mine = first + static_cast<int64_t>(threadIdx.x) * step;
    const int64_t length = mine < a.num_rows ? a.length(static_cast<int>(mine)) : 1;
    unsigned pending = __ballot_sync(kAllLanes, length == 0 || length > kTokens);
    for (; pending != 0; pending &= pending - 1) {
      const int r = static_cast<int>(first + static_cast<int64_t>(__ffs(pending) - 1) * step);
      const int64_t together = a.length(r) > kTokens * kTogether ? kTogether : 1;
      const int64_t parts = (a.length(r) + together * kTokens - 1) / (together * kTokens);
      float sums[kCount], total[kCount][1];
      column_sums(column < a.width ? parts : 0, sums, [&](int64_t part, float (&x)[kCount]) {
        for (int s = 0; s < kCount; ++s) x[s] += a.slot(r)[part * together * a.stride + s * a.width + column];
      });
      for (int s = 0; s < kCount; ++s) total[s][0] = sums[s];
      if (threadIdx.y == 0 && column < a.width) finish_row<GATE, NORM>(a, r, column, total);
    }
  }
}

// A block owns 32 columns of dweight and dbias.
template <class T>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_rows(const __grid_constant__ Backward<T> a) {
  const int column = blockIdx.x * kWarp + threadIdx.x;
  float sums[2];
  column_sums(column < a.width ? a.num_rows : 0, sums, [&](int64_t r, float (&x)[2]) {
    const float factor = 1 + to_float(a.scale[r][column]);
    for (int s : {kShift, kScale}) x[s] = fmaf(a.row_totals[(2 * r + s) * a.width + column], factor, x[s]);
  });
  if (threadIdx.y != 0 || column >= a.width) return;
  if (a.dweight != nullptr) a.dweight[column] = to<T>(sums[kScale]);
  if (a.dbias != nullptr) a.dbias[column] = to<T>(sums[kShift]);
}

template <class T, bool GATE, bool NORM>
void run_backward(const AdaLn& a) {
  constexpr int kWide = 16 / sizeof(T), kCount = kSums<GATE, NORM>;
  const char* op = !GATE  ? "layer_norm_modulate_backward"
                   : NORM ? "gate_residual_layer_norm_modulate_backward"
                          : "gate_residual_backward";
  Backward<T> b{};
  b.dresidual_out = rows<const T>(NORM ? a.dresidual_out : a.dout), b.dout = rows<const T>(a.dout);
  b.normed = rows<const T>(GATE ? a.residual_out : a.x), b.x = rows<const T>(a.x);
  b.gate = rows<const T>(a.gate), b.scale = rows<const T>(a.scale);
  b.weight = static_cast<const T*>(a.weight.data), b.bias = static_cast<const T*>(a.bias.data);
  b.mean = static_cast<const float*>(a.mean.data), b.rstd = static_cast<const float*>(a.rstd.data), b.cu = a.cu_seqlens.ints();
  b.dresidual = rows<T>(a.dresidual), b.dx = rows<T>(a.dx);
  b.dshift = rows<T>(a.dshift), b.dscale = rows<T>(a.dscale), b.dgate = rows<T>(a.dgate);
  b.dweight = static_cast<T*>(a.dweight.data), b.dbias = static_cast<T*>(a.dbias.data);
  b.tokens = a.x.size[0], b.width = static_cast<int>(a.x.size[1]), b.num_rows = static_cast<int>(a.cu_seqlens.size[0] - 1);
  b.rms = a.rms, b.stride = static_cast<int64_t>(kCount) * b.width;

  const int64_t whole = b.tokens / kTokens, slots = whole + std::min(static_cast<int64_t>(b.num_rows), whole) + 1;
  const int64_t partial = b.tokens > kTokens ? slots * b.stride : 0;
  const int64_t row_totals = a.weight || a.bias ? 2 * static_cast<int64_t>(b.num_rows) * b.width : 0;
  const Workspace workspace(a.x, partial + row_totals);
  b.partial = workspace.data();
  if (row_totals > 0) b.row_totals = workspace.data() + partial;

  const bool wide = b.width % kWide == 0 && aligned(16, sizeof(T),
                                                    {&a.dresidual_out, &a.dout, &a.residual_out, &a.x, &a.gate, &a.scale, &a.weight,
                                                     &a.bias, &a.dresidual, &a.dx, &a.dshift, &a.dscale, &a.dgate});
  const int vectors = b.width / (wide ? kWide : 1);
  const auto threads = [&](int held) {
    return std::clamp(static_cast<int>(ceil_div(vectors, kWarp * held)) * kWarp, kWarp, kMaxThreads);
  };
  const Launch on{op, current_stream(a.x)};
  const dim3 grid(static_cast<unsigned>(b.tokens / kTokens + b.num_rows + 1));
  const auto columns = [&] {
    launch(on, wide ? column_backward<T, kWide, GATE, NORM> : column_backward<T, 1, GATE, NORM>, grid, threads(1),
           NORM ? 2 * kTokens * sizeof(float) : 0, b);
  };
  if constexpr (NORM) {
    const int block = threads(kVectors<T>);
    const size_t shared = (kCount * kVectors<T> * kWide * block + 4 * block / kWarp) * sizeof(float);
    if (wide && block * kVectors<T> >= vectors && shared <= max_shared_memory(op))
      launch(on, norm_backward<T, kWide, GATE>, grid, block, shared, b);
    else
      columns();
  } else {
    columns();
  }

  const unsigned tiles = static_cast<unsigned>(ceil_div(b.width, kWarp));
  constexpr int64_t kGroup = kTokens * kTogether;
  if (b.tokens > kGroup)
    launch(on, gather_chunks<T, GATE, NORM>, dim3(static_cast<unsigned>(b.tokens / kGroup + b.num_rows + 1), tiles),
           dim3(kWarp, kLanes), column_sums_bytes<kCount>, b);
  launch(on, sum_chunks<T, GATE, NORM>, dim3(tiles, std::min(b.num_rows, 64)), dim3(kWarp, kLanes), column_sums_bytes<kCount>, b);
  if (a.weight || a.bias) launch(on, sum_rows<T>, tiles, dim3(kWarp, kLanes), column_sums_bytes<2>, b);
}

}  // namespace

void adaln_backward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) {
    using T = decltype(t);
    if (!a.gate)
      run_backward<T, false, true>(a);
    else if (a.scale)
      run_backward<T, true, true>(a);
    else
      run_backward<T, true, false>(a);
  });
}

}  // namespace sora::cuda
