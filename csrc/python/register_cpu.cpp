#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "cpu/parallel.h"
#include "python/register.h"
#include "zimage_mxfp8/cpu_target.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {

void register_cpu(py::module_& module) {
  module.def(
      "available_cpu_targets",
      [] {
        std::vector<std::string> names;
        for (const CpuTarget target : available_cpu_targets()) names.emplace_back(name(target));
        return names;
      },
      "Return the names of the instruction sets that this processor can run.");
  module.def(
      "active_cpu_target", [] { return name(active_cpu_target()); },
      "Return the name of the instruction set that the kernels use.");
  module.def("force_cpu_target", &force_cpu_target, py::arg("name"),
             "Use the kernels of one instruction set, given by its name.");
  module.def("default_threads", &detail::default_threads,
             "Return the number of threads that 0 means: the processors of this process.");
}

}  // namespace zimage_mxfp8::python
