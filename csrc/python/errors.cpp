#include "python/errors.h"

#include <pybind11/pybind11.h>

#include "zimage_mxfp8/error.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

void raise(const char* class_name, const py::tuple& arguments) {
  const py::object cls = py::module_::import("zimage_mxfp8.errors").attr(class_name);
  PyErr_SetObject(cls.ptr(), cls(*arguments).ptr());
}

}  // namespace

void register_errors() {
  py::register_exception_translator([](std::exception_ptr failure) {
    try {
      if (failure) std::rethrow_exception(failure);
    } catch (const NonFiniteValue& error) {
      raise("NonFiniteError", py::make_tuple(error.what(), error.row(), error.column()));
    } catch (const PrecisionLoss& error) {
      raise("PrecisionLossError", py::make_tuple(error.what(), error.relative_error()));
    } catch (const Unsupported& error) {
      raise("UnsupportedError", py::make_tuple(error.what()));
    } catch (const CudaError& error) {
      raise("CudaError", py::make_tuple(error.what()));
    } catch (const InvalidArgument& error) {
      raise("InvalidArgumentError", py::make_tuple(error.what()));
    } catch (const Error& error) {
      raise("Error", py::make_tuple(error.what()));
    }
  });
}

}  // namespace zimage_mxfp8::python
