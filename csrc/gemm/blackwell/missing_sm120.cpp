// In builds without the target 120f.
#include "gemm/dispatch/missing.h"
#include "gemm/dispatch/table.h"

namespace zimage_mxfp8::detail {
namespace {

struct Reason {
  static constexpr const char* text =
      "this build has no kernels for sm120: rebuild it with ZM_CUDA=ON, 120f in ZM_CUDA_ARCHS, "
      "CUDA 12.9 or newer and CUTLASS 4.2 or newer";
};

}  // namespace

const GemmImplementation kMXFP8SM120 = missing_kernel<Reason>();

}  // namespace zimage_mxfp8::detail
