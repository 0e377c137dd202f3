// A byte of flags for each byte that the kernels may touch, and who touched last what they may write, in pages that exist where
// there are any.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <utility>
#include <vector>

namespace simt {

enum : uint8_t { kReadable = 1, kWritable = 2, kWritten = 4 };
constexpr uintptr_t kPage = 4096;
constexpr size_t kGranule = 2;  // bytes of the smallest element
constexpr int32_t kMany = -1;   // in place of a thread

// Epochs grow with each block and each barrier, over launches too: none of an earlier launch is ever in the way.
struct Touch {
  uint32_t epoch = 0, warp_epoch = 0;
  int32_t thread = 0;  // or kMany, that read
};
struct Touches {
  Touch write, read;
};
using PageTouches = std::array<Touches, kPage / kGranule>;

struct Page {
  uint8_t flags[kPage] = {};
  std::unique_ptr<PageTouches> touches;  // null where all is read-only
};
inline std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages;
inline std::vector<std::unique_ptr<PageTouches>> spare;  // of pages that are gone: too large to be made anew for each call
struct Recent {
  uintptr_t number = ~uintptr_t{0};  // that of no page
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

inline std::unique_ptr<PageTouches> make_touches() {
  if (spare.empty()) return std::make_unique<PageTouches>();
  auto made = std::move(spare.back());
  spare.pop_back();
  return made;
}

// Applies flags = (flags & keep) | add to [address, address + bytes).
inline void mark(uintptr_t address, size_t bytes, uint8_t keep, uint8_t add) {
  while (bytes > 0) {
    const size_t part = std::min<size_t>(bytes, kPage - address % kPage);
    auto& page = pages[address / kPage];
    if (page == nullptr) page = std::make_unique<Page>();
    if (add & kWritable && page->touches == nullptr) page->touches = make_touches();
    for (size_t i = 0; i < part; ++i) {
      uint8_t& flags = page->flags[address % kPage + i];
      flags = (flags & keep) | add;
    }
    address += part, bytes -= part;
  }
}

inline void clear() {
  for (auto& [number, page] : pages)
    if (page->touches != nullptr) spare.push_back(std::move(page->touches));
  pages.clear();
  for (auto& entry : recent) entry = {};
}

}  // namespace simt
