#include <cmath>

#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8 {
namespace {

constexpr double kTheta = 256.0;
constexpr int kAxes = 3;
constexpr int kAxisSizes[kAxes] = {32, 48, 48};  // elements of a head; 128 together

}  // namespace

void compute_rotations(const std::int32_t* positions, std::int64_t tokens, float* rotations) {
  if (tokens < 0) throw InvalidArgument("tokens must be 0 or more");
  if (tokens > 0 && (!positions || !rotations)) {
    throw InvalidArgument("positions or rotations are a null pointer");
  }
  for (std::int64_t token = 0; token < tokens; ++token) {
    for (int axis = 0; axis < kAxes; ++axis) {
      for (int i = 0; i < kAxisSizes[axis]; i += 2) {
        // In float64, then float32, as in the model's training.
        const double frequency = std::pow(kTheta, -static_cast<double>(i) / kAxisSizes[axis]);
        const auto angle = static_cast<float>(positions[token * kAxes + axis] * frequency);
        *rotations++ = std::cos(angle);
        *rotations++ = std::sin(angle);
      }
    }
  }
}

}  // namespace zimage_mxfp8
