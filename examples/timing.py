"""Wall clock that can be compared: all candidates in turn, several rounds, over the same batches."""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from examples import shell


def interleaved(
    candidates: Mapping[str, Callable[[Any], object]],
    batches: Sequence[Any],
    *,
    rounds: int,
    wait: Callable[[], None] = lambda: None,
) -> dict[str, list[float]]:
    """Time every candidate in every round, so that what slows the machine for a while slows all of them.

    Args:
        candidates: What to time, by name; each is given one batch at a time.
        batches: Images on the device that runs them.
        rounds: How often each candidate runs all batches, after one batch to warm up.
        wait: Returns when the device has done what it was given; nothing to wait for, by default.

    Returns:
        Seconds for all batches, by candidate, one for each round.
    """
    for run in candidates.values():
        run(batches[0])
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    title = f"timing, batch {len(batches[0])}"
    with shell.progress(total=rounds * len(candidates), desc=title) as bar:
        for turn in range(rounds):
            # A new order every round: no candidate always runs after the same neighbour's caches and heat.
            for name in random.Random(turn).sample(list(candidates), len(candidates)):
                seconds[name].append(_seconds(candidates[name], batches, wait))
                bar.update()
    return seconds


def _seconds(run: Callable[[Any], object], batches: Sequence[Any], wait: Callable[[], None]) -> float:
    wait()
    started = time.perf_counter()
    for images in batches:
        run(images)
    wait()
    return time.perf_counter() - started


def summary(seconds: Mapping[str, Sequence[float]], *, images: int, baseline: str) -> dict[str, dict[str, list[float]]]:
    """Lower quartile, median and upper quartile of speed and of speed-up, by candidate.

    Args:
        seconds: What `interleaved` returned.
        images: Images in all batches together.
        baseline: The candidate that the others are compared with, round by round.

    Returns:
        For each candidate `images_per_second` and `speedup` (a factor), three numbers each.
    """
    reference = np.asarray(seconds[baseline])
    return {
        name: {"images_per_second": _quartiles(images / np.asarray(values)),
               "speedup": _quartiles(reference / np.asarray(values))}
        for name, values in seconds.items()
    }  # fmt: skip


def _quartiles(values: Float[np.ndarray, " rounds"]) -> list[float]:
    return np.percentile(values, (25, 50, 75)).tolist()
