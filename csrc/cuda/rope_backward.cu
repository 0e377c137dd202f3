// QK-norm + RoPE, backward. With g the gradient rotated back, xhat = x rstd and u = g weight:
//
//   dx = rstd (u - xhat mean(u xhat)),   dweight = sum over tokens (and heads, unless across them) of g xhat
//
// A block passes over each of its tokens twice: first for the sums of u xhat and of dweight, then for dx. Two variants differ in
// where x and dout are between the passes:
//
//   units_in_registers   a thread keeps those of its U units: each element moves once, 3 H d elements a token
//   units_read_twice     the second pass reads them again: 5 H d elements a token, for units that are too many or too narrow
//
// See rope.cuh for who owns what. A block sums dweight over its kTokens tokens in shared memory, each thread that of its own units.
// sum_weights adds up the blocks in order. All sums are float32.
#include "rope.cuh"

namespace sora::cuda {
namespace {

constexpr int kTokens = 32;

// Where element e of unit q has its total: in fours (or twos) and interleaved by thread, free of bank conflicts.
template <int VEC>
__device__ __forceinline__ int total_index(int q, int e) {
  constexpr int kTogether = VEC == 1 ? 2 : 4;
  const int threads = blockDim.x;
  return ((q / threads * (2 * VEC / kTogether) + e / kTogether) * threads + q % threads) * kTogether + e % kTogether;
}

// What both variants compute of a token and of a unit.
template <class T, class W, int VEC>
struct Block {
  const RopeCall<T, W>& a;
  const Part<T, W>& p;
  const SharedMemory shared;
  const int units;

  __device__ Block(const RopeCall<T, W>& a, const Part<T, W>& p, int units)
      : a(a), p(p), shared(a.pairs, units, p.heads), units(units) {}

  __device__ __forceinline__ float rstd(int64_t n, int head) const {
    return a.across_heads ? p.rstd[n] : p.rstd[n * p.heads + head];
  }

  // Computes the angles of token n. False if it is slack, whose dx is zero.
  __device__ __forceinline__ bool start_token(int64_t n) const {
    const int span = find_row(a.cu_spans, a.spans, n);
    if (span == a.spans) {
      zero_token(a, p, p.dx, n);
      return false;
    }
    __syncthreads();  // the previous token's table is no longer read, and the frequencies are written
    fill_table(a, shared, span, n);
    __syncthreads();
    return true;
  }

  __device__ __forceinline__ void read(int64_t n, const Unit& unit, Pairs<T, VEC>& x, Pairs<T, VEC>& dout) const {
    x.read(p.x.at(n, unit.head), unit), dout.read(p.dout.at(n, unit.head), unit);
  }

  // g and xhat of a unit, as the us and the vs of its pairs.
  __device__ __forceinline__ void rotate_back(const Unit& unit, const Pairs<T, VEC>& x, const Pairs<T, VEC>& dout, float r,
                                              float (&g)[2][VEC], float (&xhat)[2][VEC]) const {
    dout.get(a.interleaved, g[0], g[1]);
    rotate(shared.table, unit, g[0], g[1]);
    x.get(a.interleaved, xhat[0], xhat[1]);
    for (int k = 0; k < VEC; ++k) xhat[0][k] *= r, xhat[1][k] *= r;
  }

  // u of g, in place.
  __device__ __forceinline__ void multiply_weight(const Unit& unit, float (&g)[2][VEC]) const {
    if (p.weight == nullptr) return;
    float w[2][VEC];
    weights(a, p, unit, w[0], w[1]);
    for (int k = 0; k < VEC; ++k) g[0][k] *= w[0][k], g[1][k] *= w[1][k];
  }

  // First pass: u xhat of unit q, and g xhat for dweight.
  __device__ __forceinline__ void add_sums(int64_t n, int q, const Unit& unit, const Pairs<T, VEC>& x,
                                           const Pairs<T, VEC>& dout) const {
    float g[2][VEC], xhat[2][VEC], dot = 0;
    rotate_back(unit, x, dout, rstd(n, unit.head), g, xhat);
    if (p.weight != nullptr)
      for (int e = 0; e < 2 * VEC; ++e) {
        float& total = shared.totals[total_index<VEC>(q, e)];
        total = fmaf(g[e / VEC][e % VEC], xhat[e / VEC][e % VEC], total);
      }
    multiply_weight(unit, g);
    for (int e = 0; e < 2 * VEC; ++e) dot = fmaf(g[e / VEC][e % VEC], xhat[e / VEC][e % VEC], dot);
    shared.unit_sums[q] = dot;
  }

  // Between the passes: mean(u xhat), as a function of the head.
  __device__ __forceinline__ auto means() const {
    const float channels = 2 * a.pairs * (a.across_heads ? p.heads : 1);
    return group_sums<VEC>(a, p, shared, [=](float dots) { return dots / channels; });
  }

  // Second pass: dx of a unit.
  __device__ __forceinline__ void write_dx(int64_t n, const Unit& unit, const Pairs<T, VEC>& x, const Pairs<T, VEC>& dout,
                                           float mean) const {
    float g[2][VEC], xhat[2][VEC];
    const float r = rstd(n, unit.head);
    rotate_back(unit, x, dout, r, g, xhat);
    multiply_weight(unit, g);
    for (int s = 0; s < 2; ++s)
      for (int k = 0; k < VEC; ++k) g[s][k] = fmaf(-xhat[s][k], mean, g[s][k]) * r;
    Pairs<T, VEC> dx;
    dx.set(a.interleaved, g[0], g[1]);
    dx.write(p.dx.at(n, unit.head), unit);
  }

  // The block's sums of dweight, from its threads' totals.
  __device__ __forceinline__ void write_partial() const {
    const int d = 2 * a.pairs, width = a.across_heads ? p.heads * d : d, per_head = a.pairs / VEC;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
      const int channel = i % d, half = channel / a.pairs, rest = channel % a.pairs;
      int unit = rest / VEC, side = half, k = rest % VEC;
      if (a.interleaved && VEC == 1) unit = channel / 2, side = channel % 2;
      if (a.interleaved && VEC > 1) side = k % 2, k = (half * VEC + k) / 2;
      float total = 0;
      for (int h = i / d; h < (a.across_heads ? i / d + 1 : p.heads); ++h)
        total += shared.totals[total_index<VEC>(h * per_head + unit, side * VEC + k)];
      p.partial[static_cast<int64_t>(blockIdx.x) * width + i] = total;
    }
  }
};

// Tokens [begin, end), each read before its angles are computed.
template <class T, class W, int VEC, int U>
__device__ __forceinline__ void units_in_registers(const Block<T, W, VEC>& block, int64_t begin, int64_t end) {
  Unit unit[U];
  Pairs<T, VEC> x[U], dout[U];
  each_vector<U>(block.units, [&](int j, int q) { unit[j] = unit_at<VEC>(block.a, q); });
  for (int64_t n = begin; n < end; ++n) {
    each_vector<U>(block.units, [&](int j, int) { block.read(n, unit[j], x[j], dout[j]); });
    if (!block.start_token(n)) continue;
    each_vector<U>(block.units, [&](int j, int q) { block.add_sums(n, q, unit[j], x[j], dout[j]); });
    const auto means = block.means();
    each_vector<U>(block.units, [&](int j, int) {
      x[j].keep_packed(), dout[j].keep_packed();
      block.write_dx(n, unit[j], x[j], dout[j], means(unit[j].head));
    });
  }
}

// Tokens [begin, end), each read by both passes.
template <class T, class W, int VEC>
__device__ __forceinline__ void units_read_twice(const Block<T, W, VEC>& block, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    if (!block.start_token(n)) continue;
    Pairs<T, VEC> x, dout;
    each_vector<0>(block.units, [&](int, int q) {
      const Unit unit = unit_at<VEC>(block.a, q);
      block.read(n, unit, x, dout);
      block.add_sums(n, q, unit, x, dout);
    });
    const auto means = block.means();
    each_vector<0>(block.units, [&](int, int q) {
      const Unit unit = unit_at<VEC>(block.a, q);
      block.read(n, unit, x, dout);
      block.write_dx(n, unit, x, dout, means(unit.head));
    });
  }
}

template <class T, class W, int VEC, int U>
__global__ void __launch_bounds__(kMaxThreads, 1) rope_backward(const __grid_constant__ RopeCall<T, W> a) {
  const Part<T, W>& p = a.parts[blockIdx.y];
  const Block<T, W, VEC> block(a, p, p.heads * (a.pairs / VEC));
  for (int i = threadIdx.x; i < a.pairs; i += blockDim.x) block.shared.frequency[i] = a.frequency[i];
  each_vector<U>(block.units, [&](int, int q) {
    for (int e = 0; e < 2 * VEC; ++e) block.shared.totals[total_index<VEC>(q, e)] = 0;
  });
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens, end = min(begin + kTokens, a.tokens);
  if constexpr (U > 0)
    units_in_registers<T, W, VEC, U>(block, begin, end);
  else
    units_read_twice<T, W, VEC>(block, begin, end);
  if (p.weight == nullptr) return;
  __syncthreads();
  block.write_partial();
}

// A block owns 32 columns of one dweight.
template <class T, class W>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_weights(const __grid_constant__ RopeCall<T, W> a, int64_t blocks) {
  const Part<T, W>& p = a.parts[blockIdx.y];
  const int width = 2 * a.pairs * (a.across_heads ? p.heads : 1), column = blockIdx.x * kWarp + threadIdx.x;
  float sums[1];
  column_sums(p.weight != nullptr && column < width ? blocks : 0, sums,
              [&](int64_t block, float (&x)[1]) { x[0] += p.partial[block * width + column]; });
  if (p.weight != nullptr && threadIdx.y == 0 && column < width) p.dweight[column] = to<W>(sums[0]);
}

template <class T, class W>
void run_backward(const Rope& rope, const QkNorm (&parts)[2], bool across_heads) {
  const QkNorm &q = parts[0], &k = parts[1];
  const char* op = "qk_norm_rope_3d_backward";
  RopeCall<T, W> a = make_call<T, W>(op, rope, q.x);
  for (int i = 0; i < 2; ++i) a.parts[i] = make_part<T, W>(parts[i]);
  a.across_heads = across_heads;
  const Launch on{op, current_stream(q.x)};
  const int num_heads = std::max(a.parts[0].heads, a.parts[1].heads);
  with_width(a, {&q.x, &k.x, &q.dout, &k.dout, &q.dx, &k.dx}, [&](auto vec, auto u, int units) {
    const int threads = block_size(units);
    const size_t shared =
        SharedMemory::bytes(a.pairs, units, num_heads, static_cast<int>(ceil_div(units, threads)) * threads * 2 * vec);
    if (shared > max_shared_memory(op))
      throw std::invalid_argument(std::string("sora_kernels: ") + op + ": " + std::to_string(num_heads) + " heads of " +
                                  std::to_string(2 * a.pairs) + " channels need more shared memory than this GPU has");
    const int64_t blocks = ceil_div(a.tokens, kTokens);
    int64_t widths[2];
    for (int i = 0; i < 2; ++i) widths[i] = 2 * a.pairs * (across_heads ? a.parts[i].heads : 1);
    const bool weighted = q.weight || k.weight;
    const Workspace workspace(q.x, weighted ? blocks * (widths[0] + widths[1]) : 0);
    a.parts[0].partial = workspace.data(), a.parts[1].partial = workspace.data() + blocks * widths[0];
    launch(on, rope_backward<T, W, vec, u>, dim3(static_cast<unsigned>(blocks), 2), threads, shared, a);
    if (weighted)
      launch(on, sum_weights<T, W>, dim3(static_cast<unsigned>(ceil_div(std::max(widths[0], widths[1]), kWarp)), 2),
             dim3(kWarp, kLanes), column_sums_bytes<1>, a, blocks);
  });
}

}  // namespace

void qk_norm_rope_3d_backward(const Rope& rope, QkNorm (&parts)[2], bool across_heads) {
  with_types(parts, [&](auto t, auto w) { run_backward<decltype(t), decltype(w)>(rope, parts, across_heads); });
}

}  // namespace sora::cuda
