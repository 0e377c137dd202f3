// exp2 and tanh of vectors.
#pragma once

#include "simd.h"

namespace sora::SORA_TIER {

// 2**f for |f| <= 1/2, by minimax fits that are exact at 0. Their relative error is 2e-09; of the rough one 3e-06, which is enough
// for numbers of 16 bits.
template <bool rough = false>
SORA_INLINE vf exp2_fraction(vf f) {
  vf p;
  if constexpr (rough) {
    p = 0x1.3a02ccp-7f * f + 0x1.c9fc46p-5f;
    p = p * f + 0x1.ec0378p-3f;
    p = p * f + 0x1.62e12cp-1f;
  } else {
    p = 0x1.41fbbcp-13f * f + 0x1.5f3e54p-10f;
    p = p * f + 0x1.3b2d4cp-7f;
    p = p * f + 0x1.c6aee8p-5f;
    p = p * f + 0x1.ebfbdcp-3f;
    p = p * f + 0x1.62e43p-1f;
  }
  return p * f + 1.0f;
}

// 2**x to 1 ulp or so, unless rough; 0 far below, NaN for NaN.
template <bool rough = false>
SORA_INLINE vf exp2(vf x) {
#if SORA_VECTOR_BYTES == 64
  // Masked, as GCC takes the plain forms to read an uninitialised vector.
  const __mmask16 all = 0xffff;
  const vf f = bits<vf>(_mm512_maskz_reduce_ps(all, bits<__m512>(x), 0));  // x - n; 0 for infinity
  return bits<vf>(_mm512_maskz_scalef_ps(all, bits<__m512>(exp2_fraction<rough>(f)), bits<__m512>(x - f)));
#else
  // Added to x, this leaves the nearest integer n as n + 127, the biased exponent of 2**n, in the sum's low bits.
  constexpr float kMagic = 0x1.8p23f + 127.0f;
  x = max(x, vf{} - 127.0f);
  const vf shifted = x + kMagic;
  return exp2_fraction<rough>(x - (shifted - kMagic)) * bits<vf>(bits<vu>(shifted) << 23);
#endif
}

// tanh to a few ulp, from exp. Below 0.6, where 1 - exp(-2|x|) would cancel, by a minimax fit of relative error 3e-9.
SORA_INLINE vf tanh(vf x) {
  const vf magnitude = bits<vf>(bits<vu>(x) & 0x7fffffff), e = exp2(magnitude * -2.88539008f), s = x * x;
  vf p = -0x1.82585p-8f * s + 0x1.54b8ap-6f;
  p = p * s - 0x1.b898dep-5f;
  p = p * s + 0x1.1109aep-3f;
  p = p * s - 0x1.55553ep-2f;
  const vf t = magnitude < 0.6f ? magnitude + magnitude * (s * p) : (1.0f - e) / (1.0f + e);
  return bits<vf>(bits<vu>(t) | (bits<vu>(x) & 0x80000000));
}

}  // namespace sora::SORA_TIER
