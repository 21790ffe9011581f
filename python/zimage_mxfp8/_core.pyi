"""Types of the compiled module. Arrays are anything with the buffer protocol or DLPack."""

from typing import Any

from .dtypes import DTypeName

__version__: str

def available_cpu_targets() -> list[str]: ...
def active_cpu_target() -> str: ...
def force_cpu_target(name: str) -> None: ...
def default_threads() -> int: ...
def quantize(
    source: Any, dtype: DTypeName, codes: Any, scales: Any, threads: int = 0, stream: int = 0
) -> None: ...
def dequantize(
    codes: Any, scales: Any, target: Any, dtype: DTypeName, threads: int = 0, stream: int = 0
) -> None: ...

class StagedQuantizer:
    def __init__(self, device: int) -> None: ...
    def quantize(self, source: Any, dtype: DTypeName, codes: Any, scales: Any) -> None: ...

def find_nonfinite(source: Any, dtype: DTypeName, threads: int = 0) -> tuple[int, int] | None: ...
def cast(
    source: Any, source_dtype: DTypeName, target: Any, target_dtype: DTypeName, threads: int = 0
) -> None: ...
def measure_residual(
    original: Any, dtype: DTypeName, codes: Any, scales: Any, threads: int = 0
) -> tuple[float, float, float]: ...
def residual_times_vector(
    original: Any, dtype: DTypeName, codes: Any, scales: Any, x: Any, out: Any, threads: int = 0
) -> None: ...
def count_bit_patterns(matrix: Any, dtype: DTypeName, counts: Any, threads: int = 0) -> None: ...
def to_blocked(row_major: Any, blocked: Any) -> None: ...
def from_blocked(blocked: Any, row_major: Any) -> None: ...

class CudaDevice:
    @property
    def index(self) -> int: ...
    @property
    def name(self) -> str: ...
    @property
    def major(self) -> int: ...
    @property
    def minor(self) -> int: ...
    @property
    def multiprocessors(self) -> int: ...
    @property
    def memory(self) -> int: ...

def cuda_devices() -> list[CudaDevice]: ...

class BuildInfo:
    @property
    def version(self) -> str: ...
    @property
    def cuda(self) -> str: ...
    @property
    def no_cuda(self) -> str: ...
    @property
    def cutlass(self) -> str: ...
    @property
    def architectures(self) -> list[str]: ...

def build_info() -> BuildInfo: ...
def silu_multiply(
    gate: Any, up: Any, target: tuple[str, Any, Any, int, int], stream: int = 0
) -> None: ...
def norm_modulate(
    x: Any,
    weight: Any,
    scale: Any,
    items: Any,
    eps: float,
    target: tuple[str, Any, Any, int, int],
    stream: int = 0,
) -> None: ...
def add_norm_modulate(
    x: Any,
    y: Any,
    norm_weight: Any,
    gate: Any,
    next_weight: Any,
    next_scale: Any,
    items: Any,
    eps: float,
    target: tuple[str, Any, Any, int, int] | None,
    stream: int = 0,
) -> None: ...
def rotate_heads(
    qkv: Any,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    heads: int,
    eps: float,
    stream: int = 0,
) -> None: ...
def cublaslt_version() -> str: ...

class GemmProblem:
    def __init__(
        self,
        m: int,
        n: int,
        k: int,
        a: str,
        b: str,
        dtype: DTypeName,
        bias: bool,
        epilogue: str = "none",
        d_format: str = "bfloat16",
    ) -> None: ...

class GemmKernel:
    @property
    def name(self) -> str: ...
    @property
    def operands(self) -> list[tuple[str, str]]: ...
    @property
    def epilogues(self) -> list[str]: ...

def gemm_kernels() -> list[GemmKernel]: ...
def gemm_unsupported(kernel: str, problem: GemmProblem, device: int) -> str: ...
def choose_gemm(problem: GemmProblem, device: int) -> str: ...
def explain_gemm(problem: GemmProblem, device: int) -> list[tuple[str, bool, float, str]]: ...
def gemm_workspace_size(kernel: str, problem: GemmProblem, device: int) -> int: ...
def gemm(
    kernel: str,
    a: tuple[str, Any, Any, int, int],
    b: tuple[str, Any, Any, int, int],
    bias: Any,
    d: Any,
    dtype: DTypeName,
    workspace: Any,
    threads: int = 0,
    stream: int = 0,
) -> None: ...
def gemm_silu_multiply(
    kernel: str,
    a: tuple[str, Any, Any, int, int],
    b: tuple[str, Any, Any, int, int],
    d: tuple[str, Any, Any, int, int],
    workspace: Any,
    stream: int = 0,
) -> None: ...
def gemm_rotate_heads(
    kernel: str,
    a: tuple[str, Any, Any, int, int],
    b: tuple[str, Any, Any, int, int],
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    heads: int,
    eps: float,
    d: Any,
    workspace: Any,
    stream: int = 0,
) -> None: ...
def quantize_rows(
    source: Any, dtype: DTypeName, codes: Any, scales: Any, threads: int = 0, stream: int = 0
) -> None: ...
def fold(
    codes: Any,
    scales: Any,
    rows: int,
    cols: int,
    out_codes: Any,
    out_scales: Any,
    bound: float,
    threads: int = 0,
) -> tuple[int, float]: ...
def fold_async(
    codes: Any,
    scales: Any,
    rows: int,
    cols: int,
    out_codes: Any,
    out_scales: Any,
    stats: Any,
    stream: int = 0,
) -> None: ...
def fold_stats(stats: Any, bound: float) -> tuple[int, float]: ...
