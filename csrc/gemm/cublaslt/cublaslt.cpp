#include "gemm/cublaslt/cublaslt.h"

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <tuple>

#include "cuda/runtime.h"
#include "gemm/cublaslt/cublaslt_abi.h"

#ifdef _WIN32
#ifndef NOMINMAX
#define NOMINMAX
#endif
#ifndef WIN32_LEAN_AND_MEAN
#define WIN32_LEAN_AND_MEAN
#endif
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace zimage_mxfp8::detail::cublaslt {
namespace {

// The library's functions. Only versions 12 and 13 are loaded: cublaslt_abi.h declares their
// interface. Row scales came with 12.9.
class Library {
 public:
  static const Library& get() {
    static const Library library;
    return library;
  }

  std::string missing;

#define ZM_CUBLASLT_FUNCTION(name) abi::name* name = nullptr;
  ZM_CUBLASLT_FUNCTIONS
#undef ZM_CUBLASLT_FUNCTION

 private:
  Library() {
#ifdef _WIN32
    constexpr std::array names{"cublasLt64_13.dll", "cublasLt64_12.dll"};
#else
    constexpr std::array names{"libcublasLt.so.13", "libcublasLt.so.12"};
#endif
    void* handle = nullptr;
    // A library that the process has already (torch's, say) comes before one that must be loaded.
    for (const bool loaded : {true, false}) {
      for (const char* name : names) {
        if (!handle) handle = open(name, loaded);
      }
    }
    if (!handle) {
      missing = std::string("cuBLASLt was not found (") + names[0] + " or " + names[1] +
                "): it comes with torch for CUDA, with the CUDA toolkit and with the package "
                "nvidia-cublas";
      return;
    }
#define ZM_CUBLASLT_FUNCTION(name)                                       \
  name = reinterpret_cast<abi::name*>(symbol(handle, "cublasLt" #name)); \
  if (!name) missing = "this cuBLASLt lacks the function cublasLt" #name;
    ZM_CUBLASLT_FUNCTIONS
#undef ZM_CUBLASLT_FUNCTION
  }

#ifdef _WIN32
  static void* open(const char* name, bool loaded) {
    return loaded ? static_cast<void*>(GetModuleHandleA(name))
                  : static_cast<void*>(LoadLibraryA(name));
  }
  static void* symbol(void* handle, const char* name) {
    return reinterpret_cast<void*>(GetProcAddress(static_cast<HMODULE>(handle), name));
  }
#else
  static void* open(const char* name, bool loaded) {
    return dlopen(name, RTLD_NOW | RTLD_LOCAL | (loaded ? RTLD_NOLOAD : 0));
  }
  static void* symbol(void* handle, const char* name) { return dlsym(handle, name); }
#endif
};

const Library& require_library() {
  const Library& library = Library::get();
  if (!library.missing.empty()) throw Unsupported(library.missing);
  return library;
}

// A version as the library numbers it: 120900 is 12.9.0.
std::string text(std::size_t number) {
  return std::to_string(number / 10000) + "." + std::to_string(number / 100 % 100) + "." +
         std::to_string(number % 100);
}

void check(abi::Status status, const char* what) {
  if (status != abi::kSuccess) {
    throw CudaError(std::string("cuBLASLt: ") + what + " failed with status " +
                    std::to_string(status));
  }
}

// An object of the library that is destroyed with this one.
template <typename Handle>
class Owned {
 public:
  using Destroy = abi::Status (*)(Handle);
  explicit Owned(Destroy destroy) : destroy_(destroy) {}
  ~Owned() {
    if (handle) destroy_(handle);
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;

  Handle handle = nullptr;

 private:
  Destroy destroy_;
};

// The library's handle of a device; lives as long as the process.
abi::Handle handle_of(int device) {
  static std::mutex mutex;
  static std::map<int, abi::Handle> handles;
  const std::lock_guard<std::mutex> lock(mutex);
  abi::Handle& handle = handles[device];
  if (!handle) check(require_library().Create(&handle), "cublasLtCreate");
  return handle;
}

// The properties of a GEMM that decide its algorithm.
using Key =
    std::tuple<int, int, int, int, bool, DType, bool, std::int64_t, std::int64_t, std::int64_t>;

struct Descriptors {
  Owned<abi::MatmulDesc> operation;
  Owned<abi::MatrixLayout> a, b, d;

  Descriptors(const Library& library, const Gemm& gemm)
      : operation(library.MatmulDescDestroy),
        a(library.MatrixLayoutDestroy),
        b(library.MatrixLayoutDestroy),
        d(library.MatrixLayoutDestroy) {
    check(library.MatmulDescCreate(&operation.handle, abi::kCompute32F, abi::kReal32F),
          "cublasLtMatmulDescCreate");
    const auto set = [&](abi::MatmulDescAttribute attribute, auto value) {
      check(library.MatmulDescSetAttribute(operation.handle, attribute, &value, sizeof(value)),
            "cublasLtMatmulDescSetAttribute");
    };
    // Its matrices are column-major: its A is our B [n, k] read as [k, n] and transposed,
    // its B is our A, and its D is ours transposed.
    set(abi::kTransA, std::int32_t{abi::kTranspose});
    if (gemm.fp8) {
      set(abi::kAScaleMode, std::int32_t{abi::kScaleOuterVector});
      set(abi::kBScaleMode, std::int32_t{abi::kScaleOuterVector});
      set(abi::kAScalePointer, gemm.b_scales);
      set(abi::kBScalePointer, gemm.a_scales);
      set(abi::kFastAccumulation, std::int8_t{1});
    }
    if (gemm.bias) {
      set(abi::kEpilogue, std::uint32_t{abi::kEpilogueBias});
      set(abi::kBiasPointer, gemm.bias);
      set(abi::kBiasDataType, std::int32_t{abi::kReal16BF});
    }
    const auto operand = gemm.fp8 ? abi::kReal8FE4M3 : abi::kReal16BF;
    const auto output = gemm.d_dtype == DType::kBFloat16 ? abi::kReal16BF : abi::kReal32F;
    layout(library, a, operand, gemm.k, gemm.n, gemm.b_row_stride);
    layout(library, b, operand, gemm.k, gemm.m, gemm.a_row_stride);
    layout(library, d, output, gemm.n, gemm.m, gemm.d_row_stride);
  }

  static void layout(const Library& library, Owned<abi::MatrixLayout>& layout, abi::DataType type,
                     int rows, int cols, std::int64_t stride) {
    check(library.MatrixLayoutCreate(&layout.handle, type, static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(cols), stride),
          "cublasLtMatrixLayoutCreate");
  }
};

std::optional<abi::Algorithm> choose(const Library& library, abi::Handle handle, const Gemm& gemm) {
  const Descriptors descriptors(library, gemm);
  Owned<abi::Preference> preference(library.MatmulPreferenceDestroy);
  check(library.MatmulPreferenceCreate(&preference.handle), "cublasLtMatmulPreferenceCreate");
  const auto set = [&](abi::PreferenceAttribute attribute, auto value) {
    check(library.MatmulPreferenceSetAttribute(preference.handle, attribute, &value, sizeof(value)),
          "cublasLtMatmulPreferenceSetAttribute");
  };
  set(abi::kMaxWorkspaceBytes, std::uint64_t{kWorkspaceBytes});
  for (const auto attribute :
       {abi::kMinAlignmentA, abi::kMinAlignmentB, abi::kMinAlignmentC, abi::kMinAlignmentD}) {
    set(attribute, std::uint32_t{16});
  }
  abi::HeuristicResult result{};
  int found = 0;
  const abi::Status status = library.MatmulAlgoGetHeuristic(
      handle, descriptors.operation.handle, descriptors.a.handle, descriptors.b.handle,
      descriptors.d.handle, descriptors.d.handle, preference.handle, 1, &result, &found);
  if (status != abi::kSuccess || found == 0 || result.state != abi::kSuccess) return std::nullopt;
  return result.algorithm;
}

// The algorithm for a GEMM, looked up once per kind.
std::optional<abi::Algorithm> find_algorithm(const Library& library, int device, const Gemm& gemm) {
  static std::mutex mutex;
  static std::map<Key, std::optional<abi::Algorithm>> known;
  const Key key{device,
                gemm.m,
                gemm.n,
                gemm.k,
                gemm.fp8,
                gemm.d_dtype,
                gemm.bias != nullptr,
                gemm.a_row_stride,
                gemm.b_row_stride,
                gemm.d_row_stride};
  const abi::Handle handle = handle_of(device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, choose(library, handle, gemm)).first->second;
}

}  // namespace

std::string unavailable(std::size_t minimum) {
  const Library& library = Library::get();
  if (!library.missing.empty()) return library.missing;
  if (library.GetVersion() >= minimum) return "";
  return "cuBLASLt " + text(minimum) + " or newer is needed, and " + version() + " was found";
}

std::string version() {
  const Library& library = Library::get();
  return library.missing.empty() ? text(library.GetVersion()) : "";
}

bool has_algorithm(const Gemm& gemm) {
  const Library& library = require_library();
  return find_algorithm(library, current_device(), gemm).has_value();
}

void multiply(const Gemm& gemm, void* workspace, CudaStream stream) {
  const Library& library = require_library();
  const int device = current_device();
  const auto algorithm = find_algorithm(library, device, gemm);
  if (!algorithm) {
    throw Unsupported("cuBLASLt " + version() + " has no algorithm for [" + std::to_string(gemm.m) +
                      ", " + std::to_string(gemm.k) + "] x [" + std::to_string(gemm.n) + ", " +
                      std::to_string(gemm.k) + "]^T in " +
                      (gemm.fp8 ? "FP8 with row scales" : "BF16") + " on this device");
  }
  const Descriptors descriptors(library, gemm);
  const float one = 1.0f, zero = 0.0f;
  check(library.Matmul(handle_of(device), descriptors.operation.handle, &one, gemm.b,
                       descriptors.a.handle, gemm.a, descriptors.b.handle, &zero, gemm.d,
                       descriptors.d.handle, gemm.d, descriptors.d.handle, &*algorithm, workspace,
                       kWorkspaceBytes, stream.handle),
        "cublasLtMatmul");
}

}  // namespace zimage_mxfp8::detail::cublaslt
