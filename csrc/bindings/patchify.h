// Videos and patches: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include <algorithm>
#include <array>

#include "../arguments.h"
#include "define.h"

namespace sora {

using Patch = std::array<int32_t, 3>;

// Positions of a patch.
inline int64_t volume_of(const Patch& patch) {
  int64_t volume = 1;
  bool fits = true;
  for (const int32_t n : patch) fits = fits && n > 0 && !__builtin_mul_overflow(volume, int64_t{n}, &volume) && volume <= kMaxAxis;
  const int64_t sizes[3] = {patch[0], patch[1], patch[2]};
  if (!fits) fail("patch_size", "sizes >= 1 of at most 2**30 positions", listed(sizes, sizes + 3));
  return volume;
}

// Checks the videos and returns their tokens. `patch` is not empty.
inline int64_t check_videos(const Tensors& videos, const Patch& patch, int64_t channels, DType storage) {
  int64_t tokens = 0;
  for (const Tensor& v : videos) {
    rank(v, 4, "[C, T, H, W]");
    dtype(v, storage);
    int64_t count = 1;
    bool fits = v.size[0] == channels;
    for (int axis = 0; axis < 3; ++axis) {
      fits = fits && v.size[axis + 1] % patch[axis] == 0;
      fits = fits && !__builtin_mul_overflow(count, v.size[axis + 1] / patch[axis], &count);
    }
    fits = fits && !__builtin_add_overflow(tokens, count, &tokens);
    if (!fits) fail(v, std::to_string(channels) + " channels, and (T, H, W) divisible by the patch size", shape_of(v));
  }
  return tokens;
}

// Tokens that are written have a row for each patch; of those that are read, rows behind the last patch are left out.
inline void rearrange(const Call& call, const Tensors& videos, const Patch& patch, const Tensor& tokens, bool writes_tokens,
                      void (*kernel)(const PatchEmbed&)) {
  PatchEmbed a{};
  a.videos = videos.data(), a.num_videos = static_cast<int64_t>(videos.size()), a.tokens = tokens;
  std::copy(patch.begin(), patch.end(), a.patch);
  rank(tokens, 2, "[N, pt*ph*pw*C]");
  at_most(tokens, 1);
  same_storage({&tokens});
  const int64_t volume = volume_of(patch), channels = tokens.size[1] / volume;
  if (tokens.size[1] % volume != 0) fail(tokens, "a width divisible by " + std::to_string(volume), shape_of(tokens));
  const int64_t count = check_videos(videos, patch, channels, tokens.dtype);
  if (writes_tokens ? count != tokens.size[0] : count > tokens.size[0])
    fail(tokens, (writes_tokens ? "" : "at least ") + std::to_string(count) + " rows", shape_of(tokens));
  call.run([&] { kernel(a); });
}

template <class Kernels>
void bind_patchify(py::module_& m, const Kernels* kernels) {
  define(m, "patchify_3d(videos, patch_size) -> tokens", [=](const Call& call, Tensors videos, Patch patch_size, Tensor tokens) {
    rearrange(call, videos, patch_size, tokens, true, kernels->patchify_3d);
  });
  define(m, "unpatchify_3d(tokens, patch_size) -> videos", [=](const Call& call, Tensor tokens, Patch patch_size, Tensors videos) {
    rearrange(call, videos, patch_size, tokens, false, kernels->unpatchify_3d);
  });
}

}  // namespace sora
