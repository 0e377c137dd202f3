// adaLN: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include "../arguments.h"
#include "define.h"

namespace sora {

inline void check_adaln(const AdaLn& a) {
  rank(a.x, 2, "[N, D]");
  at_most(a.x, 1);
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
    if (*t) float_table(*t, {n});
}

inline void run_adaln(const Call& call, const AdaLn& a, void (*kernel)(const AdaLn&)) {
  check_adaln(a);
  call.run([&] { kernel(a); });
}

template <class Kernels>
void bind_adaln(py::module_& m, const Kernels* kernels) {
  define(m, "layer_norm_modulate_forward(x, shift, scale, cu_seqlens, rms, weight?, bias?, eps) -> out, mean, rstd",
         [=](const Call& call, Tensor x, Tensor shift, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias, float eps,
             Tensor out, Tensor mean, Tensor rstd) {
           AdaLn a{};
           a.x = x, a.shift = shift, a.scale = scale, a.cu_seqlens = cu, a.rms = rms, a.weight = weight, a.bias = bias, a.eps = eps;
           a.out = out, a.mean = mean, a.rstd = rstd;
           run_adaln(call, a, kernels->layer_norm_modulate_forward);
         });
  define(m,
         "layer_norm_modulate_backward(dout, x, scale, cu_seqlens, rms, weight?, bias?, mean, rstd) -> dx, dshift, dscale, "
         "dweight?, dbias?",
         [=](const Call& call, Tensor dout, Tensor x, Tensor scale, Tensor cu, bool rms, Tensor weight, Tensor bias, Tensor mean,
             Tensor rstd, Tensor dx, Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias) {
           AdaLn a{};
           a.dout = dout, a.x = x, a.scale = scale, a.cu_seqlens = cu, a.rms = rms, a.weight = weight, a.bias = bias, a.mean = mean,
           a.rstd = rstd;
           a.dx = dx, a.dshift = dshift, a.dscale = dscale, a.dweight = dweight, a.dbias = dbias;
           run_adaln(call, a, kernels->adaln_backward);
         });
  define(m, "gate_residual_forward(residual, x, gate, cu_seqlens) -> out",
         [=](const Call& call, Tensor residual, Tensor x, Tensor gate, Tensor cu, Tensor out) {
           AdaLn a{};
           a.residual = residual, a.x = x, a.gate = gate, a.cu_seqlens = cu, a.out = out;
           run_adaln(call, a, kernels->gate_residual_forward);
         });
  define(m, "gate_residual_backward(dout, x, gate, cu_seqlens) -> dresidual, dx, dgate",
         [=](const Call& call, Tensor dout, Tensor x, Tensor gate, Tensor cu, Tensor dresidual, Tensor dx, Tensor dgate) {
           AdaLn a{};
           a.dout = dout, a.x = x, a.gate = gate, a.cu_seqlens = cu, a.dresidual = dresidual, a.dx = dx, a.dgate = dgate;
           run_adaln(call, a, kernels->adaln_backward);
         });
  define(m,
         "gate_residual_layer_norm_modulate_forward(residual, x, gate, shift, scale, cu_seqlens, rms, weight?, bias?, eps) -> "
         "residual_out, out, mean, rstd",
         [=](const Call& call, Tensor residual, Tensor x, Tensor gate, Tensor shift, Tensor scale, Tensor cu, bool rms,
             Tensor weight, Tensor bias, float eps, Tensor residual_out, Tensor out, Tensor mean, Tensor rstd) {
           AdaLn a{};
           a.residual = residual, a.x = x, a.gate = gate, a.shift = shift, a.scale = scale, a.cu_seqlens = cu;
           a.rms = rms, a.weight = weight, a.bias = bias, a.eps = eps, a.residual_out = residual_out, a.out = out, a.mean = mean,
           a.rstd = rstd;
           run_adaln(call, a, kernels->gate_residual_layer_norm_modulate_forward);
         });
  define(m,
         "gate_residual_layer_norm_modulate_backward(dresidual_out, dout, residual_out, x, gate, scale, cu_seqlens, rms, weight?, "
         "bias?, mean, rstd) -> dresidual, dx, dgate, dshift, dscale, dweight?, dbias?",
         [=](const Call& call, Tensor dresidual_out, Tensor dout, Tensor residual_out, Tensor x, Tensor gate, Tensor scale,
             Tensor cu, bool rms, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor dresidual, Tensor dx, Tensor dgate,
             Tensor dshift, Tensor dscale, Tensor dweight, Tensor dbias) {
           AdaLn a{};
           a.dresidual_out = dresidual_out, a.dout = dout, a.residual_out = residual_out, a.x = x, a.gate = gate, a.scale = scale,
           a.cu_seqlens = cu;
           a.rms = rms, a.weight = weight, a.bias = bias, a.mean = mean, a.rstd = rstd;
           a.dresidual = dresidual, a.dx = dx, a.dgate = dgate, a.dshift = dshift, a.dscale = dscale, a.dweight = dweight,
           a.dbias = dbias;
           run_adaln(call, a, kernels->adaln_backward);
         });
}

}  // namespace sora
