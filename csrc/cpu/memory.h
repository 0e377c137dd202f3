// Memory of large outputs, kept for the next one.
//
// The system maps and zeroes each page of a fresh output when it is first written. For an output of many megabytes that takes
// longer than a memory-bound kernel needs to fill it. So memory of outputs that are no longer used stays here and serves the next
// output of about that size, as torch does on a GPU.
//
// All blocks together are at most twice the most that was in use at one time, so that outputs of ever new sizes do not pile up.
// Blocks are whole huge pages: a block's first use costs one page fault per 2 MiB and not per 4 KiB.
#pragma once

#include <pybind11/pybind11.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../bindings/checks.h"
#include "../dlpack.h"

namespace sora {

class Pool {
 public:
  static constexpr size_t kHugePage = size_t{1} << 21;

  // Never destroyed: tensors may outlive every static object.
  static Pool& instance() {
    static Pool* pool = new Pool;
    return *pool;
  }

  struct Block {
    void* data;
    size_t bytes;
  };

  // A block of at least `bytes`, contents undefined; none if there is no such memory.
  Block take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      auto best = free_.end();
      for (auto block = free_.begin(); block != free_.end(); ++block)
        if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 && (best == free_.end() || block->bytes <= best->bytes))
          best = block;
      if (best != free_.end()) {
        const Block block = *best;
        free_.erase(best);
        cached_ -= block.bytes;
        use(block.bytes);
        return block;
      }
    }
    void* data = aligned_alloc(kHugePage, bytes);
    if (data == nullptr) {
      shrink(0);
      data = aligned_alloc(kHugePage, bytes);
    }
    if (data == nullptr) return {nullptr, 0};
#if defined(__linux__)
    madvise(data, bytes, MADV_HUGEPAGE);
#endif
    std::lock_guard<std::mutex> lock(mutex_);
    use(bytes);
    trim(limit_);
    return {data, bytes};
  }

  void give(Block block) {
    std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(block);
    cached_ += block.bytes;
    used_ -= block.bytes;
    trim(limit_);
  }

  // Frees what is cached beyond `bytes`, longest unused first.
  void shrink(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    trim(bytes);
  }

  void set_limit(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim(limit_);
  }

  size_t cached() {
    std::lock_guard<std::mutex> lock(mutex_);
    return cached_;
  }

  // Nothing changes between these two, in whatever thread.
  void hold() { mutex_.lock(); }
  void release() { mutex_.unlock(); }

 private:
  void use(size_t bytes) {
    used_ += bytes;
    most_ = std::max(most_, used_);
  }

  void trim(size_t bytes) {
    while (cached_ > bytes || (cached_ > 0 && cached_ + used_ > 2 * most_)) {
      cached_ -= free_.front().bytes;
      free(free_.front().data);
      free_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> free_;  // longest unused first
  size_t cached_ = 0, used_ = 0, most_ = 0, limit_ = 0;
};

// A contiguous tensor of like's type and dtype, contents undefined, whose memory goes back to the pool with its last reference.
inline pybind11::object empty(pybind11::object like, const std::vector<int64_t>& sizes) {
  struct Owned {
    dlpack::ManagedTensor managed;
    Pool::Block block;
    std::vector<int64_t> sizes, strides;
  };
  const auto message = [&](const char* text) { return std::string(this_module.name) + ": empty: " + text; };
  const auto shape = [&] { return listed(sizes.data(), sizes.data() + sizes.size()); };
  const dlpack::ExchangeApi* api = dlpack::exchange_api(Py_TYPE(like.ptr()));
  dlpack::Tensor view;
  if (api == nullptr || api->managed_to_object == nullptr || api->tensor_from_object(like.ptr(), &view) != 0 ||
      view.device.type != dlpack::kCpu) {
    PyErr_Clear();
    throw pybind11::type_error(message("like: expected a dense torch.Tensor on the CPU"));
  }
  constexpr int64_t kMost = int64_t{1} << 62;
  auto owned = std::make_unique<Owned>();
  owned->sizes = sizes, owned->strides.resize(sizes.size());
  // Elements, an axis of none counted as one: strides are products, too.
  int64_t elements = 1, bytes = 0;
  bool fits = true;
  for (size_t i = sizes.size(); i-- > 0;) {
    if (sizes[i] < 0) throw pybind11::value_error(message("shape: expected sizes >= 0, got ") + shape());
    owned->strides[i] = elements;
    fits = fits && !__builtin_mul_overflow(elements, std::max<int64_t>(sizes[i], 1), &elements);
  }
  fits = fits && !__builtin_mul_overflow(elements, int64_t{view.dtype.bits} * view.dtype.lanes, &bytes) && bytes <= kMost;
  bytes = (bytes + 7) / 8;
  if (fits) owned->block = Pool::instance().take(static_cast<size_t>(bytes));
  if (!fits || owned->block.data == nullptr) {
    const std::string text = message("no memory for an output of shape ") + shape();
    PyErr_SetString(PyExc_MemoryError, text.c_str());
    throw pybind11::error_already_set();
  }
  owned->managed.version = {1, 0};
  owned->managed.context = owned.get();
  owned->managed.deleter = [](dlpack::ManagedTensor* self) {  // may run in any thread, without the GIL
    auto* gone = static_cast<Owned*>(self->context);
    Pool::instance().give(gone->block);
    delete gone;
  };
  owned->managed.flags = 0;
  owned->managed.tensor = {owned->block.data,
                           view.device,
                           static_cast<int32_t>(sizes.size()),
                           view.dtype,
                           owned->sizes.data(),
                           owned->strides.data(),
                           0};
  void* object = nullptr;
  dlpack::ManagedTensor* managed = &owned.release()->managed;
  if (api->managed_to_object(managed, &object) != 0) {
    managed->deleter(managed);
    throw pybind11::error_already_set();
  }
  return pybind11::reinterpret_steal<pybind11::object>(static_cast<PyObject*>(object));
}

}  // namespace sora
