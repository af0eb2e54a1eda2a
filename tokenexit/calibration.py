"""The fastest setting whose loss is small enough, with a guarantee: Learn then Test over an ordered ladder of settings.

    ladder = ladders.by_threshold(plan, thresholds=(0.99, 0.97, 0.95, 0.9, 0.8))     # before any loss is seen
    report = certify(ladder, losses, costs, at_most=0.02, confidence=0.95)           # losses (images, settings)
    print(report)                                                                    # what was chosen, and what holds

With a probability of at least `confidence`, over draws of the calibration images, the mean loss of the setting chosen
is at most `at_most` (Angelopoulos et al., Learn then Test, 2021, with fixed-sequence testing). The losses need not rise
along the ladder: with exits they need not, for a token that leaves is one that the others no longer see.
"""

import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float

from tokenexit._array import Array, array_namespace, device, plain, take, with_doubles
from tokenexit.bounds import Test, images_needed, p_values, upper_bounds
from tokenexit.certificate import ASSUMPTIONS, Certificate, Fingerprints
from tokenexit.errors import TokenExitError, require
from tokenexit.policies import always
from tokenexit.schedule import Schedule, dense

__all__ = ["Point", "Report", "certify", "conformal", "fixed_sequence"]


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
        curve: All settings, in the order of the ladder.
        chosen: The cheapest certified setting that is cheaper than the dense network; None for "never exit".
    """

    risk: str
    at_most: float
    confidence: float
    images: int
    test: Test
    seed: int
    curve: tuple[Point, ...]
    chosen: Point | None

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
        )

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data, for JSON and for plots.

        Raises:
            TokenExitError: If a policy of a schedule is not of this library.
        """
        own = {name: getattr(self, name) for name in ("risk", "at_most", "confidence", "images", "test", "seed")}
        curve = [{**vars(point), "schedule": point.schedule.to_dict()} for point in self.curve]
        chosen = None if self.chosen is None else self.curve.index(self.chosen)
        return own | {"curve": curve, "chosen": chosen, "saving": self.saving, "assumptions": list(self.assumptions)}

    def __str__(self) -> str:
        """The choice, the numbers and the assumptions."""
        if self.chosen is None:
            return self._refusal
        lines = [*self._choice(self.chosen), "This holds if:", *(f"- {one}" for one in self.assumptions)]
        return "\n".join(lines)

    @property
    def _level(self) -> str:
        return (
            f"mean {self.risk} over images at most {_percent(self.at_most)}, with {_percent(self.confidence)} "
            f"confidence ({self.test} test, {self.images} images)"
        )

    @property
    def _refusal(self) -> str:
        if any(point.certified for point in self.curve):
            return f"Never exit: what is certified saves nothing. Asked for: {self._level}."
        first = self.curve[0]
        measured = f"the first setting measured {_percent(first.loss)}, p = {first.p_value:.3g}"
        return f"Never exit: nothing is certified; {measured}. Asked for: {self._level}."

    def _choice(self, chosen: Point) -> list[str]:
        place = f"setting {self.curve.index(chosen) + 1} of {len(self.curve)}"
        measured = (
            f"{_percent(chosen.loss)} measured, {_percent(chosen.bound)} at most by a bound on all settings at once"
        )
        lines = [
            f"Chosen: {place}, which saves {_percent(self.saving)} of the dense network's cost.",
            f"Certified: {self._level}. ({measured}.)",
        ]
        if chosen.cut_after is not None:
            better = f"the network cut short after block {chosen.cut_after}"
            lines.append(f"Cutting is the better deal: this is {better}, and needs no exits that look at tokens.")
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
        losses: Losses in [0, 1] of independent images (`tokenexit.risks`); with classes, each must pass, for which
            no correction is needed: a setting is certified only if the worst of its p-values is small.
        costs: What each setting costs on average; the dense network costs 1.
        at_most: The mean loss that is not to be exceeded.
        confidence: With which confidence it is not.
        risk: What the loss is, for the report.
        test: Which test (`tokenexit.bounds`).
        chains: Settings that are tested one after another, by their places, if they are not all one ladder: exits and
            networks cut short, for example. `1 - confidence` is shared evenly among the chains.
        seed: Of the order in which the test takes the images, which is drawn anew: data sets are often sorted.

    Returns:
        The report.

    Raises:
        TokenExitError: If the shapes do not fit, a loss or a number is out of range, the chains do not hold every
            setting once, or there are fewer images than the test needs if all losses are 0.
    """
    require(0 < confidence < 1, "confidence", "lie between 0 and 1", confidence)
    costs = plain(costs)
    chains = [range(len(settings))] if chains is None else chains
    _require_fit(settings, losses, costs, chains)
    delta = (1 - confidence) / len(chains)
    images = losses.shape[0]
    needed = images_needed(at_most=at_most, delta=delta, test=test)
    rule = f"be of at least {needed} images, that {at_most:g} can be certified at all by this test"
    require(images >= needed, "losses", rule, f"{images} images")
    shuffled = _shuffled(losses, seed)
    p = _worst(p_values(shuffled, at_most=at_most, delta=delta, test=test))
    # A bound of each setting by itself would not hold for the one that is chosen: it is chosen by its losses.
    bound = _worst(upper_bounds(shuffled, delta=(1 - confidence) / len(settings), test=test))
    xp = array_namespace(shuffled)
    mean = _worst(xp.mean(xp.astype(shuffled, xp.float64), axis=0))
    passed = {place for chain in chains for place in chain[: fixed_sequence([p[at] for at in chain], delta=delta)]}
    curve = tuple(
        Point(setting, mean[at], bound[at], p[at], costs[at], at in passed) for at, setting in enumerate(settings)
    )
    worth = [point for point in curve if point.certified and point.cost < 1]
    chosen = min(worth, key=lambda point: point.cost, default=None)
    return Report(risk, at_most, confidence, images, test, seed, curve, chosen)


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
    require(0 < at_most < 1, "at_most", "lie between 0 and 1", at_most)
    there = losses.ndim == 2 and losses.shape[0] > 0
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


def _require_fit(
    settings: Sequence[Schedule], losses: Array, costs: list[float], chains: Sequence[Sequence[int]]
) -> None:
    count = len(settings)
    require(count > 0, "settings", "be at least one", count)
    strange = [one for one in settings if not isinstance(one, Schedule)]
    require(not strange, "settings", "be schedules", repr(strange[:1]))
    fits = losses.ndim in (2, 3) and losses.shape[1] == count and (losses.ndim == 2 or losses.shape[2] > 0)
    require(fits, "losses", f"have shape (images, {count}), or (images, {count}, classes), for the settings", losses)
    require(len(costs) == count, "costs", f"be one for each of the {count} settings", len(costs))
    require(all(0 <= cost < float("inf") for cost in costs), "costs", "be numbers from 0 up", costs)
    once = sorted(place for chain in chains for place in chain) == list(range(count))
    require(once, "chains", f"hold every place from 0 to {count - 1} once", [list(chain) for chain in chains])


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


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
