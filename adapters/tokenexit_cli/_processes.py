"""Work shared among processes, each of which takes the next part when it is free.

Ctrl-C reaches all processes of a terminal at once. Here it is for the first alone, which tells the others to end by
closing its connections to them: they finish the part that they are at, and write it whole. So they do if the first is
killed.
"""

import multiprocessing
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from tokenexit.errors import TokenExitError

__all__ = ["shared_out"]

Part = TypeVar("Part")
Done = TypeVar("Done")

_PATIENCE = 30.0  # seconds for a part that is being worked on when all is to end


@dataclass(frozen=True)
class _Failed:
    """What went wrong in a process: an error of usage, or the traceback of another."""

    usage: str | None
    trace: str


def shared_out(
    ready: Callable[[], Callable[[Part], Done]], parts: Iterable[Part], processes: int, /
) -> Generator[Done, None, None]:
    """Work on all parts, in this process or in others.

    Args:
        ready: What each process calls once, to get what does a part; with several processes it is pickled.
        parts: The parts.
        processes: How many; 1 is this process itself.

    Yields:
        What was done, as it comes.

    Raises:
        TokenExitError: If a process raised it, or was ended from outside.
        RuntimeError: If a process raised something else, whose traceback is in it.
    """
    if processes == 1:
        work = ready()
        yield from map(work, parts)
        return
    context = multiprocessing.get_context("spawn")  # a process with threads, as of torch, must not fork
    workers: dict[Any, Any] = {}
    try:
        with _without_interrupts():  # which those that are started here inherit
            for _ in range(processes):
                ours, theirs = context.Pipe(duplex=True)
                process = context.Process(target=_serve, args=(theirs, ready), daemon=True)
                process.start()
                theirs.close()
                workers[ours] = process
        left, open_ = iter(parts), set(workers)
        for connection in workers:
            _give_next(connection, left, open_)
        while open_:
            heard: list[Any] = wait(list(open_))
            for connection in heard:
                try:
                    done = connection.recv()
                except (EOFError, ConnectionError) as error:
                    workers[connection].join(_PATIENCE)
                    code = workers[connection].exitcode
                    rule = "fit into this machine's memory (the same command goes on, with fewer)"
                    got = f"{processes}, of which one was ended from outside, with status {code}"
                    raise TokenExitError(f"`--processes` must {rule}, got {got}") from error
                if isinstance(done, _Failed):
                    raise TokenExitError(done.usage) if done.usage else RuntimeError(f"in a process:\n{done.trace}")
                _give_next(connection, left, open_)
                yield done
    finally:
        for connection in workers:
            connection.close()
        for process in workers.values():
            process.join(_PATIENCE)
            if process.is_alive():
                process.terminate()


def _give_next(connection: Any, left: Iterator[Any], open_: set[Any]) -> None:
    """Give a process the next part; or let it end, if there is none."""
    for part in left:
        with suppress(ConnectionError):  # it has ended, which is found when it is listened to
            connection.send(part)
        return
    open_.discard(connection)
    connection.close()


def _serve(connection: Connection, ready: Callable[[], Callable[[Any], Any]]) -> None:
    """Work on parts as they come, until there is nobody to send any."""
    try:
        work = ready()
        while True:
            connection.send(work(connection.recv()))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        usage = str(error) if isinstance(error, TokenExitError) else None
        with suppress(ConnectionError):
            connection.send(_Failed(usage, traceback.format_exc()))


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Ctrl-C is not heard by this process, nor ever by those that it starts here."""
    if threading.current_thread() is not threading.main_thread():  # where signals cannot be set, nor come
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
