#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <memory>
#include <string>

#include "python/register.h"
#include "python/views.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/peer_memory.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

py::bytes handle_of(const PeerMemory& memory) {
  const PeerMemory::Handle handle = memory.handle();
  return py::bytes(reinterpret_cast<const char*>(handle.data()), handle.size());
}

// Waits for the device without the interpreter's lock: whoever ends that waiting may need it.
struct DeleteUnlocked {
  void operator()(PeerMemory* memory) const {
    const py::gil_scoped_release unlocked;
    delete memory;
  }
};

void open(PeerMemory& memory, int rank, const py::bytes& given) {
  const std::string bytes = given;
  PeerMemory::Handle handle;
  if (bytes.size() != handle.size()) throw InvalidArgument("a handle has 64 bytes");
  std::copy(bytes.begin(), bytes.end(), handle.begin());
  const py::gil_scoped_release unlocked;
  memory.open(rank, handle);
}

}  // namespace

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
  py::class_<PeerMemory, std::unique_ptr<PeerMemory, DeleteUnlocked>>(
      module, "PeerMemory", "Device memory that processes on other CUDA devices write to.")
      .def(py::init<int, int, int, std::size_t>(), py::arg("device"), py::arg("rank"),
           py::arg("ranks"), py::arg("nbytes"), py::call_guard<py::gil_scoped_release>(),
           "Allocate memory on a CUDA device, given by its index.")
      .def("handle", &handle_of, "Return what other processes open this memory by.")
      .def("open", &open, py::arg("rank"), py::arg("handle"), "Open the memory of another rank.")
      .def(
          "address",
          [](const PeerMemory& memory) { return reinterpret_cast<std::uintptr_t>(memory.data()); },
          "Address of the first byte.")
      .def(
          "send",
          [](PeerMemory& memory, std::uintptr_t source, std::size_t source_pitch, std::size_t width,
             std::size_t rows, std::size_t offset, std::size_t pitch, std::uintptr_t stream) {
            memory.send(reinterpret_cast<const void*>(source), source_pitch, {width, rows}, offset,
                        pitch, cuda_stream(stream));
          },
          py::arg("source"), py::arg("source_pitch"), py::arg("width"), py::arg("rows"),
          py::arg("offset"), py::arg("pitch"), py::arg("stream"),
          py::call_guard<py::gil_scoped_release>(),
          "Copy rows of bytes of this device to the memory of all other ranks.")
      .def(
          "signal",
          [](PeerMemory& memory, int channel, std::uintptr_t stream) {
            memory.signal(channel, cuda_stream(stream));
          },
          py::arg("channel"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Tell all other ranks that what was sent before on the stream has arrived.")
      .def(
          "wait",
          [](PeerMemory& memory, int channel, std::uintptr_t stream) {
            memory.wait(channel, cuda_stream(stream));
          },
          py::arg("channel"), py::arg("stream"), py::call_guard<py::gil_scoped_release>(),
          "Wait, on the stream, for the signals of all other ranks.")
      .def("release", &PeerMemory::release, "Stop waiting for other ranks, now and later.");
  module.def("build_info", &build_info, "Describe this build.");
}

}  // namespace zimage_mxfp8::python
