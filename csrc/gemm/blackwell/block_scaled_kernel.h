// The CUTLASS types of the block-scaled GEMMs, and their arguments.
//
// D[M, N] = A[M, K] B[N, K]^T + bias[N], E4M3 operands, one E8M0 scale for 32 elements of K in the
// 128x4 blocked layout of zimage_mxfp8/scale_layout.h. Everything here also evaluates on the host,
// where tests/cpp/test_block_scaled.cu checks it; CUTLASS types stay inside templates.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cute/tensor.hpp>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/epilogue/fusion/operations.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "gemm/task.h"

namespace zimage_mxfp8::detail {

// A tile and its schedule. `max_shared_memory` is the family's limit for a block.
struct SM100Base {
  using Arch = cutlass::arch::Sm100;
  static constexpr int max_shared_memory = 232448;
};

// Two SMs share a tile: for large GEMMs.
struct SM100Large : SM100Base {
  using Tile = cute::Shape<cute::_256, cute::_256, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized2Sm;
};

struct SM100Medium : SM100Base {
  using Tile = cute::Shape<cute::_256, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_2, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized2SmMxf8f6f4Sm100;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized2Sm;
};

// One SM: for few rows.
struct SM100Small : SM100Base {
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::KernelTmaWarpSpecialized1SmMxf8f6f4Sm100;
  using Epilogue = cutlass::epilogue::TmaWarpSpecialized1Sm;
};

struct SM120 {
  using Arch = cutlass::arch::Sm120;
  static constexpr int max_shared_memory = 101376;
  using Tile = cute::Shape<cute::_128, cute::_128, cute::_128>;
  using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
  using Mainloop = cutlass::gemm::collective::KernelScheduleAuto;
  using Epilogue = cutlass::epilogue::collective::EpilogueScheduleAuto;
};

template <class Config, class Output>
struct BlockScaledKernel {
  using Operand = cutlass::mx_float8_t<cutlass::float_e4m3_t>;
  using Bias = cutlass::bfloat16_t;
  using RowMajor = cutlass::layout::RowMajor;
  using ColumnMajor = cutlass::layout::ColumnMajor;
  static constexpr int kOperandAlignment = 16;
  static constexpr int kOutputAlignment = 128 / cutlass::sizeof_bits<Output>::value;
  // For row-major D a bias per column is one over N.
  using Fusion = cutlass::epilogue::fusion::LinCombPerColBias<Output, float, Bias, void>;

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassBlockScaledTensorOp, typename Config::Tile,
      typename Config::Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float, void,
      RowMajor, kOutputAlignment, Output, RowMajor, kOutputAlignment, typename Config::Epilogue,
      Fusion>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      typename Config::Arch, cutlass::arch::OpClassBlockScaledTensorOp, Operand, RowMajor,
      kOperandAlignment, Operand, ColumnMajor, kOperandAlignment, float, typename Config::Tile,
      typename Config::Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      typename Config::Mainloop>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop,
                                                      Epilogue, void>;
  using Gemm = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  // CUTLASS chooses the number of stages and does not check the sum against the family's limit.
  static_assert(sizeof(typename Kernel::SharedStorage) <= Config::max_shared_memory);

  static typename Gemm::Arguments arguments(const GemmTask& task) {
    const int m = static_cast<int>(task.m), n = static_cast<int>(task.n),
              k = static_cast<int>(task.k);
    using ScaleConfig = typename Mainloop::Sm1xxBlkScaledConfig;
    using Element = cutlass::float_e4m3_t;
    using Scale = cutlass::float_ue8m0_t;
    const auto shape = cute::make_shape(m, n, k, 1);
    typename Gemm::Arguments arguments{};
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGemm;
    arguments.problem_shape = shape;
    arguments.mainloop = {
        static_cast<const Element*>(task.a.codes),
        cute::make_stride(task.k, cute::Int<1>{}, int64_t{0}),
        static_cast<const Element*>(task.b.codes),
        cute::make_stride(task.k, cute::Int<1>{}, int64_t{0}),
        static_cast<const Scale*>(task.a.scales),
        ScaleConfig::tile_atom_to_shape_SFA(shape),
        static_cast<const Scale*>(task.b.scales),
        ScaleConfig::tile_atom_to_shape_SFB(shape),
    };
    arguments.epilogue.thread.alpha = 1.0f;
    arguments.epilogue.thread.beta = 0.0f;
    arguments.epilogue.thread.bias_ptr = static_cast<const Bias*>(task.bias);
    arguments.epilogue.ptr_C = nullptr;
    arguments.epilogue.ptr_D = static_cast<Output*>(task.d);
    const auto stride_d = cute::make_stride(task.d_row_stride, cute::Int<1>{}, int64_t{0});
    arguments.epilogue.dC = stride_d;
    arguments.epilogue.dD = stride_d;
    return arguments;
  }
};

}  // namespace zimage_mxfp8::detail
