#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <vector>

#include "cuda/runtime.h"
#include "python/array.h"
#include "python/register.h"
#include "python/views.h"
#include "zimage_mxfp8/fused.h"
#include "zimage_mxfp8/rotated.h"

namespace py = pybind11;

namespace zimage_mxfp8::python {
namespace {

using Activation = FormattedMatrix<MatrixView, MXFP8View, RowScaledView, Int8View>;

// An array or None.
struct OptionalArray {
  std::optional<Array> array;

  OptionalArray(const py::object& object, const char* name) {
    if (!object.is_none()) array.emplace(object, name, kRead, kAnywhere);
  }
};

// Arrays of a call; their device is looked up once all are known.
class Arrays {
 public:
  void add(const Array& array) { arrays_.push_back(&array); }
  void add(const OptionalArray& optional) {
    if (optional.array) add(*optional.array);
  }
  void add(const Activation& activation) {
    add(activation.data);
    if (activation.scales) add(*activation.scales);
  }
  int device() const { return common_device(arrays_); }

 private:
  std::vector<const Array*> arrays_;
};

const std::uint8_t* vector(const Array& array, std::int64_t count, std::int64_t item) {
  array.require_contiguous(count * item);
  return array.data();
}

// A norm as Python describes it: its weight, and a matrix of scales or gates, or None.
struct Norm {
  Array weight;
  OptionalArray modulation;

  Norm(const py::object& weight_object, const char* weight_name,
       const py::object& modulation_object, const char* modulation_name)
      : weight(weight_object, weight_name, kRead, kAnywhere),
        modulation(modulation_object, modulation_name) {}

  NormWeights view(std::int64_t cols) const {
    NormWeights norm{vector(weight, cols, 2), std::nullopt};
    if (modulation.array) norm.modulation = matrix<ConstMatrixView>(*modulation.array, "bfloat16");
    return norm;
  }
};

Items items_of(const OptionalArray& items, std::int64_t rows) {
  if (!items.array) return nullptr;
  return reinterpret_cast<Items>(vector(*items.array, rows, sizeof(std::int32_t)));
}

void py_quantize_rotated(const py::object& source, const py::tuple& target, std::uintptr_t stream) {
  const Array from(source, "the source", kRead, kAnywhere);
  const Activation to(target, "the target", kWrite);
  Arrays arrays;
  arrays.add(from), arrays.add(to);
  const int device = arrays.device();
  const auto view = matrix<ConstMatrixView>(from, "bfloat16");
  const auto* const int8 = std::get_if<Int8View>(&to.view);
  if (!int8) throw InvalidArgument("the target must be INT8");
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  quantize_rotated(view, *int8, cuda_stream(stream));
}

// An operation that reads two matrices and writes an activation.
using OfTwoMatrices = void (*)(const ConstMatrixView&, const ConstMatrixView&,
                               const ActivationView&, CudaStream);

void call_on_two(OfTwoMatrices operation, const Array& first, const Array& second,
                 const py::tuple& target, std::uintptr_t stream) {
  const Activation to(target, "the target", kWrite);
  Arrays arrays;
  arrays.add(first), arrays.add(second), arrays.add(to);
  const int device = arrays.device();
  const auto first_view = matrix<ConstMatrixView>(first, "bfloat16");
  const auto second_view = matrix<ConstMatrixView>(second, "bfloat16");
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  operation(first_view, second_view, to.view, cuda_stream(stream));
}

void py_join_columns(const py::object& left, const py::object& right, const py::tuple& target,
                     std::uintptr_t stream) {
  call_on_two(join_columns, Array(left, "left", kRead, kAnywhere),
              Array(right, "right", kRead, kAnywhere), target, stream);
}

void py_silu_multiply(const py::object& gate, const py::object& up, const py::tuple& target,
                      std::uintptr_t stream) {
  call_on_two(silu_multiply, Array(gate, "gate", kRead, kAnywhere),
              Array(up, "up", kRead, kAnywhere), target, stream);
}

void py_norm_modulate(const py::object& x, const py::object& weight, const py::object& scale,
                      const py::object& items, float eps, const py::tuple& target,
                      std::uintptr_t stream) {
  const Array from(x, "x", kRead, kAnywhere);
  const Norm norm(weight, "weight", scale, "scale");
  const OptionalArray item_array(items, "items");
  const Activation to(target, "the target", kWrite);
  Arrays arrays;
  arrays.add(from), arrays.add(norm.weight), arrays.add(norm.modulation);
  arrays.add(item_array), arrays.add(to);
  const int device = arrays.device();
  const auto view = matrix<ConstMatrixView>(from, "bfloat16");
  const NormWeights weights = norm.view(view.cols);
  const Items item_view = items_of(item_array, view.rows);
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  norm_modulate(view, weights, item_view, eps, to.view, cuda_stream(stream));
}

void py_add_norm_modulate(const py::object& x, const py::object& y, const py::object& norm_weight,
                          const py::object& gate, const py::object& next_weight,
                          const py::object& next_scale, const py::object& items, float eps,
                          const std::optional<py::tuple>& target, const py::object& addend,
                          const py::object& addend_factor, std::uintptr_t stream) {
  const Array in_place(x, "x", kWrite, kAnywhere), from(y, "y", kRead, kAnywhere);
  const Norm norm(norm_weight, "norm_weight", gate, "gate");
  const OptionalArray item_array(items, "items"), added_array(addend, "addend");
  const OptionalArray factor(addend_factor, "addend_factor");
  Arrays arrays;
  arrays.add(in_place), arrays.add(from), arrays.add(norm.weight), arrays.add(norm.modulation);
  arrays.add(item_array), arrays.add(added_array), arrays.add(factor);
  const auto view = matrix<MatrixView>(in_place, "bfloat16");
  const auto y_view = matrix<ConstMatrixView>(from, "bfloat16");
  const NormWeights weights = norm.view(view.cols);
  const Items item_view = items_of(item_array, view.rows);
  std::optional<ScaledMatrix> added;
  if (added_array.array.has_value() != factor.array.has_value()) {
    throw InvalidArgument("addend and addend_factor need each other");
  }
  if (added_array.array) {
    added = ScaledMatrix{matrix<ConstMatrixView>(*added_array.array, "bfloat16"),
                         reinterpret_cast<const float*>(vector(*factor.array, 1, sizeof(float)))};
  }
  std::optional<Norm> next_norm;
  std::optional<Activation> to;
  std::optional<NextNorm> next;
  if (target) {
    next_norm.emplace(next_weight, "next_weight", next_scale, "next_scale");
    to.emplace(*target, "the target", kWrite);
    arrays.add(next_norm->weight), arrays.add(next_norm->modulation), arrays.add(*to);
    next = NextNorm{next_norm->view(view.cols), to->view};
  }
  const int device = arrays.device();
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  add_norm_modulate(view, y_view, weights, added, next, item_view, eps, cuda_stream(stream));
}

void py_rotate_heads(const py::object& array, const py::object& q_weight,
                     const py::object& k_weight, const py::object& rotations, std::int64_t q_heads,
                     std::int64_t k_heads, float eps, std::uintptr_t stream) {
  const Array in_place(array, "the matrix", kWrite, kAnywhere);
  const Array q(q_weight, "q_weight", kRead, kAnywhere), k(k_weight, "k_weight", kRead, kAnywhere);
  const Array from(rotations, "rotations", kRead, kAnywhere);
  const int device = common_device({&in_place, &q, &k, &from});
  const auto view = matrix<MatrixView>(in_place, "bfloat16");
  const auto rotation_view = matrix<ConstMatrixView>(from, "float32");
  const void* q_data = vector(q, kHeadSize, 2);
  const void* k_data = vector(k, kHeadSize, 2);
  const py::gil_scoped_release release;
  const detail::DeviceGuard guard(device);
  rotate_heads(view, q_data, k_data, rotation_view, q_heads, k_heads, eps, cuda_stream(stream));
}

}  // namespace

void register_fused(py::module_& module) {
  using py::arg;
  module.def("quantize_rotated", &py_quantize_rotated, arg("source"), arg("target"),
             arg("stream") = 0, "Rotate the rows of [M, K] and encode them in INT8.");
  module.def("join_columns", &py_join_columns, arg("left"), arg("right"), arg("target"),
             arg("stream") = 0);
  module.def("silu_multiply", &py_silu_multiply, arg("gate"), arg("up"), arg("target"),
             arg("stream") = 0);
  module.def("norm_modulate", &py_norm_modulate, arg("x"), arg("weight"), arg("scale"),
             arg("items"), arg("eps"), arg("target"), arg("stream") = 0);
  module.def("add_norm_modulate", &py_add_norm_modulate, arg("x"), arg("y"), arg("norm_weight"),
             arg("gate"), arg("next_weight"), arg("next_scale"), arg("items"), arg("eps"),
             arg("target"), arg("addend") = py::none(), arg("addend_factor") = py::none(),
             arg("stream") = 0);
  module.def("rotate_heads", &py_rotate_heads, arg("matrix"), arg("q_weight"), arg("k_weight"),
             arg("rotations"), arg("q_heads"), arg("k_heads"), arg("eps"), arg("stream") = 0);
}

}  // namespace zimage_mxfp8::python
