// Module _cpu: decodes the arguments of each op, checks what memory safety needs, and calls the kernels of one instruction-set
// tier.
//
// The kernels are compiled once per tier the best one this processor runs is chosen at import, or
// the one that SORA_KERNELS_ISA names.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../dlpack.h"
#include "kernels.h"

#define SORA_DECLARE_TIER(tier, bytes)                                       \
  namespace sora::tier {                                                     \
  void attention_forward(const Attention&);                                  \
  void attention_backward(const Attention&);                                 \
  void rope_3d(const Rope&, const Tensor&, const Tensor&);                   \
  void qk_norm_rope_3d_forward(const Rope&, QkNorm (&)[2], bool, float);     \
  void qk_norm_rope_3d_backward(const Rope&, QkNorm (&)[2], bool);           \
  void layer_norm_modulate_forward(const AdaLn&);                            \
  void gate_residual_forward(const AdaLn&);                                  \
  void gate_residual_layer_norm_modulate_forward(const AdaLn&);              \
  void adaln_backward(const AdaLn&);                                         \
  void patch_embed_3d_forward(const PatchEmbed&);                            \
  void patch_embed_3d_backward(const PatchEmbed&);                           \
  void patchify_3d(const PatchEmbed&);                                       \
  void unpatchify_3d(const PatchEmbed&);                                     \
  static const Kernels kernels = {#tier,                                     \
                                  bytes,                                     \
                                  attention_forward,                         \
                                  attention_backward,                        \
                                  rope_3d,                                   \
                                  qk_norm_rope_3d_forward,                   \
                                  qk_norm_rope_3d_backward,                  \
                                  layer_norm_modulate_forward,               \
                                  gate_residual_forward,                     \
                                  gate_residual_layer_norm_modulate_forward, \
                                  adaln_backward,                            \
                                  patch_embed_3d_forward,                    \
                                  patch_embed_3d_backward,                   \
                                  patchify_3d,                               \
                                  unpatchify_3d};                            \
  }

SORA_DECLARE_TIER(baseline, 16)
#if defined(__x86_64__)
SORA_DECLARE_TIER(avx2, 32)
SORA_DECLARE_TIER(avx512, 64)
#endif

namespace py = pybind11;

namespace sora {
namespace {

using Tensors = std::vector<Tensor>;

// ---- tiers

struct Tier {
  const Kernels* kernels;
  bool supported;
};

std::vector<Tier> tiers() {
  std::vector<Tier> best_first;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  best_first.push_back({&avx512::kernels, avx512});
  best_first.push_back({&avx2::kernels, avx2});
#endif
  best_first.push_back({&baseline::kernels, true});
  return best_first;
}

const Kernels* choose() {
  const char* forced = std::getenv("SORA_KERNELS_ISA");
  std::string known;
  for (const Tier& tier : tiers()) {
    if (forced == nullptr || *forced == 0) {
      if (tier.supported) return tier.kernels;
      continue;
    }
    if (std::string(forced) == tier.kernels->name) {
      if (!tier.supported)
        throw std::runtime_error("SORA_KERNELS_ISA: this processor does not support '" + std::string(forced) + "'");
      return tier.kernels;
    }
    known += known.empty() ? tier.kernels->name : std::string(", ") + tier.kernels->name;
  }
  throw std::runtime_error("SORA_KERNELS_ISA: expected one of " + known + ", got '" + forced + "'");
}

const Kernels* kernels = nullptr;

// ---- checks: the story files have validated every argument; this keeps a wrong call from touching memory that is not there

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(std::string("sora_kernels._cpu: ") + what);
}

void same_storage(std::initializer_list<const Tensor*> tensors) {
  DType dtype = DType::kOther;
  for (const Tensor* t : tensors) {
    if (!*t) continue;
    if (dtype == DType::kOther) dtype = t->dtype;
    require(t->dtype == dtype && dtype <= DType::kFloat16, "float tensors of one dtype expected");
    require(t->size[t->ndim - 1] <= 1 || t->stride[t->ndim - 1] == 1, "the last axis must be contiguous");
  }
}

void same_shape(const Tensor& a, const Tensor& b) {
  require(a.ndim == b.ndim && std::equal(a.size, a.size + a.ndim, b.size), "tensors of one shape expected");
}

void shape(const Tensor& t, std::initializer_list<int64_t> sizes) {
  require(t.ndim == static_cast<int>(sizes.size()) && std::equal(sizes.begin(), sizes.end(), t.size), "unexpected shape");
}

void boundaries(const Tensor& cu, int64_t total) {
  require(cu.ndim == 1 && cu.dtype == DType::kInt32 && cu.size[0] >= 1 && (cu.size[0] == 1 || cu.stride[0] == 1),
          "boundaries must be int32 and contiguous");
  const int32_t* x = cu.ints();
  require(x[0] == 0 && x[cu.size[0] - 1] <= total && std::is_sorted(x, x + cu.size[0]),
          "boundaries must rise from 0 to at most the number of tokens");
}

void spans(const Tensor& cu_spans, const Tensor& grid, int64_t total) {
  boundaries(cu_spans, total);
  const int64_t count = cu_spans.size[0] - 1;
  require(grid.dtype == DType::kInt32 && grid.ndim == 2 && grid.size[0] == count && grid.size[1] == 3 &&
              (count == 0 || (grid.stride[0] == 3 && grid.stride[1] == 1)),
          "grid must be int32 [S, 3]");
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* g = grid.ints() + 3 * i;
    require(g[0] >= 0 && g[1] >= 0 && g[2] >= 0 && int64_t(g[0]) * g[1] * g[2] == cu_spans.ints()[i + 1] - cu_spans.ints()[i],
            "each grid must hold its span's tokens");
  }
}

// A fresh output of many megabytes costs more in page faults, one per 4 KiB, than in arithmetic. Asked for huge pages, the kernel
// takes one fault per 2 MiB; where it does not, nothing changes.
void expect_writes([[maybe_unused]] std::initializer_list<const Tensor*> outputs) {
#if defined(__linux__)
  constexpr uintptr_t kHugePage = uintptr_t{1} << 21;
  for (const Tensor* t : outputs) {
    int64_t count = t->ndim > 0 ? 1 : 0;
    for (int i = 0; i < t->ndim; ++i) count *= t->size[i];
    const int64_t bytes = count * (t->dtype == DType::kFloat32 ? 4 : 2);
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(t->data) + kHugePage - 1) / kHugePage * kHugePage;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(t->data) + bytes) / kHugePage * kHugePage;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  }
#endif
}

// ---- attention

struct AttentionCall : Attention {
  std::vector<Sample> sample_list;
  std::vector<AttentionItem> item_list;
  double work(const AttentionItem& item) const { return double(item.q_end - item.q_begin) * sample_list[item.sample].k_size; }
};

void add_samples(AttentionCall& a, const Tensor& cu_q, const Tensor& cu_k) {
  same_storage({&a.q, &a.k, &a.v, &a.out});
  same_shape(a.q, a.out);
  same_shape(a.k, a.v);
  const int n = a.q.ndim;
  require(a.k.ndim == n && (cu_q ? n == 3 && cu_k : n == 4), "packed [N, H, d] with boundaries or dense [B, S, H, d] expected");
  require(a.k.size[n - 1] == a.q.size[n - 1] && a.k.size[n - 2] > 0 && a.q.size[n - 2] % a.k.size[n - 2] == 0,
          "heads do not match");
  if (cu_q) {
    boundaries(cu_q, a.q.size[0]);
    boundaries(cu_k, a.k.size[0]);
    require(cu_q.size[0] == cu_k.size[0], "as many key samples as query samples expected");
    const int32_t *q = cu_q.ints(), *k = cu_k.ints();
    for (int64_t b = 0; b + 1 < cu_q.size[0]; ++b)
      a.sample_list.push_back({q[b], k[b], 0, 0, q[b + 1] - q[b], k[b + 1] - k[b], 0, 0});
    a.q_used = q[cu_q.size[0] - 1], a.k_used = k[cu_q.size[0] - 1];
    shape(a.lse, {a.q.size[1], a.q.size[0]});
  } else {
    require(a.k.size[0] == a.q.size[0], "batch sizes differ");
    for (int64_t b = 0; b < a.q.size[0]; ++b) a.sample_list.push_back({0, 0, b, b, a.q.size[1], a.k.size[1], 0, 0});
    a.q_used = a.k_used = 0;
    shape(a.lse, {a.q.size[0], a.q.size[2], a.q.size[1]});
  }
  require(a.lse.dtype == DType::kFloat64 && a.lse.stride[a.lse.ndim - 1] == 1, "lse must be float64");
  a.samples = a.sample_list.data();
}

void run(AttentionCall& a, bool backward) {
  const Tensor& split = backward ? a.k : a.q;
  const int32_t num_heads = static_cast<int32_t>(split.size[split.ndim - 2]);
  for (size_t b = 0; b < a.sample_list.size(); ++b) {
    const int64_t size = a.sample_list[b].q_size, step = backward ? std::max<int64_t>(size, 1) : kQueryBlock;
    for (int32_t h = 0; h < num_heads; ++h)
      // A sample without queries still owes its keys zero gradients.
      for (int64_t begin = 0; begin < size || (backward && begin == 0); begin += step)
        a.item_list.push_back({static_cast<int32_t>(b), h, begin, std::min(begin + step, size)});
  }
  backward ? expect_writes({&a.dq, &a.dk, &a.dv}) : expect_writes({&a.out});
  // Longest first, so that no thread starts a long item when the others are done.
  std::stable_sort(a.item_list.begin(), a.item_list.end(), [&](const auto& x, const auto& y) { return a.work(x) > a.work(y); });
  a.items = a.item_list.data();
  a.num_items = static_cast<int64_t>(a.item_list.size());
  py::gil_scoped_release release;
  (backward ? kernels->attention_backward : kernels->attention_forward)(a);
}

void add_gradients(AttentionCall& a, Tensor dout, Tensor dlse, Tensor dq, Tensor dk, Tensor dv) {
  a.dout = dout, a.dlse = dlse, a.dq = dq, a.dk = dk, a.dv = dv;
  same_storage({&a.q, &dout, &dq, &dk, &dv});
  same_shape(dout, a.q), same_shape(dq, a.q), same_shape(dk, a.k), same_shape(dv, a.k);
  if (dlse)
    same_shape(dlse, a.lse), require(dlse.dtype == DType::kFloat64 && dlse.stride[dlse.ndim - 1] == 1, "dlse must be float64");
}

AttentionCall attention_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, Tensor bias,
                             Tensor alibi, float scale, int64_t left, int64_t right, float softcap) {
  AttentionCall a{};
  a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.bias = bias, a.alibi = alibi;
  a.scale = scale, a.left = left, a.right = right, a.softcap = softcap;
  add_samples(a, cu_q, cu_k);
  const int64_t batch = static_cast<int64_t>(a.sample_list.size()), num_heads = q.size[q.ndim - 2];
  if (bias)
    shape(bias, {batch, num_heads, q.size[1], k.size[1]}),
        require(!cu_q && bias.dtype == DType::kFloat32, "bias must be float32, its batch dense");
  if (alibi) shape(alibi, {batch, num_heads}), require(alibi.dtype == DType::kFloat32, "alibi must be float32");
  return a;
}

AttentionCall windowed_call(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu, Tensor cu_spans, Tensor grid,
                            Tensor step, std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale) {
  AttentionCall a{};
  a.q = q, a.k = k, a.v = v, a.out = out, a.lse = lse, a.scale = scale, a.windowed = true;
  a.cu_spans = cu_spans, a.grid = grid, a.step = step;
  std::copy(window.begin(), window.end(), a.window);
  std::copy(causal.begin(), causal.end(), a.causal);
  require(static_cast<bool>(cu), "boundaries expected");
  add_samples(a, cu, cu);
  require(q.size[0] == k.size[0], "as many keys as queries expected");
  spans(cu_spans, grid, q.size[0]);
  shape(step, {grid.size[0], 3});
  int32_t span = 0;
  const int32_t count = static_cast<int32_t>(grid.size[0]);
  for (Sample& s : a.sample_list) {
    while (span < count && cu_spans.ints()[span + 1] <= s.q_start) ++span;  // empty spans in between
    s.first_span = span;
    int64_t end = s.q_start;
    for (; end < s.q_start + s.q_size && span < count; ++span) end = cu_spans.ints()[span + 1];
    require(end == s.q_start + s.q_size, "spans must end where samples end");
    s.num_spans = span - s.first_span;
  }
  return a;
}

// ---- RoPE

Rope rope_tables(Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta,
                 std::array<int32_t, 3> axes_dim, bool interleaved, bool inverse, const Tensor& x) {
  require(x.ndim == 3, "[N, H, d] expected");
  spans(cu_spans, grid, x.size[0]);
  for (const Tensor* t : {&origin, &step}) {
    shape(*t, {grid.size[0], 3});
    require(t->dtype == DType::kFloat32 && (t->size[0] == 0 || (t->stride[0] == 3 && t->stride[1] == 1)),
            "origin and step must be float32 and contiguous");
  }
  for (int32_t n : axes_dim) require(n >= 0 && n % 2 == 0, "axes_dim must be even");
  require(axes_dim[0] + axes_dim[1] + axes_dim[2] == x.size[2], "axes_dim must add up to the head dim");
  return {cu_spans,    grid,   origin, step, {theta[0], theta[1], theta[2]}, {axes_dim[0], axes_dim[1], axes_dim[2]},
          interleaved, inverse};
}

void check_part(const QkNorm& p, bool across_heads, int64_t tokens) {
  same_storage({&p.x, &p.weight, &p.out, &p.dout, &p.dx, &p.dweight});
  shape(p.rstd, {tokens, across_heads ? 1 : p.x.size[1]});
  require(p.x.ndim == 3 && p.x.size[0] == tokens && p.rstd.dtype == DType::kFloat32, "[N, H, d] expected");
  for (const Tensor* t : {&p.out, &p.dout, &p.dx})
    if (*t) same_shape(*t, p.x);
  for (const Tensor* t : {&p.weight, &p.dweight})
    if (*t) shape(*t, {across_heads ? p.x.size[1] * p.x.size[2] : p.x.size[2]});
  expect_writes({&p.out, &p.dx});
}

// ---- adaLN

void check_adaln(const AdaLn& a) {
  require(a.x.ndim == 2, "[N, D] expected");
  boundaries(a.cu_seqlens, a.x.size[0]);
  const int64_t n = a.x.size[0], d = a.x.size[1], rows = a.cu_seqlens.size[0] - 1;
  same_storage({&a.x, &a.residual, &a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.residual_out, &a.out, &a.dresidual_out,
                &a.dout, &a.dresidual, &a.dx, &a.dgate, &a.dshift, &a.dscale, &a.dweight, &a.dbias});
  for (const Tensor* t : {&a.residual, &a.residual_out, &a.out, &a.dresidual_out, &a.dout, &a.dresidual, &a.dx})
    if (*t) shape(*t, {n, d});
  for (const Tensor* t : {&a.gate, &a.shift, &a.scale, &a.dgate, &a.dshift, &a.dscale})
    if (*t) shape(*t, {rows, d});
  for (const Tensor* t : {&a.weight, &a.bias, &a.dweight, &a.dbias})
    if (*t) shape(*t, {d});
  for (const Tensor* t : {&a.mean, &a.rstd})
    if (*t) shape(*t, {n}), require(t->dtype == DType::kFloat32, "statistics must be float32");
  expect_writes({&a.residual_out, &a.out, &a.dresidual, &a.dx});
}

// ---- patch embedding

using Patch = std::array<int32_t, 3>;

int64_t check_videos(const Tensors& videos, const Patch& patch, int64_t channels, DType dtype) {
  int64_t tokens = 0;
  for (const Tensor& v : videos) {
    require(v.ndim == 4 && v.size[0] == channels && v.dtype == dtype, "videos [C, T, H, W] of one dtype expected");
    int64_t count = 1;
    for (int axis = 0; axis < 3; ++axis) {
      require(patch[axis] > 0 && v.size[axis + 1] % patch[axis] == 0, "the patch size must divide the video");
      count *= v.size[axis + 1] / patch[axis];
    }
    tokens += count;
  }
  return tokens;
}

PatchEmbed embed_call(const Tensors& videos, const Tensor& weight, const Patch& patch) {
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

void rearrange(const Tensors& videos, const Patch& patch, const Tensor& tokens, bool to_tokens) {
  PatchEmbed a{};
  a.videos = videos.data(), a.num_videos = static_cast<int64_t>(videos.size()), a.tokens = tokens;
  std::copy(patch.begin(), patch.end(), a.patch);
  same_storage({&tokens});
  const int64_t volume = int64_t(patch[0]) * patch[1] * patch[2];
  require(tokens.ndim == 2 && volume > 0 && tokens.size[1] % volume == 0, "tokens [N, pt*ph*pw*C] expected");
  require(check_videos(videos, patch, tokens.size[1] / volume, tokens.dtype) <= tokens.size[0], "too few tokens");
  py::gil_scoped_release release;
  (to_tokens ? kernels->patchify_3d : kernels->unpatchify_3d)(a);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of sora_kernels, writing into outputs the caller allocated.";
  kernels = choose();
  m.def("isa", [] { return std::string(kernels->name); }, "The instruction-set tier in use.");
  m.def(
      "isa_tiers",
      [] {
        std::vector<std::pair<std::string, bool>> list;
        for (const Tier& tier : tiers()) list.emplace_back(tier.kernels->name, tier.supported);
        return list;
      },
      "(tier, whether this processor supports it), best first.");
  m.def("num_threads", [] { return omp_get_max_threads(); }, "Threads a kernel called from here would use.");

  m.def("attention_forward", [](Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor bias, Tensor alibi, float scale,
                                int64_t left, int64_t right, float softcap, Tensor out, Tensor lse) {
    AttentionCall a = attention_call(q, k, v, out, lse, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
    run(a, false);
  });
  m.def("attention_backward",
        [](Tensor dout, Tensor dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu_q, Tensor cu_k, Tensor bias,
           Tensor alibi, float scale, int64_t left, int64_t right, float softcap, Tensor dq, Tensor dk, Tensor dv) {
          AttentionCall a = attention_call(q, k, v, out, lse, cu_q, cu_k, bias, alibi, scale, left, right, softcap);
          add_gradients(a, dout, dlse, dq, dk, dv);
          run(a, true);
        });
  m.def("spatiotemporal_attention_forward",
        [](Tensor q, Tensor k, Tensor v, Tensor cu, Tensor cu_spans, Tensor grid, Tensor step, std::array<int32_t, 3> window,
           std::array<bool, 3> causal, float scale, Tensor out, Tensor lse) {
          AttentionCall a = windowed_call(q, k, v, out, lse, cu, cu_spans, grid, step, window, causal, scale);
          run(a, false);
        });
  m.def("spatiotemporal_attention_backward",
        [](Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor cu, Tensor cu_spans, Tensor grid, Tensor step,
           std::array<int32_t, 3> window, std::array<bool, 3> causal, float scale, Tensor dq, Tensor dk, Tensor dv) {
          AttentionCall a = windowed_call(q, k, v, out, lse, cu, cu_spans, grid, step, window, causal, scale);
          add_gradients(a, dout, Tensor{}, dq, dk, dv);
          run(a, true);
        });

  m.def("rope_3d", [](Tensor x, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta,
                      std::array<int32_t, 3> axes_dim, bool interleaved, bool inverse, Tensor out) {
    const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, inverse, x);
    same_storage({&x, &out});
    same_shape(x, out);
    expect_writes({&out});
    py::gil_scoped_release release;
    kernels->rope_3d(rope, x, out);
  });
  m.def("qk_norm_rope_3d_forward",
        [](Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step,
           std::array<double, 3> theta, std::array<int32_t, 3> axes_dim, bool interleaved, bool across_heads, float eps,
           Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd) {
          const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, false, q);
          QkNorm parts[2] = {{q, q_weight, q_rstd, q_out, {}, {}, {}}, {k, k_weight, k_rstd, k_out, {}, {}, {}}};
          for (const QkNorm& p : parts) check_part(p, across_heads, q.size[0]);
          require(k.size[2] == q.size[2], "head dims differ");
          py::gil_scoped_release release;
          kernels->qk_norm_rope_3d_forward(rope, parts, across_heads, eps);
        });
  m.def("qk_norm_rope_3d_backward",
        [](Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd, Tensor k_rstd,
           Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta, std::array<int32_t, 3> axes_dim,
           bool interleaved, bool across_heads, Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight) {
          const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, true, q);
          QkNorm parts[2] = {{q, q_weight, q_rstd, {}, dq_out, dq, dq_weight}, {k, k_weight, k_rstd, {}, dk_out, dk, dk_weight}};
          for (const QkNorm& p : parts) check_part(p, across_heads, q.size[0]);
          require(k.size[2] == q.size[2], "head dims differ");
          py::gil_scoped_release release;
          kernels->qk_norm_rope_3d_backward(rope, parts, across_heads);
        });

  m.def("layer_norm_modulate_forward", [](Tensor x, Tensor shift, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias,
                                          float eps, Tensor out, Tensor mean, Tensor rstd) {
    AdaLn a{};
    a.x = x, a.shift = shift, a.scale = scale, a.cu_seqlens = cu, a.rms = rms, a.weight = weight, a.bias = bias, a.eps = eps;
    a.out = out, a.mean = mean, a.rstd = rstd;
    check_adaln(a);
    py::gil_scoped_release release;
    kernels->layer_norm_modulate_forward(a);
  });
  m.def("layer_norm_modulate_backward",
        [](Tensor dout, Tensor x, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias, Tensor mean, Tensor rstd,
           Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias) {
          AdaLn a{};
          a.dout = dout, a.x = x, a.scale = scale, a.cu_seqlens = cu, a.rms = rms, a.weight = weight, a.bias = bias, a.mean = mean,
          a.rstd = rstd;
          a.dx = dx, a.dshift = dshift, a.dscale = dscale, a.dweight = dweight, a.dbias = dbias;
          check_adaln(a);
          py::gil_scoped_release release;
          kernels->adaln_backward(a);
        });
  m.def("gate_residual_forward", [](Tensor residual, Tensor x, Tensor gate, Tensor cu, Tensor out) {
    AdaLn a{};
    a.residual = residual, a.x = x, a.gate = gate, a.cu_seqlens = cu, a.out = out;
    check_adaln(a);
    py::gil_scoped_release release;
    kernels->gate_residual_forward(a);
  });
  m.def("gate_residual_backward", [](Tensor dout, Tensor x, Tensor gate, Tensor cu, Tensor dresidual, Tensor dx, Tensor dgate) {
    AdaLn a{};
    a.dout = dout, a.x = x, a.gate = gate, a.cu_seqlens = cu, a.dresidual = dresidual, a.dx = dx, a.dgate = dgate;
    check_adaln(a);
    py::gil_scoped_release release;
    kernels->adaln_backward(a);
  });
  m.def("gate_residual_layer_norm_modulate_forward",
        [](Tensor residual, Tensor x, Tensor gate, Tensor shift, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias,
           float eps, Tensor residual_out, Tensor out, Tensor mean, Tensor rstd) {
          AdaLn a{};
          a.residual = residual, a.x = x, a.gate = gate, a.shift = shift, a.scale = scale, a.cu_seqlens = cu;
          a.rms = rms, a.weight = weight, a.bias = bias, a.eps = eps, a.residual_out = residual_out, a.out = out, a.mean = mean,
          a.rstd = rstd;
          check_adaln(a);
          py::gil_scoped_release release;
          kernels->gate_residual_layer_norm_modulate_forward(a);
        });
  m.def("gate_residual_layer_norm_modulate_backward", [](Tensor dresidual_out, Tensor dout, Tensor residual_out, Tensor x,
                                                         Tensor gate, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias,
                                                         Tensor mean, Tensor rstd, Tensor dresidual, Tensor dx, Tensor dgate,
                                                         Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias) {
    AdaLn a{};
    a.dresidual_out = dresidual_out, a.dout = dout, a.residual_out = residual_out, a.x = x, a.gate = gate, a.scale = scale,
    a.cu_seqlens = cu;
    a.rms = rms, a.weight = weight, a.bias = bias, a.mean = mean, a.rstd = rstd;
    a.dresidual = dresidual, a.dx = dx, a.dgate = dgate, a.dshift = dshift, a.dscale = dscale, a.dweight = dweight, a.dbias = dbias;
    check_adaln(a);
    py::gil_scoped_release release;
    kernels->adaln_backward(a);
  });

  m.def("patch_embed_3d_forward", [](Tensors videos, Tensor weight, Tensor bias, Patch patch, Tensor tokens) {
    PatchEmbed a = embed_call(videos, weight, patch);
    a.bias = bias, a.tokens = tokens;
    same_storage({&weight, &bias, &tokens});
    shape(tokens, {check_videos(videos, patch, weight.size[1], weight.dtype), weight.size[0]});
    if (bias) shape(bias, {weight.size[0]});
    expect_writes({&tokens});
    py::gil_scoped_release release;
    kernels->patch_embed_3d_forward(a);
  });
  m.def("patch_embed_3d_backward", [](Tensor dtokens, Tensors videos, Tensor weight, Patch patch, std::optional<Tensors> dvideos,
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
  m.def("patchify_3d", [](Tensors videos, Patch patch, Tensor tokens) { rearrange(videos, patch, tokens, true); });
  m.def("unpatchify_3d", [](Tensor tokens, Patch patch, Tensors videos) { rearrange(videos, patch, tokens, false); });
}

}  // namespace sora
