#include "zimage_mxfp8/peer_memory.h"

#include <cuda_runtime_api.h>

#include <cstring>
#include <memory>
#include <string>

#include "cuda/runtime.h"
#include "peers/signals_cuda.h"

namespace zimage_mxfp8 {
namespace {

constexpr std::size_t kHeader = 2048;  // before the data: signals
static_assert(sizeof(detail::Signals) <= kHeader);
static_assert(sizeof(cudaIpcMemHandle_t) == sizeof(PeerMemory::Handle));

// Lets this thread allocate and free while another one captures a graph.
class AnyCapture {
 public:
  AnyCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~AnyCapture() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AnyCapture(const AnyCapture&) = delete;
  AnyCapture& operator=(const AnyCapture&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Writes to memory of the current device that no rank has signalled, apart from all other work of
// the device.
void begin_signals(void* memory) {
  detail::Signals signals{};
  for (std::uint32_t& next : signals.next) next = 1;
  cudaStream_t stream = nullptr;
  ZM_CUDA_CHECK(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const std::unique_ptr<CUstream_st, cudaError_t (*)(cudaStream_t)> owner(stream,
                                                                          cudaStreamDestroy);
  ZM_CUDA_CHECK(cudaMemcpyAsync(memory, &signals, sizeof(signals), cudaMemcpyHostToDevice, stream));
  ZM_CUDA_CHECK(cudaStreamSynchronize(stream));
}

void check_channel(int channel) {
  if (channel >= 0 && channel < PeerMemory::kMaxChannels) return;
  throw InvalidArgument("channel " + std::to_string(channel) + ": there are " +
                        std::to_string(PeerMemory::kMaxChannels) + ", counted from 0");
}

}  // namespace

struct PeerMemory::Resources {
  int device = -1;
  int rank = 0;
  int ranks = 0;
  std::size_t bytes = 0;
  void* of_rank[kMaxRanks] = {};      // memory of each, header first
  std::uint32_t* released = nullptr;  // in the host's memory
  std::uint32_t* released_on_device = nullptr;

  detail::Signals* signals_of(int of) const { return static_cast<detail::Signals*>(of_rank[of]); }

  void check_all_are_open() const {
    for (int i = 0; i < ranks; ++i) {
      if (of_rank[i]) continue;
      throw InvalidArgument("the memory of rank " + std::to_string(i) + " is not open");
    }
  }

  ~Resources() {
    // Whoever waits for the device has been told of its errors.
    const AnyCapture allowed;
    int previous = 0;
    cudaGetDevice(&previous);
    cudaSetDevice(device);
    cudaFree(of_rank[rank]);  // after all work of the device, copies to others included
    for (int i = 0; i < ranks; ++i) {
      if (i != rank && of_rank[i]) cudaIpcCloseMemHandle(of_rank[i]);
    }
    cudaFreeHost(released);
    cudaSetDevice(previous);
    cudaGetLastError();
  }
};

PeerMemory::PeerMemory(int device, int rank, int ranks, std::size_t bytes) {
  if (ranks < 1 || ranks > kMaxRanks || rank < 0 || rank >= ranks) {
    throw InvalidArgument("rank " + std::to_string(rank) + " of " + std::to_string(ranks) +
                          ": there are 1 to " + std::to_string(kMaxRanks) +
                          " ranks, counted from 0");
  }
  detail::find_device(device);
  resources_ = std::make_unique<Resources>();
  Resources& own = *resources_;
  own.device = device;
  own.rank = rank;
  own.ranks = ranks;
  own.bytes = bytes;
  const AnyCapture allowed;
  const detail::DeviceGuard guard(device);
  void* released = nullptr;
  ZM_CUDA_CHECK(cudaHostAlloc(&released, sizeof(std::uint32_t), cudaHostAllocMapped));
  own.released = static_cast<std::uint32_t*>(released);
  *own.released = 0;
  void* on_device = nullptr;
  ZM_CUDA_CHECK(cudaHostGetDevicePointer(&on_device, released, 0));
  own.released_on_device = static_cast<std::uint32_t*>(on_device);
  ZM_CUDA_CHECK(cudaMalloc(&own.of_rank[rank], kHeader + bytes));
  begin_signals(own.of_rank[rank]);
}

PeerMemory::~PeerMemory() = default;

PeerMemory::Handle PeerMemory::handle() const {
  const detail::DeviceGuard guard(resources_->device);
  cudaIpcMemHandle_t opaque;
  ZM_CUDA_CHECK(cudaIpcGetMemHandle(&opaque, resources_->of_rank[resources_->rank]));
  Handle handle;
  std::memcpy(handle.data(), &opaque, handle.size());
  return handle;
}

void PeerMemory::open(int rank, const Handle& handle) {
  Resources& own = *resources_;
  if (rank < 0 || rank >= own.ranks || own.of_rank[rank]) {
    throw InvalidArgument("rank " + std::to_string(rank) +
                          " cannot be opened: it does not exist, is this one, or is open");
  }
  const AnyCapture allowed;
  const detail::DeviceGuard guard(own.device);
  cudaIpcMemHandle_t opaque;
  std::memcpy(&opaque, handle.data(), handle.size());
  ZM_CUDA_CHECK(cudaIpcOpenMemHandle(&own.of_rank[rank], opaque, cudaIpcMemLazyEnablePeerAccess));
}

void* PeerMemory::data() const {
  return static_cast<std::uint8_t*>(resources_->of_rank[resources_->rank]) + kHeader;
}

void PeerMemory::send(const void* source, std::size_t source_pitch, Rows rows, std::size_t offset,
                      std::size_t pitch, CudaStream stream) {
  const Resources& own = *resources_;
  if (rows.width == 0 || rows.count == 0) return;
  if (source_pitch < rows.width || pitch < rows.width) {
    throw InvalidArgument("rows of " + std::to_string(rows.width) + " bytes overlap");
  }
  const std::size_t room = offset > own.bytes ? 0 : own.bytes - offset;
  if (rows.width > room || rows.count - 1 > (room - rows.width) / pitch) {
    throw InvalidArgument(std::to_string(rows.count) + " rows from " + std::to_string(offset) +
                          " on are beyond the memory of " + std::to_string(own.bytes));
  }
  own.check_all_are_open();
  const detail::DeviceGuard guard(own.device);
  for (int step = 1; step < own.ranks; ++step) {  // each begins with another one
    auto* const memory = static_cast<std::uint8_t*>(own.of_rank[(own.rank + step) % own.ranks]);
    ZM_CUDA_CHECK(cudaMemcpy2DAsync(memory + kHeader + offset, pitch, source, source_pitch,
                                    rows.width, rows.count, cudaMemcpyDefault,
                                    static_cast<cudaStream_t>(stream.handle)));
  }
}

void PeerMemory::signal(int channel, CudaStream stream) {
  const Resources& own = *resources_;
  check_channel(channel);
  own.check_all_are_open();
  const detail::DeviceGuard guard(own.device);
  const std::uint32_t* const number = &own.signals_of(own.rank)->next[channel];
  for (int step = 1; step < own.ranks; ++step) {
    detail::Signals* const other = own.signals_of((own.rank + step) % own.ranks);
    // A copy, not a kernel, which would wait for a multiprocessor until long kernels end.
    ZM_CUDA_CHECK(cudaMemcpyAsync(&other->arrived[channel][own.rank], number, sizeof(*number),
                                  cudaMemcpyDefault, static_cast<cudaStream_t>(stream.handle)));
  }
}

void PeerMemory::wait(int channel, CudaStream stream) {
  const Resources& own = *resources_;
  check_channel(channel);
  own.check_all_are_open();
  const detail::DeviceGuard guard(own.device);
  detail::wait_cuda(
      {own.signals_of(own.rank), channel, own.rank, own.ranks, own.released_on_device}, stream);
}

void PeerMemory::release() noexcept {
  *static_cast<volatile std::uint32_t*>(resources_->released) = 1;
}

}  // namespace zimage_mxfp8
