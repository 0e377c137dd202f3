// The arguments of the ops that both compiled modules have, checked and decoded.
#pragma once

#include <cstdint>

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

// What is absent is left out: a factor, a summand, a gradient with the sums for it. Without cu_rows one row serves all tokens.
struct AdaLn {
  Tensor residual, x, gate, shift, scale, cu_rows, weight, bias;
  bool rms;
  float eps;
  Tensor residual_out, out, mean, rstd;
  // Backward.
  Tensor dresidual_out, dout, dresidual, dx, dgate, dshift, dscale, dweight, dbias;
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
