// A byte of flags for each byte that the kernels may touch, in pages that exist where there are any.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>

namespace simt {

enum : uint8_t { kReadable = 1, kWritable = 2, kWritten = 4 };
constexpr uintptr_t kPage = 4096;
struct Page {
  uint8_t flags[kPage];
};
inline std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
struct Recent {
  uintptr_t number = 0;
  Page* page = nullptr;
};
inline Recent recent[256];  // by the number's last bits

inline Page* find_page(uintptr_t address) {
  const uintptr_t number = address / kPage;
  auto& entry = recent[number % 256];
  if (entry.number != number) {
    const auto found = pages.find(number);
    if (found == pages.end()) return nullptr;
    entry = {number, found->second.get()};
  }
  return entry.page;
}

inline uint8_t flags_of(uintptr_t address) {
  const Page* page = find_page(address);
  return page == nullptr ? 0 : page->flags[address % kPage];
}

// Applies flags = (flags & keep) | add to [address, address + bytes).
inline void mark(uintptr_t address, size_t bytes, uint8_t keep, uint8_t add) {
  while (bytes > 0) {
    const size_t part = std::min<size_t>(bytes, kPage - address % kPage);
    auto& page = pages[address / kPage];
    if (page == nullptr) page = std::make_unique<Page>();
    for (size_t i = 0; i < part; ++i) {
      uint8_t& flags = page->flags[address % kPage + i];
      flags = (flags & keep) | add;
    }
    address += part, bytes -= part;
  }
}

inline void clear() {
  pages.clear();
  for (auto& entry : recent) entry = {};
}

}  // namespace simt
