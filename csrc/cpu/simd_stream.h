// Streaming stores: outputs that bypass the caches.
//
// A plain store first reads the line it writes and evicts another one. An output larger than the caches gains nothing from that.
#pragma once

#include "simd.h"

namespace sora::SORA_TIER {

// Outputs of at least as many bytes are streamed.
constexpr int64_t kStreamBytes = int64_t{8} << 20;

SORA_INLINE bool streams(const Tensor& out) {
  int64_t bytes = out.dtype == DType::kFloat32 ? 4 : 2;
  for (int i = 0; i < out.ndim; ++i) bytes *= out.size[i];
  return bytes >= kStreamBytes;
}

// store_lanes, past the caches if `stream`. Such stores are weakly ordered: see finish_streams.
template <class T>
SORA_INLINE void write_lanes(T* p, vf x, int n, bool stream) {
#if defined(__x86_64__)
  if (stream && n == W && reinterpret_cast<uintptr_t>(p) % (W * sizeof(T)) == 0) {
    alignas(W * sizeof(T)) T line[W];
    store(line, x);
#if SORA_VECTOR_BYTES == 64
    if constexpr (sizeof(T) == 4)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(p), bits<__m512i>(line));
    else
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(line));
#elif SORA_VECTOR_BYTES == 32
    if constexpr (sizeof(T) == 4)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bits<__m256i>(line));
    else
      _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(line));
#else
    if constexpr (sizeof(T) == 4)
      _mm_stream_si128(reinterpret_cast<__m128i*>(p), bits<__m128i>(line));
    else
      _mm_stream_si64(reinterpret_cast<long long*>(p), bits<long long>(line));
#endif
    return;
  }
#endif
  store_lanes(p, x, n);
}

// Orders a thread's streaming stores before all that other threads do after it. A parallel loop's body calls it last.
SORA_INLINE void finish_streams() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

}  // namespace sora::SORA_TIER
