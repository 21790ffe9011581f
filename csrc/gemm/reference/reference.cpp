#include "gemm/reference/reference.h"

#include <memory>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "zimage_mxfp8/matrix.h"

namespace zimage_mxfp8::detail {

void reference_gemm(const GemmTask& task, int threads) {
  if (task.m == 0) return;
  const Kernels& kernels = active_kernels();
  parallel_for(ceil_div(task.n, kGemmPanel), 1, threads, [&](std::int64_t begin, std::int64_t end) {
    const auto scratch = std::make_unique<float[]>(static_cast<std::size_t>(gemm_scratch(task.k)));
    for (std::int64_t panel = begin; panel < end; ++panel) {
      kernels.gemm_panel(task, panel, scratch.get());
    }
  });
}

}  // namespace zimage_mxfp8::detail
