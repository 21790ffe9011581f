// In place of gemm_sm90.cpp in builds without that target.
#include "gemm/gemm_cuda.h"
#include "zimage_mxfp8/error.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr const char* kReason =
    "this build has no kernels for sm90: rebuild it with 90a in ZM_CUDA_ARCHS";

}  // namespace

Support supports_sm90() { return {false, kReason}; }

std::size_t workspace_sm90(const GemmProblem&) { throw Unsupported(kReason); }

void gemm_sm90(const GemmTask&, Workspace, CudaStream) { throw Unsupported(kReason); }

}  // namespace zimage_mxfp8::detail
