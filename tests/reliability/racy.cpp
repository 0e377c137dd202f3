// A race between the threads of a kernel's loop, and the same loop without one: whether ThreadSanitizer sees the first and accepts
// what our loops do.
#include "../../csrc/cpu/parallel.h"

namespace sora {

NoMemory::NoMemory(int64_t bytes) : bytes(bytes) {}
const char* NoMemory::what() const noexcept { return text_; }
void no_memory(int64_t bytes) { throw NoMemory(bytes); }

}  // namespace sora

// Adds up 0 .. count - 1: in one place that all threads share, or in one place for each item.
extern "C" int64_t add_up(int64_t count, bool racy) {
  sora::SORA_TIER::Memory<int64_t> sums(count);
  for (int64_t i = 0; i < count; ++i) sums[i] = 0;
  sora::SORA_TIER::parallel_for(count, [&](int64_t i) { sums[racy ? 0 : i] += i; });
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += sums[i];
  return total;
}
