// gelu(x + bias), in the tanh approximation, and its backward. With u = x + bias and z = sqrt(2 / pi) (u + 0.044715 u^3),
//
//   (1 + tanh z) / 2 = s = 1 / (1 + exp(-2 z)),   gelu(u) = u s,   gelu'(u) = s + u s (1 - s) 2 dz/du
//
// A block owns kTokens tokens of as many vectors as it has threads; a thread goes down the columns of one, with kTogether tokens in
// flight, and adds their gradients of the bias in float32. Each element moves once: 2 D elements a token forward, 3 D backward, and
// D / 8 (2-byte types) of sums, which sum_blocks reads back and adds in a fixed order.
#include "common.cuh"
#include "kernels.h"

namespace sora::cuda {
namespace {

constexpr int kTokens = 32, kTogether = 4;
constexpr int kBlockThreads = 128;

template <class T>
struct Call {
  Rows<const T> x, dout;
  const T* bias;
  Rows<T> out;     // the gradient of x, in the backward
  float* partial;  // [blocks, D]; null if nobody wants the bias's gradient
  T* dbias;
  int64_t tokens;
  int width;
};

struct Gelu {
  float value, slope;
};

// From e = exp(-2 |z|), which cannot overflow.
__device__ __forceinline__ Gelu gelu(float u) {
  constexpr float kLog2e = 1.44269504f, kSlope = 1.5957691216057308f, kCubic = 0.044715f;  // 2 z = kSlope (u + kCubic u^3)
  const float square = u * u, inner = fabsf(u) * fmaf(kSlope * kLog2e * kCubic, square, kSlope * kLog2e);
  const float e = exp2f(-inner), r = 1 / (1 + e), s = u < 0 ? e * r : r;
  const float bounded = square < 1e4f ? square : 1e4f;  // beyond, e is 0
  return {u * s, fmaf(u * (e * r * r), fmaf(3 * kSlope * kCubic, bounded, kSlope), s)};
}

template <class T, int VEC, bool BACKWARD>
__global__ void __launch_bounds__(kBlockThreads) bias_gelu(const __grid_constant__ Call<T> a) {
  const int column = (blockIdx.y * blockDim.x + threadIdx.x) * VEC;
  if (column >= a.width) return;
  float bias[VEC] = {}, total[VEC] = {};
  if (a.bias != nullptr) {
    const auto b = load<VEC>(a.bias + column);
    for (int k = 0; k < VEC; ++k) bias[k] = b[k];
  }
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens, end = min(begin + kTokens, a.tokens);
  for (int64_t n = begin; n < end; n += kTogether) {
    Vector<T, VEC> x[kTogether], dout[BACKWARD ? kTogether : 1];
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (n + j < end) {
        x[j] = load<VEC>(a.x[n + j] + column);
        if constexpr (BACKWARD) dout[j] = load<VEC>(a.dout[n + j] + column);
      }
#pragma unroll
    for (int j = 0; j < kTogether; ++j)
      if (n + j < end) {
        Vector<T, VEC> out;
        for (int k = 0; k < VEC; ++k) {
          const Gelu y = gelu(x[j][k] + bias[k]);
          if constexpr (BACKWARD) {
            const float gradient = dout[j][k] * y.slope;
            total[k] += gradient;
            out.set(k, gradient);
          } else {
            out.set(k, y.value);
          }
        }
        store(a.out[n + j] + column, out);
      }
  }
  if constexpr (BACKWARD)
    if (a.partial != nullptr) store_floats(a.partial + static_cast<int64_t>(blockIdx.x) * a.width + column, total);
}

// A block owns 32 columns of dbias.
template <class T>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_blocks(const __grid_constant__ Call<T> a, int64_t blocks) {
  const int column = blockIdx.x * kWarp + threadIdx.x;
  float sums[1];
  column_sums(column < a.width ? blocks : 0, sums,
              [&](int64_t block, float (&x)[1]) { x[0] += a.partial[block * a.width + column]; });
  if (threadIdx.y == 0 && column < a.width) a.dbias[column] = to<T>(sums[0]);
}

template <class T, bool BACKWARD>
void run(const char* op, const BiasGelu& a) {
  Call<T> c{};
  c.x = rows<const T>(a.x), c.dout = rows<const T>(a.dout), c.bias = static_cast<const T*>(a.bias.data);
  c.out = rows<T>(BACKWARD ? a.dx : a.out), c.dbias = static_cast<T*>(a.dbias.data);
  c.tokens = a.x.size[0], c.width = static_cast<int>(a.x.size[1]);
  const int64_t blocks = ceil_div(c.tokens, kTokens);
  const Workspace workspace(a.x, a.dbias ? blocks * c.width : 0);
  c.partial = workspace.data();

  constexpr int kWide = 16 / sizeof(T);
  const bool wide = c.width % kWide == 0 && aligned(16, {&a.x, &a.bias, &a.out, &a.dout, &a.dx});
  const int64_t vectors = c.width / (wide ? kWide : 1);
  const Launch on{op, current_stream(a.x)};
  launch(on, wide ? bias_gelu<T, kWide, BACKWARD> : bias_gelu<T, 1, BACKWARD>,
         dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(ceil_div(vectors, kBlockThreads))), kBlockThreads, 0, c);
  if (a.dbias)
    launch(on, sum_blocks<T>, dim3(static_cast<unsigned>(ceil_div(c.width, kWarp))), dim3(kWarp, kLanes), column_sums_bytes<1>, c,
           blocks);
}

}  // namespace

void bias_gelu_forward(const BiasGelu& a) {
  dispatch(a.x.dtype, [&](auto t) { run<decltype(t), false>("bias_gelu", a); });
}

void bias_gelu_backward(const BiasGelu& a) {
  dispatch(a.x.dtype, [&](auto t) { run<decltype(t), true>("bias_gelu_backward", a); });
}

}  // namespace sora::cuda
