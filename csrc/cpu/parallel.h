// Threads and their scratch memory.
//
// OpenMP, because an extension loaded after torch binds to torch's own OpenMP runtime: one pool of threads for both, and
// torch.set_num_threads holds here too. Work is cut into pieces whose results do not depend on who computes them, so a result is
// the same for any number of threads.
#pragma once

#include <cstdint>
#include <cstdlib>

#include "simd.h"

namespace sora::SORA_TIER {

// body(i) for i in 0..count, in any order, on all threads; the pieces may differ in size.
template <class Body>
void parallel_for(int64_t count, Body body) {
#pragma omp parallel for schedule(dynamic, 1) if (count > 1)
  for (int64_t i = 0; i < count; ++i) body(i);
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

// One block of floats per thread that only ever grows, so that a call allocates nothing once warm.
class Scratch {
 public:
  ~Scratch() { free(data_); }

  // `count` floats, 64-byte aligned, contents undefined. Valid until the same thread asks again.
  static float* get(int64_t count) {
    static thread_local Scratch scratch;
    if (count > scratch.count_) {
      free(scratch.data_);
      scratch.count_ = (count + 15) / 16 * 16;
      scratch.data_ = static_cast<float*>(aligned_alloc(64, scratch.count_ * sizeof(float)));
      if (scratch.data_ == nullptr) abort();  // an exception must not leave a parallel region
    }
    return scratch.data_;
  }

 private:
  float* data_ = nullptr;
  int64_t count_ = 0;
};

// `count` zeros for sums of all threads.
class Zeros {
 public:
  explicit Zeros(int64_t count) : data_(static_cast<float*>(calloc(count + 1, sizeof(float)))) {
    if (data_ == nullptr) abort();
  }
  Zeros(const Zeros&) = delete;
  ~Zeros() { free(data_); }
  float* data() const { return data_; }

 private:
  float* data_;
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
