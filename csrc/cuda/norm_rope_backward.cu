// Norm and RoPE of given tables, backward. With g the gradient rotated back, xhat = (x - mean) rstd and u = g weight:
//
//   dx = rstd (u - mean(u) - xhat mean(u xhat))     without mean(u) for RMS
//   dweight = sum of g xhat, dbias = sum of g, over tokens (and heads, unless across them)
//
// A team goes through some groups, each twice: first for the two means and its shares of dweight and dbias, which stay in
// registers, then for dx. With U = 1 a group's units stay in registers between the passes: 3 H d elements a token. A block adds its
// teams' sums in order in shared memory; sum_parts adds up the blocks in order. All sums are float32. See norm_rope.cuh for who
// owns what.
#include "norm_rope.cuh"

namespace sora::cuda {
namespace {

constexpr int64_t kMaxBlocks = 1024;  // so many parts sum_parts reads in no time, next to what the groups move

// The channel, in the weight, of the u (side 0) or v of pair k of a unit.
template <int VEC, class T, class W>
__device__ __forceinline__ int channel_of(const NormRopeCall<T, W>& a, const Place& place, int side, int k) {
  const int i = a.interleaved ? 2 * k + side : side * VEC + k;
  return place.unit.head * a.channels + (i < VEC ? place.unit.first + i : place.unit.second + i - VEC);
}

// Sums of one unit over groups.
template <int VEC>
struct Totals {
  float weight[2][VEC] = {}, bias[2][VEC] = {};
};

template <class T, class W, int VEC, bool LAYER>
struct Group {
  const NormRopeCall<T, W>& a;
  const Head at;
  const float mean, rstd;

  __device__ Group(const NormRopeCall<T, W>& a, int64_t group)
      : a(a), at(head_of(a, group)), mean(LAYER ? a.mean[group] : 0), rstd(a.rstd[group]) {}

  __device__ __forceinline__ void read(const Place& place, Pairs<T, VEC>& x, Pairs<T, VEC>& dout) const {
    const int head = at.head + place.unit.head;
    x.read(a.x.at(at.token, head), place.unit), dout.read(a.dout.at(at.token, head), place.unit);
  }

  // g and xhat of a unit. Of an odd number of channels the last unit has no v.
  __device__ __forceinline__ void rotate_back(const Place& place, const Pairs<T, VEC>& x, const Pairs<T, VEC>& dout,
                                              float (&g)[2][VEC], float (&xhat)[2][VEC]) const {
    dout.get(a.interleaved, g[0], g[1]), x.get(a.interleaved, xhat[0], xhat[1]);
    rotate(a, at, place, -1, g);
    for (int e = 0; e < 2 * VEC; ++e) xhat[e / VEC][e % VEC] = (xhat[e / VEC][e % VEC] - mean) * rstd;
    if (VEC == 1 && !place.both) g[1][0] = xhat[1][0] = 0;
  }

  // u of g, in place.
  __device__ __forceinline__ void multiply_weight(const Place& place, float (&g)[2][VEC]) const {
    if (a.weight == nullptr) return;
    float w[2][VEC];
    parameters(a, a.weight, place, w);
    for (int e = 0; e < 2 * VEC; ++e) g[e / VEC][e % VEC] *= w[e / VEC][e % VEC];
  }

  // First pass: adds u xhat and u to `sums`; total(side, k, g xhat, g) for dweight and dbias.
  template <class Total>
  __device__ __forceinline__ void add_sums(const Place& place, const Pairs<T, VEC>& x, const Pairs<T, VEC>& dout, float (&sums)[2],
                                           Total total) const {
    float g[2][VEC], xhat[2][VEC];
    rotate_back(place, x, dout, g, xhat);
    for (int e = 0; e < 2 * VEC; ++e) total(e / VEC, e % VEC, g[e / VEC][e % VEC], xhat[e / VEC][e % VEC]);
    multiply_weight(place, g);
    for (int e = 0; e < 2 * VEC; ++e) {
      const float u = g[e / VEC][e % VEC];
      sums[0] = fmaf(u, xhat[e / VEC][e % VEC], sums[0]);
      if (LAYER) sums[1] += u;
    }
  }

  // Second pass: dx of a unit, from the means of u xhat and u.
  __device__ __forceinline__ void write_dx(const Place& place, const Pairs<T, VEC>& x, const Pairs<T, VEC>& dout, float along,
                                           float level) const {
    float g[2][VEC], xhat[2][VEC];
    rotate_back(place, x, dout, g, xhat);
    multiply_weight(place, g);
    for (int e = 0; e < 2 * VEC; ++e) {
      float& u = g[e / VEC][e % VEC];
      u = fmaf(-xhat[e / VEC][e % VEC], along, u - level) * rstd;
    }
    Pairs<T, VEC> dx;
    dx.set(a.interleaved, g[0], g[1]);
    write(a.dx.at(at.token, at.head + place.unit.head), place, dx);
  }
};

// The sums of the block's teams, in their order.
template <int VEC, class T, class W>
__device__ __forceinline__ void write_parts(const NormRopeCall<T, W>& a, const Place& place, const Totals<VEC>& totals) {
  float* sums = reinterpret_cast<float*>(shared_memory) + TeamSums::kFloats;
  const auto add = [&](float* parts, const float (&mine)[2][VEC]) {
    if (parts == nullptr) return;
    for (int team = 0; team < static_cast<int>(blockDim.y); ++team) {
      __syncthreads();
      if (team != static_cast<int>(threadIdx.y) || static_cast<int>(threadIdx.x) >= a.units) continue;
      for (int e = 0; e < 2 * VEC; ++e) {
        if (VEC == 1 && e == 1 && !place.both) continue;
        float& sum = sums[channel_of<VEC>(a, place, e / VEC, e % VEC)];
        sum = team == 0 ? mine[e / VEC][e % VEC] : sum + mine[e / VEC][e % VEC];
      }
    }
    __syncthreads();
    const int width = a.width(), threads = blockDim.x * blockDim.y;
    for (int i = threadIdx.y * blockDim.x + threadIdx.x; i < width; i += threads)
      parts[static_cast<int64_t>(blockIdx.x) * width + i] = sums[i];
  };
  add(a.weight_parts, totals.weight), add(a.bias_parts, totals.bias);
}

// LayerNorm has sums of two kinds, and so takes more registers than blocks of kMaxThreads leave.
template <bool LAYER>
constexpr int kThreads = LAYER ? kBlockThreads : kMaxThreads;

template <class T, class W, int VEC, int U, bool LAYER>
__global__ void __launch_bounds__(kThreads<LAYER>, 1) norm_rope_backward(const __grid_constant__ NormRopeCall<T, W> a) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.steps * blockDim.y + threadIdx.y;
  const float channels = a.width();
  TeamSums team_sums;
  Totals<VEC> totals;
  Place place;
  Pairs<T, VEC> x, dout;
  float *const weight_part = a.weight_parts == nullptr ? nullptr : a.weight_parts + blockIdx.x * static_cast<int64_t>(a.width()),
               *const bias_part = a.bias_parts == nullptr ? nullptr : a.bias_parts + blockIdx.x * static_cast<int64_t>(a.width());
  if constexpr (U > 0) each_vector<U>(a.units, [&](int, int q) { place = place_at<VEC>(a, q); });

  for (int64_t step = 0; step < a.steps; ++step) {
    const int64_t mine = first + step * blockDim.y;
    const int units = mine < a.groups ? a.units : 0;  // spare teams take part in the sums only
    const Group<T, W, VEC, LAYER> group(a, min(mine, a.groups - 1));
    const auto read = [&](int q) {
      if constexpr (U == 0) place = place_at<VEC>(a, q);
      group.read(place, x, dout);
    };
    float sums[2] = {};
    each_vector<U>(units, [&](int, int q) {
      read(q);
      group.add_sums(place, x, dout, sums, [&](int side, int k, float g, float xhat) {
        if constexpr (U > 0) {
          totals.weight[side][k] = fmaf(g, xhat, totals.weight[side][k]);
          if (LAYER) totals.bias[side][k] += g;
        } else if (side == 0 || place.both) {  // the block's only team; a channel is always the same thread's
          const int channel = channel_of<VEC>(a, place, side, k);
          if (weight_part != nullptr) weight_part[channel] = fmaf(g, xhat, step == 0 ? 0 : weight_part[channel]);
          if (LAYER && bias_part != nullptr) bias_part[channel] = g + (step == 0 ? 0 : bias_part[channel]);
        }
      });
    });
    team_sums(sums);
    each_vector<U>(units, [&](int, int q) {
      if constexpr (U == 0)
        read(q);
      else if constexpr (VEC > 1)
        x.keep_packed(), dout.keep_packed();
      group.write_dx(place, x, dout, sums[0] / channels, LAYER ? sums[1] / channels : 0);
    });
  }
  if constexpr (U > 0) write_parts<VEC>(a, place, totals);
}

// A block owns 32 columns of dweight and dbias.
template <class T, class W>
__global__ void __launch_bounds__(kWarp* kLanes, 1) sum_parts(const __grid_constant__ NormRopeCall<T, W> a, int64_t blocks) {
  const int width = a.width(), column = blockIdx.x * kWarp + threadIdx.x;
  const auto sum = [&](const float* parts, W* to_) {
    if (to_ == nullptr) return;
    float sums[1];
    column_sums(column < width ? blocks : 0, sums, [&](int64_t block, float (&x)[1]) { x[0] += parts[block * width + column]; });
    if (threadIdx.y == 0 && column < width) to_[column] = to<W>(sums[0]);
  };
  sum(a.weight_parts, a.dweight), sum(a.bias_parts, a.dbias);
}

template <class T, class W, bool LAYER>
void run_backward(const NormRope& a) {
  const QkNorm& p = a.part;
  NormRopeCall<T, W> call = make_call<T, W>(a);
  call.dout = heads<const T>(p.dout), call.dx = heads<T>(p.dx);
  call.dweight = static_cast<W*>(p.dweight.data), call.dbias = static_cast<W*>(a.dbias.data);
  const Launch on{"norm_rope_backward", current_stream(p.x)};
  with_team<T, W>(call, a, kThreads<LAYER>, [&](auto vec, auto u, dim3 block) {
    const int64_t width = call.width(), teams = ceil_div(call.groups, block.y);
    call.steps = ceil_div(teams, kMaxBlocks);
    const int64_t blocks = call.steps == 0 ? 0 : ceil_div(teams, call.steps);
    const int64_t floats = blocks * width;
    const Workspace workspace(p.x, floats * ((p.dweight ? 1 : 0) + (a.dbias ? 1 : 0)));
    if (p.dweight) call.weight_parts = workspace.data();
    if (a.dbias) call.bias_parts = workspace.data() + (p.dweight ? floats : 0);
    launch(on, norm_rope_backward<T, W, vec, u, LAYER>, static_cast<unsigned>(blocks), block,
           TeamSums::kBytes + (u > 0 ? width * sizeof(float) : 0), call);
    if (p.dweight || a.dbias)
      launch(on, sum_parts<T, W>, static_cast<unsigned>(ceil_div(width, kWarp)), dim3(kWarp, kLanes), column_sums_bytes<1>, call,
             blocks);
  });
}

}  // namespace

void norm_rope_backward(const NormRope& a) {
  with_types(a, [&](auto t, auto w) {
    (a.layer ? run_backward<decltype(t), decltype(w), true> : run_backward<decltype(t), decltype(w), false>)(a);
  });
}

}  // namespace sora::cuda
