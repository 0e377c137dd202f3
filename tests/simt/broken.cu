// Kernels with one mistake each, and one without: what the harness must report, and what it must not.
#include "../../csrc/cuda/common.cuh"

namespace sora::cuda {
namespace {

__global__ void good(const float* x, float* y, int n) {
  float* shared = reinterpret_cast<float*>(shared_memory);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  shared[threadIdx.x] = i < n ? x[i] : 0;
  __syncthreads();
  const float sum = warp_sum(shared[blockDim.x - 1 - threadIdx.x]);
  if (i < n) y[i] = sum;
}

__global__ void reads_past_the_end(const float* x, float* y, int n) {
  if (threadIdx.x == 5) y[0] = x[n];
}

__global__ void writes_past_the_end(const float*, float* y, int n) {
  if (threadIdx.x == 5) y[n] = 0;
}

__global__ void writes_to_an_input(const float* x, float*, int) { const_cast<float*>(x)[threadIdx.x] = 1; }

__global__ void reads_past_shared_memory(const float*, float* y, int) { y[0] = shared_memory[32 * sizeof(float)]; }

__global__ void reads_what_nobody_wrote(const float*, float* y, int) { y[0] = y[1]; }

__global__ void reads_unwritten_shared_memory(const float*, float* y, int) {
  y[threadIdx.x] = reinterpret_cast<float*>(shared_memory)[threadIdx.x];
}

__global__ void reads_a_misaligned_vector(const float* x, float* y, int) { store(y, load<4>(x + 1)); }

__global__ void waits_at_a_barrier_in_a_branch(const float*, float*, int) {
  if (threadIdx.x < 16) __syncthreads();
}

__global__ void shuffles_in_a_branch(const float* x, float* y, int) {
  if (threadIdx.x < 16)
    y[threadIdx.x] = warp_sum(x[threadIdx.x]);
  else
    __syncthreads();
}

__global__ void forgets_a_barrier(const float* x, float* y, int) {
  float* shared = reinterpret_cast<float*>(shared_memory);
  shared[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] = shared[max(threadIdx.x, 1u) - 1];
}

__global__ void leaves_output_unwritten(const float*, float* y, int n) {
  for (int i = 0; i < n - 1; ++i) y[i] = 0;
}

}  // namespace

#define KERNELS(X)                  \
  X(good)                           \
  X(reads_past_the_end)             \
  X(writes_past_the_end)            \
  X(writes_to_an_input)             \
  X(reads_past_shared_memory)       \
  X(reads_what_nobody_wrote)        \
  X(reads_unwritten_shared_memory)  \
  X(reads_a_misaligned_vector)      \
  X(waits_at_a_barrier_in_a_branch) \
  X(shuffles_in_a_branch)           \
  X(forgets_a_barrier)              \
  X(leaves_output_unwritten)

void run_broken(const std::string& name, const float* x, float* y, int n) {
#define RUN(kernel) \
  if (name == #kernel) return launch({#kernel, nullptr}, kernel, 1, 32, 32 * sizeof(float), x, y, n);
  KERNELS(RUN)
  throw std::invalid_argument("no kernel " + name);
}

}  // namespace sora::cuda
