// What the kernels of RoPE from tables share: teams of threads, and the units in which heads are moved.
//
// A group is what is normed together: the channels of one head, or those of all heads of a token. A team of threads (threadIdx.x)
// owns a group; a block has several. A unit is VEC pairs of one head in two vectors, as in rope.cuh. Channels behind the rotated
// ones come in units of two neighbouring vectors; of an odd number of channels the last unit has one. A thread owns one unit, which
// stays in registers from its load to its store. So a team is as wide as its group has units: less than a warp for most heads,
// whose sums are then shuffles, and whole warps across heads.
//
// Groups of more units than a block has threads take the variant U = 0, which reads them again for each pass. Heads that cannot be
// moved in vectors of at least four take VEC = 1.
#pragma once

#include "rope.cuh"

namespace sora::cuda {

constexpr int kBlockThreads = 256;

template <class T, class W>
struct NormRopeCall {
  Heads<const T> x, dout;
  Heads<T> out, dx;
  const W *weight, *bias;
  const float *cos, *sin;
  int64_t cos_token, cos_head, sin_token, sin_head;  // strides
  float *mean, *rstd;                                // of the groups
  float *weight_parts, *bias_parts;                  // backward: [blocks, width()]; null if nobody wants the gradient
  W *dweight, *dbias;
  int64_t tokens, table_rows, groups, steps;  // groups that a team of the backward goes through
  int heads, channels, pairs, units;          // of a head: its channels and rotated pairs; units of a group
  bool interleaved, inverse, across_heads;
  float eps;

  __host__ __device__ int width() const { return across_heads ? heads * channels : channels; }
};

// Where a group is. The head of one across heads is 0, and its units have theirs.
struct Head {
  int64_t token, table_row;
  int head;
};
template <class T, class W>
__device__ __forceinline__ Head head_of(const NormRopeCall<T, W>& a, int64_t group) {
  int64_t token = group, table_row;
  if (a.groups <= 0x7fffffff) {  // 64-bit divisions take longer than all else
    if (!a.across_heads) token = static_cast<unsigned>(group) / static_cast<unsigned>(a.heads);
    table_row = token < a.table_rows ? token : static_cast<unsigned>(token) % static_cast<unsigned>(a.table_rows);
  } else {
    if (!a.across_heads) token = group / a.heads;
    table_row = token % a.table_rows;
  }
  return {token, table_row, a.across_heads ? 0 : static_cast<int>(group - token * a.heads)};
}

struct Place {
  Unit unit;
  bool rotated, both;  // both vectors
};
template <int VEC, class T, class W>
__device__ __forceinline__ Place place_at(const NormRopeCall<T, W>& a, int q) {
  const int per_head = (a.channels + 2 * VEC - 1) / (2 * VEC), head = q / per_head, i = (q - head * per_head) * VEC;
  Place place;
  place.rotated = i < a.pairs;
  place.unit = place.rotated ? unit_of<VEC>(head, i, a.pairs, a.interleaved) : Unit{head, 2 * i, 2 * i + VEC, 0, 0};
  place.both = VEC > 1 || place.unit.second < a.channels;
  if (!place.both) place.unit.second = place.unit.first;
  return place;
}

// body(value) for the channels of a unit.
template <class T, int VEC, class Body>
__device__ __forceinline__ void each_channel(const Place& place, const Pairs<T, VEC>& x, Body body) {
  for (int k = 0; k < VEC; ++k) body(x.first[k]);
  if (place.both)
    for (int k = 0; k < VEC; ++k) body(x.second[k]);
}

template <class T, int VEC>
__device__ __forceinline__ void write(T* head, const Place& place, const Pairs<T, VEC>& x) {
  if (place.both)
    x.write(head, place.unit);
  else
    store(head + place.unit.first, x.first);
}

// The weight or the bias of a unit, as the us and the vs of its pairs.
template <int VEC, class T, class W>
__device__ __forceinline__ void parameters(const NormRopeCall<T, W>& a, const W* of, const Place& place, float (&x)[2][VEC]) {
  Pairs<W, VEC> pairs;
  pairs.read(of + place.unit.head * a.channels, place.unit);
  pairs.get(a.interleaved, x[0], x[1]);
}

// Turns the pairs of a unit by their angles times `sign`.
template <int VEC, class T, class W>
__device__ __forceinline__ void rotate(const NormRopeCall<T, W>& a, const Head& at, const Place& place, float sign,
                                       float (&x)[2][VEC]) {
  if (!place.rotated) return;
  constexpr int kTogether = VEC == 1 ? 1 : VEC / 2;
  const int head = at.head + place.unit.head;
  const float* cos = a.cos + at.table_row * a.cos_token + head * a.cos_head;
  const float* sin = a.sin + at.table_row * a.sin_token + head * a.sin_head;
  for (int k = 0; k < VEC; k += kTogether) {
    const int pair = (k == 0 ? place.unit.pair : place.unit.other_pair) + k;
    const auto c = load<kTogether>(cos + pair), s = load<kTogether>(sin + pair);
    for (int i = 0; i < kTogether; ++i) {
      const float u = x[0][k + i], v = x[1][k + i], sine = sign * s[i];
      x[0][k + i] = fmaf(u, c[i], -(v * sine)), x[1][k + i] = fmaf(u, sine, v * c[i]);
    }
  }
}

// The sums over a team, the same bits in each of its threads. All threads of the block must call it, with at most two numbers.
class TeamSums {
 public:
  static constexpr int kFloats = 4 * kMaxThreads / kWarp;
  static constexpr size_t kBytes = kFloats * sizeof(float);

  template <int COUNT>
  __device__ __forceinline__ void operator()(float (&x)[COUNT]) {
    static_assert(COUNT <= 2);
    if (blockDim.x < kWarp) {
      for (int offset = blockDim.x / 2; offset > 0; offset /= 2)
        for (int c = 0; c < COUNT; ++c) x[c] += __shfl_xor_sync(kAllLanes, x[c], offset);
    } else {
      row_sums(x, reinterpret_cast<float*>(shared_memory) + (second_ ? kFloats / 2 : 0));
      second_ = !second_;
    }
  }

 private:
  bool second_ = false;  // half of the room, as the first may still be read
};

// ---- host ----

template <class T, class W>
NormRopeCall<T, W> make_call(const NormRope& a) {
  const QkNorm& p = a.part;
  const auto &cos = a.tables.cos, &sin = a.tables.sin;
  NormRopeCall<T, W> call{};
  call.x = heads<const T>(p.x), call.weight = static_cast<const W*>(p.weight.data), call.bias = static_cast<const W*>(a.bias.data);
  call.mean = static_cast<float*>(a.mean.data), call.rstd = static_cast<float*>(p.rstd.data);
  call.tokens = p.x.size[0], call.heads = static_cast<int>(p.x.size[1]), call.channels = static_cast<int>(p.x.size[2]);
  call.table_rows = 1;
  if (cos) {
    call.cos = static_cast<const float*>(cos.data), call.sin = static_cast<const float*>(sin.data);
    call.cos_token = cos.stride[0], call.sin_token = sin.stride[0], call.table_rows = std::max<int64_t>(cos.size[0], 1);
    if (cos.ndim == 3) call.cos_head = cos.stride[1], call.sin_head = sin.stride[1];
    call.pairs = static_cast<int>(cos.size[cos.ndim - 1]);
  }
  call.interleaved = a.tables.interleaved, call.inverse = a.tables.inverse, call.across_heads = a.across_heads, call.eps = a.eps;
  call.groups = call.heads == 0 ? 0 : call.tokens * (a.across_heads ? 1 : call.heads);
  return call;
}

// Calls body(VEC, U, block), the first two as compile-time constants, with the widest vectors that all rows allow.
template <class T, class W, class Body>
void with_team(NormRopeCall<T, W>& call, const NormRope& a, int max_threads, Body body) {
  const QkNorm& p = a.part;
  const auto units = [&](int vec) {
    return static_cast<int>(ceil_div(call.channels, 2 * vec)) * (call.across_heads ? call.heads : 1);
  };
  const auto fits = [&](int vec) {
    return call.pairs % vec == 0 && call.channels % (2 * vec) == 0 && units(vec) <= max_threads &&
           aligned(vec * sizeof(T), {&p.x, &p.out, &p.dout, &p.dx}) &&
           aligned(vec / 2 * sizeof(float), {&a.tables.cos, &a.tables.sin}) &&
           aligned(std::min<int64_t>(vec * sizeof(W), 16), {&p.weight, &a.bias});
  };
  const auto run = [&](auto vec, auto u) {
    call.units = units(vec);
    int threads = 1;
    while (threads < std::min(call.units, kWarp)) threads *= 2;
    if (call.units > kWarp) threads = std::min(static_cast<int>(ceil_div(call.units, kWarp)) * kWarp, max_threads);
    body(vec, u, dim3(threads, u > 0 ? std::max(kBlockThreads / threads, 1) : 1));
  };
  using std::integral_constant;
  if constexpr (sizeof(T) == 2)
    if (fits(8)) return run(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  if (fits(4)) return run(integral_constant<int, 4>{}, integral_constant<int, 1>{});
  if (units(1) <= max_threads) return run(integral_constant<int, 1>{}, integral_constant<int, 1>{});
  run(integral_constant<int, 1>{}, integral_constant<int, 0>{});
}

// Calls body(T{}, W{}) with the storage types of x and of weight and bias.
template <class Body>
void with_types(const NormRope& a, Body body) {
  const Tensor& parameter = a.part.weight ? a.part.weight : a.bias;
  dispatch(a.part.x.dtype, [&](auto t) {
    if (sizeof(t) == sizeof(float) || !parameter || parameter.dtype != DType::kFloat32)
      body(t, t);
    else
      body(t, float{});
  });
}

}  // namespace sora::cuda
