#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/register.h"
#include "zimage_mxfp8/device.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {

void register_device(py::module_& module) {
  py::class_<CudaDevice>(module, "CudaDevice")
      .def_readonly("index", &CudaDevice::index)
      .def_readonly("name", &CudaDevice::name)
      .def_readonly("major", &CudaDevice::major)
      .def_readonly("minor", &CudaDevice::minor)
      .def_readonly("multiprocessors", &CudaDevice::multiprocessors)
      .def_readonly("memory", &CudaDevice::memory);
  module.def("cuda_devices", &cuda_devices, py::call_guard<py::gil_scoped_release>());
  py::class_<BuildInfo>(module, "BuildInfo")
      .def_readonly("version", &BuildInfo::version)
      .def_readonly("cuda", &BuildInfo::cuda)
      .def_readonly("no_cuda", &BuildInfo::no_cuda)
      .def_readonly("cutlass", &BuildInfo::cutlass)
      .def_readonly("architectures", &BuildInfo::architectures);
  module.def("build_info", &build_info);
}

}  // namespace zimage_mxfp8::python
