"""Exceptions and warnings of this package. Every exception derives from `Error`."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Any, Final

from .text import printable

if TYPE_CHECKING:
    from .checkpoint.kinds import Kind


_FREE_SPACE = "free some space, or choose another disk"
_REMEDIES: Final = {
    errno.ENOENT: "check the path",
    errno.EEXIST: "choose another name",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "check the path",
    errno.ELOOP: "check the path",
    errno.EACCES: "allow this user to use it",
    errno.EPERM: "allow this user to use it",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ENOSPC: _FREE_SPACE,
    errno.EDQUOT: _FREE_SPACE,
    errno.EFBIG: "choose a disk that takes larger files",
    errno.EMFILE: "raise the limit of open files",
    errno.ENFILE: "close other programs",
}


class Error(Exception):
    """Base class of this package's exceptions.

    `str` gives one sentence. A program with another interface (a command line, a server) words its
    own from the parts: a hint names arguments of this package's calls between backticks, alone
    (`layers`) or with a value (`compute="weight-only"`). Problems do not.

    Attributes:
        problem: the problem, as a sentence.
        hint: the remedy, in the imperative; "" if the problem includes it.
    """

    def __init__(self, problem: str = "", hint: str = "") -> None:
        super().__init__(*([problem, hint] if hint else [problem]))
        self.problem = problem
        self.hint = hint

    def __str__(self) -> str:
        """Return the sentence on one line: names in files may hold line breaks."""
        return printable(f"{self.problem}; {self.hint}" if self.hint else self.problem)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let errors pass between processes: Python's way would call `__init__` with `args`."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[Error], args: tuple[Any, ...], state: dict[str, Any]) -> Error:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(state)
    return error


def remedy(error: OSError) -> str:
    """Return what a user can do about an error of the operating system, in the imperative."""
    return _REMEDIES.get(error.errno or 0, "check the disk")


class InvalidArgumentError(Error, ValueError):
    """A shape, dtype, stride or option that the operation does not accept."""


class UnsupportedError(Error, RuntimeError):
    """An operation that this build or this machine cannot do."""


class MissingFeatureError(Error):
    """A missing attribute or a missing package: one of the two classes below."""


class MissingAttributeError(MissingFeatureError, AttributeError):
    """An attribute of diffusers' models that the transformer does not have.

    An AttributeError, because diffusers and similar libraries ask with `hasattr`.
    """


class MissingExtraError(MissingFeatureError, ImportError):
    """An optional package that is missing, with the extra that brings it.

    An ImportError and not an AttributeError: Python replaces the latter's sentence in `from
    zimage_mxfp8 import ...`.

    Attributes:
        name: the module that cannot be imported, as in Python's own error.
    """

    def __init__(self, problem: str, hint: str, name: str | None = None) -> None:
        super().__init__(problem, hint)
        self.name = name


class CudaError(Error, RuntimeError):
    """A CUDA call that failed: no memory, no driver, an earlier fault."""


class RankError(Error, RuntimeError):
    """A process of a transformer on several devices that has ended, and with it all others.

    Attributes:
        was_killed: whether the process ended without an error of its own, as by a signal.
    """

    def __init__(self, problem: str, hint: str = "", was_killed: bool = False) -> None:
        super().__init__(problem, hint)
        self.was_killed = was_killed


class NonFiniteError(Error, ValueError):
    """A NaN or an infinity in a matrix that is to be quantised.

    Attributes:
        row: row of the first such value in row-major order.
        column: its column.
    """

    def __init__(self, problem: str, row: int, column: int, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.row = row
        self.column = column


class PrecisionLossError(Error, ValueError):
    """A conversion that would lose more than its bound allows.

    Attributes:
        relative_error: the error that it would add.
    """

    def __init__(self, problem: str, relative_error: float) -> None:
        super().__init__(problem)
        self.relative_error = relative_error


class GenerationError(Error, ArithmeticError):
    """An image that became NaN or infinite.

    Attributes:
        step: the first step after which it was not finite, from 1; 0 if the caption was not finite
            before the first step, None if only the VAE's result was not.
    """

    def __init__(self, problem: str, step: int | None, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.step = step


class CheckpointError(Error):
    """A checkpoint that cannot be read, or does not suit the operation."""


class WrongKindError(CheckpointError):
    """A file of a kind that the operation does not take, such as an adapter or a GGUF file.

    Attributes:
        kind: its kind, a row of the table in `checkpoint/kinds.py`.
    """

    def __init__(self, problem: str, kind: Kind, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.kind = kind


class RecipeError(Error):
    """A recipe file or a pattern that cannot be used."""


class OutputError(Error):
    """An output that cannot or must not be written."""


class UsageError(Error):
    """An argument with an invalid value, or one that contradicts other arguments.

    Attributes:
        argument: name of the argument in this package's calls.
        problem: completes a sentence that begins with the argument's name.
    """

    def __init__(self, argument: str, problem: str, hint: str = "") -> None:
        super().__init__(problem, hint)
        self.args = (argument, problem, hint)
        self.argument = argument

    def __str__(self) -> str:
        """Return the sentence, which begins with the argument's name."""
        return printable(f"{self.argument} ") + super().__str__()


class DeviceWarning(UserWarning):
    """A GPU that is not used, or used without this package's kernels."""
