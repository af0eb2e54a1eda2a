"""What the scripts have in common: errors for the person at the shell, progress bars, files written whole."""

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from tokenexit import TokenExitError

progress = functools.partial(tqdm, leave=False, disable=None)  # a bar on a terminal, nothing in a log file


class UsageError(ValueError):
    """What the user gave does not fit; the message names the argument, the rule and what was found."""


def exit_with(main: Callable[[], None]) -> None:
    """Run a script's `main`, turning usage errors and Ctrl-C into one line and an exit status."""
    try:
        main()
    except (UsageError, TokenExitError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("\nstopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def require_counts(**given: int | None) -> None:
    """Raise a `UsageError` for the first argument that is given and less than 1."""
    for name, value in given.items():
        if value is not None and value < 1:
            raise UsageError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write to that takes the place of `path` once it is complete, and never before."""
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
