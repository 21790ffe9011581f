// In place of gemm_sm120.cpp in builds without that target.
#include "gemm/gemm_cuda.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr const char* kReason =
    "this build has no kernels for sm120: rebuild it with ZM_CUDA=ON, 120f in ZM_CUDA_ARCHS, CUDA "
    "12.9 or newer and CUTLASS 4.2 or newer";

}  // namespace

Support supports_sm120() { return {false, kReason}; }

std::size_t workspace_sm120(const GemmProblem&) { throw Unsupported(kReason); }

void gemm_sm120(const GemmTask&, Workspace, CudaStream) { throw Unsupported(kReason); }

}  // namespace zimage_mxfp8::detail
