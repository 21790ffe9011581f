#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "python/register.h"
#include "zimage_mxfp8/device.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {

void register_device(py::module_& module) {
  py::class_<CudaDevice>(module, "CudaDevice", "A CUDA device.")
      .def_readonly("index", &CudaDevice::index, "Index of the device.")
      .def_readonly("name", &CudaDevice::name, "Name of the device.")
      .def_readonly("major", &CudaDevice::major, "First number of the compute capability.")
      .def_readonly("minor", &CudaDevice::minor, "Second number of the compute capability.")
      .def_readonly("multiprocessors", &CudaDevice::multiprocessors, "Number of multiprocessors.")
      .def_readonly("memory", &CudaDevice::memory, "Bytes of device memory.");
  module.def("cuda_devices", &cuda_devices, py::call_guard<py::gil_scoped_release>(),
             "Return the devices that the CUDA runtime sees; none without a driver.");
  module.def(
      "capability_limit", &capability_limit,
      "Return the compute capability that devices have at most, such as 80; 0 for no limit.");
  py::class_<BuildInfo>(module, "BuildInfo", "Versions and CUDA targets of this build.")
      .def_readonly("version", &BuildInfo::version, "Version of this library.")
      .def_readonly("cuda", &BuildInfo::cuda, "Version of the CUDA compiler; empty without CUDA.")
      .def_readonly("no_cuda", &BuildInfo::no_cuda,
                    "Why the build is without CUDA; empty with CUDA.")
      .def_readonly("cutlass", &BuildInfo::cutlass, "Version of CUTLASS; empty if it was not used.")
      .def_readonly("architectures", &BuildInfo::architectures,
                    "CUDA targets that were compiled in.");
  module.def("build_info", &build_info, "Describe this build.");
}

}  // namespace zimage_mxfp8::python
