// Runs kernels on the CPU, thread by thread, and watches every memory access.
//
// Each thread of a block is a fiber with a stack of its own. One fiber runs at a time, until it ends or waits at a barrier or for
// the other lanes of its warp; a block is stuck, and reported, when no fiber can go on. Blocks run one after the other.
//
// The kernels are compiled with -fsanitize=kernel-address, which calls one of the __asan_ functions below before each access that
// it cannot prove to be one of the thread's own variables. They look the bytes up in a shadow memory that knows, byte by byte,
// what may be read and written and what has been written: the elements of the tensors of the call (not the gaps between rows),
// workspaces, and as much shared memory as the launch asked for. Of what may be written it also knows who touched it last, and
// reports two threads that touch one place, at least one of them writing, without a barrier in between or in different blocks of
// a launch.
//
// A report ends the launch: it becomes an exception that names the kernel, the place, the block and the thread. {0x...} in it
// is an address in this library, which build.py turns into function and line.
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

#include "context.h"
#include "shadow.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace sora::cuda {
alignas(4096) unsigned char shared_memory[228 * 1024];
}

namespace simt {
namespace {

constexpr int kMaxThreads = 512;  // the largest of the kernels' __launch_bounds__, which are defined away
constexpr int kLanes = 32;

// ---- fibers ----

enum class State { kReady, kBarrier, kWarp, kDone };
struct Fiber {
  Context context;
  char* stack = nullptr;
  bool started = false;
  State state = State::kDone;
  Warp operation;  // what it waits for
  unsigned mask;
  uint64_t value, result;
  int source;
};

std::vector<Fiber> fibers(kMaxThreads);
Fiber* current = nullptr;  // null: the host runs
Context scheduler;
const void* current_kernel = nullptr;
void (*current_entry)(void*) = nullptr;
void* current_arguments = nullptr;
int num_threads = 0;
std::string report_text;
std::unordered_map<const void*, int> allowed_shared;

uintptr_t in_library(const void* address) {
  static const uintptr_t base = [] {
    Dl_info info{};
    dladdr(reinterpret_cast<const void*>(&fibers), &info);
    return reinterpret_cast<uintptr_t>(info.dli_fbase);
  }();
  return reinterpret_cast<uintptr_t>(address) - base;
}

std::string format(const char* text, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, text);
  vsnprintf(buffer, sizeof(buffer), text, arguments);
  va_end(arguments);
  return buffer;
}

std::string position(uint3 at) { return format("(%u,%u,%u)", at.x, at.y, at.z); }
uint3 position_in(const dim3& all, unsigned i) { return {i % all.x, i / all.x % all.y, i / all.x / all.y}; }
std::string position(int thread) { return position(position_in(blockDim, thread)); }

// Ends the launch. On a fiber, the scheduler throws for it; the fibers are left where they are and started anew next time.
[[noreturn]] void report(const std::string& what) {
  report_text = "kernel {" + format("0x%zx", in_library(current_kernel)) + "}, block " + position(blockIdx);
  if (current != nullptr) {
    report_text += ", thread " + position(static_cast<int>(current - fibers.data())) + ": " + what;
    switch_to(current->context, scheduler);
  }
  throw std::runtime_error(report_text + ": " + what);
}

void fiber_main() {
  for (;;) {
    current_entry(current_arguments);
    current->state = State::kDone;
    switch_to(current->context, scheduler);
  }
}

void wait(State state) {
  current->state = state;
  switch_to(current->context, scheduler);
}

void resume(int thread) {
  current = &fibers[thread];
  threadIdx = position_in(blockDim, thread);
  if (!current->started) {
    if (current->stack == nullptr)
      current->stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    start_context(current->context, current->stack, fiber_main);
    current->started = true;
  }
  switch_to(scheduler, current->context);
  current = nullptr;
  if (!report_text.empty()) throw std::runtime_error(report_text);
}

// ---- races ----

uint32_t epoch = 0, warp_epochs[kMaxThreads / kLanes];
std::vector<uint32_t> block_epochs;  // the first of each block of the launch so far; blocks run in order

// Whether nothing orders an earlier touch before one by this thread; all before the epoch `since` is ordered.
bool unordered(const Touch& other, int thread, uint32_t since) {
  if (other.epoch < since) return false;
  if (other.epoch < block_epochs.back()) return true;
  if (other.epoch != epoch || other.thread == thread) return false;
  return other.thread == kMany || other.thread / kLanes != thread / kLanes || other.warp_epoch == warp_epochs[thread / kLanes];
}

std::string describe(const Touch& touch) {
  const std::string who = touch.thread == kMany ? "other threads" : "thread " + position(touch.thread);
  const auto block = std::upper_bound(block_epochs.begin(), block_epochs.end(), touch.epoch) - block_epochs.begin() - 1;
  return touch.epoch >= block_epochs.back() ? who : who + " of block " + position(position_in(gridDim, block));
}

// An access to memory that may be written, all within a page.
inline void touch(Page& page, uintptr_t address, size_t bytes, bool is_write, const void* place) {
  const auto shared = reinterpret_cast<uintptr_t>(sora::cuda::shared_memory);
  const bool is_shared = address - shared < sizeof(sora::cuda::shared_memory);
  const int thread = static_cast<int>(current - fibers.data());
  const Touch now = {epoch, warp_epochs[thread / kLanes], thread};
  const uint32_t since = is_shared ? block_epochs.back() : block_epochs.front();  // each block has shared memory of its own
  for (size_t i = 0; i < bytes; i += kGranule) {
    Touches& last = (*page.touches)[(address + i) % kPage / kGranule];
    const Touch* other = unordered(last.write, thread, since)              ? &last.write
                         : is_write && unordered(last.read, thread, since) ? &last.read
                                                                           : nullptr;
    if (other != nullptr)
      report(format("race: %s %s at {0x%zx}, which %s %s without a barrier in between", is_write ? "writes" : "reads",
                    is_shared ? format("byte %zu of shared memory", static_cast<size_t>(address - shared + i)).c_str() : "memory",
                    in_library(place), describe(*other).c_str(), other == &last.write ? "wrote" : "read"));
    if (is_write)
      last.write = now;
    else if (!unordered(last.read, thread, since))
      last.read = now;
    else if (last.read.epoch == epoch)  // or else by another block, whose read is in the way of all that follow
      last.read.thread = kMany;
  }
}

// ---- every access ----

bool on_stack(uintptr_t address) { return address - reinterpret_cast<uintptr_t>(current->stack) < kStack; }

void access(uintptr_t address, size_t bytes, bool is_write, const void* place) {
  if (current == nullptr || on_stack(address)) return;
  const auto shared = reinterpret_cast<uintptr_t>(sora::cuda::shared_memory);
  const auto complain = [&](const char* problem) {
    const bool is_shared = address - shared < sizeof(sora::cuda::shared_memory);
    report(format("%s: %s of %zu bytes at {0x%zx}%s", problem, is_write ? "write" : "read", bytes, in_library(place),
                  is_shared ? format(", byte %zu of shared memory", static_cast<size_t>(address - shared)).c_str() : ""));
  };
  if ((bytes & (bytes - 1)) == 0 && bytes <= 16 && address % bytes != 0) complain("misaligned");
  uint8_t all = 0xff;
  const uintptr_t end = address + bytes;
  for (uintptr_t at = address; at < end && all != 0;) {
    Page* page = find_page(at);
    const size_t part = std::min<size_t>(end - at, kPage - at % kPage);
    if (page == nullptr) all = 0;
    for (size_t i = 0; i < part && page != nullptr; ++i) {
      uint8_t& flags = page->flags[at % kPage + i];
      all &= flags;
      if (is_write) flags |= kWritten;
    }
    at += part;
  }
  if (!(all & (is_write ? kWritable : kReadable))) complain(all & kReadable ? "write to an input" : "out of bounds");
  if (!is_write && !(all & kWritten)) complain("never written");
  if (!(all & kWritable)) return;
  for (uintptr_t at = address; at < end;) {
    const size_t part = std::min<size_t>(end - at, kPage - at % kPage);
    touch(*find_page(at), at, part, is_write, place);
    at += part;
  }
}

// The same for the usual case: an aligned access to a page looked up before, all in order.
template <size_t BYTES, bool WRITE>
inline void access(uintptr_t address, const void* place) {
  if (current == nullptr || on_stack(address)) return;
  const auto& entry = recent[address / kPage % 256];
  if (entry.number == address / kPage && address % BYTES == 0) {
    uint8_t* flags = entry.page->flags + address % kPage;
    constexpr uint8_t kNeeded = WRITE ? kWritable : kReadable | kWritten;
    uint8_t all = 0xff;
    for (size_t i = 0; i < BYTES; ++i) all &= flags[i];
    if ((all & kNeeded) == kNeeded) {
      if (WRITE)
        for (size_t i = 0; i < BYTES; ++i) flags[i] |= kWritten;
      if (all & kWritable) touch(*entry.page, address, BYTES, WRITE, place);
      return;
    }
  }
  access(address, BYTES, WRITE, place);
}

// ---- blocks ----

void release_barrier() {
  for (int t = 0; t < num_threads; ++t) {
    if (fibers[t].state == State::kDone) report("__syncthreads is waited at, but thread " + position(t) + " has ended");
    fibers[t].state = State::kReady;
  }
  ++epoch;
}

void run_block() {
  block_epochs.push_back(++epoch);
  for (int t = 0; t < num_threads; ++t) fibers[t].state = State::kReady;
  for (;;) {
    bool moved = false, ended = true;
    for (int warp = 0; warp < num_threads; warp += kLanes)
      for (bool again = true; again;) {
        again = false;
        for (int t = warp; t < std::min(warp + kLanes, num_threads); ++t)
          if (fibers[t].state == State::kReady) resume(t), again = moved = true;
      }
    int waiting = -1;
    bool all_at_barrier = true;
    for (int t = 0; t < num_threads; ++t) {
      if (fibers[t].state == State::kDone) continue;
      ended = false, waiting = t;
      all_at_barrier &= fibers[t].state == State::kBarrier;
    }
    if (ended) return;
    if (all_at_barrier) {
      release_barrier();
    } else if (!moved) {
      int other = 0;  // one that waits for something else
      while (fibers[other].state == fibers[waiting].state) ++other;
      const auto at = [](int t) {
        const State state = fibers[t].state;
        return "thread " + position(t) +
               (state == State::kDone      ? " has ended"
                : state == State::kBarrier ? " waits at __syncthreads"
                                           : " waits for its warp");
      };
      report("deadlock: " + at(waiting) + ", " + at(other));
    }
  }
}

}  // namespace

void barrier() { wait(State::kBarrier); }

uint64_t warp(Warp operation, unsigned mask, uint64_t value, int source) {
  const int thread = static_cast<int>(current - fibers.data()), first = thread / kLanes * kLanes;
  current->operation = operation, current->mask = mask, current->value = value, current->source = source;
  if (!(mask >> (thread - first) & 1)) report("a lane calls a warp function whose mask leaves it out");
  bool complete = true;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1) || first + lane == thread) continue;
    const Fiber& other = fibers[first + lane];
    if (first + lane >= num_threads || other.state == State::kDone)
      report("a warp function waits for lane " + std::to_string(lane) + ", which has ended or never was");
    complete &= other.state == State::kWarp && other.operation == operation && other.mask == mask;
  }
  if (!complete) {
    wait(State::kWarp);
    return current->result;
  }
  uint64_t ballot = 0;
  for (int lane = 0; lane < kLanes; ++lane)
    if (mask >> lane & 1) ballot |= static_cast<uint64_t>(fibers[first + lane].value != 0) << lane;
  if (operation == Warp::kSync) ++warp_epochs[first / kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Fiber& fiber = fibers[first + lane];
    fiber.result = operation == Warp::kShuffle ? fibers[first + fiber.source % kLanes].value : ballot;
    fiber.state = State::kReady;
  }
  return current->result;
}

void allow_shared_memory(const void* kernel, int bytes) { allowed_shared[kernel] = bytes; }

void launch(dim3 grid, dim3 block, size_t shared, const void* kernel, void (*entry)(void*), void* arguments, size_t bytes) {
  gridDim = grid, blockDim = block, blockIdx = {}, current_kernel = kernel, current_entry = entry, current_arguments = arguments;
  num_threads = static_cast<int>(block.x * block.y * block.z);
  const auto shared_begin = reinterpret_cast<uintptr_t>(sora::cuda::shared_memory);
  const auto arguments_begin = reinterpret_cast<uintptr_t>(arguments);
  report_text.clear();
  block_epochs.clear();
  if (num_threads < 1 || num_threads > kMaxThreads) report("a block of " + std::to_string(num_threads) + " threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535) report("a grid of no or too many blocks");
  if (shared > 48 * 1024 && static_cast<size_t>(allowed_shared[kernel]) < shared)
    report(std::to_string(shared) + " bytes of shared memory without leave");
  mark(arguments_begin, bytes, 0, kReadable | kWritten);
  try {
    for (blockIdx.z = 0; blockIdx.z < grid.z; ++blockIdx.z)
      for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
          mark(shared_begin, shared, 0, kReadable | kWritable);
          run_block();
        }
  } catch (...) {
    for (Fiber& fiber : fibers) fiber.started = false;
    mark(shared_begin, shared, 0, 0);
    throw;
  }
  mark(shared_begin, shared, 0, 0);
  mark(arguments_begin, bytes, 0, 0);
}

}  // namespace simt

// ---- what the compiler calls ----

#define SIMT_ACCESS(bytes)                                                                                                    \
  extern "C" void __asan_load##bytes##_noabort(uintptr_t at) { simt::access<bytes, false>(at, __builtin_return_address(0)); } \
  extern "C" void __asan_store##bytes##_noabort(uintptr_t at) { simt::access<bytes, true>(at, __builtin_return_address(0)); }
SIMT_ACCESS(1)
SIMT_ACCESS(2)
SIMT_ACCESS(4)
SIMT_ACCESS(8)
SIMT_ACCESS(16)
extern "C" void __asan_loadN_noabort(uintptr_t at, size_t bytes) { simt::access(at, bytes, false, __builtin_return_address(0)); }
extern "C" void __asan_storeN_noabort(uintptr_t at, size_t bytes) { simt::access(at, bytes, true, __builtin_return_address(0)); }
extern "C" void __asan_handle_no_return() {}

// ---- what build.py calls ----

namespace {

// Calls body(address, bytes) for the contiguous pieces of a tensor, until it returns false.
template <class Body>
bool each_piece(uintptr_t data, int64_t item, int ndim, const int64_t* sizes, const int64_t* strides, Body body) {
  if (ndim == 0) return body(data, static_cast<size_t>(item));
  if (ndim == 1 && strides[0] == 1) return sizes[0] == 0 || body(data, static_cast<size_t>(item * sizes[0]));
  for (int64_t i = 0; i < sizes[0]; ++i)
    if (!each_piece(data + i * strides[0] * item, item, ndim - 1, sizes + 1, strides + 1, body)) return false;
  return true;
}

}  // namespace

// A tensor of the next call; an output counts as never written.
extern "C" void simt_add(void* data, int64_t item, int ndim, const int64_t* sizes, const int64_t* strides, bool output) {
  each_piece(reinterpret_cast<uintptr_t>(data), item, ndim, sizes, strides, [&](uintptr_t at, size_t bytes) {
    simt::mark(at, bytes, 0xff, output ? simt::kReadable | simt::kWritable : simt::kReadable | simt::kWritten);
    return true;
  });
}

// Whether the call wrote every element of an output.
extern "C" bool simt_written(void* data, int64_t item, int ndim, const int64_t* sizes, const int64_t* strides) {
  return each_piece(reinterpret_cast<uintptr_t>(data), item, ndim, sizes, strides, [&](uintptr_t at, size_t bytes) {
    for (size_t i = 0; i < bytes; ++i)
      if (!(simt::flags_of(at + i) & simt::kWritten)) return false;
    return true;
  });
}

extern "C" void simt_clear() { simt::clear(); }

// Scratch memory comes or goes; see workspace.cpp.
extern "C" void simt_scratch(void* data, size_t bytes, bool comes) {
  simt::mark(reinterpret_cast<uintptr_t>(data), bytes, 0, comes ? simt::kReadable | simt::kWritable : 0);
}
