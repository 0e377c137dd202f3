// Checks what holds for every tensor of all entry points. A tensor is present, on the module's device, and its sizes and strides
// reach no address that there is not. That its memory is there is its maker's promise: DLPack says nowhere how much was allocated.
// Outputs share no memory. Two outputs, or an output and an input, may not even interleave: their ranges of addresses are compared.
// No Python here: tests/reliability/fuzz_dlpack.cpp runs this on tensors of any description.
#pragma once

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "checks.h"

namespace sora {

using Tensors = std::vector<Tensor>;

// "op(x, bias?) -> out": names in the order of the arguments, with a "?" where None is allowed. Outputs come behind the arrow. The
// names are the keywords of the Python function.
struct Signature {
  struct Argument {
    std::string name;
    bool optional, output;
  };
  std::string op;
  std::vector<Argument> arguments;

  explicit Signature(const char* text) {
    bool output = false;
    while (*text != 0) {
      if (*text == '>') output = true;
      if (*text == '?') arguments.back().optional = true;
      const char* begin = text;
      while (std::isalnum(static_cast<unsigned char>(*text)) || *text == '_') ++text;
      if (text == begin)
        ++text;
      else if (op.empty())
        op.assign(begin, text);
      else
        arguments.push_back({std::string(begin, text), false, output});
    }
  }
};

class CheckedCall {
 public:
  template <class... Arguments>
  explicit CheckedCall(const Signature& signature, Arguments&... arguments) {
    ranges_.reserve(sizeof...(arguments));
    auto argument = signature.arguments.begin();
    (look(arguments, *argument++), ...);
    find_overlap();
  }

  // Whether there is anything to write: sizes beside an empty axis may be huge.
  bool writes() const { return writes_; }

  // How many bytes from its first element on it has. Strides that mean nothing become 0, so that no kernel overflows with them.
  static int64_t reach(Tensor& t) {
    constexpr int64_t kMost = int64_t{1} << 58;  // elements, which leaves room for sums of sizes in bytes
    int64_t elements = 1, last = 0;
    for (int i = 0; i < t.ndim; ++i) {
      int64_t offset = 0;
      bool fits =
          t.size[i] >= 0 && !__builtin_mul_overflow(elements, std::max<int64_t>(t.size[i], 1), &elements) && elements <= kMost;
      if (t.size[i] <= 1) t.stride[i] = 0;
      fits = fits && t.stride[i] >= 0 && !__builtin_mul_overflow(std::max<int64_t>(t.size[i] - 1, 0), t.stride[i], &offset) &&
             !__builtin_add_overflow(last, offset, &last) && last <= kMost;
      if (!fits)
        fail(t, "sizes and strides >= 0 of at most 2**58 elements",
             shape_of(t) + " and strides " + listed(t.stride, t.stride + t.ndim));
    }
    return is_empty(t) ? 0 : (last + 1) * t.item_bytes;
  }

 private:
  struct Range {
    uintptr_t begin, end;
    const Tensor* tensor;
    bool output;
  };

  template <class Number>
  void look(Number&, const Signature::Argument&) {}
  void look(std::optional<Tensors>& list, const Signature::Argument& argument) {
    if (list) look(*list, argument);
  }
  void look(Tensors& list, const Signature::Argument& argument) {
    for (Tensor& t : list) look(t, argument);
  }
  void look(Tensor& t, const Signature::Argument& argument) {
    t.name = argument.name.c_str();
    if (!t && argument.optional) return;
    if (!t) fail(t, "a tensor", "None");
    if (t.device_type != this_module.device_type || (!ranges_.empty() && t.device_id != ranges_.front().tensor->device_id))
      fail(t, "a tensor on the device of " + std::string(this_module.name), "one on another");
    const int64_t bytes = reach(t);
    const auto begin = reinterpret_cast<uintptr_t>(t.data);
    uintptr_t end;
    if (__builtin_add_overflow(begin, static_cast<uintptr_t>(bytes), &end)) fail(t, "memory below 2**64", shape_of(t));
    ranges_.push_back({begin, end, &t, argument.output});
    if (bytes == 0) return;
    if (t.data == nullptr) fail(t, "a tensor with memory", "none, its storage was freed");
    if (begin % t.item_bytes != 0) fail(t, "elements aligned to their size", "an address that is not");
    if (argument.output) apart(t), writes_ = true;
  }

  // An output's elements must be apart: along the axes from the smallest stride on, each steps over all of those before.
  static void apart(const Tensor& t) {
    int order[Tensor::kMaxDims], axes = 0;
    for (int axis = 0; axis < t.ndim; ++axis) {
      if (t.size[axis] <= 1) continue;
      int at = axes++;
      for (; at > 0 && t.stride[order[at - 1]] > t.stride[axis]; --at) order[at] = order[at - 1];
      order[at] = axis;
    }
    int64_t last = 0;
    for (int i = 0; i < axes; ++i) {
      if (t.stride[order[i]] <= last) fail(t, "elements that do not overlap", "strides " + listed(t.stride, t.stride + t.ndim));
      last += (t.size[order[i]] - 1) * t.stride[order[i]];
    }
  }

  void find_overlap() {
    std::sort(ranges_.begin(), ranges_.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range *reaches = nullptr, *written = nullptr;  // what reaches farthest so far, of all and of the outputs
    for (const Range& range : ranges_) {
      if (range.begin == range.end) continue;
      const Range* other = range.output ? reaches : written;
      if (other != nullptr && range.begin < other->end) {
        const Range &output = range.output ? range : *other, &shares = range.output ? *other : range;
        fail(*output.tensor, "memory of its own", std::string("some of ") + shares.tensor->name + "'s");
      }
      if (reaches == nullptr || range.end > reaches->end) reaches = &range;
      if (range.output && (written == nullptr || range.end > written->end)) written = &range;
    }
  }

  std::vector<Range> ranges_;
  bool writes_ = false;
};

}  // namespace sora
