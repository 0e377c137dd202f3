// Stands in front of sora::cuda::allocate and release, which the linker's --wrap directs here: the harness learns of scratch
// memory.
#include <cuda_runtime.h>

#include <unordered_map>

#include "../../csrc/cuda/runtime.h"

#define ALLOCATE(prefix) prefix##_ZN4sora4cuda8allocateERKNS_6TensorEl
#define RELEASE(prefix) prefix##_ZN4sora4cuda7releaseEPv

extern "C" {

void simt_scratch(void* data, size_t bytes, bool comes);
sora::cuda::Allocation ALLOCATE(__real_)(const sora::Tensor&, int64_t);
void RELEASE(__real_)(void*);

struct Scratch {
  void* data;
  size_t bytes;
};
static std::unordered_map<void*, Scratch> present;  // by owner

sora::cuda::Allocation ALLOCATE(__wrap_)(const sora::Tensor& like, int64_t floats) {
  const sora::cuda::Allocation made = ALLOCATE(__real_)(like, floats);
  const Scratch& scratch = present[made.owner] = {made.data, floats * sizeof(float)};
  simt_scratch(scratch.data, scratch.bytes, true);
  return made;
}

void RELEASE(__wrap_)(void* owner) {
  simt_scratch(present[owner].data, present[owner].bytes, false);
  present.erase(owner);
  RELEASE(__real_)(owner);
}
}
