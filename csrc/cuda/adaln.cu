// adaLN: norm, modulation and gated residual, forward.
//
//   residual_out = residual + gate[r] x                      (RESIDUAL)
//   out = norm(residual_out or x) (1 + scale[r]) + shift[r]  (NORM)
//   residual_out = residual + norm(x) scale[r]               (A::kGatesNorm, with NORM alone: a gate in the place of 1 + scale)
//
// A row of threads (threadIdx.x) owns a token: a warp up to 160 vectors of 16 bytes (1280 channels of bfloat16), then one more warp
// per 160. A block has about 128 threads; with 100 registers each, five blocks fit on a multiprocessor; four, with up to 118,
// where a float32 residual waits behind the norm of 2-byte tokens. The token's row stays in registers as it is stored, kVectors
// vectors to a thread, from the loads over the mean and the variance to the result, so that memory sees each input and output
// once: D (2 or 3 reads and writes) elements a token. All loads of the token are in flight before the search for its modulation
// row begins, which then costs no time of its own; the modulation rows are those of neighbouring tokens and come from L1.
// Statistics are float32; the variance is the mean of (x - mean)^2.
//
// With 2-byte types the arithmetic takes nearly as long as the memory, so adaLN-Zero's own variant asks no questions: it has all
// rows, and neither weight nor bias. The variant OPTIONAL asks for each of them.
//
// Rows that are too long (more than 2560 vectors) or cannot be moved in vectors take the variant V = 0, which reads them again
// from memory for each pass, mostly from L1.
#include "common.cuh"
#include "kernels.h"

namespace sora::cuda {
namespace {

constexpr int kVectors = 5;
constexpr int kBlockThreads = 128;

template <class A>
struct Forward {
  using T = typename A::T;
  using P = typename A::P;
  using R = typename A::R;
  Rows<const R> residual;
  Rows<const T> x;
  Rows<const P> gate, shift, scale;
  const P *weight, *bias;
  const int32_t* cu;
  Rows<R> residual_out;
  Rows<T> out;
  float *mean, *rstd;
  int64_t tokens;
  int num_rows, width;
  bool rms;
  float eps;
};

template <class A, int VEC, int V, bool RESIDUAL, bool NORM, bool OPTIONAL>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_forward(const __grid_constant__ Forward<A> a) {
  using T = typename A::T;
  using P = typename A::P;
  using R = typename A::R;
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = n < a.tokens;  // the last block's spare rows take part in the barriers only
  int count = inside ? a.width / VEC : 0;
  const T* const x_row = a.x[n];
  const R* const residual_row = a.residual[n];
  R* const residual_out_row = a.residual_out[n];
  T* const out_row = a.out[n];
  // What is normed is `sum` with a residual, else x.
  Vector<T, VEC> x[V > 0 ? V : 1];
  Vector<R, VEC> sum[V > 0 ? V : 1];
  Vector<P, VEC> gates[V > 0 ? V : 1];
  if constexpr (V > 0)
    each_vector<V>(count, [&](int j, int i) {
      x[j] = load<VEC>(x_row + i * VEC);
      if constexpr (RESIDUAL || A::kGatesNorm) sum[j] = load<VEC>(residual_row + i * VEC);
    });
  const int r = !inside || (OPTIONAL && a.cu == nullptr) ? 0 : find_row(a.cu, a.num_rows, n);
  const P *const gate_row = a.gate[r], *const shift_row = a.shift[r], *const scale_row = a.scale[r];

  if (inside && r == a.num_rows) {  // slack
    each_vector<0>(count, [&](int, int i) {
      if constexpr (RESIDUAL || A::kGatesNorm) store_zeros<VEC>(residual_out_row + i * VEC);
      if constexpr (NORM && !A::kGatesNorm) store_zeros<VEC>(out_row + i * VEC);
    });
    if (NORM && threadIdx.x == 0) a.mean[n] = a.rstd[n] = 0;
    count = 0;
  }
  const bool used = count > 0;

  if constexpr (RESIDUAL) {
    // All before the first store, which the compiler must take for one into the next load. Wider than x, they would not fit.
    constexpr bool kBefore = V > 0 && sizeof(P) == sizeof(T);
    const bool gated = !OPTIONAL || a.gate.data != nullptr;
    if constexpr (kBefore)
      if (gated) each_vector<V>(count, [&](int j, int i) { gates[j] = load<VEC>(gate_row + i * VEC); });
    each_vector<V>(count, [&](int j, int i) {
      const int g = kBefore ? j : 0;
      if constexpr (!kBefore)
        if (gated) gates[g] = load<VEC>(gate_row + i * VEC);
      if constexpr (V == 0) x[0] = load<VEC>(x_row + i * VEC), sum[0] = load<VEC>(residual_row + i * VEC);
      for (int k = 0; k < VEC; ++k) sum[j].set(k, gated ? fmaf(gates[g][k], x[j][k], sum[j][k]) : x[j][k] + sum[j][k]);
      store(residual_out_row + i * VEC, sum[j]);
    });
  }

  if constexpr (NORM) {
    // The normed row as stored. Without registers for it, each thread reads back what it wrote itself.
    const auto value = [&](int j, int i) {
      if constexpr (V > 0 && RESIDUAL) {
        keep_packed(sum[j]);
        return sum[j];
      } else if constexpr (V > 0) {
        keep_packed(x[j]);
        return x[j];
      } else if constexpr (RESIDUAL) {
        return load<VEC>(residual_out_row + i * VEC);
      } else {
        return load<VEC>(x_row + i * VEC);
      }
    };
    float* scratch = reinterpret_cast<float*>(shared_memory);  // three floats per warp
    float mean[1] = {}, sums[2] = {};                          // of x - mean and its square
    if (!a.rms) {
      each_vector<V>(count, [&](int j, int i) {
        const auto y = value(j, i);
        float total = 0;
        for (int k = 0; k < VEC; ++k) total += y[k];
        mean[0] += total;
      });
      row_sums(mean, scratch);
      mean[0] /= a.width;
    }
    each_vector<V>(count, [&](int j, int i) {
      const auto y = value(j, i);
      float total = 0, square = 0;
      for (int k = 0; k < VEC; ++k) {
        const float centred = y[k] - mean[0];
        total += centred, square = fmaf(centred, centred, square);
      }
      sums[0] += total, sums[1] += square;
    });
    row_sums(sums, scratch + blockDim.x * blockDim.y / kWarp);
    // The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean, and gives zeros.
    const float left = a.rms ? 0 : sums[0] / a.width;
    mean[0] += left;
    const float rstd = 1 / sqrtf(fmaxf(sums[1] / a.width - left * left, 0) + a.eps);
    if (used && threadIdx.x == 0) a.mean[n] = mean[0], a.rstd[n] = rstd;

    const bool scaled = !OPTIONAL || a.scale.data != nullptr, shifted = !OPTIONAL || a.shift.data != nullptr;
    each_vector<V>(count, [&](int j, int i) {
      const auto h = value(j, i);
      Vector<P, VEC> scale, shift;
      if (scaled) scale = load<VEC>(scale_row + i * VEC);
      if (shifted) shift = load<VEC>(shift_row + i * VEC);
      float y[VEC];
      for (int k = 0; k < VEC; ++k) y[k] = (h[k] - mean[0]) * rstd;
      if (OPTIONAL && a.weight != nullptr) {
        const auto weight = load<VEC>(a.weight + i * VEC);
        for (int k = 0; k < VEC; ++k) y[k] *= weight[k];
      }
      if (OPTIONAL && a.bias != nullptr) {
        const auto bias = load<VEC>(a.bias + i * VEC);
        for (int k = 0; k < VEC; ++k) y[k] += bias[k];
      }
      if constexpr (A::kGatesNorm) {
        if constexpr (V == 0) sum[0] = load<VEC>(residual_row + i * VEC);
        for (int k = 0; k < VEC; ++k) sum[j].set(k, fmaf(y[k], scaled ? scale[k] : 1, sum[j][k]));
        store(residual_out_row + i * VEC, sum[j]);
      } else {
        Vector<T, VEC> out;
        for (int k = 0; k < VEC; ++k) out.set(k, fmaf(y[k], scaled ? 1 + scale[k] : 1, shifted ? shift[k] : 0));
        store(out_row + i * VEC, out);
      }
    });
  }
}

template <class A, bool RESIDUAL, bool NORM>
void run_forward(const char* op, const AdaLn& a) {
  using T = typename A::T;
  using P = typename A::P;
  using R = typename A::R;
  Forward<A> f{};
  f.residual = rows<const R>(a.residual), f.x = rows<const T>(a.x), f.gate = rows<const P>(a.gate);
  f.shift = rows<const P>(a.shift), f.scale = rows<const P>(a.scale);
  f.weight = static_cast<const P*>(a.weight.data), f.bias = static_cast<const P*>(a.bias.data), f.cu = a.cu_rows.ints();
  f.residual_out = rows<R>(NORM ? a.residual_out : a.out), f.out = rows<T>(a.out);
  f.mean = static_cast<float*>(a.mean.data), f.rstd = static_cast<float*>(a.rstd.data);
  f.tokens = a.x.size[0], f.width = static_cast<int>(a.x.size[1]),
  f.num_rows = a.cu_rows ? static_cast<int>(a.cu_rows.size[0] - 1) : 1;
  f.rms = a.rms, f.eps = a.eps;

  constexpr int kWide = 16 / sizeof(T);
  const bool wide = f.width % kWide == 0 &&
                    aligned(16, {&a.residual, &a.x, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual_out, &a.out});
  const int vectors = f.width / (wide ? kWide : 1), warps = static_cast<int>(ceil_div(vectors, kWarp * kVectors));
  const dim3 block(std::clamp(warps * kWarp, kWarp, kMaxThreads), std::max(1, kBlockThreads / std::max(warps * kWarp, kWarp)));
  const dim3 grid(static_cast<unsigned>(ceil_div(f.tokens, block.y)));
  const size_t shared = NORM ? 3 * block.x * block.y / kWarp * sizeof(float) : 0;
  const bool in_registers = static_cast<int>(block.x) * kVectors >= vectors;
  const bool whole = a.cu_rows && (!NORM || (a.shift && a.scale && !a.weight && !a.bias)) && (!RESIDUAL || a.gate);
  auto kernel = wide && in_registers ? adaln_forward<A, kWide, kVectors, RESIDUAL, NORM, true>
                : wide               ? adaln_forward<A, kWide, 0, RESIDUAL, NORM, true>
                                     : adaln_forward<A, 1, 0, RESIDUAL, NORM, true>;
  if constexpr (!A::kGatesNorm)
    if (wide && in_registers && whole) kernel = adaln_forward<A, kWide, kVectors, RESIDUAL, NORM, false>;
  launch({op, current_stream(a.x)}, kernel, grid, block, shared, f);
}

}  // namespace

void layer_norm_modulate_forward(const AdaLn& a) {
  with_types(a, [&](auto types) { run_forward<decltype(types), false, true>("layer_norm_modulate", a); });
}

void gate_residual_forward(const AdaLn& a) {
  with_types(a, [&](auto types) { run_forward<decltype(types), true, false>("gate_residual", a); });
}

void gate_residual_layer_norm_modulate_forward(const AdaLn& a) {
  with_types(a, [&](auto types) { run_forward<decltype(types), true, true>("gate_residual_layer_norm_modulate", a); });
}

void norm_gate_residual_forward(const AdaLn& a) {
  with_types(a, [&](auto types) { run_forward<typename decltype(types)::GatesNorm, false, true>("norm_gate_residual", a); });
}

}  // namespace sora::cuda
