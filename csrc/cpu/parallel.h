// Threads and their scratch memory.
//
// OpenMP, because an extension loaded after torch binds to torch's own OpenMP runtime: one pool of threads for both, and
// torch.set_num_threads holds here too. Work is cut into pieces whose results do not depend on who computes them, so a result is
// the same for any number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"
#include "simd_stream.h"

namespace sora::SORA_TIER {

// body(i) for i in 0..count, in any order, on all threads; the pieces may differ in size. A thread that cannot have its memory ends
// the loop, and the caller learns of it: an exception must not leave a parallel region.
template <class Body>
void parallel_for(int64_t count, Body body) {
  int64_t missing = 0;  // bytes
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t i = 0; i < count; ++i) {
    if (__atomic_load_n(&missing, __ATOMIC_RELAXED) != 0) continue;
    try {
      body(i);
    } catch (const NoMemory& failure) {
      __atomic_store_n(&missing, failure.bytes, __ATOMIC_RELAXED);
    }
  }
  if (missing != 0) no_memory(missing);
}

// body(i, lanes) for the vectors of a row of `length` elements, on all threads.
template <class Body>
void parallel_vectors(int64_t length, Body body) {
  constexpr int64_t kBlock = 4 * W;
  parallel_for((length + kBlock - 1) / kBlock, [&](int64_t block) {
    const int64_t begin = block * kBlock, count = length - begin < kBlock ? length - begin : kBlock;
    each_vector(count, [&](int64_t i, int lanes) { body(begin + i, lanes); });
  });
}

// The bytes of rows * columns elements of `size` bytes, in whole cache lines, and one at least.
inline size_t memory_bytes(int64_t rows, int64_t columns, int64_t size) {
  int64_t bytes;
  if (__builtin_mul_overflow(rows, columns, &bytes) || __builtin_mul_overflow(bytes, size, &bytes) ||
      __builtin_add_overflow(bytes, 64, &bytes))
    no_memory(INT64_MAX);
  return static_cast<size_t>(bytes) / 64 * 64;
}

// rows * columns elements, 64-byte aligned, contents undefined.
template <class T>
class Memory {
 public:
  explicit Memory(int64_t rows, int64_t columns = 1) {
    const size_t bytes = memory_bytes(rows, columns, sizeof(T));
    data_ = static_cast<T*>(aligned_alloc(64, bytes));
    if (data_ == nullptr) no_memory(static_cast<int64_t>(bytes));
  }
  Memory(const Memory&) = delete;
  ~Memory() { free(data_); }
  T* data() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

// rows * columns zeros for sums of all threads.
class Zeros {
 public:
  Zeros(int64_t rows, int64_t columns) {
    const size_t bytes = memory_bytes(rows, columns, sizeof(float));
    data_ = static_cast<float*>(calloc(bytes, 1));
    if (data_ == nullptr) no_memory(static_cast<int64_t>(bytes));
  }
  Zeros(const Zeros&) = delete;
  ~Zeros() { free(data_); }
  float* data() const { return data_; }

 private:
  float* data_;
};

// One block of floats per thread that only ever grows, so that a call allocates nothing once warm.
class Scratch {
 public:
  ~Scratch() { free(data_); }

  // `count` floats, 64-byte aligned, contents undefined. Valid until the same thread asks again.
  static float* get(int64_t count) {
    static thread_local Scratch scratch;
    if (count > scratch.count_) {
      const size_t bytes = memory_bytes(count, 1, sizeof(float));
      free(scratch.data_);
      scratch.data_ = static_cast<float*>(aligned_alloc(64, bytes));
      scratch.count_ = scratch.data_ == nullptr ? 0 : count;
      if (scratch.data_ == nullptr) no_memory(static_cast<int64_t>(bytes));
    }
    return scratch.data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

constexpr int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

// Hands out consecutive aligned pieces of a block.
struct Pieces {
  float* data;
  int64_t used = 0;
  float* take(int64_t count) {
    float* piece = data + used;
    used += padded(count);
    return piece;
  }
};

// A Room(Pieces&, args...) whose pieces are in this thread's scratch memory. It is laid out twice, first to learn its size.
template <class Room, class... Args>
Room on_scratch(const Args&... args) {
  Pieces size{nullptr};
  Room(size, args...);
  Pieces pieces{Scratch::get(size.used)};
  return Room(pieces, args...);
}

}  // namespace sora::SORA_TIER
