// adaLN, backward. With xhat the normed row without its affine part and u = dout (1 + scale) weight:
//
//   g = rstd (u - mean(u) - xhat mean(u xhat)) + dresidual_out     without mean(u) for RMS; g = dresidual_out without a norm
//   dresidual = g,  dx = g gate                                    dx = g without a gate
//   dshift[r] = sum dout,  dscale[r] = sum dout (weight xhat + bias),  dgate[r] = sum g x
//   dweight = sum_r (1 + scale[r]) sum dout xhat,  dbias = sum_r (1 + scale[r]) sum dout
//
// norm_gate_residual (A::kGatesNorm) has a gate in the place of 1 + scale, and its gradient in that of dscale; dresidual is dout.
//
// What is absent counts as no factor; of the sums over dout, dout xhat and g x only those that somebody asked for are formed. The
// variant OPTIONAL asks for each, the other one has all rows and all their sums.
//
// A block owns a chunk: up to kTokens tokens of one row r, counted from the row's first token, so that sums do not depend on what
// else is packed. It goes through them one by one; a thread owns the same columns of each and adds their sums in float32.
//   norm_backward    a token's vectors stay in registers between the two passes over it, the sums in shared memory: each input
//                    and output moves once, 3 (norm) or 6 (both) times D elements a token.
//   column_backward  for gate_residual, whose gradient has one pass and whose sums stay in registers; and for rows that are too
//                    long or cannot be moved in vectors, which it reads once more for the means of the first pass.
// What becomes of the sums is in adaln_sums.cuh.
#include "adaln_sums.cuh"
#include "kernels.h"

namespace sora::cuda {
namespace {

// In registers of a thread of norm_backward: as many as fit into 128 registers.
template <class A>
constexpr int kVectors = sizeof(typename A::T) == 4   ? 3
                         : sizeof(typename A::R) == 4 ? 1
                                                      : 2;

template <int VEC, class A>
__device__ __forceinline__ void zero_chunk(const Backward<A>& a, const Chunk& chunk) {
  for (int64_t n = chunk.begin; n < chunk.end; ++n)
    each_vector<0>(a.width / VEC, [&](int, int i) {
      if (a.dx.data != nullptr) store_zeros<VEC>(a.dx[n] + i * VEC);
      if (a.dresidual.data != nullptr) store_zeros<VEC>(a.dresidual[n] + i * VEC);
    });
}

// What a kernel is compiled for: ops with a residual, with a norm, and rows and sums that may be absent.
template <bool RESIDUAL_, bool NORM_, bool OPTIONAL_>
struct Variant {
  static constexpr bool RESIDUAL = RESIDUAL_, NORM = NORM_, OPTIONAL = OPTIONAL_;

  // Which of the sums s is, or -1. Only OPTIONAL has to ask.
  template <class A>
  __device__ static __forceinline__ int place(const Backward<A>& a, int s) {
    if (s == kGate ? !RESIDUAL : !NORM) return -1;
    return OPTIONAL ? a.place[s] : NORM ? s : 0;
  }
  template <class A>
  __device__ static __forceinline__ int sums(const Backward<A>& a) {
    return OPTIONAL ? a.sums : 2 * NORM + RESIDUAL;
  }
  template <class A>
  __device__ static __forceinline__ bool gated(const Backward<A>& a) {
    return RESIDUAL && (!OPTIONAL || a.gate.data != nullptr);
  }
};

// What a chunk found out about vector i of its row.
template <class Op, int VEC, class A>
__device__ __forceinline__ void finish_chunk(const Backward<A>& a, const Chunk& chunk, int i, const float (&total)[kSums][VEC]) {
  if (a.length(chunk.row) <= kTokens) return finish_row(a, chunk.row, i, total);
  float* slot = a.slot(chunk.row) + chunk.index * a.stride + i * VEC;
  for (int s = 0; s < kSums; ++s)
    if (Op::place(a, s) >= 0) store_floats(slot + Op::place(a, s) * a.width, total[s]);
}

// One vector of a token: what is read, and its share of the two means.
template <class A, int VEC, class Op>
struct Piece {
  Vector<typename A::G, VEC> dout;
  Vector<typename A::X, VEC> normed;
  Vector<typename A::T, VEC> x;
  Vector<typename A::R, VEC> dresidual_out;

  __device__ __forceinline__ void read(const Backward<A>& a, int64_t n, int i) {
    if constexpr (Op::NORM) dout = load<VEC>(a.dout[n] + i * VEC), normed = load<VEC>(a.normed[n] + i * VEC);
    if constexpr (Op::RESIDUAL) dresidual_out = load<VEC>(a.dresidual_out[n] + i * VEC);
    if (Op::gated(a)) x = load<VEC>(a.x[n] + i * VEC);
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

// (1 + scale) weight, a factor of all tokens of row r; of norm_gate_residual gate weight.
template <class Op, int VEC, class A>
__device__ __forceinline__ void row_factor(const Backward<A>& a, int r, int i, float (&factor)[VEC]) {
  for (int k = 0; k < VEC; ++k) factor[k] = 1;
  if (!Op::OPTIONAL || a.scale.data != nullptr) {
    const auto scale = load<VEC>(a.scale[r] + i * VEC);
    for (int k = 0; k < VEC; ++k) factor[k] = A::kGatesNorm ? scale[k] : factor[k] + scale[k];
  }
  if (a.weight == nullptr) return;
  const auto weight = load<VEC>(a.weight + i * VEC);
  for (int k = 0; k < VEC; ++k) factor[k] *= weight[k];
}

struct Token {
  float mean, rstd, mean_u, mean_ux;
};

// Writes the gradients of vector i of token n and gives its terms of the row's sums.
template <class A, int VEC, class Op>
__device__ __forceinline__ void token_gradient(const Backward<A>& a, int64_t n, int r, int i, const Token& token,
                                               const Piece<A, VEC, Op>& piece, const float (&factor)[VEC],
                                               float (&terms)[kSums][VEC]) {
  float g[VEC] = {};
  if constexpr (Op::NORM)
    for (int k = 0; k < VEC; ++k) {
      const float xhat = (piece.normed[k] - token.mean) * token.rstd, dout = piece.dout[k];
      g[k] = fmaf(-xhat, token.mean_ux, fmaf(dout, factor[k], -token.mean_u)) * token.rstd;
      terms[kShift][k] = dout, terms[kScale][k] = dout * xhat;
    }
  if constexpr (Op::RESIDUAL) {
    Vector<typename A::P, VEC> gate;
    Vector<typename A::R, VEC> dresidual;
    if (Op::gated(a)) gate = load<VEC>(a.gate[r] + i * VEC);
    for (int k = 0; k < VEC; ++k) {
      g[k] += piece.dresidual_out[k];
      dresidual.set(k, g[k]);
    }
    store(a.dresidual[n] + i * VEC, dresidual);
    if (!Op::gated(a)) return;
    for (int k = 0; k < VEC; ++k) {
      terms[kGate][k] = g[k] * piece.x[k];
      g[k] *= gate[k];
    }
  }
  if constexpr (A::kGatesNorm)
    if (a.dresidual.data != nullptr) store(a.dresidual[n] + i * VEC, piece.dout);
  Vector<typename A::T, VEC> dx;
  for (int k = 0; k < VEC; ++k) dx.set(k, g[k]);
  store(a.dx[n] + i * VEC, dx);
}

template <class A, int VEC, class Op>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_backward(const __grid_constant__ Backward<A> a) {
  constexpr int kQuads = VEC / 4;
  const Chunk chunk = find_chunk<kTokens>(a);
  if (chunk.begin >= chunk.end) return;
  if (chunk.row == a.num_rows) return zero_chunk<VEC>(a, chunk);
  const int vectors = a.width / VEC, r = chunk.row;
  // Each thread's own sums, in fours and interleaved by thread, which keeps shared memory free of bank conflicts.
  float* totals = reinterpret_cast<float*>(shared_memory);
  const auto quad = [&](int s, int j, int q) {
    return totals + (((Op::place(a, s) * kVectors<A> + j) * kQuads + q) * blockDim.x + threadIdx.x) * 4;
  };
  float* scratch = totals + Op::sums(a) * kVectors<A> * VEC * blockDim.x;  // two floats per warp, twice

  float factor[kVectors<A>][VEC];
  each_vector<kVectors<A>>(vectors, [&](int j, int i) {
    row_factor<Op>(a, r, i, factor[j]);
    for (int s = 0; s < kSums; ++s)
      if (Op::place(a, s) >= 0)
        for (int q = 0; q < kQuads; ++q) store_zeros<4>(quad(s, j, q));
  });
  for (int64_t n = chunk.begin; n < chunk.end; ++n) {
    Piece<A, VEC, Op> piece[kVectors<A>];
    each_vector<kVectors<A>>(vectors, [&](int j, int i) { piece[j].read(a, n, i); });
    const float mean = a.mean[n], rstd = a.rstd[n];
    float sums[2] = {};
    each_vector<kVectors<A>>(vectors, [&](int j, int) { piece[j].add_means(mean, rstd, factor[j], sums); });
    row_sums(sums, scratch + n % 2 * (2 * blockDim.x / kWarp));
    const Token token = {mean, rstd, a.rms ? 0 : sums[0] / a.width, sums[1] / a.width};
    each_vector<kVectors<A>>(vectors, [&](int j, int i) {
      keep_packed(piece[j].dout), keep_packed(piece[j].normed);
      float terms[kSums][VEC];
      token_gradient(a, n, r, i, token, piece[j], factor[j], terms);
      for (int s = 0; s < kSums; ++s)
        if (Op::place(a, s) >= 0)
          for (int q = 0; q < kQuads; ++q) {
            auto total = load<4>(quad(s, j, q));
            for (int k = 0; k < 4; ++k) total.x[k] += terms[s][4 * q + k];
            store(quad(s, j, q), total);
          }
    });
  }
  each_vector<kVectors<A>>(vectors, [&](int j, int i) {
    float total[kSums][VEC] = {};
    for (int s = 0; s < kSums; ++s)
      if (Op::place(a, s) >= 0)
        for (int k = 0; k < VEC; ++k) total[s][k] = quad(s, j, k / 4)[k % 4];
    finish_chunk<Op>(a, chunk, i, total);
  });
}

template <class A, int VEC, class Op>
__global__ void __launch_bounds__(kMaxThreads, 1) column_backward(const __grid_constant__ Backward<A> a) {
  const Chunk chunk = find_chunk<kTokens>(a);
  if (chunk.begin >= chunk.end) return;
  if (chunk.row == a.num_rows) return zero_chunk<VEC>(a, chunk);
  const int vectors = a.width / VEC, r = chunk.row;
  Piece<A, VEC, Op> piece;
  float factor[VEC];
  float* means = reinterpret_cast<float*>(shared_memory);  // [kTokens, 2]

  if constexpr (Op::NORM) {  // a token to a warp
    for (int64_t n = chunk.begin + threadIdx.x / kWarp; n < chunk.end; n += blockDim.x / kWarp) {
      float sums[2] = {};
      for (int i = threadIdx.x % kWarp; i < vectors; i += kWarp) {
        row_factor<Op>(a, r, i, factor);
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
    float total[kSums][VEC] = {}, terms[kSums][VEC];
    if constexpr (Op::NORM) row_factor<Op>(a, r, i, factor);
    for (int64_t n = chunk.begin; n < chunk.end; ++n) {
      piece.read(a, n, i);
      Token token{};
      if constexpr (Op::NORM) {
        const float* mean = means + 2 * (n - chunk.begin);
        token = {a.mean[n], a.rstd[n], a.rms ? 0 : mean[0], mean[1]};
      }
      token_gradient(a, n, r, i, token, piece, factor, terms);
      for (int s = 0; s < kSums; ++s)
        if (Op::place(a, s) >= 0)
          for (int k = 0; k < VEC; ++k) total[s][k] += terms[s][k];
    }
    finish_chunk<Op>(a, chunk, i, total);
  }
}

template <class A, bool RESIDUAL, bool NORM>
void run_backward(const AdaLn& a) {
  using T = typename A::T;
  using P = typename A::P;
  using R = typename A::R;
  using G = typename A::G;
  constexpr int kWide = 16 / sizeof(T);
  using Whole = Variant<RESIDUAL, NORM, false>;
  using Optional = Variant<RESIDUAL, NORM, true>;
  using All = std::conditional_t<A::kGatesNorm, Optional, Whole>;  // a gated norm has no shift, and needs no second variant
  const char* op = A::kGatesNorm ? "norm_gate_residual_backward"
                   : !RESIDUAL   ? "layer_norm_modulate_backward"
                   : NORM        ? "gate_residual_layer_norm_modulate_backward"
                                 : "gate_residual_backward";
  Backward<A> b{};
  const Tensor& dout = A::kGatesNorm ? a.dresidual_out : a.dout;
  b.dresidual_out = rows<const R>(NORM ? a.dresidual_out : a.dout), b.dout = rows<const G>(dout);
  b.normed = rows<const typename A::X>(RESIDUAL ? a.residual_out : a.x), b.x = rows<const T>(a.x);
  b.gate = rows<const P>(a.gate), b.scale = rows<const P>(a.scale);
  b.weight = static_cast<const P*>(a.weight.data), b.bias = static_cast<const P*>(a.bias.data);
  b.mean = static_cast<const float*>(a.mean.data), b.rstd = static_cast<const float*>(a.rstd.data), b.cu = a.cu_rows.ints();
  b.dresidual = rows<R>(a.dresidual), b.dx = rows<T>(a.dx);
  b.dshift = rows<P>(a.dshift), b.dscale = rows<P>(a.dscale), b.dgate = rows<P>(a.dgate);
  b.dweight = static_cast<P*>(a.dweight.data), b.dbias = static_cast<P*>(a.dbias.data);
  b.tokens = dout.size[0], b.width = static_cast<int>(dout.size[1]), b.rms = a.rms;
  b.num_rows = a.cu_rows ? static_cast<int>(a.cu_rows.size[0] - 1) : 1;
  const bool wanted[kSums] = {a.dshift || a.dbias || (a.dscale && a.bias), a.dscale || a.dweight, static_cast<bool>(a.dgate)};
  for (int s = 0; s < kSums; ++s) b.place[s] = wanted[s] ? b.sums++ : -1;
  b.stride = static_cast<int64_t>(b.sums) * b.width;

  const int64_t whole = b.tokens / kTokens, slots = whole + std::min(static_cast<int64_t>(b.num_rows), whole) + 1;
  const int64_t partial = b.tokens > kTokens ? slots * b.stride : 0, totals = static_cast<int64_t>(b.num_rows) * b.width;
  const Workspace workspace(dout, partial + (a.dweight ? totals : 0) + (a.dbias ? totals : 0));
  b.partial = workspace.data();
  if (a.dweight) b.weight_totals = workspace.data() + partial;
  if (a.dbias) b.bias_totals = workspace.data() + partial + (a.dweight ? totals : 0);

  const bool wide = b.width % kWide == 0 && aligned(16, {&a.dresidual_out, &a.dout, &a.residual_out, &a.x, &a.gate, &a.scale,
                                                         &a.weight, &a.bias, &a.dresidual, &a.dx, &a.dshift, &a.dscale, &a.dgate});
  const bool all = (!NORM || (a.scale && a.dshift && a.dscale)) && (!RESIDUAL || a.gate);
  const int vectors = b.width / (wide ? kWide : 1);
  const auto threads = [&](int vectors_each) {
    return std::clamp(static_cast<int>(ceil_div(vectors, kWarp * vectors_each)) * kWarp, kWarp, kMaxThreads);
  };
  const Launch on{op, current_stream(dout)};
  const dim3 grid(static_cast<unsigned>(b.tokens / kTokens + b.num_rows + 1));
  const int block = threads(kVectors<A>);
  const size_t shared = (b.sums * kVectors<A> * kWide * block + 4 * block / kWarp) * sizeof(float);
  const bool in_registers = NORM && wide && block * kVectors<A> >= vectors && shared <= max_shared_memory(op);
  if constexpr (NORM)
    if (in_registers) launch(on, all ? norm_backward<A, kWide, All> : norm_backward<A, kWide, Optional>, grid, block, shared, b);
  using Columns = std::conditional_t<NORM, Optional, Whole>;  // with a norm the way for odd rows, which need no second variant
  if (!in_registers)
    launch(on,
           wide && all ? column_backward<A, kWide, Columns>
           : wide      ? column_backward<A, kWide, Optional>
                       : column_backward<A, 1, Optional>,
           grid, threads(1), NORM ? 2 * kTokens * sizeof(float) : 0, b);
  launch_sums(on, b);
}

}  // namespace

void adaln_backward(const AdaLn& a) {
  with_types(a, [&](auto types) {
    using A = decltype(types);
    if (a.gates_norm())
      run_backward<typename A::GatesNorm, false, true>(a);
    else if (!a.dresidual)
      run_backward<A, false, true>(a);
    else if (a.mean)
      run_backward<A, true, true>(a);
    else
      run_backward<A, true, false>(a);
  });
}

}  // namespace sora::cuda
