// Module broken: the kernels of broken.cu, by name, on tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../../csrc/dlpack.h"

namespace sora::cuda {

void run_broken(const std::string& name, const float* x, float* y, int n);

PYBIND11_MODULE(broken, m) {
  m.def("run", [](const std::string& name, Tensor x, Tensor y) {
    run_broken(name, static_cast<const float*>(x.data), static_cast<float*>(y.data), static_cast<int>(x.size[0]));
  });
}

}  // namespace sora::cuda
