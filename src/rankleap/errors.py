"""Every error that rankleap raises on purpose, as one tree.

    RankleapError                  anything below; the CLI prints it without a traceback
    ├── InputError                 what the user gave is wrong               exit code 2
    │   ├── RecipeError            a recipe file or a --set override
    │   ├── UnknownNameError       a name that is in no dict; lists the closest
    │   ├── CheckpointError        a missing, truncated or foreign checkpoint
    │   │   └── BaseMismatchError  the base does not fit the run
    │   ├── TrajectoryError        too few, unordered or repeated steps
    │   ├── NotFiniteError         NaN or infinity in weights (the tensor is named)
    │   ├── DiskSpaceError         not enough room for what is about to be written
    │   └── MissingExtraError      an optional dependency is not installed
    └── RunError                   the work itself failed                    exit code 1
        └── NotConvergedError      a factorisation missed its residual

A message says what was needed, what came, where, and what to do.
"""

import difflib
from collections.abc import Iterable
from types import TracebackType
from typing import Self


class RankleapError(Exception):
    """Root of the tree."""

    def __reduce__(self) -> tuple[object, ...]:
        """Travel between processes by the message alone, for ``__init__`` may take more."""
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[RankleapError], arguments: tuple[object, ...], state: dict[str, object]) -> RankleapError:
    error = kind.__new__(kind, *arguments)
    error.args = arguments
    error.__dict__.update(state)
    return error


class InputError(RankleapError):
    """What the user gave is wrong."""


class RecipeError(InputError):
    """A recipe file or an override is not valid."""


class UnknownNameError(InputError):
    """A name that is in no dict."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        # Looser than difflib's own 0.6: names are short, so one wrong letter weighs much.
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(known)}"
        super().__init__(f"{kind} {name!r} does not exist; {hint}")


class CheckpointError(InputError):
    """A checkpoint is missing, truncated or of an unknown layout."""


class BaseMismatchError(CheckpointError):
    """The base given is not the base that the run was trained from."""


class TrajectoryError(InputError):
    """A trajectory has too few, unordered or repeated steps."""


class MissingExtraError(InputError):
    """An optional dependency is not installed."""

    def __init__(self, need: str, extra: str) -> None:
        super().__init__(f"{need} needs packages that are not installed; run: pip install 'rankleap[{extra}]'")


class RunError(RankleapError):
    """The work itself failed."""


class NotConvergedError(RunError):
    """An iterative factorisation did not reach its residual."""


class NotFiniteError(InputError):
    """NaN or infinity where finite numbers are needed."""


class DiskSpaceError(InputError):
    """Not enough room on the disk for what is about to be written."""


class Caught:
    """A block whose exception is kept in ``error`` instead of raised; exits and interrupts pass."""

    error: Exception | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        if isinstance(error, Exception):
            self.error = error
        return self.error is not None
