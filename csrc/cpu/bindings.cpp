// Module _cpu: one instruction-set tier's kernels, behind the checks of csrc/bindings, and memory for outputs.
//
// The kernels are compiled once per tier. The best one this processor runs is chosen at import, or the one that SORA_KERNELS_ISA
// names.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../bindings/adaln.h"
#include "../bindings/attention.h"
#include "../bindings/bias_gelu.h"
#include "../bindings/block_sparse_attention.h"
#include "../bindings/norm_rope.h"
#include "../bindings/patch_embed.h"
#include "../bindings/patchify.h"
#include "../bindings/rope.h"
#include "../bindings/spatiotemporal_attention.h"
#include "fork.h"
#include "kernels.h"
#include "memory.h"

// A tier's entry points and their table.
#define SORA_TIER_TABLE(tier)                                         \
  namespace sora::tier {                                              \
  SORA_KERNELS(SORA_DECLARE)                                          \
  static const Kernels kernels = {#tier, SORA_KERNELS(SORA_ADDRESS)}; \
  }

SORA_TIER_TABLE(baseline)
#if defined(__x86_64__)
SORA_TIER_TABLE(avx2)
SORA_TIER_TABLE(avx512)
SORA_TIER_TABLE(avx512bf16)

// Matrix products on tiles. The other ops are those of AVX-512 BF16, which every processor with tiles has.
namespace sora::amx {
SORA_PRODUCT_KERNELS(SORA_DECLARE)
static const Kernels kernels = [] {
  Kernels table = avx512bf16::kernels;
  table.name = "amx";
#define SORA_REPLACE(result, name, arguments) table.name = name;
  SORA_PRODUCT_KERNELS(SORA_REPLACE)
#undef SORA_REPLACE
  return table;
}();
}  // namespace sora::amx
#endif

namespace sora {

NoMemory::NoMemory(int64_t bytes) : bytes(bytes) {
  std::snprintf(text_, sizeof text_, "no %lld bytes of memory to work in", static_cast<long long>(bytes));
}
const char* NoMemory::what() const noexcept { return text_; }
void no_memory(int64_t bytes) { throw NoMemory(bytes); }

namespace {

struct Tier {
  const Kernels* kernels;
  bool supported;
};

#if defined(__x86_64__)
// Whether the processor multiplies bfloat16 tiles.
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  return (d & kBf16) != 0 && (d & kTile) != 0;
}

// Whether the system lets this process use tiles: their 8 KiB of registers are only saved for processes that ask.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM of asm/prctl.h, since Linux 5.16
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

std::vector<Tier> tiers() {
  std::vector<Tier> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool avx512bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  const bool tiles = avx512bf16 && has_tiles();
  best_first.push_back({&amx::kernels, tiles && may_use_tiles()});
  // Where there are tiles, the instruction for pairs of bfloat16 numbers is slow, and doing without is faster: docs/performance.md.
  const Tier pairs{&avx512bf16::kernels, avx512bf16}, plain{&avx512::kernels, avx512};
  best_first.push_back(tiles ? plain : pairs);
  best_first.push_back(tiles ? pairs : plain);
  best_first.push_back({&avx2::kernels, avx2});
#endif
  best_first.push_back({&baseline::kernels, true});
  return best_first;
}

const Kernels* choose() {
  const char* forced = std::getenv("SORA_KERNELS_ISA");
  std::string known;
  for (const Tier& tier : tiers()) {
    if (forced == nullptr || *forced == 0) {
      if (tier.supported) return tier.kernels;
      continue;
    }
    if (std::string(forced) == tier.kernels->name) {
      if (!tier.supported)
        throw std::runtime_error("SORA_KERNELS_ISA: this processor does not support '" + std::string(forced) + "'");
      return tier.kernels;
    }
    known += known.empty() ? tier.kernels->name : std::string(", ") + tier.kernels->name;
  }
  throw std::runtime_error("SORA_KERNELS_ISA: expected one of " + known + ", got '" + forced + "'");
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of sora_kernels, writing into outputs the caller allocated.";
  this_module = {"sora_kernels._cpu", true, dlpack::kCpu};
  const Kernels* kernels = choose();
  survive_forks();
  m.def("isa", [=] { return std::string(kernels->name); }, "The instruction-set tier in use.");
  m.def(
      "isa_tiers",
      [] {
        std::vector<std::pair<std::string, bool>> list;
        for (const Tier& tier : tiers()) list.emplace_back(tier.kernels->name, tier.supported);
        return list;
      },
      "(tier, whether this processor supports it), best first.");
  m.def("num_threads", [] { return omp_get_max_threads(); }, "Threads a kernel called from here would use.");
  m.def(
      "multiply_adds",
      [=](int64_t items, double operations) {
        if (!(items >= 0 && items < INT32_MAX && operations >= 0 && operations < 1e15))
          throw py::value_error(
              "sora_kernels._cpu: multiply_adds: expected items below 2**31 and operations below 1e15, both >= 0");
        py::gil_scoped_release release;
        return kernels->multiply_adds(items, operations);
      },
      "On all threads, items * operations float32 operations that are fused multiply-adds; for benchmarks.", py::arg("items"),
      py::arg("operations"));
  m.def("empty", empty, "A tensor of like's dtype and these sizes, contents undefined, in memory that is kept for reuse.",
        py::arg("like"), py::arg("shape"));
  m.def("cached_bytes", [] { return Pool::instance().cached(); }, "Memory kept for reuse.");
  m.def(
      "set_cache_limit", [](size_t bytes) { Pool::instance().set_limit(bytes); }, "The most memory to keep for reuse.",
      py::arg("bytes"));
  m.def("empty_cache", [] { Pool::instance().shrink(0); }, "Gives back the memory kept for reuse.");
  bind_attention(m, kernels);
  bind_spatiotemporal_attention(m, kernels);
  bind_block_sparse_attention(m, kernels);
  bind_rope(m, kernels);
  bind_norm_rope(m, kernels);
  bind_adaln(m, kernels);
  bind_bias_gelu(m, kernels);
  bind_patch_embed(m, kernels);
  bind_patchify(m, kernels);
}

}  // namespace sora
