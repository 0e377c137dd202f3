// adaLN: norm, modulation and gated residual, forward.
//
//   residual_out = residual + gate[r] x                      (RESIDUAL)
//   out = norm(residual_out or x) (1 + scale[r]) + shift[r]  (NORM)
//
// A row of threads (threadIdx.x) owns a token: a warp up to 160 vectors of 16 bytes (1280 channels of bfloat16), then one more warp
// per 160. A block has about 128 threads; with 100 registers each, five blocks fit on a multiprocessor. The token's row stays in
// registers as it is stored, kVectors vectors to a thread, from the loads over the mean and the variance to the result, so that
// memory sees each input and output once: D (2 or 3 reads and writes) elements a token. All loads of the token are in flight before
// the search for its modulation row begins, which then costs no time of its own; the modulation rows are those of neighbouring
// tokens and come from L1. Statistics are float32; the variance is the mean of (x - mean)^2.
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

template <class T>
struct Forward {
  Rows<const T> residual, x, gate, shift, scale;
  const T *weight, *bias;
  const int32_t* cu;
  Rows<T> residual_out, out;
  float *mean, *rstd;
  int64_t tokens;
  int num_rows, width;
  bool rms;
  float eps;
};

template <class T, int VEC, int V, bool RESIDUAL, bool NORM, bool OPTIONAL>
__global__ void __launch_bounds__(kMaxThreads, 1) adaln_forward(const __grid_constant__ Forward<T> a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = n < a.tokens;  // the last block's spare rows take part in the barriers only
  int count = inside ? a.width / VEC : 0;
  const T *const x_row = a.x[n], *const residual_row = a.residual[n];
  T *const residual_out_row = a.residual_out[n], *const out_row = a.out[n];
  Vector<T, VEC> row[V > 0 ? V : 1], other[V > 0 ? V : 1], gates[V > 0 ? V : 1];
  if constexpr (V > 0)
    each_vector<V>(count, [&](int j, int i) {
      row[j] = load<VEC>(x_row + i * VEC);
      if constexpr (RESIDUAL) other[j] = load<VEC>(residual_row + i * VEC);
    });
  const int r = !inside || (OPTIONAL && a.cu == nullptr) ? 0 : find_row(a.cu, a.num_rows, n);
  const T *const gate_row = a.gate[r], *const shift_row = a.shift[r], *const scale_row = a.scale[r];

  if (inside && r == a.num_rows) {  // slack
    each_vector<0>(count, [&](int, int i) {
      if constexpr (RESIDUAL) store_zeros<VEC>(residual_out_row + i * VEC);
      if constexpr (NORM) store_zeros<VEC>(out_row + i * VEC);
    });
    if (NORM && threadIdx.x == 0) a.mean[n] = a.rstd[n] = 0;
    count = 0;
  }
  const bool used = count > 0;

  if constexpr (RESIDUAL) {
    // All before the first store, which the compiler must take for one into the next load.
    const bool gated = !OPTIONAL || a.gate.data != nullptr;
    if constexpr (V > 0)
      if (gated) each_vector<V>(count, [&](int j, int i) { gates[j] = load<VEC>(gate_row + i * VEC); });
    each_vector<V>(count, [&](int j, int i) {
      if constexpr (V == 0) {
        if (gated) gates[0] = load<VEC>(gate_row + i * VEC);
        row[0] = load<VEC>(x_row + i * VEC), other[0] = load<VEC>(residual_row + i * VEC);
      }
      for (int k = 0; k < VEC; ++k) row[j].set(k, gated ? fmaf(gates[j][k], row[j][k], other[j][k]) : row[j][k] + other[j][k]);
      store(residual_out_row + i * VEC, row[j]);
    });
  }

  if constexpr (NORM) {
    // The normed row as stored. Without registers for it, each thread reads back what it wrote itself.
    const auto value = [&](int j, int i) {
      if constexpr (V > 0) {
        keep_packed(row[j]);
        return row[j];
      }
      return load<VEC>((RESIDUAL ? residual_out_row : x_row) + i * VEC);
    };
    float* scratch = reinterpret_cast<float*>(shared_memory);  // three floats per warp
    float mean[1] = {}, sums[2] = {};                          // of x - mean and its square
    if (!a.rms) {
      each_vector<V>(count, [&](int j, int i) {
        const auto x = value(j, i);
        float sum = 0;
        for (int k = 0; k < VEC; ++k) sum += x[k];
        mean[0] += sum;
      });
      row_sums(mean, scratch);
      mean[0] /= a.width;
    }
    each_vector<V>(count, [&](int j, int i) {
      const auto x = value(j, i);
      float sum = 0, square = 0;
      for (int k = 0; k < VEC; ++k) {
        const float centred = x[k] - mean[0];
        sum += centred, square = fmaf(centred, centred, square);
      }
      sums[0] += sum, sums[1] += square;
    });
    row_sums(sums, scratch + blockDim.x * blockDim.y / kWarp);
    // The mean of what is left corrects the rounding of the sum: a row of one large value has that very mean, and gives zeros.
    const float left = a.rms ? 0 : sums[0] / a.width;
    mean[0] += left;
    const float rstd = 1 / sqrtf(fmaxf(sums[1] / a.width - left * left, 0) + a.eps);
    if (used && threadIdx.x == 0) a.mean[n] = mean[0], a.rstd[n] = rstd;

    const bool scaled = !OPTIONAL || a.scale.data != nullptr, shifted = !OPTIONAL || a.shift.data != nullptr;
    each_vector<V>(count, [&](int j, int i) {
      const auto x = value(j, i);
      Vector<T, VEC> scale, shift;
      if (scaled) scale = load<VEC>(scale_row + i * VEC);
      if (shifted) shift = load<VEC>(shift_row + i * VEC);
      float y[VEC];
      for (int k = 0; k < VEC; ++k) y[k] = (x[k] - mean[0]) * rstd;
      if (OPTIONAL && a.weight != nullptr) {
        const auto weight = load<VEC>(a.weight + i * VEC);
        for (int k = 0; k < VEC; ++k) y[k] *= weight[k];
      }
      if (OPTIONAL && a.bias != nullptr) {
        const auto bias = load<VEC>(a.bias + i * VEC);
        for (int k = 0; k < VEC; ++k) y[k] += bias[k];
      }
      Vector<T, VEC> out;
      for (int k = 0; k < VEC; ++k) out.set(k, fmaf(y[k], scaled ? 1 + scale[k] : 1, shifted ? shift[k] : 0));
      store(out_row + i * VEC, out);
    });
  }
}

template <class T, bool RESIDUAL, bool NORM>
void run_forward(const char* op, const AdaLn& a) {
  Forward<T> f{};
  f.residual = rows<const T>(a.residual), f.x = rows<const T>(a.x), f.gate = rows<const T>(a.gate);
  f.shift = rows<const T>(a.shift), f.scale = rows<const T>(a.scale);
  f.weight = static_cast<const T*>(a.weight.data), f.bias = static_cast<const T*>(a.bias.data), f.cu = a.cu_rows.ints();
  f.residual_out = rows<T>(NORM ? a.residual_out : a.out), f.out = rows<T>(a.out);
  f.mean = static_cast<float*>(a.mean.data), f.rstd = static_cast<float*>(a.rstd.data);
  f.tokens = a.x.size[0], f.width = static_cast<int>(a.x.size[1]),
  f.num_rows = a.cu_rows ? static_cast<int>(a.cu_rows.size[0] - 1) : 1;
  f.rms = a.rms, f.eps = a.eps;

  constexpr int kWide = 16 / sizeof(T);
  const bool wide =
      f.width % kWide == 0 &&
      aligned(16, sizeof(T), {&a.residual, &a.x, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual_out, &a.out});
  const int vectors = f.width / (wide ? kWide : 1), warps = static_cast<int>(ceil_div(vectors, kWarp * kVectors));
  const dim3 block(std::clamp(warps * kWarp, kWarp, kMaxThreads), std::max(1, kBlockThreads / std::max(warps * kWarp, kWarp)));
  const dim3 grid(static_cast<unsigned>(ceil_div(f.tokens, block.y)));
  const size_t shared = NORM ? 3 * block.x * block.y / kWarp * sizeof(float) : 0;
  const bool in_registers = static_cast<int>(block.x) * kVectors >= vectors;
  const bool whole = a.cu_rows && (!NORM || (a.shift && a.scale && !a.weight && !a.bias)) && (!RESIDUAL || a.gate);
  launch({op, current_stream(a.x)},
         wide && in_registers && whole ? adaln_forward<T, kWide, kVectors, RESIDUAL, NORM, false>
         : wide && in_registers        ? adaln_forward<T, kWide, kVectors, RESIDUAL, NORM, true>
         : wide                        ? adaln_forward<T, kWide, 0, RESIDUAL, NORM, true>
                                       : adaln_forward<T, 1, 0, RESIDUAL, NORM, true>,
         grid, block, shared, f);
}

}  // namespace

void layer_norm_modulate_forward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) { run_forward<decltype(t), false, true>("layer_norm_modulate", a); });
}

void gate_residual_forward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) { run_forward<decltype(t), true, false>("gate_residual", a); });
}

void gate_residual_layer_norm_modulate_forward(const AdaLn& a) {
  dispatch(a.x.dtype, [&](auto t) { run_forward<decltype(t), true, true>("gate_residual_layer_norm_modulate", a); });
}

}  // namespace sora::cuda
