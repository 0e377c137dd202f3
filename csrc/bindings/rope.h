// RoPE and QK-norm + RoPE: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include <array>

#include "../arguments.h"
#include "define.h"

namespace sora {

using Axes = std::array<int32_t, 3>;
using Theta = std::array<double, 3>;

inline Rope rope_tables(Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, const Theta& theta, const Axes& axes_dim,
                        bool interleaved, bool inverse, const Tensor& x) {
  rank(x, 3, "[N, H, d]");
  at_most(x, 1), at_most(x, 2);
  spans(cu_spans, grid, {&origin, &step}, x.size[0]);
  const int64_t sizes[3] = {axes_dim[0], axes_dim[1], axes_dim[2]};
  const bool even = std::all_of(sizes, sizes + 3, [](int64_t n) { return n >= 0 && n % 2 == 0; });
  if (!even || sizes[0] + sizes[1] + sizes[2] != x.size[2])
    fail("axes_dim", "even sizes >= 0 that add up to " + std::to_string(x.size[2]), listed(sizes, sizes + 3));
  return {cu_spans,    grid,   origin, step, {theta[0], theta[1], theta[2]}, {axes_dim[0], axes_dim[1], axes_dim[2]},
          interleaved, inverse};
}

inline void check_part(const QkNorm& p, bool across_heads, const Tensor& q) {
  rank(p.x, 3, "[N, H, d]");
  at_most(p.x, 1);
  shape(p.x, {q.size[0], p.x.size[1], q.size[2]});
  same_storage({&q, &p.x, &p.out, &p.dout, &p.dx});
  float_table(p.rstd, {q.size[0], across_heads ? 1 : p.x.size[1]});
  for (const Tensor* t : {&p.out, &p.dout, &p.dx})
    if (*t) same_shape(*t, p.x);
  for (const Tensor* t : {&p.weight, &p.dweight})
    if (*t) shape(*t, {across_heads ? p.x.size[1] * p.x.size[2] : p.x.size[2]});
  if (p.dout && p.weight && !p.dweight) fail(p.dweight, "a tensor, as there is a weight", "None");
  if (p.dweight && !p.weight) fail(p.dweight, "None, as there is no weight", "a tensor");  // CUDA would leave it unwritten
}

inline void check_parts(const QkNorm (&parts)[2], bool across_heads) {
  for (const QkNorm& p : parts) check_part(p, across_heads, parts[0].x);
  const Tensor* first = same_storage({&parts[0].weight, &parts[1].weight, &parts[0].dweight, &parts[1].dweight});
  if (first != nullptr && first->dtype != DType::kFloat32) dtype(*first, parts[0].x.dtype);
}

template <class Kernels>
void bind_rope(py::module_& m, const Kernels* kernels) {
  define(m, "rope_3d(x, cu_spans, grid, origin, step, theta, axes_dim, interleaved, inverse) -> out",
         [=](const Call& call, Tensor x, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, Theta theta, Axes axes_dim,
             bool interleaved, bool inverse, Tensor out) {
           const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, inverse, x);
           same_storage({&x, &out});
           same_shape(out, x);
           call.run([&] { kernels->rope_3d(rope, x, out); });
         });
  define(m,
         "qk_norm_rope_3d_forward(q, k, q_weight?, k_weight?, cu_spans, grid, origin, step, theta, axes_dim, interleaved, "
         "across_heads, eps) -> q_out, k_out, q_rstd, k_rstd",
         [=](const Call& call, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cu_spans, Tensor grid, Tensor origin,
             Tensor step, Theta theta, Axes axes_dim, bool interleaved, bool across_heads, float eps, Tensor q_out, Tensor k_out,
             Tensor q_rstd, Tensor k_rstd) {
           const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, false, q);
           QkNorm parts[2] = {{q, q_weight, q_rstd, q_out, {}, {}, {}}, {k, k_weight, k_rstd, k_out, {}, {}, {}}};
           check_parts(parts, across_heads);
           call.run([&] { kernels->qk_norm_rope_3d_forward(rope, parts, across_heads, eps); });
         });
  define(
      m,
      "qk_norm_rope_3d_backward(dq_out, dk_out, q, k, q_weight?, k_weight?, q_rstd, k_rstd, cu_spans, grid, origin, step, theta, "
      "axes_dim, interleaved, across_heads) -> dq, dk, dq_weight?, dk_weight?",
      [=](const Call& call, Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd,
          Tensor k_rstd, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, Theta theta, Axes axes_dim, bool interleaved,
          bool across_heads, Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight) {
        const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, true, q);
        QkNorm parts[2] = {{q, q_weight, q_rstd, {}, dq_out, dq, dq_weight}, {k, k_weight, k_rstd, {}, dk_out, dk, dk_weight}};
        check_parts(parts, across_heads);
        call.run([&] { kernels->qk_norm_rope_3d_backward(rope, parts, across_heads); });
      });
}

}  // namespace sora
