// Device memory that processes on other CUDA devices of one machine write to.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>

#include "zimage_mxfp8/device.h"

namespace zimage_mxfp8 {

// Memory of one size on the device of each rank of a group, a process each. The devices must reach
// each other's memory, over NVLink or PCIe; copies take no multiprocessor. Through the CUDA
// runtime's interprocess communication (cudaIpcGetMemHandle).
class PeerMemory {
 public:
  static constexpr int kMaxRanks = 64;
  static constexpr int kMaxChannels = 4;
  using Handle = std::array<std::uint8_t, 64>;

  // Allocates `bytes` on a device for rank `rank` of `ranks`. Throws InvalidArgument for numbers
  // out of range, Unsupported without CUDA or without the device, CudaError if CUDA fails.
  PeerMemory(int device, int rank, int ranks, std::size_t bytes);
  ~PeerMemory();
  PeerMemory(const PeerMemory&) = delete;
  PeerMemory& operator=(const PeerMemory&) = delete;

  // What other processes open this memory by. Throws CudaError if the system does not allow it.
  Handle handle() const;

  // Opens the memory of another rank. Throws InvalidArgument for a rank that is no other one or is
  // open, CudaError if the devices or the system do not allow it.
  void open(int rank, const Handle& handle);

  // The first byte, at a multiple of 512 bytes.
  void* data() const;

  // The size of rows of bytes.
  struct Rows {
    std::size_t width;  // bytes of a row
    std::size_t count;
  };

  // Copies rows of this device to every other rank's memory, one rank after another: from `source`,
  // where they are `source_pitch` bytes apart, to `offset`, where they are `pitch` bytes apart.
  //
  // Throws InvalidArgument for a range beyond the memory, a pitch below the width, or a rank that
  // is not open.
  void send(const void* source, std::size_t source_pitch, Rows rows, std::size_t offset,
            std::size_t pitch, CudaStream stream);

  // Tells all other ranks, on the stream, that what this rank sent before on it has arrived. Like
  // send() it takes no multiprocessor. On each of kMaxChannels channels a rank calls signal() and
  // wait() in turns, and signal() first; all ranks make the same calls. The stream is that of this
  // rank's last wait() on the channel, or has waited for it.
  //
  // Throws InvalidArgument for a channel out of range, or a rank that is not open.
  void signal(int channel, CudaStream stream);

  // Waits, on the stream, until every other rank has signalled as often on the channel as this one.
  // The stream is that of this rank's signal, or has waited for it.
  //
  // Nothing keeps a rank from writing to what another one still reads. Before a rank sends to a
  // range again, it must have waited for signals that every rank gave after its work that reads the
  // range.
  //
  // Throws as signal() does.
  void wait(int channel, CudaStream stream);

  // Ends all waiting for other ranks, now and from now on, because one has died. What the memory
  // holds is then undefined. For any thread.
  void release() noexcept;

 private:
  struct Resources;
  std::unique_ptr<Resources> resources_;
};

}  // namespace zimage_mxfp8
