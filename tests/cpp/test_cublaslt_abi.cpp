// The declarations of gemm/cublaslt/cublaslt_abi.h against cuBLASLt's own header. Compiled where
// that is installed; there is nothing to run.
#include <cublasLt.h>

#include <type_traits>

#include "gemm/cublaslt/cublaslt_abi.h"

namespace abi = zimage_mxfp8::detail::cublaslt::abi;

static_assert(abi::kSuccess == CUBLAS_STATUS_SUCCESS);
static_assert(int{abi::kCompute32F} == CUBLAS_COMPUTE_32F);
static_assert(int{abi::kReal32F} == CUDA_R_32F);
static_assert(int{abi::kReal16BF} == CUDA_R_16BF);
static_assert(int{abi::kReal8FE4M3} == CUDA_R_8F_E4M3);
static_assert(int{abi::kTranspose} == CUBLAS_OP_T);
static_assert(int{abi::kScaleOuterVector} == CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F);
static_assert(int{abi::kEpilogueBias} == CUBLASLT_EPILOGUE_BIAS);
static_assert(int{abi::kTransA} == CUBLASLT_MATMUL_DESC_TRANSA);
static_assert(int{abi::kEpilogue} == CUBLASLT_MATMUL_DESC_EPILOGUE);
static_assert(int{abi::kBiasPointer} == CUBLASLT_MATMUL_DESC_BIAS_POINTER);
static_assert(int{abi::kAScalePointer} == CUBLASLT_MATMUL_DESC_A_SCALE_POINTER);
static_assert(int{abi::kBScalePointer} == CUBLASLT_MATMUL_DESC_B_SCALE_POINTER);
static_assert(int{abi::kFastAccumulation} == CUBLASLT_MATMUL_DESC_FAST_ACCUM);
static_assert(int{abi::kBiasDataType} == CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE);
static_assert(int{abi::kAScaleMode} == CUBLASLT_MATMUL_DESC_A_SCALE_MODE);
static_assert(int{abi::kBScaleMode} == CUBLASLT_MATMUL_DESC_B_SCALE_MODE);
static_assert(int{abi::kMaxWorkspaceBytes} == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES);
static_assert(int{abi::kMinAlignmentA} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES);
static_assert(int{abi::kMinAlignmentB} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES);
static_assert(int{abi::kMinAlignmentC} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES);
static_assert(int{abi::kMinAlignmentD} == CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES);
static_assert(sizeof(abi::Algorithm) == sizeof(cublasLtMatmulAlgo_t));
static_assert(sizeof(abi::HeuristicResult) == sizeof(cublasLtMatmulHeuristicResult_t));
static_assert(offsetof(abi::HeuristicResult, state) ==
              offsetof(cublasLtMatmulHeuristicResult_t, state));
