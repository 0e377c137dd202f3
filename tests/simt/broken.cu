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
  if (i < n) y[i] = 0;
  __syncthreads();
  if ((i ^ 1) < n) y[i ^ 1] = sum;
}

__global__ void reads_past_the_end(const float* x, float* y, int n) {
  if (threadIdx.x == 5) y[0] = x[n];
}

__global__ void writes_past_the_end(const float*, float* y, int n) {
  if (threadIdx.x == 5) y[n] = 0;
}

__global__ void reads_null(const float*, float* y, int) {
  const float* volatile nothing = nullptr;
  y[0] = *nothing;
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

__global__ void forgets_a_barrier_in_global_memory(const float* x, float* y, int) {
  y[threadIdx.x] = x[threadIdx.x];
  y[threadIdx.x] += y[max(threadIdx.x, 1u) - 1];
}

__global__ void blocks_write_one_element(const float*, float* y, int) {
  if (threadIdx.x == 0) y[0] = 0;
}

__global__ void blocks_read_what_others_wrote(const float*, float* y, int) {
  if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x == 0 ? 0 : y[0];
}

__global__ void blocks_write_what_others_read(const float*, float* y, int) {
  if (threadIdx.x == 0) y[blockIdx.x] = blockIdx.x == 0 ? y[1] : 0;
}

__global__ void leaves_output_unwritten(const float*, float* y, int n) {
  const int i = threadIdx.x;
  if (i < n - 1) y[i] = 0;
}

__global__ void takes_too_many_threads(const float*, float*, int) {}

__global__ void takes_too_much_shared_memory(const float*, float*, int) {}

}  // namespace

// Blocks, threads of a block, bytes of shared memory.
#define KERNELS(X)                                \
  X(good, 2, 32, 128)                             \
  X(reads_past_the_end, 1, 32, 0)                 \
  X(writes_past_the_end, 1, 32, 0)                \
  X(reads_null, 1, 32, 0)                         \
  X(writes_to_an_input, 1, 32, 0)                 \
  X(reads_past_shared_memory, 1, 32, 128)         \
  X(reads_what_nobody_wrote, 1, 32, 0)            \
  X(reads_unwritten_shared_memory, 1, 32, 128)    \
  X(reads_a_misaligned_vector, 1, 32, 0)          \
  X(waits_at_a_barrier_in_a_branch, 1, 32, 0)     \
  X(shuffles_in_a_branch, 1, 32, 0)               \
  X(forgets_a_barrier, 1, 32, 128)                \
  X(forgets_a_barrier_in_global_memory, 1, 32, 0) \
  X(blocks_write_one_element, 2, 32, 0)           \
  X(blocks_read_what_others_wrote, 2, 32, 0)      \
  X(blocks_write_what_others_read, 2, 32, 0)      \
  X(leaves_output_unwritten, 1, 32, 0)            \
  X(takes_too_many_threads, 1, 544, 0)            \
  X(takes_too_much_shared_memory, 1, 32, 99 * 1024 + 1)

void run_broken(const std::string& name, const float* x, float* y, int n) {
  const auto run = [&](const char* op, auto kernel, int blocks, int threads, size_t shared) {
    launch({op, nullptr}, kernel, blocks, threads, shared, x, y, n);
  };
  if (name == "blocks_write_what_others_read") run("good", good, 1, 32, 128);  // or y could not be read
#define RUN(kernel, blocks, threads, shared) \
  if (name == #kernel) return run(#kernel, kernel, blocks, threads, shared);
  KERNELS(RUN)
  throw std::invalid_argument("no kernel " + name);
}

}  // namespace sora::cuda
