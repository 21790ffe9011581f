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

// The library's functions. Only versions 12 and 13 are asked for: theirs are declared in
// cublaslt_abi.h. Scales of rows came with 12.9.
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
    // One that the process has already (torch's, say) before one that would have to be loaded.
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

// What the choice of an algorithm depends on.
using Key =
    std::tuple<int, int, int, int, bool, DType, bool, std::int64_t, std::int64_t, std::int64_t>;

struct Descriptors {
  Owned<abi::MatmulDesc> operation;
  Owned<abi::MatrixLayout> a, b, d;

  Descriptors(const Library& library, const Product& product)
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
    // Its matrices are column-major: what it calls A is our B [n, k] read as [k, n] and transposed,
    // its B is our A, and its D is ours transposed.
    set(abi::kTransA, std::int32_t{abi::kTranspose});
    if (product.fp8) {
      set(abi::kAScaleMode, std::int32_t{abi::kScaleOuterVector});
      set(abi::kBScaleMode, std::int32_t{abi::kScaleOuterVector});
      set(abi::kAScalePointer, product.b_scales);
      set(abi::kBScalePointer, product.a_scales);
      set(abi::kFastAccumulation, std::int8_t{1});
    }
    if (product.bias) {
      set(abi::kEpilogue, std::uint32_t{abi::kEpilogueBias});
      set(abi::kBiasPointer, product.bias);
      set(abi::kBiasDataType, std::int32_t{abi::kReal16BF});
    }
    const auto operand = product.fp8 ? abi::kReal8FE4M3 : abi::kReal16BF;
    const auto output = product.d_dtype == DType::kBFloat16 ? abi::kReal16BF : abi::kReal32F;
    layout(library, a, operand, product.k, product.n, product.b_row_stride);
    layout(library, b, operand, product.k, product.m, product.a_row_stride);
    layout(library, d, output, product.n, product.m, product.d_row_stride);
  }

  static void layout(const Library& library, Owned<abi::MatrixLayout>& layout, abi::DataType type,
                     int rows, int cols, std::int64_t stride) {
    check(library.MatrixLayoutCreate(&layout.handle, type, static_cast<std::uint64_t>(rows),
                                     static_cast<std::uint64_t>(cols), stride),
          "cublasLtMatrixLayoutCreate");
  }
};

std::optional<abi::Algorithm> choose(const Library& library, abi::Handle handle,
                                     const Product& product) {
  const Descriptors descriptors(library, product);
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

// The algorithm for a product, looked up once for each kind.
std::optional<abi::Algorithm> find_algorithm(const Library& library, int device,
                                             const Product& product) {
  static std::mutex mutex;
  static std::map<Key, std::optional<abi::Algorithm>> known;
  const Key key{device,
                product.m,
                product.n,
                product.k,
                product.fp8,
                product.d_dtype,
                product.bias != nullptr,
                product.a_row_stride,
                product.b_row_stride,
                product.d_row_stride};
  const abi::Handle handle = handle_of(device);
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  return known.emplace(key, choose(library, handle, product)).first->second;
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

bool has_algorithm(const Product& product) {
  const Library& library = require_library();
  return find_algorithm(library, current_device(), product).has_value();
}

void multiply(const Product& product, void* workspace, CudaStream stream) {
  const Library& library = require_library();
  const int device = current_device();
  const auto algorithm = find_algorithm(library, device, product);
  if (!algorithm) {
    throw Unsupported("cuBLASLt " + version() + " has no algorithm for [" +
                      std::to_string(product.m) + ", " + std::to_string(product.k) + "] x [" +
                      std::to_string(product.n) + ", " + std::to_string(product.k) + "]^T in " +
                      (product.fp8 ? "FP8 with row scales" : "BF16") + " on this device");
  }
  const Descriptors descriptors(library, product);
  const float one = 1.0f, zero = 0.0f;
  check(library.Matmul(handle_of(device), descriptors.operation.handle, &one, product.b,
                       descriptors.a.handle, product.a, descriptors.b.handle, &zero, product.d,
                       descriptors.d.handle, product.d, descriptors.d.handle, &*algorithm,
                       workspace, kWorkspaceBytes, stream.handle),
        "cublasLtMatmul");
}

}  // namespace zimage_mxfp8::detail::cublaslt
