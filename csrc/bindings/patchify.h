// Videos and patches: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <vector>

#include "../arguments.h"
#include "../dlpack.h"
#include "checks.h"

namespace sora {

namespace py = pybind11;

using Tensors = std::vector<Tensor>;
using Patch = std::array<int32_t, 3>;

inline int64_t check_videos(const Tensors& videos, const Patch& patch, int64_t channels, DType dtype) {
  int64_t tokens = 0;
  for (const Tensor& v : videos) {
    require(v.ndim == 4 && v.size[0] == channels && v.dtype == dtype, "videos [C, T, H, W] of one dtype expected");
    on_device(v);
    int64_t count = 1;
    for (int axis = 0; axis < 3; ++axis) {
      require(patch[axis] > 0 && v.size[axis + 1] % patch[axis] == 0, "the patch size must divide the video");
      count *= v.size[axis + 1] / patch[axis];
    }
    tokens += count;
  }
  return tokens;
}

inline void rearrange(const Tensors& videos, const Patch& patch, const Tensor& tokens, void (*kernel)(const PatchEmbed&)) {
  PatchEmbed a{};
  a.videos = videos.data(), a.num_videos = static_cast<int64_t>(videos.size()), a.tokens = tokens;
  std::copy(patch.begin(), patch.end(), a.patch);
  same_storage({&tokens});
  const int64_t volume = int64_t(patch[0]) * patch[1] * patch[2];
  require(tokens.ndim == 2 && volume > 0 && tokens.size[1] % volume == 0, "tokens [N, pt*ph*pw*C] expected");
  require(check_videos(videos, patch, tokens.size[1] / volume, tokens.dtype) <= tokens.size[0], "too few tokens");
  py::gil_scoped_release release;
  kernel(a);
}

template <class Kernels>
void bind_patchify(py::module_& m, const Kernels* kernels) {
  m.def("patchify_3d", [=](Tensors videos, Patch patch, Tensor tokens) { rearrange(videos, patch, tokens, kernels->patchify_3d); });
  m.def("unpatchify_3d",
        [=](Tensor tokens, Patch patch, Tensors videos) { rearrange(videos, patch, tokens, kernels->unpatchify_3d); });
}

}  // namespace sora
