// Replaces cuda/runtime.cpp and the kernels in a build without CUDA.
#include "attention/attention_cuda.h"
#include "cuda/runtime.h"
#include "dequantize/dequantize_cuda.h"
#include "fused/fused_cuda.h"
#include "gemm/dispatch/missing.h"
#include "gemm/dispatch/table.h"
#include "quantize/quantize_cuda.h"
#include "rotated/quantize_rotated_cuda.h"
#include "row_scaled/fold_cuda.h"
#include "row_scaled/quantize_rows_cuda.h"
#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/device.h"
#include "zimage_mxfp8/gemm.h"
#include "zimage_mxfp8/peer_memory.h"
#include "zimage_mxfp8/staged_quantizer.h"

namespace zimage_mxfp8 {
namespace {

[[noreturn]] void refuse() { throw Unsupported(detail::kNoCuda); }

}  // namespace

std::vector<CudaDevice> cuda_devices() { return {}; }

std::string cublaslt_version() { return ""; }

struct PeerMemory::Resources {};
PeerMemory::PeerMemory(int, int, int, std::size_t) { refuse(); }
PeerMemory::~PeerMemory() = default;
PeerMemory::Handle PeerMemory::handle() const { refuse(); }
void PeerMemory::open(int, const Handle&) { refuse(); }
void* PeerMemory::data() const { refuse(); }
void PeerMemory::send(const void*, std::size_t, Rows, std::size_t, std::size_t, CudaStream) {
  refuse();
}
void PeerMemory::signal(int, CudaStream) { refuse(); }
void PeerMemory::wait(int, CudaStream) { refuse(); }
void PeerMemory::release() noexcept {}

struct StagedQuantizer::Resources {};
StagedQuantizer::StagedQuantizer(int) { refuse(); }
StagedQuantizer::~StagedQuantizer() = default;
void StagedQuantizer::quantize(const ConstMatrixView&, const MXFP8View&) { refuse(); }

struct DeviceBlock::Content {};
std::size_t DeviceBlock::memory_size(const BlockWeights&, BlockCompute) { refuse(); }
DeviceBlock::DeviceBlock(const BlockWeights&, BlockCompute, Workspace, CudaStream) { refuse(); }
DeviceBlock::~DeviceBlock() = default;
DeviceBlock::DeviceBlock(DeviceBlock&&) noexcept = default;
DeviceBlock& DeviceBlock::operator=(DeviceBlock&&) noexcept = default;
std::size_t DeviceBlock::workspace_size(std::int64_t, std::int64_t) const { refuse(); }
void DeviceBlock::run(const BlockInput&, const MatrixView&, Workspace, CudaStream,
                      const DeviceAttention&) const {
  refuse();
}

namespace detail {

const std::vector<CudaDevice>& known_devices() {
  static const std::vector<CudaDevice> none;
  return none;
}

int current_device() { refuse(); }

void check_device_memory(std::initializer_list<MemoryRange>) { refuse(); }

DeviceGuard::DeviceGuard(int device) {
  if (device >= 0) refuse();
}
DeviceGuard::~DeviceGuard() = default;

void attend_cuda(const ConstMatrixView&, std::int64_t, const std::vector<std::int64_t>&,
                 const MatrixView&, CudaStream) {
  refuse();
}
void quantize_cuda(const QuantizeTask&, CudaStream) { refuse(); }
void dequantize_cuda(const DequantizeTask&, CudaStream) { refuse(); }
void quantize_rows_cuda(const QuantizeRowsTask&, CudaStream) { refuse(); }
void quantize_rotated_cuda(const ConstMatrixView&, const Int8View&, CudaStream) { refuse(); }
void fold_cuda(const ConstMXFP8View&, const RowScaledView&, FoldRowStats*, CudaStream) { refuse(); }
void join_columns_cuda(const ConstMatrixView&, const ConstMatrixView&, const ActivationView&,
                       CudaStream) {
  refuse();
}
void silu_multiply_cuda(const ConstMatrixView&, const ConstMatrixView&, const ActivationView&,
                        CudaStream) {
  refuse();
}
void norm_modulate_cuda(const ConstMatrixView&, const NormWeights&, Items, float,
                        const ActivationView&, CudaStream) {
  refuse();
}
void add_norm_modulate_cuda(const MatrixView&, const ConstMatrixView&, const NormWeights&,
                            const std::optional<ScaledMatrix>&, const std::optional<NextNorm>&,
                            Items, float, CudaStream) {
  refuse();
}
void rotate_heads_cuda(const MatrixView&, const void*, const void*, const ConstMatrixView&,
                       std::int64_t, std::int64_t, float, CudaStream) {
  refuse();
}
namespace {

struct NoCuda {
  static constexpr const char* text = kNoCuda;
};

}  // namespace

const GemmImplementation kReference = missing_kernel<NoCuda>();
const GemmImplementation kDequantize = missing_kernel<NoCuda>();
const GemmImplementation kFP8Rowwise = missing_kernel<NoCuda>();
const GemmImplementation kInt8SM80 = missing_kernel<NoCuda>();

}  // namespace detail
}  // namespace zimage_mxfp8
