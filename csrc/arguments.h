// The arguments of the ops that both compiled modules have, checked and decoded.
#pragma once

#include <cstdint>
#include <type_traits>

#include "tensor.h"

namespace sora {

struct Rope {
  Tensor cu_spans, grid, origin, step;
  double theta[3];
  int32_t axes_dim[3];
  bool interleaved, inverse;
};

struct QkNorm {
  Tensor x, weight, rstd;    // one of q and k
  Tensor out;                // forward
  Tensor dout, dx, dweight;  // backward
};

// The weights' storage type: x's, or float32 beside x of 2 bytes.
inline __attribute__((always_inline)) DType weight_type(const QkNorm (&parts)[2]) {
  return parts[0].weight ? parts[0].weight.dtype : parts[1].weight ? parts[1].weight.dtype : parts[0].x.dtype;
}

// Angles of tokens that the caller has: float32 [M, r / 2], or [M, H, r / 2] of each head; token n has row n % M.
struct RopeTables {
  Tensor cos, sin;
  bool interleaved, inverse;
};

// A norm of heads, and a rotation behind it if there are tables. Only a LayerNorm has mean and bias.
struct NormRope {
  QkNorm part;
  Tensor bias, mean, dbias;
  RopeTables tables;
  bool layer, across_heads;
  float eps;
};

// What is absent is left out: a factor, a summand, a gradient with the sums for it. Without cu_rows one row serves all tokens.
// Storage types: next to tokens of 2 bytes, rows, weight and bias may be float32, and with them the residual.
struct AdaLnTypes {
  DType tokens, parameters, residual;
};

// The same as C++ types: T of tokens, P of the parameters, which are rows, weight and bias, R of the residual. A backward reads the
// norm's input, X, and the gradient of what it made of that, G. kGatesNorm: of norm_gate_residual.
template <class Tokens, class Parameters, class Residual, bool gates_norm = false>
struct AdaLnOf {
  using T = Tokens;
  using P = Parameters;
  using R = Residual;
  using X = std::conditional_t<gates_norm, T, R>;
  using G = std::conditional_t<gates_norm, R, T>;
  static constexpr bool kGatesNorm = gates_norm;
  using GatesNorm = AdaLnOf<T, P, R, true>;
};

// Calls body(AdaLnOf<...>{}); dispatch(dtype, body) calls body with a value of a storage type.
template <class Dispatch, class Body>
inline __attribute__((always_inline)) void dispatch_adaln(const AdaLnTypes& types, Dispatch dispatch, Body body) {
  dispatch(types.tokens, [&](auto t) {
    using T = decltype(t);
    if constexpr (sizeof(T) == sizeof(float))
      body(AdaLnOf<T, T, T>{});
    else if (types.residual == DType::kFloat32)
      body(AdaLnOf<T, float, float>{});
    else if (types.parameters == DType::kFloat32)
      body(AdaLnOf<T, float, T>{});
    else
      body(AdaLnOf<T, T, T>{});
  });
}

// norm_gate_residual adds to the residual what others write to `out`: it has residual_out and dresidual_out, but no out and no
// dout. Its gate is `scale`, which multiplies as it is, where others multiply by 1 + scale.
struct AdaLn {
  __attribute__((always_inline)) bool gates_norm() const { return !out && !dout; }

  Tensor residual, x, gate, shift, scale, cu_rows, weight, bias;
  bool rms;
  float eps;
  Tensor residual_out, out, mean, rstd;
  // Backward.
  Tensor dresidual_out, dout, dresidual, dx, dgate, dshift, dscale, dweight, dbias;
  AdaLnTypes types;
};

struct BiasGelu {
  Tensor x, bias, out;
  Tensor dout, dx, dbias;  // backward
};

struct PatchEmbed {
  const Tensor* videos;
  int64_t num_videos;
  int32_t patch[3];
  Tensor weight, bias, tokens;
  Tensor dtokens, dweight, dbias;
  const Tensor* dvideos;  // null: not wanted
};

}  // namespace sora
