#include <pybind11/pybind11.h>

#include "python/errors.h"
#include "python/register.h"

PYBIND11_MODULE(_core, module, pybind11::mod_gil_not_used()) {
  module.doc() = "Bindings of the zimage_mxfp8 core; use the zimage_mxfp8 package instead.";
  module.attr("__version__") = ZM_VERSION;
  zimage_mxfp8::python::register_errors();
  zimage_mxfp8::python::register_codec(module);
  zimage_mxfp8::python::register_cpu(module);
  zimage_mxfp8::python::register_device(module);
  zimage_mxfp8::python::register_fused(module);
  zimage_mxfp8::python::register_gemm(module);
}
