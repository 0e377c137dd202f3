// Nothing but fused multiply-adds, on all threads: the most arithmetic that this machine can do on vectors, for benchmarks to
// compare with. Each thread runs kChains independent chains, more than a processor's multipliers need to be busy all the time.
#include "parallel.h"
#include "simd.h"

namespace sora::SORA_TIER {

// items * operations floating-point operations; returns a number that depends on all of them.
float multiply_adds(int64_t items, double operations) {
  constexpr int kChains = 12;
  const int64_t steps = static_cast<int64_t>(operations / (2 * W * kChains));
  float total = 0;
  parallel_for(items, [&](int64_t item) {
    vf chain[kChains];
    for (int i = 0; i < kChains; ++i) chain[i] = vf{} + static_cast<float>(item + i);
    vf factor = vf{} + 0.5f, term = vf{} + 1.0f;
    for (int64_t step = 0; step < steps; ++step)
#pragma GCC unroll 12
      for (int i = 0; i < kChains; ++i) chain[i] = chain[i] * factor + term;
    for (int i = 1; i < kChains; ++i) chain[0] += chain[i];
    const float sum_of_item = sum(chain[0]);
#pragma omp atomic
    total += sum_of_item;
  });
  return total;
}

}  // namespace sora::SORA_TIER
