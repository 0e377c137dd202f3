// What the kernels need of their surroundings: a GPU that can run them, the stream that the framework works on, and scratch memory
// from the framework's own allocator, which is ordered by that stream and safe inside a graph capture. Nothing waits for the GPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../arguments.h"

namespace sora::cuda {

// The GPU architectures this module was built for, such as "sm_80".
std::vector<std::string> archs();

// Why no kernel of this module can run on the present GPU, if so.
std::optional<std::string> unavailable();

// The framework's current stream on the device of `like`.
cudaStream_t current_stream(const Tensor& like);

// `floats` float32 numbers, contents undefined, on the device of `like`; `release` takes `owner`.
struct Allocation {
  float* data;
  void* owner;
};
Allocation allocate(const Tensor& like, int64_t floats);
void release(void* owner);

// Given back when it goes out of scope: kernels queued by then may still use it, later users come behind them in the stream.
class Workspace {
 public:
  Workspace(const Tensor& like, int64_t floats) {
    if (floats > 0) allocation_ = allocate(like, floats);
  }
  ~Workspace() {
    if (allocation_.owner != nullptr) release(allocation_.owner);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float* data() const { return allocation_.data; }

 private:
  Allocation allocation_{};
};

}  // namespace sora::cuda
