#include "gemm/dispatch/table.h"

#include "gemm/dispatch/heuristics.h"

namespace zimage_mxfp8::detail {
namespace {

constexpr OperandFormat kBF16 = OperandFormat::kBFloat16, kMX = OperandFormat::kMXFP8,
                        kRows = OperandFormat::kRowScaled, kInt8 = OperandFormat::kInt8;

constexpr std::uint32_t kMXFP8Pair = operands(kMX, kMX), kRowScaledPair = operands(kRows, kRows),
                        kInt8Pair = operands(kInt8, kInt8), kMixedPair = operands(kBF16, kMX);
constexpr std::uint32_t kAllOperands = kMXFP8Pair | kRowScaledPair | kInt8Pair | kMixedPair |
                                       operands(kBF16, kBF16) | operands(kMX, kBF16) |
                                       operands(kBF16, kRows) | operands(kRows, kBF16) |
                                       operands(kMX, kRows) | operands(kRows, kMX);
constexpr std::uint32_t kDecodable =
    operands(kBF16, kBF16) | operands(kMX, kBF16) | kMixedPair | kMXFP8Pair;

constexpr std::uint32_t kToBF16 = output(DType::kBFloat16),
                        kToAny = kToBF16 | output(DType::kFloat16) | output(DType::kFloat32);

constexpr std::uint32_t kPlain = epilogue(GemmEpilogue::kNone),
                        kFused = epilogue(GemmEpilogue::kSiluMultiply) |
                                 epilogue(GemmEpilogue::kRotateHeads),
                        kNoAddend = 0;

// Kernels of equal cost are preferred in this order.
constexpr GemmKernel kTable[] = {
    // clang-format off
    {"mxfp8_sm100", kMXFP8Pair,     kToAny,  kPlain,          kNoAddend,       true,  {100, 103},  false, &kMXFP8SM100, cost_mxfp8_sm100},
    {"mxfp8_sm120", kMXFP8Pair,     kToAny,  kPlain,          kNoAddend,       true,  {120, 121},  false, &kMXFP8SM120, cost_mxfp8_sm120},
    {"fp8_sm90",    kRowScaledPair, kToBF16, kFused,          kPlain | kFused, false, {90},        false, &kFP8SM90,    cost_fp8_sm90},
    {"fp8_rowwise", kRowScaledPair, kToAny,  kPlain,          kNoAddend,       true,  {90},        false, &kFP8Rowwise, cost_fp8_rowwise},
    {"int8_sm90",   kInt8Pair,      kToBF16, kPlain | kFused, kPlain | kFused, false, {90},        false, &kInt8SM90,   cost_int8_sm90},
    {"int8_sm80",   kInt8Pair,      kToBF16, kPlain,          kNoAddend,       false, {-80},       false, &kInt8SM80,   cost_int8_sm80},
    {"mixed_sm90",  kMixedPair,     kToBF16, kPlain,          kPlain,          true,  {90},        false, &kMixedSM90,  cost_mixed_sm90},
    {"dequantize",  kDecodable,     kToAny,  kPlain,          kNoAddend,       true,  {80, 86, 87, 89, 90, 100, 103, 120, 121},
                                                                                                   false, &kDequantize, cost_dequantize},
    {"reference",   kAllOperands,   kToAny,  kPlain,          kNoAddend,       true,  {-80},       true,  &kReference,  cost_reference},
    // clang-format on
};

}  // namespace

GemmTable gemm_table() { return {std::begin(kTable), std::end(kTable)}; }

}  // namespace zimage_mxfp8::detail
