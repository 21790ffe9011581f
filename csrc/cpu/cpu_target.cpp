#include "zimage_mxfp8/cpu_target.h"

#include <atomic>
#include <cstdlib>

#include "cpu/kernels.h"
#include "zimage_mxfp8/error.h"

// ZM_X86_TARGETS is set by the build where the AVX2 and AVX-512 kernels are compiled in. Only this
// file queries the processor's features.
#if defined(ZM_X86_TARGETS) && defined(_MSC_VER) && !defined(__clang__)
#include <immintrin.h>
#include <intrin.h>
#endif

namespace zimage_mxfp8 {
namespace {

#ifdef ZM_X86_TARGETS
#if defined(_MSC_VER) && !defined(__clang__)
// With /arch:AVX2 and /arch:AVX512 cl may use more than their names say: FMA, BMI and CD too.
enum Register { kEBX = 1, kECX = 2 };

bool has(int leaf, Register name, unsigned mask) {
  int registers[4];
  __cpuidex(registers, leaf, 0);
  return (static_cast<unsigned>(registers[name]) & mask) == mask;
}

bool os_saves(unsigned long long state) {
  const unsigned osxsave = 1u << 27;
  return has(1, kECX, osxsave) && (_xgetbv(0) & state) == state;
}

bool cpu_has_avx2() {
  const unsigned fma = 1u << 12, bmi1 = 1u << 3, avx2 = 1u << 5, bmi2 = 1u << 8;
  return os_saves(0x6) && has(1, kECX, fma) && has(7, kEBX, bmi1 | avx2 | bmi2);
}

bool cpu_has_avx512() {
  const unsigned f = 1u << 16, dq = 1u << 17, cd = 1u << 28, bw = 1u << 30, vl = 1u << 31;
  return cpu_has_avx2() && os_saves(0xE6) && has(7, kEBX, f | dq | cd | bw | vl);
}
#else
bool cpu_has_avx2() { return __builtin_cpu_supports("avx2"); }

bool cpu_has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
#endif

constexpr int kUndecided = -1;
std::atomic<int> g_active{kUndecided};

CpuTarget parse(const std::string& target_name) {
  for (const CpuTarget target : {CpuTarget::kBaseline, CpuTarget::kAVX2, CpuTarget::kAVX512}) {
    if (target_name == name(target)) return target;
  }
  throw InvalidArgument("unknown CPU target \"" + target_name + "\": use baseline, avx2 or avx512");
}

CpuTarget require_available(CpuTarget target) {
  std::string available;
  for (const CpuTarget candidate : available_cpu_targets()) {
    if (candidate == target) return target;
    available += available.empty() ? "" : ", ";
    available += name(candidate);
  }
  throw Unsupported(std::string("CPU target \"") + name(target) +
                    "\" is not available on this machine: use " + available);
}

CpuTarget decide() {
  if (const char* forced = std::getenv("ZIMAGE_MXFP8_CPU"); forced && *forced) {
    const std::string of_environment = ", or unset ZIMAGE_MXFP8_CPU in the environment";
    try {
      return require_available(parse(forced));
    } catch (const InvalidArgument& error) {
      throw InvalidArgument(error.what() + of_environment);
    } catch (const Unsupported& error) {
      throw Unsupported(error.what() + of_environment);
    }
  }
  return available_cpu_targets().back();
}

}  // namespace

const char* name(CpuTarget target) {
  switch (target) {
    case CpuTarget::kAVX512:
      return "avx512";
    case CpuTarget::kAVX2:
      return "avx2";
    default:
      return "baseline";
  }
}

std::vector<CpuTarget> available_cpu_targets() {
  std::vector<CpuTarget> targets{CpuTarget::kBaseline};
#ifdef ZM_X86_TARGETS
  if (cpu_has_avx2()) targets.push_back(CpuTarget::kAVX2);
  if (cpu_has_avx512()) targets.push_back(CpuTarget::kAVX512);
#endif
  return targets;
}

CpuTarget active_cpu_target() {
  int active = g_active.load(std::memory_order_relaxed);
  if (active == kUndecided) {
    active = static_cast<int>(decide());
    g_active.store(active, std::memory_order_relaxed);
  }
  return static_cast<CpuTarget>(active);
}

void force_cpu_target(const std::string& target_name) {
  g_active.store(static_cast<int>(require_available(parse(target_name))),
                 std::memory_order_relaxed);
}

namespace detail {

const Kernels& active_kernels() {
  switch (active_cpu_target()) {
#ifdef ZM_X86_TARGETS
    case CpuTarget::kAVX512:
      return avx512::kKernels;
    case CpuTarget::kAVX2:
      return avx2::kKernels;
#endif
    default:
      return baseline::kKernels;
  }
}

}  // namespace detail
}  // namespace zimage_mxfp8
