// What the kernels of RoPE share: the angles of a token, and the units in which its heads are moved.
//
// A block owns some consecutive tokens of q or of k (blockIdx.y), one after the other. For each it first computes the cosines and
// sines of the d / 2 pairs, one pair to a thread, into shared memory. They serve all heads. A unit is VEC pairs of one head in two
// vectors half a head apart. So neighbouring threads move neighbouring vectors, be the pairs interleaved or halves. A thread owns
// up to kUnits units (U), which stay in registers between the norm's sum and the rotation.
//
// The norm's sum of a head adds its units' sums in order. Across heads, a token's adds its heads' in order.
//
// Angles are in turns, in float64: (origin + step index) frequency. The frequencies theta^(-p/n) / 2 pi of all pairs are a kernel
// argument. What is left after whole quarter turns is exact, and float32 from there on loses no more than its rounding.
//
// Heads that cannot be moved in vectors of at least four, or are too many, take the variant U = 0, which reads them again.
#pragma once

#include <cmath>
#include <type_traits>

#include "common.cuh"
#include "kernels.h"

namespace sora::cuda {

constexpr int kUnits = 2;
constexpr int kMaxPairs = 256;

// A tensor [N, H, d] whose last axis is contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t token, head;  // strides
  __device__ __forceinline__ T* at(int64_t n, int h) const { return data + n * token + h * head; }
};
template <class T>
Heads<T> heads(const Tensor& t) {
  return {static_cast<T*>(t.data), t.stride[0], t.stride[1]};
}

template <class T, class W>
struct Part {  // q or k
  Heads<const T> x, dout;
  Heads<T> out, dx;
  const W* weight;
  float* rstd;  // [N, H] or [N, 1]
  W* dweight;
  float* partial;  // [blocks, width of the weight]
  int heads;
};

template <class T, class W>
struct RopeCall {
  Part<T, W> parts[2];
  const int32_t *cu_spans, *grid;
  const float *origin, *step;
  int64_t tokens;
  int spans, pairs, first_h, first_w;  // the first pairs that turn with h and with w
  bool interleaved, inverse, across_heads;
  float eps;
  double frequency[kMaxPairs];  // turns per position
};

struct Turn {
  float cosine, sine;
};

// Exact up to the last bit or so: quarter turns are taken off in float64, the rest is at most an eighth of a turn.
__device__ __forceinline__ Turn turn(double turns) {
  constexpr double kHalfPi = 1.57079632679489661923;
  const double quarters = rint(4 * turns);
  const float x = static_cast<float>((4 * turns - quarters) * kHalfPi), z = x * x;
  // Minimax polynomials on [-pi/4, pi/4] (Cephes).
  const float sine = fmaf(x * z, fmaf(z, fmaf(z, -1.9515295891e-4f, 8.3321608736e-3f), -1.6666654611e-1f), x);
  const float cosine =
      fmaf(z * z, fmaf(z, fmaf(z, 2.443315711809948e-5f, -1.388731625493765e-3f), 4.166664568298827e-2f), fmaf(z, -0.5f, 1));
  switch (static_cast<int64_t>(quarters) & 3) {
    case 0:
      return {cosine, sine};
    case 1:
      return {-sine, cosine};
    case 2:
      return {-cosine, -sine};
    default:
      return {sine, -cosine};
  }
}

// What a block keeps in shared memory.
struct SharedMemory {
  double* frequency;  // [pairs]
  Turn* table;        // [pairs], of the present token
  float* unit_sums;   // [units]
  float* head_sums;   // [heads]
  float* totals;      // backward: g xhat of each unit, in the order of `total_index`

  __device__ SharedMemory(int pairs, int units, int num_heads)
      : frequency(reinterpret_cast<double*>(shared_memory)),
        table(reinterpret_cast<Turn*>(frequency + pairs)),
        unit_sums(reinterpret_cast<float*>(table + pairs)),
        head_sums(unit_sums + units),
        totals(reinterpret_cast<float*>(shared_memory) + (4 * pairs + units + num_heads + 3) / 4 * 4) {}
  static size_t bytes(int pairs, int units, int num_heads, int totals) {
    return ((4 * pairs + units + num_heads + 3) / 4 * 4 + totals) * sizeof(float);
  }
};

template <class T, class W>
__device__ __forceinline__ void fill_table(const RopeCall<T, W>& a, const SharedMemory& shared, int span, int64_t n) {
  const int32_t* size = a.grid + 3 * span;
  const int height = max(size[1], 1), width = max(size[2], 1), raster = static_cast<int>(n - a.cu_spans[span]);
  for (int p = threadIdx.x; p < a.pairs; p += blockDim.x) {
    const int axis = p < a.first_h ? 0 : p < a.first_w ? 1 : 2;
    const int index = axis == 0 ? raster / width / height : axis == 1 ? raster / width % height : raster % width;
    const double position = static_cast<double>(a.origin[3 * span + axis]) + static_cast<double>(a.step[3 * span + axis]) * index;
    Turn t = turn(position * shared.frequency[p]);
    if (a.inverse) t.sine = -t.sine;
    shared.table[p] = t;
  }
}

struct Unit {
  int head, first, second;  // channels of its two vectors
  int pair, other_pair;     // pair k of the unit is pair + k of the head, in the unit's second half other_pair + k
};
// Of `pairs` of a head, the unit whose vectors begin with the i-th channel of each half.
template <int VEC>
__device__ __forceinline__ Unit unit_of(int head, int i, int pairs, bool interleaved) {
  if (!interleaved) return {head, i, i + pairs, i, i};
  if (VEC == 1) return {head, 2 * i, 2 * i + 1, i, i};
  return {head, i, i + pairs, i / 2, (i + pairs - VEC) / 2};
}
template <int VEC, class T, class W>
__device__ __forceinline__ Unit unit_at(const RopeCall<T, W>& a, int q) {
  const int per_head = a.pairs / VEC, head = q / per_head;
  return unit_of<VEC>(head, (q - head * per_head) * VEC, a.pairs, a.interleaved);
}

// The pairs (u, v) of a unit, and back.
template <class T, int VEC>
struct Pairs {
  Vector<T, VEC> first, second;

  __device__ __forceinline__ void read(const T* head, const Unit& unit) {
    first = load<VEC>(head + unit.first), second = load<VEC>(head + unit.second);
  }
  __device__ __forceinline__ void keep_packed() { cuda::keep_packed(first), cuda::keep_packed(second); }
  __device__ __forceinline__ void write(T* head, const Unit& unit) const {
    store(head + unit.first, first), store(head + unit.second, second);
  }
  __device__ __forceinline__ float channel(int i) const { return i < VEC ? first[i] : second[i - VEC]; }
  __device__ __forceinline__ void get(bool interleaved, float (&u)[VEC], float (&v)[VEC]) const {
    for (int k = 0; k < VEC; ++k) {
      u[k] = interleaved ? channel(2 * k) : first[k];
      v[k] = interleaved ? channel(2 * k + 1) : second[k];
    }
  }
  __device__ __forceinline__ void set(bool interleaved, const float (&u)[VEC], const float (&v)[VEC]) {
    for (int k = 0; k < VEC; ++k) {
      const int i = k + VEC;
      first.set(k, interleaved ? (k % 2 == 0 ? u[k / 2] : v[k / 2]) : u[k]);
      second.set(k, interleaved ? (i % 2 == 0 ? u[i / 2] : v[i / 2]) : v[k]);
    }
  }
};

template <int VEC>
__device__ __forceinline__ void rotate(const Turn* table, const Unit& unit, float (&u)[VEC], float (&v)[VEC]) {
  for (int k = 0; k < VEC; ++k) {
    const Turn t = table[(2 * k < VEC ? unit.pair : unit.other_pair) + k];
    const float x = u[k], y = v[k];
    u[k] = fmaf(x, t.cosine, -(y * t.sine)), v[k] = fmaf(x, t.sine, y * t.cosine);
  }
}

// The norm's weight of a unit.
template <int VEC, class T, class W>
__device__ __forceinline__ void weights(const RopeCall<T, W>& a, const Part<T, W>& p, const Unit& unit, float (&u)[VEC],
                                        float (&v)[VEC]) {
  Pairs<W, VEC> weight;
  weight.read(p.weight + (a.across_heads ? unit.head * 2 * a.pairs : 0), unit);
  weight.get(a.interleaved, u, v);
}

template <class T, class W>
__device__ __forceinline__ void zero_token(const RopeCall<T, W>& a, const Part<T, W>& p, const Heads<T>& out, int64_t n) {
  for (int i = threadIdx.x; i < p.heads * 2 * a.pairs; i += blockDim.x) out.at(n, i / (2 * a.pairs))[i % (2 * a.pairs)] = to<T>(0);
}

// From unit_sums, finish(sum) of each head or of all heads, as a function of the head. All threads of the block must call it.
template <int VEC, class T, class W, class Finish>
__device__ __forceinline__ auto group_sums(const RopeCall<T, W>& a, const Part<T, W>& p, const SharedMemory& shared,
                                           Finish finish) {
  const int per_head = a.pairs / VEC;
  __syncthreads();
  for (int h = threadIdx.x; h < p.heads; h += blockDim.x) {
    float sum = 0;
    for (int i = 0; i < per_head; ++i) sum += shared.unit_sums[h * per_head + i];
    shared.head_sums[h] = a.across_heads ? sum : finish(sum);
  }
  __syncthreads();
  float all = 0;
  if (a.across_heads) {
    for (int h = 0; h < p.heads; ++h) all += shared.head_sums[h];
    all = finish(all);
  }
  return [all, across = a.across_heads, sums = shared.head_sums](int h) { return across ? all : sums[h]; };
}

template <class T, class W>
RopeCall<T, W> make_call(const char* op, const Rope& rope, const Tensor& x) {
  RopeCall<T, W> a{};
  a.cu_spans = rope.cu_spans.ints(), a.grid = rope.grid.ints(), a.spans = static_cast<int>(rope.grid.size[0]);
  a.origin = static_cast<const float*>(rope.origin.data), a.step = static_cast<const float*>(rope.step.data);
  a.tokens = x.size[0], a.pairs = static_cast<int>(x.size[2] / 2), a.interleaved = rope.interleaved, a.inverse = rope.inverse;
  a.first_h = rope.axes_dim[0] / 2, a.first_w = a.first_h + rope.axes_dim[1] / 2;
  if (a.pairs > kMaxPairs)
    throw std::invalid_argument(std::string("sora_kernels: ") + op + ": expected a head dim of at most " +
                                std::to_string(2 * kMaxPairs) + ", got " + std::to_string(x.size[2]));
  for (int axis = 0, p = 0; axis < 3; ++axis)
    for (int i = 0, n = rope.axes_dim[axis] / 2; i < n; ++i)
      a.frequency[p++] = std::pow(rope.theta[axis], -static_cast<double>(i) / n) / 6.28318530717958647693;
  return a;
}

// Calls body(VEC, U), as compile-time constants, with the widest vectors that all rows allow.
template <class T, class W, class Body>
void with_width(const RopeCall<T, W>& a, std::initializer_list<const Tensor*> tensors, Body body) {
  const int units = std::max(a.parts[0].heads, a.parts[1].heads) * a.pairs;  // of one pair
  const auto fits = [&](int vec) {
    const int weight_bytes = std::min<int>(vec * sizeof(W), 16);
    const bool weights_fit = std::all_of(
        a.parts, a.parts + 2, [&](const Part<T, W>& p) { return reinterpret_cast<uintptr_t>(p.weight) % weight_bytes == 0; });
    return a.pairs % vec == 0 && units / vec <= kMaxThreads * kUnits && weights_fit && aligned(vec * sizeof(T), tensors);
  };
  using std::integral_constant;
  if constexpr (sizeof(T) == 2)
    if (fits(8)) return body(integral_constant<int, 8>{}, integral_constant<int, kUnits>{}, units / 8);
  if (fits(4)) return body(integral_constant<int, 4>{}, integral_constant<int, kUnits>{}, units / 4);
  body(integral_constant<int, 1>{}, integral_constant<int, 0>{}, units);
}

inline int block_size(int units) {
  return std::clamp(static_cast<int>(ceil_div(units, kWarp * kUnits)) * kWarp, 2 * kWarp, kMaxThreads);
}

// Calls body(T{}, W{}) with the storage types of x and of the weights.
template <class Body>
void with_types(const QkNorm (&parts)[2], Body body) {
  dispatch(parts[0].x.dtype, [&](auto t) {
    if (sizeof(t) == sizeof(float) || weight_type(parts) != DType::kFloat32)
      body(t, t);
    else
      body(t, float{});
  });
}

template <class T, class W>
Part<T, W> make_part(const QkNorm& p) {
  Part<T, W> part{};
  part.x = heads<const T>(p.x), part.dout = heads<const T>(p.dout), part.out = heads<T>(p.out), part.dx = heads<T>(p.dx);
  part.weight = static_cast<const W*>(p.weight.data), part.rstd = static_cast<float*>(p.rstd.data);
  part.dweight = static_cast<W*>(p.dweight.data), part.heads = static_cast<int>(p.x.size[1]);
  return part;
}

}  // namespace sora::cuda
