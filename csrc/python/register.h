// One function per area of the module.
#pragma once

#include <pybind11/pybind11.h>

namespace zimage_mxfp8::python {

void register_codec(pybind11::module_& module);
void register_cpu(pybind11::module_& module);
void register_fused(pybind11::module_& module);
void register_gemm(pybind11::module_& module);
void register_device(pybind11::module_& module);

}  // namespace zimage_mxfp8::python
