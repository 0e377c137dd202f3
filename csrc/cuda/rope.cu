// 3D RoPE of packed tokens [N, H, d], alone or behind an RMS norm of queries and keys; see rope.cuh for who owns what.
//
// Each element is read and written once: 2 H d elements a token. The norm's sums and the rotation are float32. A block takes eight
// tokens, which pays for fetching the frequencies and leaves enough blocks.
#include "rope.cuh"

namespace sora::cuda {
namespace {

constexpr int kTokens = 8;

template <class T, class W, int VEC, int U, bool NORM>
__global__ void __launch_bounds__(kMaxThreads, 1) rope_forward(const __grid_constant__ RopeCall<T, W> a) {
  const Part<T, W>& p = a.parts[blockIdx.y];
  const int units = p.heads * (a.pairs / VEC), groups = a.across_heads ? 1 : p.heads;
  const float channels = 2 * a.pairs * (a.across_heads ? p.heads : 1);
  const SharedMemory shared(a.pairs, NORM ? units : 0, NORM ? p.heads : 0);
  for (int i = threadIdx.x; i < a.pairs; i += blockDim.x) shared.frequency[i] = a.frequency[i];
  Unit unit[U > 0 ? U : 1];
  Pairs<T, VEC> x[U > 0 ? U : 1];
  if constexpr (U > 0) each_vector<U>(units, [&](int j, int q) { unit[j] = unit_at<VEC>(a, q); });

  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens, end = min(begin + kTokens, a.tokens);
  for (int64_t n = begin; n < end; ++n) {
    const auto read = [&](int j, int q) {
      if constexpr (U == 0) unit[0] = unit_at<VEC>(a, q);
      x[j].read(p.x.at(n, unit[j].head), unit[j]);
    };
    if constexpr (U > 0) each_vector<U>(units, read);
    const int span = find_row(a.cu_spans, a.spans, n);
    if (span == a.spans) {  // slack
      zero_token(a, p, p.out, n);
      if (NORM)
        for (int g = threadIdx.x; g < groups; g += blockDim.x) p.rstd[n * groups + g] = 0;
      continue;
    }
    __syncthreads();  // the table is no longer read, the frequencies have come
    fill_table(a, shared, span, n);
    if constexpr (NORM)
      each_vector<U>(units, [&](int j, int q) {
        if constexpr (U == 0) read(j, q);
        float sum = 0;
        for (int k = 0; k < VEC; ++k) sum = fmaf(x[j].first[k], x[j].first[k], sum);
        for (int k = 0; k < VEC; ++k) sum = fmaf(x[j].second[k], x[j].second[k], sum);
        shared.unit_sums[q] = sum;
      });
    else
      __syncthreads();  // with a norm, group_sums waits
    const auto rotate_all = [&](auto rstd) {
      each_vector<U>(units, [&](int j, int q) {
        if constexpr (U == 0) read(j, q);
        float u[VEC], v[VEC];
        x[j].get(a.interleaved, u, v);
        if constexpr (NORM) {
          const float r = rstd(unit[j].head);
          for (int k = 0; k < VEC; ++k) u[k] *= r, v[k] *= r;
          if (p.weight != nullptr) {
            float wu[VEC], wv[VEC];
            weights(a, p, unit[j], wu, wv);
            for (int k = 0; k < VEC; ++k) u[k] *= wu[k], v[k] *= wv[k];
          }
        }
        rotate(shared.table, unit[j], u, v);
        Pairs<T, VEC> out;
        out.set(a.interleaved, u, v);
        out.write(p.out.at(n, unit[j].head), unit[j]);
      });
    };
    if constexpr (NORM) {
      const auto rstd = group_sums<VEC>(a, p, shared, [&](float squares) { return 1 / sqrtf(squares / channels + a.eps); });
      for (int g = threadIdx.x; g < groups; g += blockDim.x) p.rstd[n * groups + g] = rstd(g);
      rotate_all(rstd);
    } else {
      rotate_all(nullptr);
    }
  }
}

template <class T>
void run_rope(const Rope& rope, const Tensor& x, const Tensor& out) {
  RopeCall<T, T> a = make_call<T, T>("rope_3d", rope, x);
  a.parts[0].x = heads<const T>(x), a.parts[0].out = heads<T>(out), a.parts[0].heads = static_cast<int>(x.size[1]);
  with_width(a, {&x, &out}, [&](auto vec, auto u, int units) {
    launch({"rope_3d", current_stream(x)}, rope_forward<T, T, vec, u, false>, static_cast<unsigned>(ceil_div(a.tokens, kTokens)),
           block_size(units), SharedMemory::bytes(a.pairs, 0, 0, 0), a);
  });
}

template <class T, class W>
void run_norm(const Rope& rope, const QkNorm (&parts)[2], bool across_heads, float eps) {
  const QkNorm &q = parts[0], &k = parts[1];
  const char* op = "qk_norm_rope_3d";
  RopeCall<T, W> a = make_call<T, W>(op, rope, q.x);
  for (int i = 0; i < 2; ++i) a.parts[i] = make_part<T, W>(parts[i]);
  a.across_heads = across_heads, a.eps = eps;
  with_width(a, {&q.x, &k.x, &q.out, &k.out}, [&](auto vec, auto u, int units) {
    launch({op, current_stream(q.x)}, rope_forward<T, W, vec, u, true>, dim3(static_cast<unsigned>(ceil_div(a.tokens, kTokens)), 2),
           block_size(units), SharedMemory::bytes(a.pairs, units, std::max(a.parts[0].heads, a.parts[1].heads), 0), a);
  });
}

}  // namespace

void rope_3d(const Rope& rope, const Tensor& x, const Tensor& out) {
  dispatch(x.dtype, [&](auto t) { run_rope<decltype(t)>(rope, x, out); });
}

void qk_norm_rope_3d_forward(const Rope& rope, QkNorm (&parts)[2], bool across_heads, float eps) {
  with_types(parts, [&](auto t, auto w) { run_norm<decltype(t), decltype(w)>(rope, parts, across_heads, eps); });
}

}  // namespace sora::cuda
