// RoPE and QK-norm + RoPE: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "../arguments.h"
#include "../dlpack.h"
#include "checks.h"

namespace sora {

namespace py = pybind11;

inline Rope rope_tables(Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta,
                        std::array<int32_t, 3> axes_dim, bool interleaved, bool inverse, const Tensor& x) {
  require(x.ndim == 3, "[N, H, d] expected");
  spans(cu_spans, grid, x.size[0]);
  for (const Tensor* t : {&origin, &step}) {
    shape(*t, {grid.size[0], 3});
    on_device(*t);
    require(t->dtype == DType::kFloat32 && (t->size[0] == 0 || (t->stride[0] == 3 && t->stride[1] == 1)),
            "origin and step must be float32 and contiguous");
  }
  for (int32_t n : axes_dim) require(n >= 0 && n % 2 == 0, "axes_dim must be even");
  require(axes_dim[0] + axes_dim[1] + axes_dim[2] == x.size[2], "axes_dim must add up to the head dim");
  return {cu_spans,    grid,   origin, step, {theta[0], theta[1], theta[2]}, {axes_dim[0], axes_dim[1], axes_dim[2]},
          interleaved, inverse};
}

inline void check_part(const QkNorm& p, bool across_heads, int64_t tokens) {
  same_storage({&p.x, &p.weight, &p.out, &p.dout, &p.dx, &p.dweight});
  require(p.x.ndim == 3 && p.x.size[0] == tokens, "[N, H, d] expected");
  statistics(p.rstd, {tokens, across_heads ? 1 : p.x.size[1]});
  for (const Tensor* t : {&p.out, &p.dout, &p.dx})
    if (*t) same_shape(*t, p.x);
  for (const Tensor* t : {&p.weight, &p.dweight})
    if (*t) shape(*t, {across_heads ? p.x.size[1] * p.x.size[2] : p.x.size[2]});
}

template <class Kernels>
void bind_rope(py::module_& m, const Kernels* kernels) {
  m.def("rope_3d", [=](Tensor x, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta,
                       std::array<int32_t, 3> axes_dim, bool interleaved, bool inverse, Tensor out) {
    const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, inverse, x);
    same_storage({&x, &out});
    same_shape(x, out);
    py::gil_scoped_release release;
    kernels->rope_3d(rope, x, out);
  });
  m.def("qk_norm_rope_3d_forward",
        [=](Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cu_spans, Tensor grid, Tensor origin, Tensor step,
            std::array<double, 3> theta, std::array<int32_t, 3> axes_dim, bool interleaved, bool across_heads, float eps,
            Tensor q_out, Tensor k_out, Tensor q_rstd, Tensor k_rstd) {
          present({&q_out, &k_out});
          const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, false, q);
          QkNorm parts[2] = {{q, q_weight, q_rstd, q_out, {}, {}, {}}, {k, k_weight, k_rstd, k_out, {}, {}, {}}};
          for (const QkNorm& p : parts) check_part(p, across_heads, q.size[0]);
          require(k.size[2] == q.size[2], "head dims differ");
          py::gil_scoped_release release;
          kernels->qk_norm_rope_3d_forward(rope, parts, across_heads, eps);
        });
  m.def("qk_norm_rope_3d_backward",
        [=](Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor q_rstd, Tensor k_rstd,
            Tensor cu_spans, Tensor grid, Tensor origin, Tensor step, std::array<double, 3> theta, std::array<int32_t, 3> axes_dim,
            bool interleaved, bool across_heads, Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight) {
          present({&dq_out, &dk_out, &dq, &dk});
          const Rope rope = rope_tables(cu_spans, grid, origin, step, theta, axes_dim, interleaved, true, q);
          QkNorm parts[2] = {{q, q_weight, q_rstd, {}, dq_out, dq, dq_weight}, {k, k_weight, k_rstd, {}, dk_out, dk, dk_weight}};
          for (const QkNorm& p : parts) {
            check_part(p, across_heads, q.size[0]);
            if (p.weight) present({&p.dweight});
          }
          require(k.size[2] == q.size[2], "head dims differ");
          py::gil_scoped_release release;
          kernels->qk_norm_rope_3d_backward(rope, parts, across_heads);
        });
}

}  // namespace sora
