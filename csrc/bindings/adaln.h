// adaLN: decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include "../arguments.h"
#include "define.h"

namespace sora {

// The storage types of a call, and whether they are a combination that kernels have.
inline AdaLnTypes adaln_types(const AdaLn& a) {
  const bool norm = static_cast<bool>(a.mean);  // without one, out and dout are the residual's
  const Tensor none, *out = norm ? &a.out : &none, *dout = norm ? &a.dout : &none;
  const Tensor *sum = norm ? &a.residual_out : &a.out, *dsum = norm ? &a.dresidual_out : &a.dout;
  const Tensor* tokens = same_storage({&a.x, out, dout, &a.dx});
  const Tensor* residual = same_storage({&a.residual, sum, dsum, &a.dresidual});
  const Tensor* parameters =
      same_storage({&a.gate, &a.shift, &a.scale, &a.weight, &a.bias, &a.dgate, &a.dshift, &a.dscale, &a.dweight, &a.dbias});
  AdaLnTypes types;
  types.tokens = (tokens != nullptr ? tokens : residual)->dtype;
  types.residual = residual != nullptr ? residual->dtype : types.tokens;
  types.parameters = parameters != nullptr ? parameters->dtype : types.residual;
  if (types.residual != DType::kFloat32 && residual != nullptr) dtype(*residual, types.tokens);
  if (types.parameters != DType::kFloat32 && parameters != nullptr) dtype(*parameters, types.residual);
  return types;
}

inline void check_adaln(AdaLn& a) {
  const Tensor& tokens = a.dout ? a.dout : a.x;  // without a gate a backward has no x
  rank(tokens, 2, "[N, D]");
  at_most(tokens, 1);
  const int64_t n = tokens.size[0], d = tokens.size[1];
  if (a.cu_rows) boundaries(a.cu_rows, n);
  const int64_t rows = a.cu_rows ? a.cu_rows.size[0] - 1 : 1;
  a.types = adaln_types(a);
  for (const Tensor* t : {&a.residual, &a.x, &a.residual_out, &a.out, &a.dresidual_out, &a.dout, &a.dresidual, &a.dx})
    if (*t) shape(*t, {n, d});
  for (const Tensor* t : {&a.gate, &a.shift, &a.scale, &a.dgate, &a.dshift, &a.dscale})
    if (*t) shape(*t, {rows, d});
  for (const Tensor* t : {&a.weight, &a.bias, &a.dweight, &a.dbias})
    if (*t) shape(*t, {d});
  for (const Tensor* t : {&a.mean, &a.rstd})
    if (*t) float_table(*t, {n});
  if (!a.dresidual || a.gates_norm()) return;
  for (const Tensor* t : {&a.x, &a.dx, &a.dgate})  // of a gate, in the backward
    if (static_cast<bool>(*t) != static_cast<bool>(a.gate))
      fail(*t, a.gate ? "a tensor, as there is a gate" : "None, as there is no gate", *t ? "a tensor" : "None");
}

template <class Field>
struct FieldType;
template <class T>
struct FieldType<T AdaLn::*> {
  using type = T;
};

// Defines an entry point whose arguments are these fields of AdaLn, in the order of `text`.
template <auto... fields>
void define_adaln(py::module_& m, const char* text, void (*kernel)(const AdaLn&)) {
  define(m, text, [=](const Call& call, typename FieldType<decltype(fields)>::type... values) {
    AdaLn a{};
    ((a.*fields = values), ...);
    check_adaln(a);
    call.run([&] { kernel(a); });
  });
}

template <class Kernels>
void bind_adaln(py::module_& m, const Kernels* kernels) {
  using A = AdaLn;
  define_adaln<&A::x, &A::shift, &A::scale, &A::cu_rows, &A::rms, &A::weight, &A::bias, &A::eps, &A::out, &A::mean, &A::rstd>(
      m, "layer_norm_modulate_forward(x, shift?, scale?, cu_rows?, rms, weight?, bias?, eps) -> out, mean, rstd",
      kernels->layer_norm_modulate_forward);
  define_adaln<&A::dout, &A::x, &A::scale, &A::cu_rows, &A::rms, &A::weight, &A::bias, &A::mean, &A::rstd, &A::dx, &A::dshift,
               &A::dscale, &A::dweight, &A::dbias>(
      m,
      "layer_norm_modulate_backward(dout, x, scale?, cu_rows?, rms, weight?, bias?, mean, rstd) -> dx, dshift?, dscale?, dweight?, "
      "dbias?",
      kernels->adaln_backward);
  define_adaln<&A::residual, &A::x, &A::gate, &A::cu_rows, &A::out>(m, "gate_residual_forward(residual, x, gate?, cu_rows?) -> out",
                                                                    kernels->gate_residual_forward);
  define_adaln<&A::dout, &A::x, &A::gate, &A::cu_rows, &A::dresidual, &A::dx, &A::dgate>(
      m, "gate_residual_backward(dout, x?, gate?, cu_rows?) -> dresidual, dx?, dgate?", kernels->adaln_backward);
  define_adaln<&A::residual, &A::x, &A::gate, &A::shift, &A::scale, &A::cu_rows, &A::rms, &A::weight, &A::bias, &A::eps,
               &A::residual_out, &A::out, &A::mean, &A::rstd>(
      m,
      "gate_residual_layer_norm_modulate_forward(residual, x, gate?, shift?, scale?, cu_rows?, rms, weight?, bias?, eps) -> "
      "residual_out, out, mean, rstd",
      kernels->gate_residual_layer_norm_modulate_forward);
  define_adaln<&A::dresidual_out, &A::dout, &A::residual_out, &A::x, &A::gate, &A::scale, &A::cu_rows, &A::rms, &A::weight,
               &A::bias, &A::mean, &A::rstd, &A::dresidual, &A::dx, &A::dgate, &A::dshift, &A::dscale, &A::dweight, &A::dbias>(
      m,
      "gate_residual_layer_norm_modulate_backward(dresidual_out, dout, residual_out, x?, gate?, scale?, cu_rows?, rms, weight?, "
      "bias?, mean, rstd) -> dresidual, dx?, dgate?, dshift?, dscale?, dweight?, dbias?",
      kernels->adaln_backward);
  define_adaln<&A::residual, &A::x, &A::scale, &A::cu_rows, &A::rms, &A::weight, &A::bias, &A::eps, &A::residual_out, &A::mean,
               &A::rstd>(m, "norm_gate_residual_forward(residual, x, gate?, cu_rows?, rms, weight?, bias?, eps) -> out, mean, rstd",
                         kernels->norm_gate_residual_forward);
  define_adaln<&A::dresidual_out, &A::x, &A::scale, &A::cu_rows, &A::rms, &A::weight, &A::bias, &A::mean, &A::rstd, &A::dresidual,
               &A::dx, &A::dscale, &A::dweight, &A::dbias>(
      m,
      "norm_gate_residual_backward(dout, x, gate?, cu_rows?, rms, weight?, bias?, mean, rstd) -> dresidual?, dx, dgate?, dweight?, "
      "dbias?",
      kernels->adaln_backward);
}

}  // namespace sora
