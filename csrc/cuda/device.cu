// Whether the kernels of this module can run on the present GPU.
#include <sstream>

#include "common.cuh"

namespace sora::cuda {

__global__ void probe() {}

// SORA_CUDA_ARCHS is what SORA_KERNELS_CUDA_ARCHS was at build time, such as "80;90a".
std::vector<std::string> archs() {
  std::vector<std::string> list;
  std::istringstream names(SORA_CUDA_ARCHS);
  for (std::string name; std::getline(names, name, ';');) list.push_back("sm_" + name);
  return list;
}

std::optional<std::string> unavailable() {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  if (error != cudaSuccess) return std::string("finds no GPU: ") + cudaGetErrorString(error);
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, probe);
  if (error == cudaSuccess) return std::nullopt;
  std::string built;
  for (const std::string& name : archs()) built += (built.empty() ? "" : ", ") + name;
  return "was built for " + built + "; this GPU has compute capability " + std::to_string(major) + "." + std::to_string(minor) +
         " (" + cudaGetErrorString(error) + ")";
}

}  // namespace sora::cuda
