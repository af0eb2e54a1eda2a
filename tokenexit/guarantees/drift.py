"""Do the images in use still look like those of the calibration? A certificate is void where they do not.

    before = sample(out.logits, out.exit_depth, after=(3, 6, 8))       # at calibration, kept beside the certificate
    found = compare(before, sample(...), false_alarms=0.01)            # in use
    found.warn()                                                       # or look at found.drifted

Tokens of an image depend on each other, so the image is the unit here as well: each gives one number for each
statistic: the mean confidence of its outcome, the share of its patches that left at each exit, the tokens that ran. Two
samples of images are compared by the two-sample Kolmogorov-Smirnov test, with its exact distribution, and Bonferroni's
correction over the statistics. A drift that leaves these numbers as they are is not seen.
"""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jaxtyping import Float, Int

from tokenexit import scores
from tokenexit._array import Array, array_namespace, plain
from tokenexit._plain import require_keys, require_share
from tokenexit.errors import TokenExitError, require

__all__ = ["Compared", "Drift", "Sample", "compare", "sample"]

SCHEMA = 1


@dataclass(frozen=True)
class Sample:
    """What was seen on some images.

    Attributes:
        statistics: For each statistic one number for each image.
    """

    statistics: Mapping[str, tuple[float, ...]]

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If there is no statistic, they are not of equally many images, or something is no finite
                number.
        """
        rows = self.statistics.values() if isinstance(self.statistics, Mapping) else ()
        tuples = len(rows) > 0 and all(isinstance(row, tuple) for row in rows)
        require(
            tuples, "statistics", "be a tuple of numbers for each of at least one name", repr(self.statistics)[:200]
        )
        require(len({len(row) for row in rows}) == 1, "statistics", "be of equally many images", list(map(len, rows)))
        finite = all(isinstance(x, int | float) and math.isfinite(x) for row in rows for x in row)
        require(finite, "statistics", "be finite numbers", "others among them")

    @property
    def images(self) -> int:
        """How many images it is of."""
        return len(next(iter(self.statistics.values())))

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return {"schema": SCHEMA, "statistics": {name: list(row) for name, row in self.statistics.items()}}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Sample":
        """What `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, the schema is another one, or a value is out of range.
        """
        require_keys(data, "sample", {"schema", "statistics"})
        require(data["schema"] == SCHEMA, "schema", f"be {SCHEMA}", repr(data["schema"]))
        rows = data["statistics"]
        lists = isinstance(rows, Mapping) and all(isinstance(row, list) for row in rows.values())
        require(lists, "statistics", "be a mapping to lists", repr(rows)[:200])
        return Sample({name: tuple(row) for name, row in rows.items()})

    @staticmethod
    def join(samples: Iterable["Sample"], /) -> "Sample":
        """Batches as one sample.

        Args:
            samples: Those of the batches, with the same statistics.

        Returns:
            One of all images, in their order.

        Raises:
            TokenExitError: If there is none, or they have other statistics.
        """
        parts = list(samples)
        require(len(parts) > 0, "samples", "be at least one", parts)
        names = list(parts[0].statistics)
        strange = [list(part.statistics) for part in parts if set(part.statistics) != set(names)]
        require(not strange, "samples", f"have the statistics {names}", strange[:1])
        return Sample({name: tuple(x for part in parts for x in part.statistics[name]) for name in names})


@dataclass(frozen=True)
class Compared:
    """One statistic of two samples.

    Attributes:
        statistic: Its name.
        distance: The greatest difference of the two distribution functions (Kolmogorov-Smirnov), from 0 to 1.
        p_value: Probability of so great a distance, or more, where nothing has changed; exact to within 1e-12, so that
            less than that is 0.
        before: Mean over the images of the calibration.
        now: Mean over the images in use.
    """

    statistic: str
    distance: float
    p_value: float
    before: float
    now: float


@dataclass(frozen=True)
class Drift:
    """Two samples side by side. `str` puts it into words.

    Attributes:
        false_alarms: Probability, at most, that this says "drifted" where nothing has changed.
        images: How many images each sample has.
        compared: Each statistic.
    """

    false_alarms: float
    images: tuple[int, int]
    compared: tuple[Compared, ...]

    @property
    def alarms(self) -> tuple[Compared, ...]:
        """The statistics whose distributions differ."""
        return tuple(one for one in self.compared if one.p_value * len(self.compared) <= self.false_alarms)

    @property
    def drifted(self) -> bool:
        """Whether any does."""
        return len(self.alarms) > 0

    @property
    def blind(self) -> bool:
        """Whether there are too few images for an alarm, whatever is on them."""
        before, now = self.images
        return _p_value(before * now, before, now) * len(self.compared) > self.false_alarms

    def warn(self) -> None:
        """Warn if any does, in the words of `str`, or if none could be seen.

        Warns:
            UserWarning: If the images have drifted, or are too few to tell.
        """
        if self.drifted or self.blind:
            warnings.warn(str(self), UserWarning, stacklevel=2)

    def __str__(self) -> str:
        """What differs, and what that means."""
        rate = (
            f"{self.images[0]} images before, {self.images[1]} now; at most {100 * self.false_alarms:g} % false alarms"
        )
        if self.blind:
            return f"No drift can be seen with so few images, whatever is on them: compare more ({rate})."
        if not self.drifted:
            return f"No drift is seen ({rate}). That is no proof that there is none."
        lines = [
            f"- {one.statistic}: mean {one.before:.4g} before, {one.now:.4g} now (distance {one.distance:.3f}, "
            f"p = {one.p_value:.2g})"
            for one in self.alarms
        ]
        return "\n".join([f"The images have drifted; the certificate does not hold for them ({rate}):", *lines])


def sample(
    logits: Float[Array, "images classes *place"] | None,
    exit_depth: Int[Array, "images *place"],
    /,
    *,
    after: Sequence[int],
    tokens_per_block: Int[Array, "images blocks"] | None = None,
) -> Sample:
    """The statistics of a batch: mean confidence, share of patches that left at each exit, tokens that ran.

    Args:
        logits: Class scores of every patch, those that it left with if it left; None for a network without classes.
        exit_depth: After how many blocks every patch left.
        after: The blocks with an exit.
        tokens_per_block: How many tokens of each image ran through each block, where tokens merge; None: no statistic.

    Returns:
        One number for each image and statistic.

    Raises:
        TokenExitError: If the arrays are not of the same images and places, there are no places, or no statistic.
    """
    places = tuple(exit_depth.shape[1:])
    require(math.prod(places) > 0, "exit_depth", "have at least one place", exit_depth)
    xp, found = array_namespace(exit_depth), {}
    if logits is not None:
        fits = logits.ndim >= 2 and (logits.shape[0], *logits.shape[2:]) == (exit_depth.shape[0], *places)
        require(fits, "logits", "have shape (images, classes, *place) for the places of `exit_depth`", logits)
        found["confidence"] = scores.confidence(xp.moveaxis(logits, 1, -1))
    found |= {f"share after {block}": xp.astype(exit_depth == block, xp.float32) for block in after}
    if tokens_per_block is not None:
        fits = tokens_per_block.ndim == 2 and tokens_per_block.shape[0] == exit_depth.shape[0]
        require(
            fits, "tokens_per_block", "have shape (images, blocks) for the images of `exit_depth`", tokens_per_block
        )
        found["tokens per block"] = xp.astype(tokens_per_block, xp.float32)
    return Sample({name: _means(value) for name, value in found.items()})


def compare(before: Sample, now: Sample, /, *, false_alarms: float = 0.01) -> Drift:
    """Whether two samples of images differ in any statistic.

    The rate of false alarms is that of one comparison: whoever compares every day has an alarm now and then. The time
    it takes grows with the product of the two numbers of images: some hundred of each are plenty.

    Args:
        before: The sample of the calibration.
        now: One of independent images in use, with the same statistics.
        false_alarms: Probability of an alarm where nothing has changed that is accepted.

    Returns:
        What was found; `drifted` is the flag.

    Raises:
        TokenExitError: If the samples have other statistics, one has no images, or the rate is not between 0 and 1.
    """
    require_share(false_alarms, "false_alarms")
    names = sorted(before.statistics)
    require(sorted(now.statistics) == names, "now", f"have the statistics {names}", sorted(now.statistics))
    if before.images == 0 or now.images == 0:
        raise TokenExitError(f"`now` must have images, as must `before`, got {now.images} and {before.images}")
    compared = tuple(_compared(name, before.statistics[name], now.statistics[name]) for name in names)
    return Drift(false_alarms, (before.images, now.images), compared)


def _compared(name: str, before: tuple[float, ...], now: tuple[float, ...]) -> Compared:
    gap = _gap(before, now)
    distance = gap / (len(before) * len(now))
    means = math.fsum(before) / len(before), math.fsum(now) / len(now)
    return Compared(name, distance, _p_value(gap, len(before), len(now)), *means)


def _gap(one: tuple[float, ...], other: tuple[float, ...]) -> int:
    """The greatest distance of two distribution functions, times both counts: a whole number."""
    steps: dict[float, int] = {}
    for row, step in ((one, len(other)), (other, -len(one))):
        for value in row:
            steps[value] = steps.get(value, 0) + step
    return max(map(abs, accumulate(steps[value] for value in sorted(steps))))


def _p_value(gap: int, one: int, other: int) -> float:
    """P(gap or more) where both samples are of one continuous distribution; with ties it is less.

    All orders of the pooled sample are equally likely: paths through a grid of `one` by `other` steps. Row by row, and
    for every point within the gap, the share of the paths to it that have never come to the gap.
    """
    inside = [float(at * one < gap) for at in range(other + 1)]
    for row in range(1, one + 1):
        low = max(0, (row * other - gap) // one + 1)
        high = min(other, (row * other + gap - 1) // one)
        above, inside, here = inside, [0.0] * (other + 1), 0.0
        for at in range(low, high + 1):
            here = (row * above[at] + at * here) / (row + at)
            inside[at] = here
    return max(0.0, 1.0 - inside[other])


def _means(values: Array) -> tuple[float, ...]:
    """The mean of every image."""
    xp = array_namespace(values)
    means = xp.mean(xp.reshape(values, (values.shape[0], math.prod(values.shape[1:]))), axis=1)
    return tuple(plain(means))
