// RoPE of given tables, alone or behind a norm, of queries or keys [N, H, d]; forward.
//
// Each element is read and written once: 2 H d elements a token, and the token's row of both tables, which all heads find in L1.
// See norm_rope.cuh for who owns what.
#include "norm_rope.cuh"

namespace sora::cuda {
namespace {

enum class Norm { kNone, kRms, kLayer };

template <class T, class W, int VEC, int U, Norm NORM>
__global__ void __launch_bounds__(kMaxThreads, 1) norm_rope_forward(const __grid_constant__ NormRopeCall<T, W> a) {
  const int64_t group = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool inside = group < a.groups;  // the last block's spare teams take part in the sums only
  const Head at = head_of(a, inside ? group : 0);
  Place place;
  Pairs<T, VEC> x;
  const auto read = [&](int q) {
    place = place_at<VEC>(a, q);
    x.read(a.x.at(at.token, at.head + place.unit.head), place.unit);
  };
  const int units = inside ? a.units : 0;
  if constexpr (U > 0) each_vector<U>(units, [&](int, int q) { read(q); });
  const auto each_unit = [&](auto body) {
    each_vector<U>(units, [&](int, int q) {
      if constexpr (U == 0) read(q);
      body();
    });
  };

  float mean = 0, rstd = 1;
  if constexpr (NORM != Norm::kNone) {
    TeamSums team_sums;
    const float channels = a.width();
    if constexpr (NORM == Norm::kLayer) {
      float sum[1] = {};
      each_unit([&] { each_channel(place, x, [&](float value) { sum[0] += value; }); });
      team_sums(sum);
      mean = sum[0] / channels;
    }
    float sums[2] = {};  // of x - mean and its square
    each_unit([&] {
      each_channel(place, x, [&](float value) {
        const float centred = value - mean;
        sums[0] += centred, sums[1] = fmaf(centred, centred, sums[1]);
      });
    });
    team_sums(sums);
    // The mean of what is left corrects the rounding of the sum: a head of one large value has that very mean, and gives zeros.
    const float left = NORM == Norm::kLayer ? sums[0] / channels : 0;
    mean += left;
    rstd = 1 / sqrtf(fmaxf(sums[1] / channels - left * left, 0) + a.eps);
    if (inside && threadIdx.x == 0) {
      a.rstd[group] = rstd;
      if constexpr (NORM == Norm::kLayer) a.mean[group] = mean;
    }
  }

  each_unit([&] {
    float y[2][VEC];
    x.get(a.interleaved, y[0], y[1]);
    if constexpr (NORM != Norm::kNone) {
      for (int e = 0; e < 2 * VEC; ++e) y[e / VEC][e % VEC] = (y[e / VEC][e % VEC] - mean) * rstd;
      if (a.weight != nullptr) {
        float w[2][VEC];
        parameters(a, a.weight, place, w);
        for (int e = 0; e < 2 * VEC; ++e) y[e / VEC][e % VEC] *= w[e / VEC][e % VEC];
      }
      if (NORM == Norm::kLayer && a.bias != nullptr) {
        float b[2][VEC];
        parameters(a, a.bias, place, b);
        for (int e = 0; e < 2 * VEC; ++e) y[e / VEC][e % VEC] += b[e / VEC][e % VEC];
      }
    }
    rotate(a, at, place, a.inverse ? -1.0f : 1.0f, y);
    x.set(a.interleaved, y[0], y[1]);
    write(a.out.at(at.token, at.head + place.unit.head), place, x);
  });
}

template <class T, class W, Norm NORM>
void run_forward(const char* op, const NormRope& a) {
  NormRopeCall<T, W> call = make_call<T, W>(a);
  call.out = heads<T>(a.part.out);
  with_team<T, W>(call, a, kMaxThreads, [&](auto vec, auto u, dim3 block) {
    launch({op, current_stream(a.part.x)}, norm_rope_forward<T, W, vec, u, NORM>,
           static_cast<unsigned>(ceil_div(call.groups, block.y)), block, TeamSums::kBytes, call);
  });
}

}  // namespace

void apply_rope(const RopeTables& tables, const Tensor& x, const Tensor& out) {
  const NormRope a{{x, {}, {}, out, {}, {}, {}}, {}, {}, {}, tables, false, false, 0};
  dispatch(x.dtype, [&](auto t) { run_forward<decltype(t), decltype(t), Norm::kNone>("apply_rope", a); });
}

void norm_rope_forward(const NormRope& a) {
  with_types(a, [&](auto t, auto w) {
    constexpr auto kRms = Norm::kRms, kLayer = Norm::kLayer;
    (a.layer ? run_forward<decltype(t), decltype(w), kLayer> : run_forward<decltype(t), decltype(w), kRms>)("norm_rope", a);
  });
}

}  // namespace sora::cuda
