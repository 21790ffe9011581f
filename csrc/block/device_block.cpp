#include <algorithm>
#include <string>
#include <type_traits>
#include <vector>

#include "block/device_layers.h"
#include "block/region.h"
#include "block/shapes.h"
#include "cuda/runtime.h"
#include "zimage_mxfp8/attention.h"
#include "zimage_mxfp8/block.h"
#include "zimage_mxfp8/error.h"
#include "zimage_mxfp8/quantize.h"
#include "zimage_mxfp8/row_scaled.h"

namespace zimage_mxfp8 {
namespace {

using detail::DeviceLayers, detail::DeviceLinear, detail::kBF16Bytes, detail::Region;

void check_workspace(const Workspace& workspace, std::size_t bytes, const char* what) {
  const detail::MemoryRange memory{workspace.data, static_cast<std::int64_t>(workspace.bytes),
                                   what};
  if (workspace.bytes < bytes) {
    throw InvalidArgument(std::string(what) + " has " + std::to_string(workspace.bytes) +
                          " bytes, and " + std::to_string(bytes) + " are needed");
  }
  if (bytes == 0) return;
  if (!workspace.data) throw InvalidArgument(std::string(what) + " is a null pointer");
  detail::check_alignment(memory, detail::kRegionAlignment);
  detail::check_device_memory({memory});
}

// A matrix of activations in one of three formats, in the workspace.
ActivationView take_activation(Region& region, OperandFormat format, std::int64_t rows,
                               std::int64_t cols) {
  if (format == OperandFormat::kBFloat16) {
    return MatrixView{region.take(rows * cols * kBF16Bytes), DType::kBFloat16, rows, cols, cols};
  }
  const MXFP8Shape shape{rows, cols};
  const bool is_mxfp8 = format == OperandFormat::kMXFP8;
  auto* const codes =
      static_cast<std::uint8_t*>(region.take(is_mxfp8 ? shape.code_bytes() : rows * cols));
  void* const scales =
      region.take(is_mxfp8 ? shape.scale_bytes() : rows * std::int64_t{sizeof(float)});
  if (is_mxfp8) return MXFP8View{codes, static_cast<std::uint8_t*>(scales), rows, cols};
  return RowScaledView{codes, static_cast<float*>(scales), rows, cols};
}

ConstMatrixView as_const(const MatrixView& view) {
  return {view.data, view.dtype, view.rows, view.cols, view.row_stride};
}

GemmOperand operand_of(const ActivationView& activation) {
  if (const auto* plain = std::get_if<MatrixView>(&activation)) return as_const(*plain);
  if (const auto* mxfp8 = std::get_if<MXFP8View>(&activation)) {
    return ConstMXFP8View{mxfp8->codes, mxfp8->scales, mxfp8->rows, mxfp8->cols};
  }
  const auto& rows = std::get<RowScaledView>(activation);
  return ConstRowScaledView{rows.codes, rows.scales, rows.rows, rows.cols};
}

MatrixView columns(const MatrixView& matrix, std::int64_t begin, std::int64_t count) {
  return {static_cast<char*>(matrix.data) + begin * kBF16Bytes, matrix.dtype, matrix.rows, count,
          matrix.row_stride};
}

// Where run() keeps what is between its launches. The parts of the attention and of the
// feed-forward are in the same memory.
struct Buffers {
  MatrixView modulation;  // [items, 4 D]
  ActivationView normed;  // [M, D], the input of w1 and w3
  MatrixView y;           // [M, D], the result of either half
  // Of the attention
  ActivationView input;        // [M, D]
  MatrixView qkv, attended;    // [M, 3 D], [M, D]
  ActivationView attended_in;  // `attended`, encoded
  // Of the feed-forward
  MatrixView gate_up;    // [M, 2 F], if w1 and w3 are two GEMMs
  ActivationView gated;  // [M, F]

  Buffers(const DeviceLayers& block, Region& region, std::int64_t tokens, std::int64_t items) {
    const auto plain = [&](std::int64_t rows, std::int64_t cols) {
      return std::get<MatrixView>(take_activation(region, OperandFormat::kBFloat16, rows, cols));
    };
    const std::int64_t width = block.width;
    modulation = plain(items, block.modulation.empty() ? 0 : 4 * width);
    normed = take_activation(region, block.ffn_in[0].input, tokens, width);
    y = plain(tokens, width);
    const std::int64_t shared = region.used();
    input = take_activation(region, block.qkv.input, tokens, width);
    qkv = plain(tokens, 3 * width);
    attended = plain(tokens, width);
    attended_in = attended;
    if (block.out.input != OperandFormat::kBFloat16) {
      attended_in = take_activation(region, block.out.input, tokens, width);
    }
    region.back_to(shared);
    gate_up = plain(tokens, block.ffn_in.size() == 1 ? 0 : 2 * block.hidden());
    gated = take_activation(region, block.ffn_out.input, tokens, block.hidden());
  }
};

GemmProblem problem_for(const DeviceLinear& linear, std::int64_t tokens,
                        GemmEpilogue epilogue = GemmEpilogue::kNone,
                        OperandFormat d_format = OperandFormat::kBFloat16) {
  const OperandFormat stored = std::visit(
      [](const auto& view) {
        using View = std::decay_t<decltype(view)>;
        if constexpr (std::is_same_v<View, ConstMatrixView>) return OperandFormat::kBFloat16;
        if constexpr (std::is_same_v<View, ConstMXFP8View>) return OperandFormat::kMXFP8;
        return OperandFormat::kRowScaled;
      },
      linear.weight);
  return {tokens,           linear.size.n,          linear.size.k, linear.input, stored,
          DType::kBFloat16, linear.bias != nullptr, epilogue,      d_format};
}

std::size_t gemm_workspace(const DeviceLayers& block, int device, std::int64_t tokens,
                           std::int64_t items) {
  std::vector<GemmProblem> problems{problem_for(block.qkv, tokens, GemmEpilogue::kRotateHeads),
                                    problem_for(block.out, tokens),
                                    problem_for(block.ffn_out, tokens)};
  if (block.ffn_in.size() == 1) {
    problems.push_back(
        problem_for(block.ffn_in[0], tokens, GemmEpilogue::kSiluMultiply, block.ffn_out.input));
  } else {
    for (const DeviceLinear& linear : block.ffn_in) problems.push_back(problem_for(linear, tokens));
  }
  for (const DeviceLinear& linear : block.modulation)
    problems.push_back(problem_for(linear, items));
  std::size_t most = 0;
  for (const GemmProblem& problem : problems) {
    if (problem.m == 0) continue;
    most = std::max(most, workspace_size(choose_gemm(problem, device), problem, device));
  }
  return most;
}

void encode(const MatrixView& matrix, const ActivationView& target, CudaStream stream) {
  if (const auto* mxfp8 = std::get_if<MXFP8View>(&target)) {
    quantize(as_const(matrix), *mxfp8, stream);
  } else if (const auto* rows = std::get_if<RowScaledView>(&target)) {
    quantize_rows(as_const(matrix), *rows, stream);
  }
}

}  // namespace

struct DeviceBlock::Content {
  int device;
  DeviceLayers layers;
};

std::size_t DeviceBlock::memory_size(const BlockWeights& block, BlockCompute compute) {
  detail::check_block(block);
  return static_cast<std::size_t>(detail::layers_memory(block, compute));
}

DeviceBlock::DeviceBlock(const BlockWeights& block, BlockCompute compute, Workspace memory,
                         CudaStream stream) {
  check_workspace(memory, memory_size(block, compute), "the memory of the weights");
  content_.reset(new Content{detail::current_device(),
                             detail::load_layers(block, compute, memory.data, stream)});
}

DeviceBlock::~DeviceBlock() = default;
DeviceBlock::DeviceBlock(DeviceBlock&&) noexcept = default;
DeviceBlock& DeviceBlock::operator=(DeviceBlock&&) noexcept = default;

std::size_t DeviceBlock::workspace_size(std::int64_t tokens, std::int64_t items) const {
  if (tokens < 0 || items < 0) throw InvalidArgument("tokens and items must be 0 or more");
  Region region;
  const Buffers buffers(content_->layers, region, tokens, items);
  return static_cast<std::size_t>(region.peak()) +
         gemm_workspace(content_->layers, content_->device, tokens, items);
}

void DeviceBlock::run(const BlockInput& input, const MatrixView& x, Workspace workspace,
                      CudaStream stream, const DeviceAttention& attention) const {
  const DeviceLayers& block = content_->layers;
  detail::check_block_input(input, x, block.width, block.conditioning_cols(), DType::kBFloat16);
  const std::int64_t tokens = x.rows, items = static_cast<std::int64_t>(input.lengths.size());
  if (tokens == 0) return;
  check_workspace(workspace, workspace_size(tokens, items), "the workspace");
  Region region(workspace.data);
  const Buffers buffers(block, region, tokens, items);
  const Workspace rest{static_cast<char*>(workspace.data) + region.peak(),
                       workspace.bytes - static_cast<std::size_t>(region.peak())};

  const auto multiply = [&](const DeviceLinear& linear, const GemmOperand& a,
                            const ActivationView& d, const EpilogueArguments& epilogue = {}) {
    const GemmArguments arguments{a, linear.weight, linear.bias, d, epilogue};
    const GemmKernel& kernel = choose_gemm(problem_of(arguments), content_->device);
    gemm(kernel, arguments, rest, stream);
  };
  const auto norm = [&](const void* weight, int quarter) {
    NormWeights weights{weight, std::nullopt};
    if (!block.modulation.empty()) {
      weights.modulation =
          as_const(columns(buffers.modulation, quarter * block.width, block.width));
    }
    return weights;
  };

  if (!block.modulation.empty()) {
    multiply(block.modulation[0], *input.conditioning, buffers.modulation);
  }
  norm_modulate(as_const(x), norm(block.attention_norm1, 0), input.items, kBlockNormEps,
                buffers.input, stream);
  multiply(block.qkv, operand_of(buffers.input), buffers.qkv,
           RotateHeads{block.q_norm, block.k_norm, input.rotations, block.heads, block.heads,
                       kBlockNormEps});
  if (attention) {
    attention(as_const(buffers.qkv), block.heads, input.lengths, buffers.attended, stream);
  } else {
    attend(as_const(buffers.qkv), block.heads, input.lengths, buffers.attended, stream);
  }
  encode(buffers.attended, buffers.attended_in, stream);
  multiply(block.out, operand_of(buffers.attended_in), buffers.y);
  add_norm_modulate(x, as_const(buffers.y), norm(block.attention_norm2, 1), std::nullopt,
                    NextNorm{norm(block.ffn_norm1, 2), buffers.normed}, input.items, kBlockNormEps,
                    stream);
  if (block.ffn_in.size() == 1) {
    multiply(block.ffn_in[0], operand_of(buffers.normed), buffers.gated, SiluMultiply{});
  } else {
    const MatrixView gate = columns(buffers.gate_up, 0, block.hidden()),
                     up = columns(buffers.gate_up, block.hidden(), block.hidden());
    multiply(block.ffn_in[0], operand_of(buffers.normed), gate);
    multiply(block.ffn_in[1], operand_of(buffers.normed), up);
    silu_multiply(as_const(gate), as_const(up), buffers.gated, stream);
  }
  multiply(block.ffn_out, operand_of(buffers.gated), buffers.y);
  add_norm_modulate(x, as_const(buffers.y), norm(block.ffn_norm2, 3), std::nullopt, std::nullopt,
                    input.items, kBlockNormEps, stream);
}

}  // namespace zimage_mxfp8
