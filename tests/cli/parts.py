"""What processes do in the tests of how work is shared out."""

import os
import signal
import time
from functools import partial
from pathlib import Path

from tokenexit import TokenExitError


def _square(number: int) -> tuple[int, int]:
    time.sleep(0.05)  # so that the other process has a part as well
    return number**2, os.getpid()


def squares():
    return _square


def _slow(folder: Path, number: int) -> int:
    (folder / f"begun-{number}").touch()
    time.sleep(0.5)
    (folder / f"ended-{number}").touch()
    return number


def slow(folder: Path):
    return partial(_slow, folder)


def _failing(number: int) -> int:
    if number == 3:
        raise TokenExitError("`three` must not be, got 3")
    if number == 4:
        raise KeyError("four")
    if number == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def failing():
    return _failing
