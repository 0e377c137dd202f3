// QK-norm + RoPE, backward. With g the gradient turned back, xhat = x rstd and u = g weight:
//
//   dx = rstd (u - xhat mean(u xhat)),   dweight = sum over tokens (and heads, unless across them) of g xhat
//
// See rope.cuh for who owns what. Each element moves once: 3 H d elements a token. A block adds up the weight's gradient over its
// kTokens tokens in shared memory, each thread that of its own units, and sum_weights adds the blocks in order; float32.
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

template <class T, int VEC, int U>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_rope_backward(const __grid_constant__ Call<T> a) {
  const Part<T>& p = a.parts[blockIdx.y];
  const int per_head = a.pairs / VEC, units = p.heads * per_head, groups = a.across_heads ? 1 : p.heads;
  const float channels = 2 * a.pairs * (a.across_heads ? p.heads : 1);
  const Shared shared(a.pairs, units, p.heads);
  for (int i = threadIdx.x; i < a.pairs; i += blockDim.x) shared.frequency[i] = a.frequency[i];
  Unit unit[U > 0 ? U : 1];
  Pairs<T, VEC> x[U > 0 ? U : 1], dout[U > 0 ? U : 1];
  each_vector<U>(units, [&](int j, int q) {
    unit[j] = unit_at<VEC>(a, q);
    for (int e = 0; e < 2 * VEC; ++e) shared.totals[total_index<VEC>(q, e)] = 0;
  });

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens, end = min(begin + kTokens, a.tokens);
  for (int64_t n = begin; n < end; ++n) {
    const auto read = [&](int j, int q) {
      if constexpr (U == 0) unit[0] = unit_at<VEC>(a, q);
      x[j].read(p.x.at(n, unit[j].head), unit[j]), dout[j].read(p.dout.at(n, unit[j].head), unit[j]);
    };
    if constexpr (U > 0) each_vector<U>(units, read);
    const int span = find_row(a.cu, a.spans, n);
    if (span == a.spans) {  // slack
      zero_token(a, p, p.dx, n);
      continue;
    }
    __syncthreads();  // the table is no longer read, the frequencies have come
    fill_table(a, shared, span, n);
    __syncthreads();
    // g and xhat of a unit, as its us and its vs.
    const auto turn_back = [&](int j, float r, float (&g)[2][VEC], float (&xhat)[2][VEC]) {
      dout[j].get(a.interleaved, g[0], g[1]);
      rotate(shared.table, unit[j], g[0], g[1]);
      x[j].get(a.interleaved, xhat[0], xhat[1]);
      for (int k = 0; k < VEC; ++k) xhat[0][k] *= r, xhat[1][k] *= r;
    };
    const auto weigh = [&](int j, float (&g)[2][VEC]) {
      if (p.weight == nullptr) return;
      float w[2][VEC];
      weights(a, p, unit[j], w[0], w[1]);
      for (int k = 0; k < VEC; ++k) g[0][k] *= w[0][k], g[1][k] *= w[1][k];
    };
    const auto rstd = [&](int h) { return p.rstd[n * groups + (a.across_heads ? 0 : h)]; };

    each_vector<U>(units, [&](int j, int q) {
      if constexpr (U == 0) read(j, q);
      float g[2][VEC], xhat[2][VEC], dot = 0;
      turn_back(j, rstd(unit[j].head), g, xhat);
      if (p.weight != nullptr)
        for (int e = 0; e < 2 * VEC; ++e) {
          float& total = shared.totals[total_index<VEC>(q, e)];
          total = fmaf(g[e / VEC][e % VEC], xhat[e / VEC][e % VEC], total);
        }
      weigh(j, g);
      for (int e = 0; e < 2 * VEC; ++e) dot = fmaf(g[e / VEC][e % VEC], xhat[e / VEC][e % VEC], dot);
      shared.unit_sums[q] = dot;
    });
    const auto means = group_sums<VEC>(a, p, shared, [&](float dots) { return dots / channels; });
    each_vector<U>(units, [&](int j, int q) {
      if constexpr (U == 0)
        read(j, q);
      else
        x[j].keep_packed(), dout[j].keep_packed();
      float g[2][VEC], xhat[2][VEC];
      const float r = rstd(unit[j].head), mean = means(unit[j].head);
      turn_back(j, r, g, xhat);
      weigh(j, g);
      for (int s = 0; s < 2; ++s)
        for (int k = 0; k < VEC; ++k) g[s][k] = fmaf(-xhat[s][k], mean, g[s][k]) * r;
      Pairs<T, VEC> out;
      out.set(a.interleaved, g[0], g[1]);
      out.write(p.dx.at(n, unit[j].head), unit[j]);
    });
  }

  if (p.weight == nullptr) return;
  __syncthreads();
  const int d = 2 * a.pairs, width = a.across_heads ? p.heads * d : d;
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

// A block owns 32 columns of one dweight.
template <class T>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_weights(const __grid_constant__ Call<T> a, int64_t blocks) {
  const Part<T>& p = a.parts[blockIdx.y];
  const int width = 2 * a.pairs * (a.across_heads ? p.heads : 1), column = blockIdx.x * kWarp + threadIdx.x;
  float sums[1];
  column_sums(p.weight != nullptr && column < width ? blocks : 0, sums,
              [&](int64_t block, float (&x)[1]) { x[0] += p.partial[block * width + column]; });
  if (p.weight != nullptr && threadIdx.y == 0 && column < width) p.dweight[column] = to<T>(sums[0]);
}

template <class T>
void run_backward(const Rope& rope, const QkNorm (&parts)[2], bool across_heads) {
  const QkNorm &q = parts[0], &k = parts[1];
  const char* op = "qk_norm_rope_3d_backward";
  Call<T> a = make_call<T>(op, rope, q.x);
  for (int i = 0; i < 2; ++i) a.parts[i] = make_part<T>(parts[i]);
  a.across_heads = across_heads;
  const Launch on{op, current_stream(q.x)};
  const int num_heads = std::max(a.parts[0].heads, a.parts[1].heads);
  with_width(a, {&q.x, &k.x, &q.weight, &k.weight, &q.dout, &k.dout, &q.dx, &k.dx}, [&](auto vec, auto held, int units) {
    const int threads = block_size(units);
    const size_t shared = Shared::bytes(a.pairs, units, num_heads, static_cast<int>(ceil_div(units, threads)) * threads * 2 * vec);
    if (shared > max_shared_memory(op))
      throw std::invalid_argument(std::string("sora_kernels: ") + op + ": " + std::to_string(num_heads) + " heads of " +
                                  std::to_string(2 * a.pairs) + " channels need more shared memory than this GPU has");
    const int64_t blocks = ceil_div(a.tokens, kTokens);
    int64_t widths[2];
    for (int i = 0; i < 2; ++i) widths[i] = 2 * a.pairs * (across_heads ? a.parts[i].heads : 1);
    const bool weighted = q.weight || k.weight;
    const Workspace workspace(q.x, weighted ? blocks * (widths[0] + widths[1]) : 0);
    a.parts[0].partial = workspace.data(), a.parts[1].partial = workspace.data() + blocks * widths[0];
    launch(on, norm_rope_backward<T, vec, held>, dim3(static_cast<unsigned>(blocks), 2), threads, shared, a);
    if (weighted)
      launch(on, sum_weights<T>, dim3(static_cast<unsigned>(ceil_div(std::max(widths[0], widths[1]), kWarp)), 2),
             dim3(kWarp, kLanes), column_sums_bytes<1>, a, blocks);
  });
}

}  // namespace

void qk_norm_rope_3d_backward(const Rope& rope, QkNorm (&parts)[2], bool across_heads) {
  dispatch(parts[0].x.dtype, [&](auto t) { run_backward<decltype(t)>(rope, parts, across_heads); });
}

}  // namespace sora::cuda
