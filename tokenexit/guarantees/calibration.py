"""The fastest setting whose loss is small enough, with a guarantee: Learn then Test over an ordered ladder of settings.

    ladder = ladders.by_threshold(plan, thresholds=(0.99, 0.97, 0.95, 0.9, 0.8))     # before any loss is seen
    report = certify(ladder, losses, costs, at_most=0.02, confidence=0.95)           # losses (images, settings)
    print(report)                                                                    # what was chosen, and what holds

`certify_in_turn` says the same, and measures a setting only when its turn comes: what lies behind a failure is not run.

With a probability of at least `confidence`, over draws of the calibration images, the mean loss of the setting chosen
is at most `at_most` (Angelopoulos et al., Learn then Test, 2021, with fixed-sequence testing). The losses need not rise
along the ladder: with exits they need not, for a token that leaves is one that the others no longer see.
"""

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float

from tokenexit._array import Array, array_namespace, device, is_array, plain, take, with_doubles
from tokenexit._plain import require_share
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees.bounds import Test, images_needed, p_values, upper_bounds
from tokenexit.guarantees.certificate import ASSUMPTIONS, Certificate, Fingerprints
from tokenexit.policies import always
from tokenexit.schedule import Schedule, dense

__all__ = ["Point", "Report", "certify", "certify_in_turn", "conformal", "fixed_sequence"]


@dataclass(frozen=True)
class Point:
    """One setting of a ladder, as measured.

    Attributes:
        schedule: The setting.
        loss: Mean over the calibration images; with classes, that of the worst.
        bound: Upper bound of the mean. Those of all settings hold together, with the confidence of the report: so it
            holds for the one that is chosen, too. It is another promise than the level of the report, and may be above
            it.
        p_value: How well the losses go together with a mean above the level.
        cost: What it costs on average; the dense network costs 1.
        certified: Whether it, and every setting before it, has passed.
    """

    schedule: Schedule
    loss: float
    bound: float
    p_value: float
    cost: float
    certified: bool

    @property
    def cut_after(self) -> int | None:
        """The block after which the network is cut short; None if the setting is anything else."""
        active = self.schedule.active
        return active[0].after if active and active[0].policy == always() else None


@dataclass(frozen=True)
class Report:
    """What was chosen, why, and what it is worth. `str` puts it into words.

    Attributes:
        risk: What the loss is, as `disagreement`.
        at_most: The mean loss that is not to be exceeded.
        confidence: With which confidence.
        images: How many calibration images there were.
        test: The test.
        seed: Of the order in which it took the images.
        curve: All settings that were measured, in the order of the ladder.
        chosen: The cheapest certified setting that is cheaper than the dense network; None for "never exit".
        unmeasured: Settings behind one that failed, which could not have been certified and were not run.
        notes: What else has to be known of the calibration, a sentence each; certificates repeat them.
        unit: What costs are counted in, as `multiply-adds`; for the words of the report.
    """

    risk: str
    at_most: float
    confidence: float
    images: int
    test: Test
    seed: int
    curve: tuple[Point, ...]
    chosen: Point | None
    unmeasured: tuple[Schedule, ...] = ()
    notes: tuple[str, ...] = ()
    unit: str = "cost"

    @property
    def schedule(self) -> Schedule:
        """The setting to use: the one chosen, or `schedule.dense()`."""
        return dense() if self.chosen is None else self.chosen.schedule

    @property
    def saving(self) -> float:
        """Share of the dense network's cost that it saves; measured on the calibration images, not certified."""
        return 0.0 if self.chosen is None else 1 - self.chosen.cost

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What the guarantee rests on, in words."""
        return ASSUMPTIONS

    def certificate(self, fingerprints: Fingerprints, /) -> Certificate:
        """What was certified, for the model that has these fingerprints.

        Args:
            fingerprints: Those of the model that the losses were measured with.

        Raises:
            TokenExitError: If nothing was chosen: "never exit" needs no certificate.
        """
        if self.chosen is None:
            raise TokenExitError("`report` must have chosen a setting to be certified, got none: never exit")
        return Certificate(
            schedule=self.chosen.schedule,
            risk=self.risk,
            at_most=self.at_most,
            confidence=self.confidence,
            images=self.images,
            test=self.test,
            seed=self.seed,
            loss=self.chosen.loss,
            saving=self.saving,
            fingerprints=fingerprints,
            notes=self.notes,
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON and for plots.

        Raises:
            TokenExitError: If a policy of a schedule is not of this library.
        """
        own = {name: getattr(self, name) for name in ("risk", "at_most", "confidence", "images", "test", "seed")}
        curve = [{**vars(point), "schedule": point.schedule.to_dict()} for point in self.curve]
        chosen = None if self.chosen is None else self.curve.index(self.chosen)
        own |= {"curve": curve, "unmeasured": [one.to_dict() for one in self.unmeasured], "chosen": chosen}
        words = {"notes": list(self.notes), "assumptions": list(self.assumptions)}
        return own | {"saving": self.saving} | words

    def __str__(self) -> str:
        """The choice, the numbers and the assumptions."""
        if self.chosen is None:
            return self._refusal
        notes, assumptions = (f"Note: {one}" for one in self.notes), (f"- {one}" for one in self.assumptions)
        return "\n".join([*self._choice(self.chosen), *notes, "This holds if:", *assumptions])

    @property
    def _level(self) -> str:
        return (
            f"mean {self.risk} over images at most {_percent(self.at_most)}, with {_percent(self.confidence)} "
            f"confidence ({self.test} test, {self.images} images)"
        )

    @property
    def _refusal(self) -> str:
        if any(point.certified for point in self.curve):
            failed = next((point for point in self.curve if not point.certified), None)
            measured = "" if failed is None else f"{_percent(failed.loss)}, p = {failed.p_value:.3g}"
            bolder = "" if failed is None else f"; the first setting that is not certified measured {measured}"
            return f"Never exit: what is certified saves nothing{bolder}. Asked for: {self._level}."
        first = self.curve[0]
        measured = f"the first setting measured {_percent(first.loss)}, p = {first.p_value:.3g}"
        return f"Never exit: nothing is certified; {measured}. Asked for: {self._level}."

    def _choice(self, chosen: Point) -> list[str]:
        place = f"setting {self.curve.index(chosen) + 1} of {len(self.curve)}" + (
            " measured" if self.unmeasured else ""
        )
        count, error = len(self.curve) + len(self.unmeasured), _percent(1 - self.confidence)
        lines = [
            f"Chosen: {place}, which saves {_percent(self.saving)} of the dense network's {self.unit}:",
            *(f"  {one}" for one in _described(chosen.schedule)),
            f"Certified: {self._level}.",
            f"Measured on these images: {_percent(chosen.loss)}. By a bound that holds for all {count} settings at "
            f"once: at most {_percent(chosen.bound)}. It shares the {error} chance of error among all settings, which "
            "the certificate need not, for it tests them in a fixed order: where the bound is above the level, both "
            "hold.",
        ]
        if chosen.cut_after is not None:
            better = f"the network cut short after block {chosen.cut_after}"
            lines.append(f"Cutting is the better deal: this is {better}, and needs no exits that look at tokens.")
        if self.unmeasured:
            lines.append(f"Not measured, because one before them failed: {len(self.unmeasured)} of {count} settings.")
        return lines


def certify(
    settings: Sequence[Schedule],
    losses: Float[Array, "images settings"] | Float[Array, "images settings classes"],
    costs: Sequence[float] | Float[Array, "settings"],
    /,
    *,
    at_most: float,
    confidence: float = 0.95,
    risk: str = "disagreement",
    test: Test = "betting",
    chains: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Report:
    """Choose the cheapest setting whose mean loss is certified.

    The settings are tested in their order, each at the full level, up to the first that fails; those before it are
    certified, all of them at once. What is dearer than the dense network is not chosen.

    Args:
        settings: From the most careful to the boldest, in an order that was fixed before these losses were seen.
        losses: Losses in [0, 1] of independent images (`tokenexit.guarantees.risks`); with classes, each must pass, for
            which no correction is needed: a setting is certified only if the worst of its p-values is small.
        costs: What each setting costs on average; the dense network costs 1.
        at_most: The mean loss that is not to be exceeded.
        confidence: With which confidence it is not.
        risk: What the loss is, for the report.
        test: Which test (`tokenexit.guarantees.bounds`).
        chains: Settings that are tested one after another, by their places, if they are not all one ladder: exits and
            networks cut short, for example. `1 - confidence` is shared evenly among the chains.
        seed: Of the order in which the test takes the images, which is drawn anew: data sets are often sorted.

    Returns:
        The report.

    Raises:
        TokenExitError: If the shapes do not fit, a loss or a number is out of range, the chains do not hold every
            setting once, or there are fewer images than the test needs if all losses are 0.
    """
    asked = _Asked(risk, at_most, confidence, test, seed, _chains(settings, chains))
    costs = plain(costs)
    _require_fit(settings, losses, costs)
    rule = f"be of at least {asked.images} images, that {at_most:g} can be certified at all by this test"
    require(losses.shape[0] >= asked.images, "losses", rule, f"{losses.shape[0]} images")
    return _judged(settings, range(len(settings)), losses, costs, asked)


def certify_in_turn(
    settings: Sequence[Schedule],
    measure: Callable[[Schedule], tuple[Float[Array, "images *classes"], float]],
    /,
    *,
    images: int,
    at_most: float,
    confidence: float = 0.95,
    risk: str = "disagreement",
    test: Test = "betting",
    chains: Sequence[Sequence[int]] | None = None,
    seed: int = 0,
) -> Report:
    """What `certify` says, with each setting measured only when its turn comes: what lies behind a failure is not run.

    Nothing is lost and nothing is gained by it. The order is fixed, so what is behind a failure cannot be certified
    whatever its losses are; and the bounds are made for all settings, those that were not run included.

    Args:
        settings: As for `certify`.
        measure: Runs a setting on all images: its losses, with classes on a second axis, and what it costs on average.
        images: How many images there are: too few are refused before anything is measured.
        at_most: The mean loss that is not to be exceeded.
        confidence: With which confidence it is not.
        risk: What the loss is, for the report.
        test: Which test (`tokenexit.guarantees.bounds`).
        chains: As for `certify`; each is measured up to its first failure.
        seed: Of the order in which the test takes the images.

    Returns:
        The report; `unmeasured` are the settings that were not run.

    Raises:
        TokenExitError: As for `certify`, or if losses are of another number of images.
    """
    asked = _Asked(risk, at_most, confidence, test, seed, _chains(settings, chains))
    rule = f"be at least {asked.images}, that {at_most:g} can be certified at all by this test"
    require(images >= asked.images, "images", rule, images)
    measured: dict[int, tuple[Array, float]] = {}
    for chain in asked.chains:
        for place in chain:
            losses, _ = measured[place] = measure(settings[place])
            require(losses.shape[0] == images, "losses", f"be of {images} images", losses)
            if not asked.passes(losses):
                break
    places = sorted(measured)
    table = array_namespace(measured[places[0]][0]).stack([measured[place][0] for place in places], axis=1)
    costs = plain([measured[place][1] for place in places])
    _require_fit([settings[place] for place in places], table, costs)
    return _judged(settings, places, table, costs, asked)


def fixed_sequence(p_values: Sequence[float] | Float[Array, "hypotheses"], /, *, delta: float = 0.05) -> int:
    """How many hypotheses, from the first on, are rejected before the first that is not.

    Each is tested at the full level, since the next is looked at only if the last one was rejected: the probability
    that any true hypothesis is rejected is `delta` at most. The last one certified has the index one less.

    Args:
        p_values: In an order that was fixed beforehand.
        delta: The level.

    Returns:
        How many; 0 if the first is not rejected.
    """
    row = plain(p_values)
    return next((at for at, p in enumerate(row) if not p <= delta), len(row))


def conformal(losses: Float[Array, "images settings"], /, *, at_most: float) -> int:
    """Conformal risk control (Angelopoulos et al., ICLR 2024), which promises less than `certify`.

    It keeps the mean loss below the level on average over draws of the calibration images, and says nothing of any one
    draw. For that every image's loss must not fall along the ladder, which exits do not promise.

    Args:
        losses: Losses in [0, 1] of exchangeable images, the settings from the most careful to the boldest.
        at_most: The level.

    Returns:
        How many settings, from the first on, are within the level; the last of them is the one to use. 0 for none.

    Warns:
        UserWarning: If the loss of an image falls somewhere along the ladder: then nothing is promised.

    Raises:
        TokenExitError: If the shape does not fit, a loss is not in [0, 1], or the level does not lie between 0 and 1.
    """
    require_share(at_most, "at_most")
    there = is_array(losses) and losses.ndim == 2 and losses.shape[0] > 0
    require(there, "losses", "have shape (images, settings), with at least one image", losses)
    losses = with_doubles(losses)
    xp, images = array_namespace(losses), losses.shape[0]
    require(bool(xp.all((losses >= 0) & (losses <= 1))), "losses", "be numbers in [0, 1]", losses)
    falling = int(xp.sum(xp.astype(xp.any(losses[:, 1:] < losses[:, :-1], axis=1), xp.int64)))
    if falling:
        message = f"the loss falls along the ladder in {falling} of {images} images: conformal promises nothing here"
        warnings.warn(message, UserWarning, stacklevel=2)
    risk = (xp.sum(xp.astype(losses, xp.float64), axis=0) + 1) / (images + 1)
    return fixed_sequence(risk, delta=at_most)


@dataclass(frozen=True)
class _Asked:
    """What is to be certified, and how."""

    risk: str
    at_most: float
    confidence: float
    test: Test
    seed: int
    chains: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        require_share(self.confidence, "confidence")
        require_share(self.at_most, "at_most")

    @property
    def delta(self) -> float:
        """The share of each chain in the probability of being wrong."""
        return (1 - self.confidence) / len(self.chains)

    @property
    def images(self) -> int:
        """How many are needed at the least."""
        return images_needed(at_most=self.at_most, delta=self.delta, test=self.test)

    def p_values(self, losses: Array, /) -> list[float]:
        """Of each setting."""
        shuffled = _shuffled(losses, self.seed)
        return _worst(p_values(shuffled, at_most=self.at_most, delta=self.delta, test=self.test))

    def passes(self, losses: Array, /) -> bool:
        """Whether a setting by itself is certified, if all before it are."""
        column = array_namespace(losses).expand_dims(losses, axis=1)
        return fixed_sequence(self.p_values(column), delta=self.delta) == 1


def _judged(
    settings: Sequence[Schedule], places: Sequence[int], losses: Array, costs: list[float], asked: _Asked
) -> Report:
    """The report on all settings, of which those at some places were measured."""
    p = dict(zip(places, asked.p_values(losses), strict=True))
    known = [[place for place in chain if place in p] for chain in asked.chains]
    passed = {at for row in known for at in row[: fixed_sequence([p[at] for at in row], delta=asked.delta)]}
    shuffled = _shuffled(losses, asked.seed)
    # A bound of each setting by itself would not hold for the one that is chosen: it is chosen by its losses.
    bound = _worst(upper_bounds(shuffled, delta=(1 - asked.confidence) / len(settings), test=asked.test))
    xp = array_namespace(shuffled)
    mean = _worst(xp.mean(xp.astype(shuffled, xp.float64), axis=0))
    rows = zip(places, mean, bound, costs, strict=True)
    curve = tuple(Point(settings[at], loss, most, p[at], cost, at in passed) for at, loss, most, cost in rows)
    worth = [point for point in curve if point.certified and point.cost < 1]
    return Report(
        asked.risk, asked.at_most, asked.confidence, losses.shape[0], asked.test, asked.seed, curve,
        chosen=min(worth, key=lambda point: point.cost, default=None),
        unmeasured=tuple(setting for at, setting in enumerate(settings) if at not in p),
    )  # fmt: skip


def _chains(settings: Sequence[Schedule], chains: Sequence[Sequence[int]] | None) -> tuple[tuple[int, ...], ...]:
    """The places of the settings, chain by chain, after a check that they are settings."""
    count = len(settings)
    require(count > 0, "settings", "be at least one", count)
    strange = [one for one in settings if not isinstance(one, Schedule)]
    require(not strange, "settings", "be schedules", repr(strange[:1]))
    found = tuple(map(tuple, [range(count)] if chains is None else chains))
    once = sorted(place for chain in found for place in chain) == list(range(count))
    require(once, "chains", f"hold every place from 0 to {count - 1} once", [list(chain) for chain in found])
    return found


def _require_fit(settings: Sequence[Schedule], losses: Array, costs: list[float]) -> None:
    count = len(settings)
    fits = (
        is_array(losses)
        and losses.ndim in (2, 3)
        and losses.shape[1] == count
        and (losses.ndim == 2 or losses.shape[2] > 0)
    )
    require(fits, "losses", f"have shape (images, {count}), or (images, {count}, classes), for the settings", losses)
    require(len(costs) == count, "costs", f"be one for each of the {count} settings", len(costs))
    require(all(0 <= cost < float("inf") for cost in costs), "costs", "be numbers from 0 up", costs)


def _shuffled(losses: Array, seed: int) -> Array:
    """The images in an order that is the same on every machine: of Python's generator no more than `random` is."""
    draw = random.Random(seed)
    keys = [draw.random() for _ in range(losses.shape[0])]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    losses = with_doubles(losses)
    xp = array_namespace(losses)
    return take(losses, xp.asarray(order, device=device(losses)), axis=0)


def _worst(table: Array) -> list[float]:
    """Of each setting, the greatest over the classes, if there are any."""
    return plain(table if table.ndim == 1 else array_namespace(table).max(table, axis=1))


def _described(plan: Schedule) -> Iterator[str]:
    """What a plan does, a line for each of its exits and merges, in the order of the blocks."""
    for after in sorted({*plan.after, *plan.merged_after}):
        yield from (f"after block {after}, exit: {exit.policy!r}" for exit in plan.active if exit.after == after)
        for merge in plan.merges:
            if merge.after == after:
                alike = [] if merge.alike is None else [f"more alike than {merge.alike:.4g}"]
                agreed = [] if merge.agreed is None else [f"agreed by {merge.agreed!r}"]
                yield f"after block {after}, merge: cells of up to {merge.side} x {merge.side}, " + ", ".join(
                    alike + agreed
                )


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
