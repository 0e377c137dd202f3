// What the kernels share: storage types, wide loads, sums in a fixed order, the search for a token's row, and launches.
//
// Storage is float, __nv_bfloat16 or __half; arithmetic is float32. A Vector is what one thread moves at once: 16 bytes where rows
// allow it, one element otherwise. Only dynamic shared memory is used, `shared_memory`, cut up by each kernel.
//
// Sums that reach an output are written with fmaf, so that the compiler has no choice of what to contract: two kernels that share
// a formula give the same bits.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "../arguments.h"
#include "runtime.h"

namespace sora::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kMaxThreads = 512;  // of a block: leaves a thread 128 registers

extern __shared__ __align__(16) unsigned char shared_memory[];

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T to(float x) {
  if constexpr (sizeof(T) == 4)
    return x;
  else if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(x);
  else
    return __float2half(x);
}

// Of more than 16 bytes, next to vectors of a narrower type, in several moves.
template <class T, int VEC>
struct alignas(sizeof(T) * VEC < 16 ? sizeof(T) * VEC : 16) Vector {
  T x[VEC];
  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (std::is_same_v<T, __nv_bfloat16> && VEC % 2 == 0) {
      // One instruction each instead of one to cut the halves of a register apart and one to widen them.
      const unsigned pair = reinterpret_cast<const unsigned*>(x)[i / 2];
      return __uint_as_float(i % 2 == 0 ? pair << 16 : pair & 0xffff0000u);
    }
    return to_float(x[i]);
  }
  __device__ __forceinline__ void set(int i, float value) { x[i] = to<T>(value); }
};

template <int VEC, class T>
__device__ __forceinline__ Vector<T, VEC> load(const T* from) {
  return *reinterpret_cast<const Vector<T, VEC>*>(from);
}
template <int VEC, class T>
__device__ __forceinline__ void store(T* to, const Vector<T, VEC>& x) {
  *reinterpret_cast<Vector<T, VEC>*>(to) = x;
}
// Makes the compiler forget what it knows of x, so that it keeps the vector in registers as stored and not also as floats.
template <class T, int VEC>
__device__ __forceinline__ void keep_packed(Vector<T, VEC>& x) {
  static_assert(sizeof(x) % 4 == 0);
  for (size_t i = 0; i < sizeof(x) / 4; ++i) asm volatile("" : "+r"(reinterpret_cast<unsigned*>(&x)[i]));
}
template <int VEC, class T>
__device__ __forceinline__ void store_zeros(T* to) {
  Vector<T, VEC> zeros;
  for (int k = 0; k < VEC; ++k) zeros.set(k, 0);
  store(to, zeros);
}

// COUNT numbers, 16 bytes at a time if they are that many; `to` is aligned accordingly.
template <int COUNT>
__device__ __forceinline__ void store_floats(float* to, const float (&x)[COUNT]) {
  constexpr int kTogether = COUNT % 4 == 0 ? 4 : 1;
  for (int i = 0; i < COUNT; i += kTogether) {
    Vector<float, kTogether> together;
    for (int k = 0; k < kTogether; ++k) together.set(k, x[i + k]);
    store(to + i, together);
  }
}

// A matrix whose rows are contiguous; empty where an optional tensor is absent.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  __device__ __forceinline__ T* operator[](int64_t n) const { return data + n * stride; }
};
template <class T>
Rows<T> rows(const Tensor& t) {
  return {static_cast<T*>(t.data), t.stride[0]};
}

// f(j, i) for the vectors i of a row of `count` that this thread owns; with V > 0 they are at most V, and f may hold the j-th in
// registers.
template <int V, class F>
__device__ __forceinline__ void each_vector(int count, F f) {
  if constexpr (V > 0) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int i = threadIdx.x + j * blockDim.x;
      if (i < count) f(j, i);
    }
  } else {
    for (int i = threadIdx.x; i < count; i += blockDim.x) f(0, i);
  }
}

// The first of `count` rows that ends after token n, or `count` if none does: that token is slack.
__device__ __forceinline__ int find_row(const int32_t* cu, int count, int64_t n) {
  int low = 0, high = count;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (cu[middle + 1] > n)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The sums over a warp, the same bits in every lane.
__device__ __forceinline__ float warp_sum(float x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(kAllLanes, x, offset);
  return x;
}

// The sums over the blockDim.x threads of this thread's threadIdx.y, the same bits in each of them. All threads of the block must
// call it. `scratch` has COUNT floats per warp of the block; it may be used again behind the next barrier but one.
template <int COUNT>
__device__ __forceinline__ void row_sums(float (&x)[COUNT], float* scratch) {
  for (int c = 0; c < COUNT; ++c) x[c] = warp_sum(x[c]);
  const int warps = blockDim.x / kWarp;
  if (warps == 1) return;
  float* mine = scratch + threadIdx.y * warps * COUNT;
  if (threadIdx.x % kWarp == 0)
    for (int c = 0; c < COUNT; ++c) mine[threadIdx.x / kWarp * COUNT + c] = x[c];
  __syncthreads();
  for (int c = 0; c < COUNT; ++c) {
    x[c] = mine[c];
    for (int warp = 1; warp < warps; ++warp) x[c] += mine[warp * COUNT + c];
  }
}

// sums of term(i) over i < count, for the 32 columns of a block of kWarp x kLanes threads: lane y takes every kLanes-th term, then
// the lanes' sums are added in pairs. All threads of the block must call it, and have the result.
constexpr int kLanes = 8;
template <int COUNT, class Term>
__device__ __forceinline__ void column_sums(int64_t count, float (&x)[COUNT], Term term) {
  float* scratch = reinterpret_cast<float*>(shared_memory);  // [COUNT, kLanes, kWarp]
  for (int c = 0; c < COUNT; ++c) x[c] = 0;
  for (int64_t i = threadIdx.y; i < count; i += kLanes) term(i, x);
  for (int c = 0; c < COUNT; ++c) scratch[(c * kLanes + threadIdx.y) * kWarp + threadIdx.x] = x[c];
  __syncthreads();
  for (int c = 0; c < COUNT; ++c) {
    float lanes[kLanes];
    for (int y = 0; y < kLanes; ++y) lanes[y] = scratch[(c * kLanes + y) * kWarp + threadIdx.x];
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int y = 0; y < half; ++y) lanes[y] += lanes[y + half];
    x[c] = lanes[0];
  }
  __syncthreads();  // the next call may overwrite
}
template <int COUNT>
constexpr size_t column_sums_bytes = COUNT * kLanes * kWarp * sizeof(float);

// ---- host ----

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline void check(const char* op, cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("sora_kernels: ") + op + ": " + cudaGetErrorString(error));
}

// Shared memory that a block may have.
inline size_t max_shared_memory(const char* op) {
  int device = 0, bytes = 0;
  check(op, cudaGetDevice(&device));
  check(op, cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// What a launch needs besides its arguments.
struct Launch {
  const char* op;
  cudaStream_t stream;
};

template <class... Parameters, class... Arguments>
void launch(const Launch& on, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, const Arguments&... arguments) {
  if (grid.x == 0 || grid.y == 0) return;
  if (shared > 48 * 1024)
    check(on.op, cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = on.stream;
  check(on.op, cudaLaunchKernelEx(&config, kernel, arguments...));
}

// Calls body with a value of the storage type.
template <class Body>
void dispatch(DType dtype, Body body) {
  if (dtype == DType::kFloat32) return body(float{});
  if (dtype == DType::kBfloat16) return body(__nv_bfloat16{});
  return body(__half{});
}

// The same with the storage types of adaLN.
template <class Body>
void with_types(const AdaLn& a, Body body) {
  dispatch_adaln(a.types, [](DType dtype, auto of_type) { dispatch(dtype, of_type); }, body);
}

// Whether vectors of `bytes` can be moved from and to all rows of these tensors (those that are absent always can).
inline bool aligned(int64_t bytes, std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* t : tensors) {
    if (!*t) continue;
    if (reinterpret_cast<uintptr_t>(t->data) % bytes != 0) return false;
    for (int axis = 0; axis < t->ndim - 1; ++axis)
      if (t->size[axis] > 1 && t->stride[axis] * t->item_bytes % bytes != 0) return false;
  }
  return true;
}

}  // namespace sora::cuda
