// Stands in for CUDA's header when a .cu file is compiled as C++ for the harness: just what the kernels use. A launch runs at once.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __shared__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))

using std::max;
using std::min;

struct uint3 {
  unsigned x, y, z;
};
struct dim3 : uint3 {
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : uint3{x, y, z} {}
};
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace simt {

enum class Warp { kSync, kShuffle, kBallot };

// What a fiber waits for; see simt.cpp.
void barrier();
uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source);
void launch(dim3 grid, dim3 block, size_t shared, const void* kernel, void (*entry)(void*), void* arguments, size_t bytes);
void allow_shared_memory(const void* kernel, int bytes);

template <class T>
T shuffle(unsigned mask, T x, int source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &x, sizeof(T));
  bits = warp(Warp::kShuffle, mask, bits, source);
  memcpy(&x, &bits, sizeof(T));
  return x;
}
inline int lane() { return static_cast<int>((threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z)) % 32); }

}  // namespace simt

inline void __syncthreads() { simt::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { simt::warp(simt::Warp::kSync, mask, 0, 0); }
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int offset) {
  return simt::shuffle(mask, x, simt::lane() ^ offset);
}
inline unsigned __ballot_sync(unsigned mask, bool x) { return static_cast<unsigned>(simt::warp(simt::Warp::kBallot, mask, x, 0)); }
inline int __ffs(unsigned x) { return __builtin_ffs(static_cast<int>(x)); }

// ---- host ----

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = struct Stream*;
struct cudaFuncAttributes {};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaSuccess ? "no error" : "invalid argument"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// As small as any GPU's, so that the kernels' ways around it are taken.
constexpr int kMaxSharedMemory = 99 * 1024;
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  return *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kMaxSharedMemory : 0, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes*, Kernel*) {
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  if (value > kMaxSharedMemory) return cudaErrorInvalidValue;
  return simt::allow_shared_memory(reinterpret_cast<const void*>(kernel), value), cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<std::remove_const_t<Parameters>...> arguments;
    static void enter(void* self) { std::apply(static_cast<Call*>(self)->kernel, static_cast<Call*>(self)->arguments); }
  } call{kernel, {arguments...}};
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel arguments are limited to 4 KB");
  simt::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, reinterpret_cast<const void*>(kernel), Call::enter,
               &call, sizeof(call));
  return cudaSuccess;
}
