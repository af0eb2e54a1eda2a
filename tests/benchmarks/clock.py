"""Wall clock that can be compared: all contenders in turn, in one process, in a new order every round."""

import random
import time
from collections.abc import Callable, Mapping


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    at_least: float,
    wait: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds of one call, by contender, one for each round.

    Short calls are repeated for `at_least` seconds in a round; `wait` returns when the device has done all its work.
    """
    repeats = {}
    for name, call in calls.items():
        first = min(_seconds(call, 1, wait) for _ in range(2))  # the first warms up
        if first < at_least:
            first = _seconds(call, 3, wait)
        repeats[name] = max(1, round(at_least / first))
    measured: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            measured[name].append(_seconds(calls[name], repeats[name], wait))
    return measured


def _seconds(call: Callable[[], object], repeats: int, wait: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return (time.perf_counter() - started) / repeats
