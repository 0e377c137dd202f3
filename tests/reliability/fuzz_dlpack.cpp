// Bytes -> descriptions of tensors -> csrc/dlpack_view.h and csrc/bindings/call.h -> what was accepted must be true of every
// element.
//
// Of three tensors, the last two of them outputs, the bytes say everything: ranks, sizes, strides, offsets, dtypes, devices. Their
// memory is one arena, which some of them reach beyond. The oracle counts in 128 bits, and goes through all elements of what is
// small.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../csrc/bindings/call.h"
#include "../../csrc/dlpack_view.h"

namespace {

constexpr int kTensors = 3, kMostAxes = 8;
constexpr size_t kArena = 4096;
constexpr int64_t kSmall = 2048;  // elements that the oracle goes through

// The next bytes; zeros behind the last.
struct Bytes {
  const uint8_t* data;
  size_t left;

  template <class Number>
  Number next() {
    Number value{};
    const size_t n = left < sizeof value ? left : sizeof value;
    if (n > 0) std::memcpy(&value, data, n);
    data += n, left -= n;
    return value;
  }
  // Small numbers mostly, and now and then any.
  int64_t size() {
    const auto kind = next<uint8_t>();
    if (kind < 200) return kind % 9;
    if (kind < 225) return next<int16_t>();
    return kind < 240 ? int64_t{1} << (next<uint8_t>() % 64) : next<int64_t>();
  }
};

// A description and the memory of its sizes and strides.
struct Described {
  dlpack::Tensor view{};
  int64_t sizes[kMostAxes] = {}, strides[kMostAxes] = {};

  Described(Bytes& bytes, char* arena) {
    const auto flags = bytes.next<uint8_t>();
    const auto rank = bytes.next<uint8_t>();
    view.ndim = rank < 240 ? rank % (kMostAxes + 1) : static_cast<int8_t>(rank);
    for (int i = 0; i < kMostAxes; ++i) sizes[i] = bytes.size();
    for (int i = 0; i < kMostAxes; ++i) strides[i] = bytes.size();
    view.sizes = flags & 1 ? nullptr : sizes;
    // Where the rank is too large, nothing may look at sizes; of a few more than there are, a reader would see it in them.
    view.strides = flags & 2 ? nullptr : strides;
    view.data = flags & 4 ? nullptr : arena + bytes.next<uint16_t>() % kArena;
    view.byte_offset = flags & 8 ? static_cast<uint64_t>(bytes.size()) : 0;
    view.device = {flags & 16 ? bytes.next<int8_t>() : dlpack::kCpu, flags & 32 ? bytes.next<int8_t>() : 0};
    constexpr dlpack::DataType kTypes[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}, {0, 32, 1}, {2, 64, 1}, {5, 128, 1}, {1, 8, 1}};
    view.dtype = flags & 64 ? bytes.next<dlpack::DataType>() : kTypes[bytes.next<uint8_t>() % 7];
  }
};

[[noreturn]] void wrong(const char* what, const sora::Tensor& t) {
  std::fprintf(stderr, "%s: %s %s strides %s\n", t.name, what, sora::shape_of(t).c_str(),
               sora::listed(t.stride, t.stride + t.ndim).c_str());
  std::abort();
}

int64_t elements(const sora::Tensor& t) {
  __int128 count = 1;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.size[i] < 0) wrong("a negative size is accepted", t);
    count *= t.size[i] < (int64_t{1} << 60) ? t.size[i] : int64_t{1} << 60;
    if (count > (int64_t{1} << 60)) count = int64_t{1} << 60;
  }
  for (int i = 0; i < t.ndim; ++i)
    if (t.size[i] == 0) return 0;
  return static_cast<int64_t>(count);
}

// Where each element is, in bytes from the first one.
std::vector<int64_t> places(const sora::Tensor& t) {
  std::vector<int64_t> found;
  if (elements(t) > 0) found.push_back(0);  // the axes before an empty one may be long
  for (int axis = 0; axis < t.ndim; ++axis) {
    std::vector<int64_t> next;
    for (const int64_t place : found)
      for (int64_t i = 0; i < t.size[axis]; ++i) next.push_back(place + i * t.stride[axis] * t.item_bytes);
    found = std::move(next);
  }
  return found;
}

// Every element lies in what the checks take for the tensor's memory.
void check_reach(sora::Tensor t) {
  const int64_t reach = sora::CheckedCall::reach(t);
  if (elements(t) == 0) {
    if (reach != 0) wrong("nothing reaches somewhere", t);
    return;
  }
  __int128 last = 0;
  for (int i = 0; i < t.ndim; ++i) {
    if (t.stride[i] < 0) wrong("a negative stride is accepted", t);
    last += static_cast<__int128>(t.size[i] - 1) * t.stride[i];
  }
  if ((last + 1) * t.item_bytes != reach) wrong("the last element ends elsewhere", t);
  if (elements(t) > kSmall) return;
  for (const int64_t place : places(t))
    if (place < 0 || place + t.item_bytes > reach) wrong("an element lies beyond", t);
}

// No byte of an output is another one's.
void check_apart(const std::vector<sora::Tensor*>& tensors) {
  std::vector<std::pair<uintptr_t, const sora::Tensor*>> written;
  for (const sora::Tensor* t : tensors) {
    if (t->name[0] != 'o' || elements(*t) > kSmall) continue;
    for (const int64_t place : places(*t))
      for (int byte = 0; byte < t->item_bytes; ++byte) written.emplace_back(reinterpret_cast<uintptr_t>(t->data) + place + byte, t);
  }
  std::sort(written.begin(), written.end());
  for (size_t i = 1; i < written.size(); ++i)
    if (written[i].first == written[i - 1].first) wrong("an output shares bytes", *written[i].second);
  for (const sora::Tensor* t : tensors) {
    if (t->name[0] == 'o' || elements(*t) > kSmall) continue;
    for (const int64_t place : places(*t)) {
      const std::pair<uintptr_t, const sora::Tensor*> from{reinterpret_cast<uintptr_t>(t->data) + place, nullptr};
      const auto next = std::lower_bound(written.begin(), written.end(), from);
      if (next != written.end() && next->first < from.first + t->item_bytes) wrong("an input is written", *t);
    }
  }
}

// What `contiguous` lets pass lies one element behind the other.
void check_contiguous(const sora::Tensor& t) {
  try {
    sora::contiguous(t);
  } catch (const sora::BadArgument&) {
    return;
  }
  if (elements(t) > kSmall) return;
  const std::vector<int64_t> found = places(t);
  for (size_t i = 0; i < found.size(); ++i)
    if (found[i] != static_cast<int64_t>(i) * t.item_bytes) wrong("a gap is called contiguous", t);
}

// Boundaries that are let pass may be followed; reading them must stay in the arena, which AddressSanitizer watches.
void check_tables(const sora::Tensor& cu, const sora::Tensor& grid, const char* arena) {
  for (const sora::Tensor* t : {&cu, &grid}) {
    const auto begin = reinterpret_cast<uintptr_t>(t->data) - reinterpret_cast<uintptr_t>(arena);
    sora::Tensor copy = *t;
    if (begin > kArena || sora::CheckedCall::reach(copy) > static_cast<int64_t>(kArena - begin)) return;
  }
  constexpr int64_t kTotal = 64;
  try {
    sora::spans(cu, grid, {}, kTotal);
  } catch (const sora::BadArgument&) {
    return;
  }
  int64_t held = 0;
  for (int64_t i = 0; i + 1 < cu.size[0]; ++i) {
    const int32_t* g = grid.ints() + 3 * i;
    held += int64_t{g[0]} * g[1] * g[2];
  }
  if (held > kTotal) wrong("grids hold more tokens than there are", grid);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const sora::Signature signature("op(x, table?) -> out, other_out?");
  sora::this_module = {"fuzz", true, dlpack::kCpu};
  char* arena = static_cast<char*>(std::aligned_alloc(64, kArena));
  Bytes bytes{data, size};
  sora::Tensor tensors[kTensors + 1];
  bool decoded = true;
  for (sora::Tensor& t : tensors) {
    if (&t == &tensors[1] && bytes.next<uint8_t>() < 64) continue;  // absent
    Described described(bytes, arena);
    decoded = decoded && dlpack::decode(described.view, t);
  }
  // The rest is what the memory holds: boundaries and grids of the right sum, sometimes.
  for (size_t i = 0; i + 4 <= kArena; i += 4) {
    const int32_t value = bytes.left > 0 ? bytes.next<int8_t>() : static_cast<int32_t>(i / 4 % 9);
    std::memcpy(arena + i, &value, 4);
  }
  if (decoded) {
    try {
      const sora::CheckedCall call(signature, tensors[0], tensors[1], tensors[2], tensors[3]);
      std::vector<sora::Tensor*> present;
      for (sora::Tensor& t : tensors)
        if (t) present.push_back(&t);
      for (const sora::Tensor* t : present) check_reach(*t), check_contiguous(*t);
      check_apart(present);
      if (tensors[1]) check_tables(tensors[1], tensors[0], arena);
    } catch (const sora::BadArgument& error) {
      if (error.text.find(": expected ") == std::string::npos) std::abort();
    }
  }
  std::free(arena);
  return 0;
}
