// RoPE of given tables, and norms in front of it: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include "../arguments.h"
#include "define.h"

namespace sora {

// Checks the tables of x [N, H, d], of which there may be none.
inline void check_rope_tables(const RopeTables& tables, const Tensor& x) {
  rank(x, 3, "[N, H, d]");
  at_most(x, 1), at_most(x, 2);
  const Tensor &cos = tables.cos, &sin = tables.sin;
  if (static_cast<bool>(cos) != static_cast<bool>(sin))
    fail(sin, cos ? "a tensor, as there is cos" : "None, as there is no cos", cos ? "None" : "a tensor");
  if (!cos) return;
  if (cos.ndim != 3) rank(cos, 2, "[M, r/2] or [M, H, r/2]");
  const int64_t rows = cos.size[0], pairs = cos.size[cos.ndim - 1];
  if (rows == 0 ? x.size[0] != 0 : x.size[0] % rows != 0)
    fail(cos, "a number of rows that divides " + std::to_string(x.size[0]), shape_of(cos));
  if (cos.ndim == 3 && cos.size[1] != x.size[1]) fail(cos, "rows of " + std::to_string(x.size[1]) + " heads", shape_of(cos));
  if (pairs > x.size[2] / 2) fail(cos, "at most " + std::to_string(x.size[2] / 2) + " pairs", shape_of(cos));
  same_shape(sin, cos);
  for (const Tensor* t : {&cos, &sin}) dtype(*t, DType::kFloat32), contiguous_rows(*t);
}

inline void check_norm_rope(const NormRope& a) {
  const QkNorm& p = a.part;
  check_rope_tables(a.tables, p.x);
  same_storage({&p.x, &p.out, &p.dout, &p.dx});
  for (const Tensor* t : {&p.out, &p.dout, &p.dx})
    if (*t) same_shape(*t, p.x);
  if (a.layer && a.across_heads) fail("across_heads", "False of a LayerNorm", "True");
  const int64_t groups = a.across_heads ? 1 : p.x.size[1];
  float_table(p.rstd, {p.x.size[0], groups});
  if (static_cast<bool>(a.mean) != a.layer)
    fail(a.mean, a.layer ? "a tensor of a LayerNorm" : "None of an RMS norm", a.layer ? "None" : "a tensor");
  if (a.mean) float_table(a.mean, {p.x.size[0], groups});
  for (const Tensor* t : {&a.bias, &a.dbias})
    if (*t && !a.layer) fail(*t, "None of an RMS norm", "a tensor");
  const Tensor* first = same_storage({&p.weight, &a.bias, &p.dweight, &a.dbias});
  if (first != nullptr && first->dtype != DType::kFloat32) dtype(*first, p.x.dtype);
  for (const Tensor* t : {&p.weight, &a.bias, &p.dweight, &a.dbias})
    if (*t) shape(*t, {a.across_heads ? p.x.size[1] * p.x.size[2] : p.x.size[2]});
}

template <class Kernels>
void bind_norm_rope(py::module_& m, const Kernels* kernels) {
  define(m, "apply_rope(x, cos, sin, interleaved, inverse) -> out",
         [=](const Call& call, Tensor x, Tensor cos, Tensor sin, bool interleaved, bool inverse, Tensor out) {
           const RopeTables tables{cos, sin, interleaved, inverse};
           check_rope_tables(tables, x);
           same_storage({&x, &out});
           same_shape(out, x);
           call.run([&] { kernels->apply_rope(tables, x, out); });
         });
  define(m, "norm_rope_forward(x, weight?, bias?, cos?, sin?, layer, across_heads, interleaved, eps) -> out, mean?, rstd",
         [=](const Call& call, Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, bool layer, bool across_heads,
             bool interleaved, float eps, Tensor out, Tensor mean, Tensor rstd) {
           const QkNorm part{x, weight, rstd, out, {}, {}, {}};
           const NormRope a{part, bias, mean, {}, {cos, sin, interleaved, false}, layer, across_heads, eps};
           check_norm_rope(a);
           call.run([&] { kernels->norm_rope_forward(a); });
         });
  define(m,
         "norm_rope_backward(dout, x, weight?, bias?, cos?, sin?, mean?, rstd, layer, across_heads, interleaved) -> dx, dweight?, "
         "dbias?",
         [=](const Call& call, Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor cos, Tensor sin, Tensor mean, Tensor rstd,
             bool layer, bool across_heads, bool interleaved, Tensor dx, Tensor dweight, Tensor dbias) {
           const QkNorm part{x, weight, rstd, {}, dout, dx, dweight};
           const NormRope a{part, bias, mean, dbias, {cos, sin, interleaved, true}, layer, across_heads, 0};
           check_norm_rope(a);
           call.run([&] { kernels->norm_rope_backward(a); });
         });
}

}  // namespace sora
