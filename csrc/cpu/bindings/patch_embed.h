// Patch embedding: checks.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../../bindings/checks.h"
#include "../../bindings/patchify.h"
#include "../../dlpack.h"
#include "../kernels.h"

namespace sora {

namespace py = pybind11;

inline PatchEmbed embed_call(const Tensors& videos, const Tensor& weight, const Patch& patch) {
  PatchEmbed a{};
  a.videos = videos.data(), a.num_videos = static_cast<int64_t>(videos.size()), a.weight = weight;
  std::copy(patch.begin(), patch.end(), a.patch);
  require(weight.ndim == 5 && weight.size[2] == patch[0] && weight.size[3] == patch[1] && weight.size[4] == patch[2],
          "weight [D, C, pt, ph, pw] expected");
  int64_t stride = 1;
  for (int i = 4; i >= 0; stride *= weight.size[i--])
    require(weight.size[i] <= 1 || weight.stride[i] == stride, "weight must be contiguous");
  return a;
}

inline void bind_patch_embed(py::module_& m, const Kernels* kernels) {
  m.def("patch_embed_3d_forward", [=](Tensors videos, Tensor weight, Tensor bias, Patch patch, Tensor tokens) {
    PatchEmbed a = embed_call(videos, weight, patch);
    a.bias = bias, a.tokens = tokens;
    same_storage({&weight, &bias, &tokens});
    shape(tokens, {check_videos(videos, patch, weight.size[1], weight.dtype), weight.size[0]});
    if (bias) shape(bias, {weight.size[0]});
    py::gil_scoped_release release;
    kernels->patch_embed_3d_forward(a);
  });
  m.def("patch_embed_3d_backward", [=](Tensor dtokens, Tensors videos, Tensor weight, Patch patch, std::optional<Tensors> dvideos,
                                       Tensor dweight, Tensor dbias) {
    PatchEmbed a = embed_call(videos, weight, patch);
    a.dtokens = dtokens, a.dweight = dweight, a.dbias = dbias, a.dvideos = dvideos ? dvideos->data() : nullptr;
    same_storage({&weight, &dtokens, &dweight, &dbias});
    shape(dtokens, {check_videos(videos, patch, weight.size[1], weight.dtype), weight.size[0]});
    same_shape(dweight, weight);
    if (dbias) shape(dbias, {weight.size[0]});
    if (dvideos) {
      check_videos(*dvideos, patch, weight.size[1], weight.dtype);
      require(dvideos->size() == videos.size(), "one gradient per video expected");
      for (size_t i = 0; i < videos.size(); ++i) same_shape((*dvideos)[i], videos[i]);
    }
    py::gil_scoped_release release;
    kernels->patch_embed_3d_backward(a);
  });
}

}  // namespace sora
