"""Run contenders beside the dense network within a time limit: what they change, then the wall clock of the best.

An adapter supplies the contenders, each of which runs a batch and times itself; the order, the clock, the losses, what
is kept of an interrupted run, and the choice of what is timed are here.
"""

import json
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Integer

from tokenexit import folders
from tokenexit._array import Array, plain, with_doubles
from tokenexit._plain import Progress, is_number, is_whole
from tokenexit.assessment.results import KINDS, OURS, Kind, Measured
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees import risks
from tokenexit.guarantees.calibrate import OwnLoss
from tokenexit.schedule import Schedule

__all__ = ["Clock", "Contender", "Found", "Ran", "run_contenders", "worth_timing"]

_FOR_LOSSES = 0.65  # of the time that is left when contenders are run; the rest is for the wall clock
_BOLD = 3.0  # times `at_most` beyond which bolder plans of a chain are not tried
_CHEAPER = 0.4  # of the dense network's time that a contender takes, about, as some chains end early
_LEAST_ROUNDS = 3


@dataclass(frozen=True, eq=False)
class Ran:
    """Results of a batch.

    Attributes:
        output: What the model has returned.
        multiply_adds: Executed multiply-adds of every image; None where they are not counted.
        label_maps: Class of every pixel, in the memory of the CPU; None for a model without classes.
    """

    output: Any
    multiply_adds: Integer[Array, "images"] | None
    label_maps: Integer[Array, "images height width"] | None = None


@runtime_checkable
class Contender(Protocol):
    """What is run beside the dense network; an adapter makes it."""

    @property
    def name(self) -> str:
        """What it is, for people."""
        ...

    @property
    def kind(self) -> Kind:
        """What it does to the network."""
        ...

    @property
    def plan(self) -> Schedule | None:
        """Its plan, if it has one."""
        ...

    def run(self, batch: Any, /) -> Ran:
        """Run a batch in evaluation mode, without gradients."""
        ...

    def seconds(self, batch: Any, /) -> float:
        """Run a batch as it would be in use, and return the seconds that it took."""
        ...


@dataclass(frozen=True)
class Clock:
    """A time limit, and how long it is until then.

    Attributes:
        until: When time is up, by `time.monotonic`.
    """

    until: float

    @staticmethod
    def of(minutes: float, /) -> "Clock":
        """A limit of so many minutes from now.

        Raises:
            TokenExitError: If `minutes` is no number above 0.
        """
        require(is_number(minutes) and minutes > 0, "minutes", "be a number above 0", repr(minutes))
        return Clock(time.monotonic() + 60 * minutes)

    @property
    def left(self) -> float:
        """Seconds that are left; negative when time is up."""
        return self.until - time.monotonic()


@dataclass(frozen=True)
class Found:
    """What was found of all contenders.

    Attributes:
        rows: The dense network, and all contenders that were run.
        images: How many images they were run on.
        untried: Names of those that there was no time for.
    """

    rows: tuple[Measured, ...]
    images: int
    untried: tuple[str, ...]


@dataclass(eq=False)
class _Kept:
    """What an interrupted run has left: losses, costs and qualities of contenders, by name."""

    file: Path | None
    identity: Mapping[str, Any]
    images: int | None = None
    found: dict[str, dict[str, float | None]] = field(default_factory=dict)

    @staticmethod
    def opened(file: Path | None, identity: Mapping[str, Any]) -> "_Kept":
        kept = _Kept(file, identity)
        if file is None or not file.exists():
            return kept
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
            same = data["identity"] == json.loads(json.dumps(identity))
            images, found = data["images"], dict(data["found"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokenExitError(f"`out` must hold {file.name} as it was written, got {file}: {error}") from error
        rule = "be a new folder, or of the same model, images and options"
        require(same, "out", rule, f"{file}, which is of others")
        kept.images, kept.found = images, found
        return kept

    def keep(self, name: str, values: dict[str, float | None]) -> None:
        self.found[name] = values
        if self.file is None:
            return
        data = {"identity": self.identity, "images": self.images, "found": self.found}
        with folders.replacing(self.file, argument="out") as part:
            part.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def run_contenders(
    dense: Contender,
    chains: Sequence[Sequence[Contender]],
    batches: Sequence[Any],
    /,
    *,
    at_most: float,
    clock: Clock,
    loss: OwnLoss | None = None,
    quality: Callable[[Iterable[tuple[int, Ran]]], float] | None = None,
    rounds: int = 15,
    file: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    progress: Progress = iter,
) -> Found:
    """Run contenders, chain by chain in turn, and time the best of them.

    A chain ends with the first contender whose loss is three times `at_most`: bolder ones change even more. Where
    there is not enough time for all of them on all images, fewer images are run, spread evenly.

    Args:
        dense: The dense network.
        chains: Contenders, in each chain from the most careful to the boldest.
        batches: Batches of images of one size; the first is a whole batch.
        at_most: Mean loss within which contenders are compared.
        clock: When to stop.
        loss: From what a contender returned for a batch, and what the dense network did, to a loss in [0, 1] for each
            image; the share of pixels that get another class if left out.
        quality: From the numbers of the batches, and what was returned for them, to a quality in [0, 1].
        rounds: Rounds of timing at most.
        file: Where what was found is kept, for an interrupted run to go on.
        identity: What that file belongs to.
        progress: Wraps each loop.

    Returns:
        What was found.

    Raises:
        TokenExitError: If there are no batches, a number is out of range, the file is of another run or damaged, or a
            loss is not in [0, 1].
    """
    require(len(batches) > 0, "images", "be of at least one batch", "none")
    require(is_whole(rounds, least=1), "rounds", "be a whole number from 1 up", repr(rounds))
    names = [dense.name, *(one.name for chain in chains for one in chain)]
    twice = sorted({name for name in names if names.count(name) > 1})
    require(not twice, "settings", "have names that no other contender has", twice)
    kept = _Kept.opened(file, {} if identity is None else identity)
    fits = kept.images is None or (is_whole(kept.images, least=1) and kept.images <= len(batches))
    require(fits, "out", f"hold a run of 1 to {len(batches)} batches", repr(kept.images))
    first = dense.seconds(batches[0])  # which also warms up
    pace = min(first, dense.seconds(batches[0]))
    count = sum(map(len, chains))
    if kept.images is None:
        afforded = _FOR_LOSSES * clock.left / max(pace * (1 + _CHEAPER * count), 1e-9)
        kept.images = max(1, min(len(batches), int(afforded)))
    chosen = _spread(len(batches), kept.images)
    runs = _Runs(batches, chosen, loss, quality, progress)
    by_name: dict[str, Contender] = {dense.name: dense}
    rows = [_row(dense, kept, runs)]
    untried: list[str] = []
    until = clock.left * (1 - _FOR_LOSSES)
    open_chains = [list(chain) for chain in chains]
    firsts = {chain[0].name for chain in chains if chain}  # one of each chain is run in any case
    while any(open_chains):
        for chain in open_chains:
            if not chain:
                continue
            contender = chain.pop(0)
            late = clock.left < until and contender.name not in kept.found
            if late and contender.name not in firsts:
                untried += [contender.name, *(one.name for one in chain)]
                chain.clear()
                continue
            row = _row(contender, kept, runs)
            by_name[contender.name] = contender
            rows.append(row)
            if row.loss > _BOLD * at_most:
                chain.clear()
    timed = worth_timing(rows, at_most=at_most)
    times = _timed({name: by_name[name] for name in timed}, _whole(batches), clock, rounds, progress)
    size = len(batches[0])
    found = tuple(_with_times(row, times, dense.name, size) for row in rows)
    images = sum(len(batches[number]) for number in chosen)
    return Found(found, images, tuple(untried))


def worth_timing(rows: Sequence[Measured], /, *, at_most: float) -> tuple[str, ...]:
    """Names of the rows whose wall clock is worth knowing: of a kind the cheapest within the limit, and a bolder one.

    Args:
        rows: The dense network first.
        at_most: The limit.

    Returns:
        The names; the dense network's first.
    """
    names = [rows[0].name]
    for kind in KINDS[1:]:
        own = [row for row in rows if row.kind == kind]
        within = sorted((row for row in own if row.loss <= at_most), key=_cost)[: 2 if kind in OURS else 1]
        bolder = sorted((row for row in own if at_most < row.loss <= 2 * at_most), key=_cost)[:1]
        beyond = sorted((row for row in own if row.loss > at_most), key=lambda row: row.loss)[:1]
        names += [row.name for row in dict.fromkeys((*within, *(bolder or beyond)))]
    return tuple(names)


def _cost(row: Measured) -> float:
    return math.inf if row.cost is None else row.cost


def _spread(count: int, wanted: int) -> list[int]:
    """Numbers of some batches, spread evenly; the first among them."""
    return [number * count // wanted for number in range(wanted)]


@dataclass(eq=False)
class _Runs:
    """Batches on which all contenders are run, and what the dense network returned for them."""

    batches: Sequence[Any]
    numbers: Sequence[int]
    loss: OwnLoss | None
    quality: Callable[[Iterable[tuple[int, Ran]]], float] | None
    progress: Progress
    reference: dict[int, Ran] = field(default_factory=dict)
    work: float = 0.0

    def measured(self, contender: Contender, dense: bool) -> dict[str, float | None]:
        """Mean loss, multiply-adds beside the dense network, and quality."""
        losses: list[float] = []
        work: list[float] = []
        seen: list[tuple[int, Ran]] = []
        for number in self.progress(self.numbers):
            ran = contender.run(self.batches[number])
            if dense:
                self.reference[number] = ran
            losses += self._losses(ran, self.reference[number])
            work += [] if ran.multiply_adds is None else plain(with_doubles(ran.multiply_adds))
            if self.quality is not None:
                seen.append((number, replace(ran, output=None)))
        mean = sum(work) / len(work) if work else None
        if dense:
            self.work = mean or 0.0
        cost = None if mean is None or not self.work else mean / self.work
        quality = None if self.quality is None else self.quality(seen)
        return {"loss": sum(losses) / len(losses), "cost": cost, "quality": quality}

    def _losses(self, ran: Ran, dense: Ran) -> list[float]:
        if self.loss is None:
            rule = "have classes, or come with a `risk` of your own: Risk(words, function)"
            require(ran.label_maps is not None and dense.label_maps is not None, "model", rule, "no label maps")
            assert ran.label_maps is not None
            assert dense.label_maps is not None
            found: Any = risks.disagreement(ran.label_maps, dense.label_maps)
        else:
            found = self.loss(ran.output, dense.output)
        values = plain(found)
        inside = all(0 <= value <= 1 for value in values)
        require(
            inside,
            "risk",
            "give losses in [0, 1], and none that is NaN",
            [one for one in values if not 0 <= one <= 1][:1],
        )
        return values


def _row(contender: Contender, kept: _Kept, runs: _Runs) -> Measured:
    dense = contender.kind == "dense"
    if dense or contender.name not in kept.found:  # the dense outputs are needed again
        kept.keep(contender.name, runs.measured(contender, dense))
    return Measured(contender.name, contender.kind, plan=contender.plan, **_numbers(kept, contender.name))


def _numbers(kept: _Kept, name: str) -> dict[str, Any]:
    found = kept.found[name]
    rule = "hold what was found as it was written"
    require(set(found) == {"loss", "cost", "quality"}, "out", rule, sorted(found))
    return dict(found)


def _whole(batches: Sequence[Any]) -> list[Any]:
    """Batches as large as the first."""
    return [batch for batch in batches if len(batch) == len(batches[0])]


def _timed(
    contenders: Mapping[str, Contender], batches: Sequence[Any], clock: Clock, rounds: int, progress: Progress
) -> dict[str, list[float]]:
    """Seconds of a batch, by name, one for each round: all in turn, in a new order every round, on the same batch."""
    for contender in contenders.values():
        contender.seconds(batches[0])
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in progress(range(rounds)):
        if turn >= _LEAST_ROUNDS and clock.left < 0:
            break
        batch = batches[turn % len(batches)]
        for name in random.Random(turn).sample(list(contenders), len(contenders)):
            times[name].append(contenders[name].seconds(batch))
    return times


def _with_times(row: Measured, times: Mapping[str, Sequence[float]], dense: str, batch: int) -> Measured:
    if row.name not in times:
        return row
    ratios = [full / own for full, own in zip(times[dense], times[row.name], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else [ratios[0]] * 3
    low, middle, high = quartiles
    return replace(row, speedup=(low, middle, high), milliseconds=1000 * statistics.median(times[row.name]) / batch)
