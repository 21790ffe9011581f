#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/parallel.h"
#include "python/register.h"
#include "zimage_mxfp8/cpu_target.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {

void register_cpu(py::module_& module) {
  module.def("available_cpu_targets", [] {
    std::vector<std::string> names;
    for (const CpuTarget target : available_cpu_targets()) names.emplace_back(name(target));
    return names;
  });
  module.def("active_cpu_target", [] { return name(active_cpu_target()); });
  module.def("force_cpu_target", &force_cpu_target, py::arg("name"));
  module.def("default_threads", &detail::default_threads);
}

}  // namespace zimage_mxfp8::python
