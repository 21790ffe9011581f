"""Types of the compiled module, written by .ci/core_stub.py from its docstrings."""

from typing import Any

from .dtypes import DTypeName

__version__: str

def quantize(
    source: Any, dtype: DTypeName, codes: Any, scales: Any, threads: int = 0, stream: int = 0
) -> None:
    """Encode [N, K] in MXFP8: codes [roundup(N, 32), roundup(K, 32)], blocked scales."""

def dequantize(
    codes: Any, scales: Any, target: Any, dtype: DTypeName, threads: int = 0, stream: int = 0
) -> None:
    """Decode MXFP8 codes and blocked scales to [N, K], the shape of the target."""

def quantize_convrot(
    source: Any, dtype: DTypeName, group: int, codes: Any, scales: Any, threads: int = 0
) -> None:
    """Rotate [N, K] in groups of columns and encode it: int8 codes [N, K], float32 [N]."""

def dequantize_convrot(
    codes: Any, scales: Any, group: int, target: Any, dtype: DTypeName, threads: int = 0
) -> None:
    """Decode int8 codes [N, K] and scales [N] and rotate back to the target, [N, K]."""

class StagedQuantizer:
    """An encoder on a CUDA device for matrices in host memory."""

    def __init__(self, device: int) -> None:
        """Allocate memory on a CUDA device, given by its index."""
    def quantize(self, source: Any, dtype: DTypeName, codes: Any, scales: Any) -> None:
        """Encode [N, K] as the function `quantize` does; wait for the device."""

def find_nonfinite(source: Any, dtype: DTypeName, threads: int = 0) -> tuple[int, int] | None:
    """Find the first NaN or infinity of [N, K]: its row and column, or None."""

def cast(
    source: Any, source_dtype: DTypeName, target: Any, target_dtype: DTypeName, threads: int = 0
) -> None:
    """Convert [N, K] to another dtype, to nearest even."""

def measure_residual(
    original: Any, dtype: DTypeName, codes: Any, scales: Any, threads: int = 0
) -> tuple[float, float, float]:
    """Compare [N, K] with its encoding: sum of squared errors, of squares, largest error."""

def residual_times_vector(
    original: Any, dtype: DTypeName, codes: Any, scales: Any, x: Any, out: Any, threads: int = 0
) -> None:
    """Multiply the change by encoding, [N, K], with x, float64 [K]: out, float64 [N]."""

def count_bit_patterns(matrix: Any, dtype: DTypeName, counts: Any, threads: int = 0) -> None:
    """Add to counts, uint64 [65536], how often [N, K] has each 16-bit pattern."""

def to_blocked(row_major: Any, blocked: Any) -> None:
    """Reorder scales [N, C] to the 128x4 blocked layout [roundup(N, 128), roundup(C, 4)]."""

def from_blocked(blocked: Any, row_major: Any) -> None:
    """Reorder scales [roundup(N, 128), roundup(C, 4)] from the 128x4 blocked layout to [N, C]."""

def available_cpu_targets() -> list[str]:
    """Return the names of the instruction sets that this processor can run."""

def active_cpu_target() -> str:
    """Return the name of the instruction set that the kernels use."""

def force_cpu_target(name: str) -> None:
    """Use the kernels of one instruction set, given by its name."""

def default_threads() -> int:
    """Return the number of threads that 0 means: the processors of this process."""

class CudaDevice:
    """A CUDA device."""

    @property
    def index(self) -> int:
        """Index of the device."""
    @property
    def name(self) -> str:
        """Name of the device."""
    @property
    def major(self) -> int:
        """First number of the compute capability."""
    @property
    def minor(self) -> int:
        """Second number of the compute capability."""
    @property
    def multiprocessors(self) -> int:
        """Number of multiprocessors."""
    @property
    def memory(self) -> int:
        """Bytes of device memory."""

def cuda_devices() -> list[CudaDevice]:
    """Return the devices that the CUDA runtime sees; none without a driver."""

def capability_limit() -> int:
    """Return the compute capability that devices have at most, such as 80; 0 for no limit."""

class BuildInfo:
    """Versions and CUDA targets of this build."""

    @property
    def version(self) -> str:
        """Version of this library."""
    @property
    def cuda(self) -> str:
        """Version of the CUDA compiler; empty without CUDA."""
    @property
    def no_cuda(self) -> str:
        """Why the build is without CUDA; empty with CUDA."""
    @property
    def cutlass(self) -> str:
        """Version of CUTLASS; empty if it was not used."""
    @property
    def architectures(self) -> list[str]:
        """CUDA targets that were compiled in."""

class PeerMemory:
    """Device memory that processes on other CUDA devices write to."""

    def __init__(self, device: int, rank: int, ranks: int, nbytes: int) -> None:
        """Allocate memory on a CUDA device, given by its index."""
    def handle(self) -> bytes:
        """Return what other processes open this memory by."""
    def open(self, rank: int, handle: bytes) -> None:
        """Open the memory of another rank."""
    def address(self) -> int:
        """Address of the first byte."""
    def send(
        self,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        offset: int,
        pitch: int,
        stream: int,
    ) -> None:
        """Copy rows of bytes of this device to the memory of all other ranks."""
    def signal(self, channel: int, stream: int) -> None:
        """Tell all other ranks that what was sent before on the stream has arrived."""
    def wait(self, channel: int, stream: int) -> None:
        """Wait, on the stream, for the signals of all other ranks."""
    def release(self) -> None:
        """Stop waiting for other ranks, now and later."""

def build_info() -> BuildInfo:
    """Describe this build."""

def quantize_rotated(source: Any, target: tuple[Any, ...], stream: int = 0) -> None:
    """Rotate the rows of [M, K] and encode them in INT8."""

def join_columns(left: Any, right: Any, target: tuple[Any, ...], stream: int = 0) -> None: ...
def silu_multiply(gate: Any, up: Any, target: tuple[Any, ...], stream: int = 0) -> None: ...
def norm_modulate(
    x: Any,
    weight: Any,
    scale: Any,
    items: Any,
    eps: float,
    target: tuple[Any, ...],
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
    target: tuple[Any, ...] | None,
    addend: Any = None,
    addend_factor: Any = None,
    stream: int = 0,
) -> None: ...
def rotate_heads(
    matrix: Any,
    q_weight: Any,
    k_weight: Any,
    rotations: Any,
    q_heads: int,
    k_heads: int,
    eps: float,
    stream: int = 0,
) -> None: ...
def cublaslt_version() -> str:
    """Return the version of the cuBLASLt that is used, such as 13.1.0; empty without one."""

class GemmProblem:
    """A GEMM to compute, without its data."""

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
        addend_rank: int = 0,
    ) -> None: ...

class GemmEpilogue:
    """A row of the table of epilogues."""

    @property
    def name(self) -> str: ...
    @property
    def rows_per_column(self) -> int: ...
    @property
    def encodes(self) -> bool: ...

def gemm_epilogues() -> list[GemmEpilogue]:
    """Return the epilogues in the order of their table; the first is "none"."""

class GemmKernel:
    """A kernel of the table."""

    @property
    def name(self) -> str: ...
    @property
    def operands(self) -> list[tuple[str, str]]: ...
    @property
    def epilogues(self) -> list[str]: ...

def gemm_kernels() -> list[GemmKernel]:
    """Return the table of kernels, which all builds have."""

def gemm_unsupported(kernel: str, problem: GemmProblem, device: int) -> str:
    """Return why a kernel does not compute a problem on a device (-1: CPU); empty if it does."""

def choose_gemm(problem: GemmProblem, device: int) -> str:
    """Return the name of the kernel of least cost."""

def explain_gemm(problem: GemmProblem, device: int) -> list[tuple[str, bool, float, str]]:
    """Return per kernel: name, whether it fuses the epilogue, cost, why it is not chosen."""

def gemm_workspace_size(kernel: str, problem: GemmProblem, device: int) -> int:
    """Return the bytes of workspace that a kernel needs."""

def gemm(
    kernel: str,
    a: tuple[Any, ...],
    b: tuple[Any, ...],
    bias: Any,
    d: Any,
    dtype: DTypeName,
    workspace: Any,
    threads: int = 0,
    stream: int = 0,
) -> None:
    """Compute D [M, N] = A [M, K] B [N, K]^T + bias [N] with a kernel of the table."""

def gemm_with_epilogue(
    kernel: str,
    a: tuple[Any, ...],
    b: tuple[Any, ...],
    addend: Any,
    epilogue: str,
    arguments: tuple[Any, ...],
    d: tuple[Any, ...],
    workspace: Any,
    stream: int = 0,
) -> None:
    """Compute a GEMM, a low-rank addend (X, U) or None, and an epilogue of gemm.h."""

def narrow_gemm(
    a: tuple[Any, ...], b: tuple[Any, ...], factors: Any, d: Any, stream: int = 0
) -> None:
    """Compute D [M, R] = factors [R] * A [M, K] B^T, see narrow_gemm in gemm.h."""

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
) -> tuple[Any, ...]: ...
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
def fold_stats(stats: Any, bound: float) -> tuple[Any, ...]: ...
