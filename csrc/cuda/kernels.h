// The entry points of the kernels. Each queues its work on the framework's current stream and returns.
#pragma once

#include "../kernels.h"

namespace sora::cuda {

SORA_SHARED_KERNELS(SORA_DECLARE)

struct Kernels {
  SORA_SHARED_KERNELS(SORA_POINTER)
};

}  // namespace sora::cuda
