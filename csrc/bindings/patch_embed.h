// Patch embedding: decodes and checks the arguments.
#pragma once

#include <algorithm>
#include <optional>

#include "../cpu/kernels.h"
#include "patchify.h"

namespace sora {

inline PatchEmbed embed_call(const Tensors& videos, const Tensor& weight, const Patch& patch_size) {
  PatchEmbed a{};
  a.videos = videos.data(), a.num_videos = static_cast<int64_t>(videos.size()), a.weight = weight;
  std::copy(patch_size.begin(), patch_size.end(), a.patch);
  rank(weight, 5, "[D, C, pt, ph, pw]");
  shape(weight, {weight.size[0], weight.size[1], patch_size[0], patch_size[1], patch_size[2]});
  contiguous(weight);
  at_most(weight, 0, kMaxProduct), at_most(weight, 1, kMaxProduct);
  if (volume_of(patch_size) * weight.size[1] > kMaxProduct)
    fail(weight, "patches of at most " + std::to_string(kMaxProduct) + " elements", shape_of(weight));
  return a;
}

inline void bind_patch_embed(py::module_& m, const Kernels* kernels) {
  define(m, "patch_embed_3d_forward(videos, weight, bias?, patch_size) -> tokens",
         [=](const Call& call, Tensors videos, Tensor weight, Tensor bias, Patch patch_size, Tensor tokens) {
           PatchEmbed a = embed_call(videos, weight, patch_size);
           a.bias = bias, a.tokens = tokens;
           same_storage({&weight, &bias, &tokens});
           shape(tokens, {check_videos(videos, patch_size, weight.size[1], weight.dtype), weight.size[0]});
           contiguous(tokens);
           if (bias) shape(bias, {weight.size[0]});
           call.run([&] { kernels->patch_embed_3d_forward(a); });
         });
  define(m, "patch_embed_3d_backward(dtokens, videos, weight, patch_size) -> dvideos?, dweight, dbias?",
         [=](const Call& call, Tensor dtokens, Tensors videos, Tensor weight, Patch patch_size, std::optional<Tensors> dvideos,
             Tensor dweight, Tensor dbias) {
           PatchEmbed a = embed_call(videos, weight, patch_size);
           a.dtokens = dtokens, a.dweight = dweight, a.dbias = dbias, a.dvideos = dvideos ? dvideos->data() : nullptr;
           same_storage({&weight, &dtokens, &dweight, &dbias});
           shape(dtokens, {check_videos(videos, patch_size, weight.size[1], weight.dtype), weight.size[0]});
           same_shape(dweight, weight);
           contiguous(dweight);
           if (dbias) shape(dbias, {weight.size[0]});
           if (dvideos) {
             if (dvideos->size() != videos.size())
               fail("dvideos", std::to_string(videos.size()) + " tensors", std::to_string(dvideos->size()));
             for (size_t i = 0; i < videos.size(); ++i) same_shape((*dvideos)[i], videos[i]), dtype((*dvideos)[i], weight.dtype);
           }
           call.run([&] { kernels->patch_embed_3d_backward(a); });
         });
}

}  // namespace sora
