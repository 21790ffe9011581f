"""Work beside that of the current stream, in CUDA graphs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """Return a stream of the device, the same for all models, as torch keeps memory for each."""
    return torch.cuda.Stream(device)


def beside(
    function: Callable[[], torch.Tensor], device: torch.device
) -> Callable[[], torch.Tensor]:
    """Begin work whose result is needed later, and return what waits for it.

    In a CUDA graph it runs beside what follows: small work uses multiprocessors that large kernels
    leave idle. Otherwise it is finished at once, because launching takes longer than such work.

    Args:
        function: the work. Tensors that it reads must exist until the result is there.
        device: where it runs.

    Returns:
        A function that returns the result, for work that the current stream is given from then on.
    """
    if device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
        result = function()
        return lambda: result
    current, stream = torch.cuda.current_stream(device), _stream(torch.cuda.current_device())
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        result = function()

    def wait() -> torch.Tensor:
        current.wait_stream(stream)
        return result

    return wait
