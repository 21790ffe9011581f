// The part of cuBLASLt's C interface that is used here, declared from its documentation, so that
// building needs none of its files. tests/cpp/test_cublaslt_abi.cpp compares it with cublasLt.h
// where that is installed.
#pragma once

#include <cstddef>
#include <cstdint>

namespace zimage_mxfp8::detail::cublaslt::abi {

using Status = int;
inline constexpr Status kSuccess = 0;

using Handle = struct HandleStruct*;
using MatmulDesc = struct MatmulDescStruct*;
using MatrixLayout = struct MatrixLayoutStruct*;
using Preference = struct PreferenceStruct*;

enum ComputeType : int { kCompute32F = 68 };
enum DataType : int { kReal32F = 0, kReal16BF = 14, kReal8FE4M3 = 28 };
enum Operation : int { kTranspose = 1 };
enum ScaleMode : int { kScaleOuterVector = 3 };
enum Epilogue : int { kEpilogueBias = 4 };

enum MatmulDescAttribute : int {
  kTransA = 3,
  kEpilogue = 7,
  kBiasPointer = 8,
  kAScalePointer = 17,
  kBScalePointer = 18,
  kFastAccumulation = 25,
  kBiasDataType = 26,
  kAScaleMode = 31,
  kBScaleMode = 32,
};

enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};

struct Algorithm {
  std::uint64_t data[8];
};

struct HeuristicResult {
  Algorithm algorithm;
  std::size_t workspace_size;
  Status state;
  float waves_count;
  int reserved[4];
};

// Types of the functions, which are looked up when the library is loaded.
using Create = Status(Handle* handle);
using GetVersion = std::size_t();
using MatmulDescCreate = Status(MatmulDesc* descriptor, ComputeType compute, DataType scale);
using MatmulDescDestroy = Status(MatmulDesc descriptor);
using MatmulDescSetAttribute = Status(MatmulDesc descriptor, MatmulDescAttribute attribute,
                                      const void* value, std::size_t bytes);
using MatrixLayoutCreate = Status(MatrixLayout* layout, DataType type, std::uint64_t rows,
                                  std::uint64_t cols, std::int64_t leading_dimension);
using MatrixLayoutDestroy = Status(MatrixLayout layout);
using MatmulPreferenceCreate = Status(Preference* preference);
using MatmulPreferenceDestroy = Status(Preference preference);
using MatmulPreferenceSetAttribute = Status(Preference preference, PreferenceAttribute attribute,
                                            const void* value, std::size_t bytes);
using MatmulAlgoGetHeuristic = Status(Handle handle, MatmulDesc operation, MatrixLayout a,
                                      MatrixLayout b, MatrixLayout c, MatrixLayout d,
                                      Preference preference, int requested,
                                      HeuristicResult* results, int* returned);
using Matmul = Status(Handle handle, MatmulDesc operation, const void* alpha, const void* a,
                      MatrixLayout a_layout, const void* b, MatrixLayout b_layout, const void* beta,
                      const void* c, MatrixLayout c_layout, void* d, MatrixLayout d_layout,
                      const Algorithm* algorithm, void* workspace, std::size_t workspace_bytes,
                      void* stream);

#define ZM_CUBLASLT_FUNCTIONS                        \
  ZM_CUBLASLT_FUNCTION(Create)                       \
  ZM_CUBLASLT_FUNCTION(GetVersion)                   \
  ZM_CUBLASLT_FUNCTION(MatmulDescCreate)             \
  ZM_CUBLASLT_FUNCTION(MatmulDescDestroy)            \
  ZM_CUBLASLT_FUNCTION(MatmulDescSetAttribute)       \
  ZM_CUBLASLT_FUNCTION(MatrixLayoutCreate)           \
  ZM_CUBLASLT_FUNCTION(MatrixLayoutDestroy)          \
  ZM_CUBLASLT_FUNCTION(MatmulPreferenceCreate)       \
  ZM_CUBLASLT_FUNCTION(MatmulPreferenceDestroy)      \
  ZM_CUBLASLT_FUNCTION(MatmulPreferenceSetAttribute) \
  ZM_CUBLASLT_FUNCTION(MatmulAlgoGetHeuristic)       \
  ZM_CUBLASLT_FUNCTION(Matmul)

}  // namespace zimage_mxfp8::detail::cublaslt::abi
