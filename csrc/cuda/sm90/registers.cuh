// Hand-over of registers between the warpgroups of a block (PTX ISA: setmaxnreg).
#pragma once

#include <stdint.h>

namespace zimage_mxfp8::detail {

template <uint32_t registers>
__device__ void warpgroup_reg_alloc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(registers));
}

template <uint32_t registers>
__device__ void warpgroup_reg_dealloc() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(registers));
}

// Registers per thread in a block of `consumers` warpgroups and one producer that fills a
// multiprocessor: the producer gives up as many as the consumers get. A consumer that requested
// more would wait forever.
template <int consumers, int consumer_registers>
struct RegisterSplit {
  static constexpr int at_launch = 512 / (consumers + 1) / 8 * 8;
  static constexpr int producer_registers =
      at_launch - consumers * (consumer_registers - at_launch);
  // The limits of setmaxnreg.
  static_assert(producer_registers % 8 == 0 && producer_registers >= 24);
  static_assert(consumer_registers % 8 == 0 && consumer_registers <= 256);

  static __device__ void begin_producer() { warpgroup_reg_dealloc<producer_registers>(); }
  static __device__ void begin_consumer() { warpgroup_reg_alloc<consumer_registers>(); }
};

}  // namespace zimage_mxfp8::detail
