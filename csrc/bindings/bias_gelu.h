// gelu(x + bias): decodes and checks the arguments, for the entry points of a table `kernels`.
#pragma once

#include "../arguments.h"
#include "define.h"

namespace sora {

inline void check_bias_gelu(const BiasGelu& a) {
  rank(a.x, 2, "[N, D]");
  at_most(a.x, 1);
  same_storage({&a.x, &a.bias, &a.out, &a.dout, &a.dx, &a.dbias});
  for (const Tensor* t : {&a.out, &a.dout, &a.dx})
    if (*t) same_shape(*t, a.x);
  for (const Tensor* t : {&a.bias, &a.dbias})
    if (*t) shape(*t, {a.x.size[1]});
}

template <class Kernels>
void bind_bias_gelu(py::module_& m, const Kernels* kernels) {
  define(m, "bias_gelu_forward(x, bias?) -> out", [=](const Call& call, Tensor x, Tensor bias, Tensor out) {
    BiasGelu a{};
    a.x = x, a.bias = bias, a.out = out;
    check_bias_gelu(a);
    call.run([&] { kernels->bias_gelu_forward(a); });
  });
  define(m, "bias_gelu_backward(dout, x, bias?) -> dx, dbias?",
         [=](const Call& call, Tensor dout, Tensor x, Tensor bias, Tensor dx, Tensor dbias) {
           BiasGelu a{};
           a.dout = dout, a.x = x, a.bias = bias, a.dx = dx, a.dbias = dbias;
           check_bias_gelu(a);
           call.run([&] { kernels->bias_gelu_backward(a); });
         });
}

}  // namespace sora
