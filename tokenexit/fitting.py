"""Fitting of exit heads to a frozen network, in any framework: steps, checks on images held out, resumption, report.

An adapter supplies the network (`tokenexit.features.Teacher`), the heads with their optimiser (`Learner`), and how
arrays become files (`tokenexit.folders.Store`).
"""

import json
import math
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from jaxtyping import Int

from tokenexit._array import Array
from tokenexit._plain import Progress, is_whole, require_progress
from tokenexit.errors import TokenExitError, require
from tokenexit.features import TARGET, Cached, FitData, Rows, Teacher, gathered
from tokenexit.folders import Store, require_metadata

__all__ = ["FitReport", "HeldOut", "Learner", "Missed", "Recipe", "Standing", "fit"]

_STATE = "fit.safetensors"
_WHERE = "where"


@dataclass(frozen=True)
class Recipe:
    """Steps and rates by which exit heads are fitted.

    Attributes:
        steps: Optimiser steps, shared by all heads.
        patches_per_step: Patches drawn for each step; fewer if there are not as many.
        learning_rate: At the first step; it falls to zero along a cosine.
        weight_decay: Of AdamW.
        held_out: Share of the images, the last ones, that heads are not fitted to: at least one, unless it is 0.
        check_every: After how many steps the loss on images held out is looked at, and the state written.
        patience: How many checks in a row without a lower loss end the fit.
        decoder_steps: Steps after these, through the decoder, that are the last word: on what it makes of the tokens.
        decoder_images: Images of each of them.
    """

    steps: int
    patches_per_step: int
    learning_rate: float
    weight_decay: float
    held_out: float
    check_every: int
    patience: int
    decoder_steps: int = 0
    decoder_images: int = 2

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a number is out of range.
        """
        counts = (("steps", 1), ("patches_per_step", 2), ("check_every", 1), ("patience", 1))
        for name, least in (*counts, ("decoder_steps", 0), ("decoder_images", 1)):
            value = getattr(self, name)
            require(is_whole(value, least=least), name, f"be at least {least}", value)
        require(0 <= self.held_out < 1, "held_out", "be at least 0 and less than 1", self.held_out)

    def rate_at(self, step: int, /) -> float:
        """The learning rate of a step: a cosine that would be zero after the last.

        Args:
            step: How many steps are done.
        """
        return self.learning_rate * (1 + math.cos(math.pi * step / self.steps)) / 2

    def decoder_rate_at(self, step: int, /) -> float:
        """The learning rate of a step through the decoder: a tenth of that at first, falling in the same way.

        Args:
            step: How many of these steps are done.
        """
        return 0.1 * self.learning_rate * (1 + math.cos(math.pi * step / self.decoder_steps)) / 2

    def is_due(self, step: int, /) -> bool:
        """Whether it is time for a check.

        Args:
            step: How many steps are done.
        """
        return step % self.check_every == 0 or step == self.steps


@dataclass(frozen=True)
class Standing:
    """How far a fit is, its arrays aside.

    Attributes:
        step: How many steps are done.
        checks_since: How many checks in a row found no lower loss.
        best: The lowest mean loss on images held out, and the step after which it was found; None before any check.
        decoded: How many steps through the decoder are done.
        before: The change of the decoder's output before the first of them.
    """

    step: int = 0
    checks_since: int = 0
    best: tuple[float, int] | None = None
    decoded: int = 0
    before: float = 0.0

    @property
    def keeps(self) -> bool:
        """Whether weights are kept beside the last ones."""
        return self.best is not None and self.decoded == 0

    @property
    def kept_step(self) -> int:
        """The step after which the weights were as they are kept: that of the lowest loss, or else the last."""
        return self.step if self.best is None else self.best[1]

    def checked(self, loss: float, /) -> "Standing":
        """The standing after a check.

        Args:
            loss: The mean loss on images held out.

        Returns:
            The same with `best` of this step, if the loss was never lower; else with one check more without.
        """
        if loss < (math.inf if self.best is None else self.best[0]):
            return replace(self, checks_since=0, best=(loss, self.step))
        return replace(self, checks_since=self.checks_since + 1)

    @staticmethod
    def from_dict(data: Any, recipe: Recipe, /) -> "Standing":
        """The standing of plain data.

        Args:
            data: A mapping with the fields of this class.
            recipe: What the fit is bounded by.

        Raises:
            TokenExitError: If a field is missing, of another type, or out of range.
        """
        names = {"step", "checks_since", "best", "decoded", "before"}
        require(isinstance(data, dict) and set(data) == names, "where", f"have the keys {sorted(names)}", repr(data))
        bounds = (("step", recipe.steps), ("checks_since", recipe.patience), ("decoded", recipe.decoder_steps))
        for name, most in bounds:
            inside = is_whole(data[name]) and data[name] <= most
            require(inside, name, f"be a whole number from 0 to {most}", repr(data[name]))
        before = data["before"]
        number = isinstance(before, float) and math.isfinite(before)
        require(number, "before", "be a finite number", repr(before))
        ran = {"decoded": data["decoded"], "before": before}
        best = data["best"]
        if best is None:
            return Standing(data["step"], data["checks_since"], **ran)
        pair = isinstance(best, list) and len(best) == 2 and isinstance(best[0], float) and math.isfinite(best[0])
        pair = pair and is_whole(best[1]) and best[1] <= data["step"]
        require(pair, "best", f"be a loss and a step from 0 to {data['step']}", repr(best))
        return Standing(data["step"], data["checks_since"], (best[0], best[1]), **ran)


@dataclass(frozen=True)
class Missed:
    """What a translator misses of the tokens at one tap, as they are read there: behind the final norm, if they are.

    Attributes:
        error: The mean squared error that is left, as a fraction of each channel's variance, the mean over channels: 0
            for what later blocks make of a token, 1 for the mean of all tokens.
        variance: The variance that translations have, as a fraction of that of the tokens: regression shrinks it.
    """

    error: float
    variance: float


@runtime_checkable
class Learner(Protocol):
    """Copies of exit heads that are being fitted, with their optimiser; an adapter supplies it."""

    @property
    def exits(self) -> tuple[int, ...]:
        """The blocks that the heads follow."""
        ...

    @property
    def marks(self) -> Mapping[str, str]:
        """What the result depends on beside the rows and the recipe, by name, before the first step."""
        ...

    def draw(self, rows: int, size: int, /) -> Int[Array, "drawn"]:
        """Places of rows, drawn with replacement.

        Args:
            rows: How many rows there are.
            size: How many to draw.
        """
        ...

    def measure(self, chunks: Iterable[Rows], /) -> None:
        """Look at all rows before the first step, if the losses need it.

        Args:
            chunks: All rows that are fitted to, in pieces; computed as they are asked for, so that heads of class
                scores ask for none.
        """
        ...

    def step(self, rows: Rows, rate: float, /) -> None:
        """Take a step on the sum of the heads' mean losses.

        Args:
            rows: At least one row.
            rate: The learning rate.
        """
        ...

    def step_decoded(self, rows: Rows, batch: Any, rate: float, /) -> None:
        """Take a step on the change of the decoder's output for some images, beside the loss of rows.

        Args:
            rows: As for `step`.
            batch: The images.
            rate: The learning rate.
        """
        ...

    def revert(self) -> None:
        """Go on from the weights that are kept, if any are, which are kept no longer; the optimiser starts anew."""
        ...

    def changed(self, batch: Any, /) -> float:
        """The change of the decoder's output for some images, by the loss of `step_decoded`, with the latest weights.

        Args:
            batch: The images.
        """
        ...

    def loss(self, rows: Rows, /) -> float:
        """The loss in evaluation mode, summed over rows and heads.

        That of class scores is the cross-entropy; that of a translator has the squared error of its tokens as well, and
        of the logarithm of that, which it foretells.

        Args:
            rows: The rows.
        """
        ...

    def keep(self) -> None:
        """Keep the weights as they are now, as the best ones."""
        ...

    def finish(self, digests: frozenset[str], /) -> None:
        """Put the weights that are kept, or the last ones, into the heads of the model.

        Args:
            digests: Digests of all images shown, which the model keeps.
        """
        ...

    def agreed(self, rows: Rows, /) -> dict[int, int]:
        """How many rows the heads of the model give the class of the final head, by the block that they follow.

        Heads without class scores are left out.

        Args:
            rows: The rows.
        """
        ...

    def foretold(self, chunks: Iterable[Rows], /) -> None:
        """Correct the errors that the translators of the model foretell: they are too small for what they have seen.

        Args:
            chunks: All rows of images held out, in pieces.
        """
        ...

    def missed(self, rows: Rows, /) -> dict[int, dict[int, Missed]]:
        """What the translators of the model miss, by the block that they follow, and by tap; of other heads nothing.

        Args:
            rows: The rows.

        Returns:
            Summed over rows.
        """
        ...

    def state(self) -> dict[str, Array]:
        """All that changes from step to step, as arrays by name."""
        ...

    def restore(self, state: Mapping[str, Array], /, *, kept: bool) -> None:
        """Put back what `state` has given.

        Args:
            state: The arrays by name.
            kept: Whether weights were kept when it was written.

        Raises:
            TokenExitError: If an array is missing, or of another shape or dtype, or not finite.
        """
        ...


@dataclass(frozen=True)
class HeldOut:
    """How well the exit heads do on images that they were not fitted to.

    Attributes:
        agreement: Fraction of their patches on which the exit head and the final head, or the decoder, predict the
            same class, by the block that the exit head follows; of heads with class scores.
        patches: How many patches these are.
        images: Of how many images.
        missed: As in `FitReport`.
    """

    agreement: dict[int, float]
    patches: int
    images: int
    missed: dict[int, dict[int, Missed]] = field(default_factory=dict)


@dataclass(frozen=True)
class FitReport:
    """Agreement of the exit heads with the final head, or the decoder; `str(report)` is its text.

    Attributes:
        agreement: Fraction of the patches fitted to on which the exit head and the final head, or the decoder, predict
            the same class, by the block that the exit head follows; of heads with class scores.
        patches: How many patches these are.
        images: Of how many images.
        steps: How many steps were taken.
        kept_step: After which of them the heads were as they now are: the last, unless images were held out.
        stopped_early: Whether the held-out loss ended the fit before its last step.
        held_out: The same for images held out; None if there were none.
        missed: What each translator misses, by the block that it follows, and by the tap that it translates for: the
            last block, if a final head reads the tokens. Empty without any.
        decoded: The mean loss of the decoder's output, beside that of the dense network, before and after the steps
            through it: on images held out, or else on those fitted to. None without such steps.
    """

    agreement: dict[int, float]
    patches: int
    images: int
    steps: int
    kept_step: int
    stopped_early: bool
    held_out: HeldOut | None
    missed: dict[int, dict[int, Missed]] = field(default_factory=dict)
    decoded: tuple[float, float] | None = None

    def __str__(self) -> str:
        stopped = ", stopped early" if self.stopped_early else ""
        lines = [
            f"Fitted to {self.patches} patches of {self.images} images; held out: "
            + ("none." if self.held_out is None else f"{self.held_out.patches} patches of {self.held_out.images}."),
            f"{self.steps} steps{stopped}; the heads are those after step {self.kept_step}.",
        ]
        if self.agreement:
            lines.append("They predict what the final head, or the decoder, predicts:")
        for after, agreement in self.agreement.items():
            held = "" if self.held_out is None else f", {self.held_out.agreement[after]:.1%} of those held out"
            lines.append(f"  after block {after}: on {agreement:.1%} of the patches fitted{held}")
        if self.missed:
            lines.append("Of the variance of the tokens that are read later, translators miss:")
        for after, taps in self.missed.items():
            for tap, one in taps.items():
                held = "" if self.held_out is None else f", {self.held_out.missed[after][tap].error:.3f} held out"
                kept = f"they have {one.variance:.2f} of their variance"
                lines.append(f"  after block {after}, of those of block {tap}: {one.error:.3f}{held}; {kept}")
        if self.decoded is not None:
            before, after = self.decoded
            lines.append(
                f"The decoder's output changes by {before:.4g} before the steps through it, {after:.4g} after."
            )
        return "\n".join(lines)


def fit(
    learner: Learner,
    batches: Iterable[Any],
    teacher: Teacher,
    recipe: Recipe,
    /,
    *,
    store: Store,
    cache: Literal["memory"] | Path | None = "memory",
    resume: str | Path | None = None,
    progress: Progress = iter,
) -> FitReport:
    """Fit exit heads to the predictions of a frozen network, patch by patch.

    Args:
        learner: The heads.
        batches: Images, with labels or without. They are gone through once, unless `cache` is None.
        teacher: The network.
        recipe: Steps and rates.
        store: How arrays become files.
        cache: Where rows are kept: in memory, in a folder, or nowhere, so that each step runs the network.
        resume: Folder in which an interrupted fit is found, if the same call is made again; it ends with the same
            weights and report. It is written there at checks and on an interrupt, and removed at the end.
        progress: Wraps each of the two loops.

    Returns:
        The agreement of each head with what it was fitted to.

    Raises:
        TokenExitError: If there are no images, or none is finite; or `cache` or `resume` hold what is of another model,
            of other images or options, or is damaged.
    """
    require_progress(progress)
    data = gathered(batches, teacher, store=store, cache=cache, held_out=recipe.held_out, progress=progress)
    saved = None
    if resume is not None:
        options = {name: str(value) for name, value in asdict(recipe).items()}
        rows = {"cache": "None" if cache is None else "kept"}
        marks = {**teacher.marks, **options, "images": data.fingerprint, **learner.marks, **rows}
        saved = _Saved(Path(resume) / _STATE, marks, store)
    learner.measure(data.fitted.chunks())
    first = Standing() if saved is None else saved.restored(learner, recipe)
    last = _run(learner, data, recipe, first, saved, progress)
    decoded = None
    if recipe.decoder_steps > 0:
        last, decoded = _run_decoded(learner, data, recipe, last, saved, progress)
    learner.finish(data.digests)
    if data.held_out is not None:
        learner.foretold(data.held_out.chunks())
    report = replace(_report(learner, data, recipe, last), decoded=decoded)
    if saved is not None:
        with suppress(OSError):  # a later call goes on from the last step, to the same end
            saved.file.unlink(missing_ok=True)
    return report


@dataclass(frozen=True, eq=False)
class _Saved:
    """The file of a fit that may be interrupted, bound to what its result depends on."""

    file: Path
    marks: Mapping[str, str]
    store: Store

    def write(self, learner: Learner, standing: Standing) -> None:
        where = json.dumps(asdict(standing))
        self.store.write(self.file, learner.state(), {**self.marks, _WHERE: where}, argument="resume")

    def restored(self, learner: Learner, recipe: Recipe) -> Standing:
        """Where the same call was interrupted, if it was."""
        if not self.file.exists():
            return Standing()
        try:
            return self._read(learner, recipe)
        except TokenExitError:
            if self.file.exists():
                raise
            return Standing()  # another process, with the same call, has come to its end meanwhile

    def _read(self, learner: Learner, recipe: Recipe) -> Standing:
        arrays, found = self.store.read(self.file, "resume")
        require_metadata("resume", self.file, self.marks, found)
        try:
            standing = Standing.from_dict(json.loads(found.get(_WHERE, "")), recipe)
            learner.restore(arrays, kept=standing.keeps)
        except (ValueError, RecursionError) as error:
            name = self.file.name
            raise TokenExitError(f"`resume` must hold a valid {name}, got {self.file}: {error}") from error
        return standing


def _run(
    learner: Learner,
    data: FitData,
    recipe: Recipe,
    standing: Standing,
    saved: _Saved | None,
    progress: Progress,
) -> Standing:
    """Fit until the last step or until the loss is no longer lower, and write the state from time to time."""
    whole = True
    draws = data.fitted.draws(recipe.patches_per_step, learner.draw, standing.step)
    try:
        for _ in progress(range(standing.step, recipe.steps)):
            if standing.checks_since >= recipe.patience:
                break
            whole = False
            rows = next(draws)
            if rows[TARGET].shape[0] > 0:
                learner.step(rows, recipe.rate_at(standing.step))
            standing = replace(standing, step=standing.step + 1)
            due = recipe.is_due(standing.step)
            if due and data.held_out is not None:
                standing = _checked(learner, data.held_out, standing)
            whole = True
            if due and saved is not None:
                saved.write(learner, standing)
    except (KeyboardInterrupt, SystemExit):
        if whole and saved is not None:  # an interrupt within a step leaves what the last check has written
            saved.write(learner, standing)
        raise
    return standing


def _run_decoded(
    learner: Learner,
    data: FitData,
    recipe: Recipe,
    standing: Standing,
    saved: _Saved | None,
    progress: Progress,
) -> tuple[Standing, tuple[float, float]]:
    """Fit through the decoder, from the best weights so far, and write the state from time to time."""
    whole, size = True, recipe.decoder_images
    if standing.decoded == 0:
        learner.revert()
        standing = replace(standing, before=_changed(learner, data, size))
    draws = data.fitted.draws(recipe.patches_per_step, learner.draw, standing.step + standing.decoded)
    batches = data.batches.steps(size, standing.decoded)
    try:
        for _ in progress(range(standing.decoded, recipe.decoder_steps)):
            whole = False
            rows, batch = next(draws), next(batches)
            if rows[TARGET].shape[0] > 0:
                learner.step_decoded(rows, batch, recipe.decoder_rate_at(standing.decoded))
            standing = replace(standing, decoded=standing.decoded + 1)
            whole = True
            if saved is not None and standing.decoded % recipe.check_every == 0:
                saved.write(learner, standing)
    except (KeyboardInterrupt, SystemExit):
        if whole and saved is not None and standing.decoded > 0:
            saved.write(learner, standing)
        raise
    return standing, (standing.before, _changed(learner, data, size))


def _changed(learner: Learner, data: FitData, size: int) -> float:
    """The mean change of the decoder's output, on images held out, or else on those fitted to."""
    batches = data.batches.held_out(size) if data.images[1] else data.batches.fitted_to(size)
    changes = [learner.changed(batch) for batch in batches]
    return sum(changes) / len(changes)


def _checked(learner: Learner, held_out: Cached, standing: Standing) -> Standing:
    total, patches = 0.0, 0
    for rows in held_out.chunks():
        total += learner.loss(rows)
        patches += rows[TARGET].shape[0]
    standing = standing.checked(total / (patches * len(learner.exits)))
    if standing.best is not None and standing.best[1] == standing.step:
        learner.keep()
    return standing


def _report(learner: Learner, data: FitData, recipe: Recipe, last: Standing) -> FitReport:
    fitted, held = data.images
    own = _measured(learner, data.fitted.chunks(), fitted)
    held_out = None if data.held_out is None else _measured(learner, data.held_out.chunks(), held)
    stopped_early = last.step < recipe.steps
    ran = last.step, last.kept_step, stopped_early
    return FitReport(own.agreement, own.patches, own.images, *ran, held_out, own.missed)


def _measured(learner: Learner, chunks: Iterable[Rows], images: int) -> HeldOut:
    """On which share of the patches each head predicts the class of the final head, and what translators miss."""
    agreed, missed, patches = dict[int, int](), dict[int, dict[int, Missed]](), 0
    for rows in chunks:
        patches += rows[TARGET].shape[0]
        for after, count in learner.agreed(rows).items():
            agreed[after] = agreed.get(after, 0) + count
        for after, taps in learner.missed(rows).items():
            held = missed.setdefault(after, {})
            for tap, one in taps.items():
                so_far = held.get(tap, Missed(0.0, 0.0))
                held[tap] = Missed(so_far.error + one.error, so_far.variance + one.variance)
    require(patches > 0, "images", "give finite tokens", "NaN or infinity for every patch")
    agreement = {after: total / patches for after, total in agreed.items()}
    mean = {
        after: {tap: Missed(one.error / patches, one.variance / patches) for tap, one in taps.items()}
        for after, taps in missed.items()
    }
    return HeldOut(agreement, patches, images, mean)
