"""Calibration of a model with exits in any framework: every setting run as it will be in use, to a certificate.

    model = AdaptedModel(run=..., look=..., ...)                      # what an adapter supplies
    found = calibrate(model, batches, level=Level(at_most=0.02), risk=Risk("disagreement"))
    print(found)

An adapter supplies how a batch is run, how images are known again, and how arrays are stored; settings, chains, the
checks of images and labels, losses, resumption and the words of the report are here. `calibration.certify_in_turn` has
the statistics.
"""

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from jaxtyping import Float, Int, Integer

from tokenexit import folders, sealed
from tokenexit._array import Array, array_namespace, device, is_array, plain, with_doubles
from tokenexit._plain import Progress, is_whole, require_progress, require_share
from tokenexit.carries import Carry
from tokenexit.errors import TokenExitError, require
from tokenexit.guarantees import drift, ladders, risks
from tokenexit.guarantees.bounds import Test
from tokenexit.guarantees.calibration import Report, certify_in_turn
from tokenexit.guarantees.certificate import Certificate, Fingerprints
from tokenexit.guarantees.drift import Sample
from tokenexit.guarantees.plot import draw
from tokenexit.schedule import Schedule, dense, require_measured, truncated

__all__ = [
    "AdaptedModel",
    "Calibrated",
    "Chains",
    "Kind",
    "Level",
    "Outcome",
    "OwnLoss",
    "Risk",
    "Run",
    "calibrate",
    "default_settings",
    "sampled",
]

Kind = Literal["disagreement", "error increase", "IoU loss"]
"""The loss of an image, over label maps."""

OwnLoss = Callable[[Any, Any], Float[Array, "images"]]
"""From what a model returns for a batch, and what it returns for it if all tokens run, to losses in [0, 1]."""

Chains = tuple[tuple[Schedule, ...], tuple[tuple[int, ...], ...]]
"""Settings, and the chains of their places in which they are tested."""

_SCHEMA = 2
_IDENTITY = "calibration.json"
_ROUNDING = 0.01  # share of the pixels of an image that rounding may give another class, from one batch to another
_NOTE_OF_OWN = "The loss is a function of the user's own, of which these words are all that is known here: {}."
_THRESHOLDS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_DISTANCES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0)
_STATISTIC = "statistic "


@dataclass(frozen=True, eq=False)
class Outcome:
    """Results of a batch under a schedule.

    Attributes:
        label_maps: Class of every pixel, in the memory of the CPU; None if none were asked for.
        scores: Class scores (logits) of every patch, those that it left with if it left; None for a model without.
        exit_depth: After how many blocks every patch left.
        multiply_adds: Executed multiply-adds of every image, in the memory of the CPU.
        tokens_per_block: How many tokens of each image ran through each block.
        output: What the model has returned, for a loss of the user's own.
    """

    label_maps: Integer[Array, "images height width"] | None
    scores: Float[Array, "images classes rows columns"] | None
    exit_depth: Int[Array, "images rows columns"]
    multiply_adds: Int[Array, "images"]
    tokens_per_block: Int[Array, "images blocks"]
    output: Any = None


@runtime_checkable
class Run(Protocol):
    """A batch of images to its results."""

    def __call__(self, images: Any, schedule: Schedule, /, *, size: tuple[int, int] | None) -> Outcome:
        """Run a batch in evaluation mode, without gradients.

        Args:
            images: A batch, as `look` has seen it.
            schedule: The schedule.
            size: Height and width of the label maps; None: none are asked for.
        """
        ...


@dataclass(frozen=True, eq=False)
class AdaptedModel:
    """A model with exits, as the adapter of its framework hands it over.

    Attributes:
        run: Runs a batch under a schedule.
        look: Height and width of a batch's images, and the digest of each (`tokenexit.guarantees.certificate.digest`);
            raises a `TokenExitError` unless the batch is an array of images.
        check: Raises a `TokenExitError` unless the model can follow a schedule.
        settings: What there is to choose from by default (`default_settings`).
        fingerprints: Fingerprints of the model, from the height and width of its images.
        store: How arrays become bytes.
        classes: Number of classes; fewer than two for a model that is calibrated by a loss of the user's own alone.
        fitted: Digests of the images that exit heads or merges were fitted to.
    """

    run: Run
    look: Callable[[Any], tuple[tuple[int, int], tuple[str, ...]]]
    check: Callable[[Schedule], object]
    settings: Callable[[], Chains]
    fingerprints: Callable[[tuple[int, int]], Fingerprints]
    store: folders.Store
    classes: int
    fitted: Collection[str] = ()


@dataclass(frozen=True)
class Level:
    """Level and confidence of a guarantee, and the test behind it.

    Attributes:
        at_most: The mean loss that is not to be exceeded, as 0.02.
        confidence: With which confidence it is not.
        test: Which test (`tokenexit.guarantees.bounds`).
        seed: Of the order in which the test takes the images.
    """

    at_most: float
    confidence: float = 0.95
    test: Test = "betting"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If the level or the confidence does not lie between 0 and 1.
        """
        require_share(self.at_most, "at_most")
        require_share(self.confidence, "confidence")


@dataclass(frozen=True, eq=False)
class Risk:
    """The loss of an image, and what it is computed from: label maps, or anything by a function of your own.

        Risk("error increase", labels=labels, ignore=255)
        Risk("mean absolute change of the map", lambda out, dense: (out.decoded - dense.decoded).abs().mean((1, 2, 3)))

    Attributes:
        kind: `disagreement` (`tokenexit.guarantees.risks.disagreement`), `error increase` (`error_increase`), or `IoU
            loss` (`iou_loss`), which has one loss for each class; with `loss`, what it is in your own words, which the
            report and the certificate repeat, and by which a resumed calibration knows it.
        loss: From what the model returns for a batch, and what it returns for it if all tokens run, to a loss in [0, 1]
            for each image, that depends on no other image. It knows no labels.
        labels: Class of every pixel, in the memory of the CPU, for `error increase`; for `IoU loss`, what the classes
            are compared with, the dense run if left out.
        ignore: Label of pixels that do not count.
        classes: For `IoU loss`: the classes that are watched; all if left out.
        size: Height and width of the label maps; those of `labels`, or of the images, if left out.
        scores: The scores that are compared, for the report, as "`scores`"; those of the model if empty.
    """

    kind: Kind | str = "disagreement"
    loss: OwnLoss | None = None
    labels: Integer[Array, "images height width"] | None = None
    ignore: int | None = None
    classes: Sequence[int] | None = None
    size: tuple[int, int] | None = None
    scores: str = ""

    def __post_init__(self) -> None:
        """Check the fields by themselves.

        Raises:
            TokenExitError: If the kind is unknown, or a field is missing or not wanted for it, `labels` are no whole
                numbers, or a loss of one's own has no words, or those of another.
        """
        if self.loss is not None:
            self._require_own()
            return
        rule = f"be one of {', '.join(get_args(Kind))}, or words for a `loss` of your own"
        require(self.kind in get_args(Kind), "risk", rule, repr(self.kind))
        watching = self.kind == "IoU loss" or self.classes is None
        require(watching, "classes", "be left out unless the risk is `IoU loss`", self.classes)
        labels: Any = self.labels
        if labels is None:
            require(self.kind != "error increase", "labels", "be given for `error increase`", None)
            require(self.ignore is None, "ignore", "be left out where there are no labels", self.ignore)
            return
        whole = is_array(labels) and array_namespace(labels).isdtype(labels.dtype, "integral")
        got = str(labels.dtype) if is_array(labels) else type(labels).__name__
        require(whole, "labels", "be a tensor of whole numbers", got)
        shape = f"shape {tuple(labels.shape)}"
        require(self.kind != "disagreement", "labels", "be left out for `disagreement`", shape)

    def _require_own(self) -> None:
        rule = "be a function from two outputs to a loss for each image; labels are `labels=`"
        require(callable(self.loss), "loss", rule, self.loss)
        words = isinstance(self.kind, str) and self.kind.strip() != "" and self.kind.strip() not in get_args(Kind)
        rule = f"be what the `loss` is in your own words, and none of {', '.join(get_args(Kind))}"
        require(words, "risk", rule, repr(self.kind))
        for name in ("labels", "ignore", "classes", "size"):
            value = getattr(self, name)
            require(value is None, name, "be left out for a loss of your own, which compares no label maps", value)


@dataclass(frozen=True)
class Calibrated:
    """Result of a calibration. `str` is the report in words.

    Attributes:
        report: The choice, the curve of all settings that were run, and the assumptions.
        certificate: What was certified, for this model; None for "never exit", which needs none.
        before: How the chosen setting behaves on the calibration images, for `tokenexit.guarantees.drift.compare`.
        milliseconds: Median milliseconds of an image under the choice, and in the dense network, in the passes of the
            calibration; None where one of them was read from a folder, or is the other. No part of the report, which is
            the same again.
    """

    report: Report
    certificate: Certificate | None
    before: Sample
    milliseconds: tuple[float, float] | None = field(default=None, compare=False)

    def plot(self, file: str | Path, /) -> None:
        """Draw the curve: loss and upper bound of every setting that was run, by its cost. It needs `matplotlib`.

        Args:
            file: Where to; its ending gives the format, as .png or .svg.
        """
        draw(self.report, file)

    def __str__(self) -> str:
        """The report in words, and the time that the choice has saved."""
        if self.milliseconds is None:
            return str(self.report)
        chosen, full = self.milliseconds
        words = f"In its own passes an image took {chosen:.3g} ms, {full / chosen:.2f} times as fast as in the dense "
        return f"{self.report}\n{words}network ({full:.3g} ms); `assess` takes more care with the clock."


def calibrate(
    model: AdaptedModel,
    images: Iterable[Any],
    /,
    *,
    level: Level,
    risk: Risk = Risk(),
    settings: Sequence[Schedule] | None = None,
    chains: Sequence[Sequence[int]] | None = None,
    allow_fitted: str | None = None,
    resume: str | Path | None = None,
    progress: Progress = iter,
) -> Calibrated:
    """Choose the fastest setting whose loss, on average over images, is certified to be small enough.

    Settings are run one after the other on all images, each chain up to the first that fails. What lies behind it
    could not be certified whatever its losses are, and is not run.

    Args:
        model: The model.
        images: Batches of images of one size, no two of them equal, that can be gone through again and again in the
            same order; none that the exit heads were fitted to.
        level: What is to be certified, and how.
        risk: The loss of an image.
        settings: What to choose from, each chain from the most careful to the boldest, in an order that was fixed
            before these images were seen; those of the model by default.
        chains: Settings that are tested one after another, by their places, if they are not all one ladder;
            `1 - confidence` is shared among the chains.
        allow_fitted: Why images that the exit heads were fitted to may be among these all the same, which the report
            and the certificate repeat.
        resume: Folder for what has been measured. A calibration that was interrupted goes on from it, to the same
            report. Whatever is found there is bound to this calibration and to its own content by hashes.
        progress: Wraps each pass over the images, the first of which only looks at them.

    Returns:
        The report, the certificate, and a sample for drift.

    Raises:
        TokenExitError: If the model has one class; there are fewer images than the test needs, were all losses 0,
            which is found before the model is run; they differ in size or from one pass to the next, two of them are
            equal, or the heads were fitted to some; a label is none of the classes, or an image has no pixel that
            counts; a setting lets images of a batch trade with each other, or does not fit the model; an image's
            result depends on its batch; a loss of the user's own is not in [0, 1], NaN, or not one for each image; the
            folder is of another calibration, incomplete or damaged; class scores are NaN; or a number is out of range.
    """
    rule = "have two classes or more to be calibrated: of one class every pixel agrees with every other"
    require(risk.loss is not None or model.classes >= 2, "model", rule, model.classes)
    require_progress(progress)
    watched = _watched(risk, model.classes)
    plans, places = _planned(model, settings, chains)
    seen = _look(model, images, progress)
    notes = _notes(model, seen, allow_fitted)
    loss: _MapLoss | _OwnLoss
    if risk.loss is None:
        loss = _MapLoss(risk, level.at_most, watched, model.classes, _size(risk, seen))
    else:
        loss = _OwnLoss(risk.loss, risk.kind, level.at_most)
    if risk.labels is not None:
        _require_counting(with_doubles(risk.labels), model.classes, risk.ignore)
    prints = model.fingerprints(seen.resolution)
    options: dict[str, Any] = {
        "at_most": level.at_most, "confidence": level.confidence, "risk": loss.words,
        "test": level.test, "chains": places, "seed": level.seed,
    }  # fmt: skip
    labels = None if risk.labels is None else model.store.fingerprint([risk.labels])
    identity = options | {
        "settings": [plan.to_dict() for plan in plans], "images": seen.identity, "fingerprints": asdict(prints),
        "labels": labels, "ignore": risk.ignore, "allow_fitted": allow_fitted,
    }  # fmt: skip
    runs = _Runs(model, seen, plans, loss, None if resume is None else Path(resume), identity, progress)
    report = certify_in_turn(plans, runs.measured, images=len(seen), **options)
    report = replace(report, notes=notes + loss.notes(runs.reference["found"]), unit="multiply-adds")
    before = runs.reference if report.chosen is None else runs.setting(report.schedule)
    certificate = None if report.chosen is None else report.certificate(prints)
    return Calibrated(report, certificate, _sample(before), runs.milliseconds(report.schedule))


def default_settings(plan: Schedule, /, *, after: Iterable[int], carry: Carry | None = None) -> Chains:
    """Default settings: a plan at falling confidence, or merging ever more, and the network cut short after each head.

    Args:
        plan: The plan.
        after: The blocks with an exit head.
        carry: What the networks that are cut short carry, where a decoder needs it.

    Returns:
        Settings, and chains of their places: the plan at confidences from 0.999 down to 0.5, with its merges as they
        are; or at 0.05 to 3 times the foretold errors that it allows (`ladders.by_error`); or, where no token leaves,
        the plan with its merges at 0.05 to 3 times their distances (`ladders.by_distance`). Then, if there is any, the
        network cut short after each of the blocks, the last first: what exits and merges have to beat.

    Raises:
        TokenExitError: If the plan has no thresholds of confidence, or of foretold errors, nor merges by similarity
            alone, or has shares that are still to be measured.
    """
    require_measured(plan)
    compared = set[str]().union(*(exit.policy.compared_scores for exit in plan.exits))
    if not plan.active and any(merge.alike is not None for merge in plan.merges):
        ladder = ladders.by_distance(plan, factors=_DISTANCES)
    elif compared == {"error"}:
        ladder = ladders.by_error(plan, factors=_DISTANCES)
    else:
        rule = (
            "be given for a plan without thresholds of confidence or of foretold errors, or of similarity where no "
            "token leaves, of which alone there is a default ladder"
        )
        require(compared == {"confidence"}, "settings", rule, sorted(compared) or "a plan with none")
        ladder = ladders.by_threshold(plan, thresholds=_THRESHOLDS)
    cut = tuple(truncated(after=block) for block in sorted(after, reverse=True))
    if carry is not None:
        cut = tuple(replace(one, carry=carry) for one in cut)
    chains = (tuple(range(len(ladder))), tuple(range(len(ladder), len(ladder) + len(cut))))
    return (*ladder, *cut), chains if cut else chains[:1]


def sampled(
    plan: Schedule,
    /,
    *,
    scores: Float[Array, "images classes rows columns"] | None,
    exit_depth: Int[Array, "images rows columns"],
    tokens_per_block: Int[Array, "images blocks"],
) -> Sample:
    """The statistics of a batch under a plan, by which drift is seen: what adapters offer for images in use.

    Args:
        plan: The plan.
        scores: See `Outcome`.
        exit_depth: See `Outcome`.
        tokens_per_block: See `Outcome`.

    Returns:
        The mean confidence, if there are class scores; the share of patches that left at each exit; and the tokens of
        an average block, where tokens merge or there are no class scores.

    Raises:
        TokenExitError: If the arrays are not of the same images and places.
    """
    ran = tokens_per_block if plan.merges or scores is None else None
    return drift.sample(scores, exit_depth, after=[exit.after for exit in plan.active], tokens_per_block=ran)


@dataclass(frozen=True, eq=False)
class _Images:
    """Images that were looked at once, to be gone through again.

    Attributes:
        batches: The batches.
        look: See `AdaptedModel`.
        digests: The digest of each image.
        resolution: Their height and width.
    """

    batches: Iterable[Any]
    look: Callable[[Any], tuple[tuple[int, int], tuple[str, ...]]]
    digests: tuple[str, ...]
    resolution: tuple[int, int]

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def identity(self) -> str:
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def again(self, progress: Progress) -> Iterator[tuple[slice, Any]]:
        """The batches, and where their images are among all; refused if they are not those of the first pass."""
        start = 0
        for batch in progress(self.batches):
            _, digests = self.look(batch)
            rows = slice(start, start + len(digests))
            self._require(digests == self.digests[rows])
            yield rows, batch
            start += len(digests)
        self._require(start == len(self))

    def _require(self, same: bool) -> None:
        rule = "be the same in every pass: neither shuffled, nor drawn anew, nor an iterator that ends"
        require(same, "images", rule, "others than in the first pass")


def _look(model: AdaptedModel, batches: Iterable[Any], progress: Progress) -> _Images:
    """Images, looked at once: of one size, and no two of them equal."""
    digests: list[str] = []
    sizes = set[tuple[int, int]]()
    for batch in progress(batches):
        size, found = model.look(batch)
        sizes.add(size)
        digests += found
    require(len(digests) > 0, "images", "hold at least one image", "none")
    require(len(sizes) == 1, "images", "be of one size, for which alone a certificate holds", sorted(sizes))
    first: dict[str, int] = {}
    for at, one in enumerate(digests):
        if first.setdefault(one, at) != at:
            rule = "be independent, and so no two of them equal: leave copies out"
            got = f"{len(digests) - len(set(digests))} copies among {len(digests)}, image {at} of image {first[one]}"
            require(False, "images", rule, got)
    return _Images(batches, model.look, tuple(digests), sizes.pop())


def _notes(model: AdaptedModel, seen: _Images, allow_fitted: str | None) -> tuple[str, ...]:
    """Notes on the images, after a check that the exit heads were not fitted to them."""
    words = allow_fitted is None or (isinstance(allow_fitted, str) and allow_fitted.strip() != "")
    require(words, "allow_fitted", "be a reason in your own words, or None", repr(allow_fitted))
    known = len(set(model.fitted).intersection(seen.digests))
    if known == 0:
        return ()
    rule = (
        "be others than those that `fit_exits` or `fit_merges` has seen, for which alone their losses would hold: "
        "calibrate on other images, or give a reason as `allow_fitted`"
    )
    require(allow_fitted is not None, "images", rule, f"{known} of {len(seen)} that were fitted to")
    return (
        f"Exit heads or merges were fitted to {known} of these {len(seen)} images, for this reason: {allow_fitted}",
    )


def _note_of_one_class(maps: Array) -> tuple[str, ...]:
    """Note on a dense run with one class everywhere."""
    xp = array_namespace(maps)
    least, most = int(xp.min(maps)), int(xp.max(maps))
    if least != most:
        return ()
    return (f"The dense run gives class {least} to every pixel of every image, so that agreement says little.",)


def _require_counting(labels: Array, classes: int, ignore: int | None) -> None:
    """Raise unless every label is a class or to be ignored, and every image has a pixel that counts."""
    xp = array_namespace(labels)
    labels = xp.astype(labels, xp.int64)
    counts = xp.ones_like(labels, dtype=xp.bool) if ignore is None else labels != ignore
    strange = labels[counts & ((labels < 0) | (labels >= classes))]
    if strange.shape[0] > 0:
        also = "" if ignore is None else f", or {ignore} to be ignored"
        got = f"[{int(strange[0])}] and {strange.shape[0] - 1} more"
        require(False, "labels", f"be classes from 0 to {classes - 1}{also}", got)
    void = xp.nonzero(~xp.any(counts, axis=(1, 2)))[0]
    if void.shape[0] > 0:
        rule = "have a pixel that counts in every image: leave images without one out, for nothing is known about them"
        got = f"none in {void.shape[0]} of {labels.shape[0]} images, the first being [{int(void[0])}]"
        require(False, "labels", rule, got)


def _watched(risk: Risk, count: int) -> tuple[int, ...]:
    """The classes that have a loss each; none if a loss is of all pixels."""
    if risk.kind != "IoU loss":
        return ()
    classes = range(count) if risk.classes is None else risk.classes
    sequence = isinstance(classes, Sequence)
    require(sequence, "classes", f"be a sequence of some of 0 to {count - 1}", repr(classes))
    found = tuple(classes)
    known = all(is_whole(one, least=0) and one < count for one in found)
    once = known and len(found) == len(set(found)) > 0
    require(once, "classes", f"be some of 0 to {count - 1}, each once", found)
    return found


def _planned(
    model: AdaptedModel, settings: Sequence[Schedule] | None, chains: Sequence[Sequence[int]] | None
) -> Chains:
    """The settings and their chains, after a check that the model can follow them and images stay independent."""
    if settings is None:
        require(chains is None, "chains", "be left out if `settings` are", chains)
        settings, chains = model.settings()
    for plan in settings:
        model.check(plan)
        require_measured(plan)
        mixed = any(exit.policy.mixes_images for exit in plan.exits)
        rule = "hold no BatchBudget, under which the images of a batch are not independent"
        require(not mixed, "settings", rule, repr(plan))
    return tuple(settings), tuple(map(tuple, [range(len(settings))] if chains is None else chains))


def _size(risk: Risk, seen: _Images) -> tuple[int, int]:
    """Height and width in which the label maps are compared."""
    size, labels = risk.size, risk.labels
    if labels is not None:
        fits = labels.ndim == 3 and labels.shape[0] == len(seen)
        require(fits, "labels", f"be of shape ({len(seen)}, height, width)", labels)
        own = (labels.shape[1], labels.shape[2])
        require(size in (None, own), "size", f"be that of `labels`, {own}, or left out", size)
        return own
    shown = seen.resolution if size is None else size
    sides = len(shown) == 2 and all(is_whole(side, least=1) for side in shown)
    require(sides, "size", "be a height and a width from 1 up, in pixels", repr(shown))
    return (shown[0], shown[1])


@dataclass(frozen=True, eq=False)
class _MapLoss:
    """The loss of every image over label maps; where classes are watched, one for each of them."""

    risk: Risk
    at_most: float
    watched: tuple[int, ...]
    classes: int
    size: tuple[int, int]

    rounding = _ROUNDING
    differ = "label maps that differ in {:.2%} of the pixels"
    given = "`scores`"

    @property
    def words(self) -> str:
        """The risk, for the report."""
        of = f" of the classes of {self.risk.scores}" if self.risk.scores else ""
        at = f"{of} at {self.size[0]} x {self.size[1]} pixels"
        if not self.watched:
            return f"{self.risk.kind}{at}"
        against = "the dense run" if self.risk.labels is None else "labels"
        each = f"of each of the classes {', '.join(map(str, self.watched))}"
        return f"{self.risk.kind} {each} (IoU with {against} at least {1 - self.at_most:g}){at}"

    def notes(self, maps: Array) -> tuple[str, ...]:
        """What has to be known of the dense run."""
        return _note_of_one_class(maps)

    @property
    def each(self) -> tuple[int, ...]:
        """Shape of the losses of an image."""
        return (len(self.watched),) if self.watched else ()

    def seen(self, out: Outcome, dense: Callable[[], Outcome]) -> Array:  # noqa: ARG002
        """What it looks at: label maps, of which those of the dense run are kept."""
        assert out.label_maps is not None
        return with_doubles(out.label_maps)

    def apart(self, maps: Array, others: Array) -> float:
        """Share of the pixels in which label maps differ."""
        return _mean(maps != others)

    def losses(self, maps: Array, reference: Array, rows: slice) -> Array:
        """The losses of some label maps; `reference` are those of the dense run for all images."""
        reference = reference[rows, ...]
        xp, truth = array_namespace(maps), None
        if self.risk.labels is not None:
            truth = xp.astype(with_doubles(self.risk.labels)[rows, ...], xp.int64)
        if self.risk.kind == "IoU loss":
            other = reference if truth is None else truth
            each = [slice(at, at + 1) for at in range(maps.shape[0])]  # a mask for each class is large
            return xp.concat([self._of_classes(maps[one, ...], other[one, ...]) for one in each])
        if truth is None:
            return risks.disagreement(maps, reference)
        return risks.error_increase(maps, reference, truth, classes=self.classes, ignore=self.risk.ignore)

    def _of_classes(self, maps: Array, reference: Array) -> Array:
        valid = None if self.risk.ignore is None else reference != self.risk.ignore
        return risks.iou_loss(maps, reference, classes=self.watched, at_least=1 - self.at_most, valid=valid)


@dataclass(frozen=True, eq=False)
class _OwnLoss:
    """A loss of the user's own, for which the dense network is run beside every setting: outputs may be of any kind."""

    loss: OwnLoss
    kind: str
    at_most: float

    size = None
    each = ()
    differ = "losses that differ by {:.4g}"
    given = "`loss`"

    @property
    def rounding(self) -> float:
        """How far rounding may move a loss from one batch to another: little beside the level."""
        return min(_ROUNDING, self.at_most / 10)

    @property
    def words(self) -> str:
        """The risk, for the report."""
        return f"loss of the user's own ({self.kind})"

    def notes(self, losses: Array) -> tuple[str, ...]:  # noqa: ARG002
        """That nobody but the user knows what it is."""
        return (_NOTE_OF_OWN.format(self.kind),)

    def seen(self, out: Outcome, dense: Callable[[], Outcome]) -> Array:
        """The losses of a batch."""
        found: Any = self.loss(out.output, dense().output)
        images = out.multiply_adds.shape[0]
        rule, named = f"give one loss for each of the {images} images", f"({self.kind})"
        got = f"shape {tuple(found.shape)} {named}" if is_array(found) else f"{type(found).__name__} {named}"
        require(is_array(found) and tuple(found.shape) == (images,), "loss", rule, got)
        losses = plain(found)
        strange = [one for one in losses if not 0 <= one <= 1]
        got = f"{strange[:1]} and {len(strange) - 1} more {named}"
        require(not strange, "loss", "give losses in [0, 1], and none that is NaN", got)
        return _doubles(losses, out.multiply_adds)

    def apart(self, losses: Array, others: Array) -> float:
        """The greatest difference of two losses."""
        return max(plain(abs(losses - others)))

    def losses(self, losses: Array, reference: Array, rows: slice) -> Array:  # noqa: ARG002
        """The losses: what was seen."""
        return losses


@dataclass(frozen=True, eq=False)
class _Runs:
    """Every setting, run on all images when it is first asked for, or read from the folder where that is kept."""

    model: AdaptedModel
    images: _Images
    plans: tuple[Schedule, ...]
    loss: _MapLoss | _OwnLoss
    folder: Path | None
    identity: Mapping[str, Any]
    progress: Progress
    found: dict[str, dict[str, Array]] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def milliseconds(self, plan: Schedule) -> tuple[float, float] | None:
        """Median milliseconds of an image under a plan, and in the dense network, as far as both were run just now."""
        own, full = self.seconds.get(self._name(plan)), self.seconds.get("dense")
        if plan == dense() or own is None or full is None:
            return None
        return 1000 * statistics.median(own), 1000 * statistics.median(full)

    def _name(self, plan: Schedule) -> str:
        return "dense" if plan == dense() else f"setting-{self.plans.index(plan):03d}"

    @property
    def reference(self) -> dict[str, Array]:
        """The label maps that all others are compared with; of a loss of the user's own, that of the dense network."""
        each = self.loss.each if self.loss.size is None else self.loss.size
        return self._kept("dense", dense(), lambda seen, _: seen, each)

    def setting(self, plan: Schedule) -> dict[str, Array]:
        """The losses of a setting; the dense network has run before it."""
        reference, name = self.reference["found"], f"setting-{self.plans.index(plan):03d}"
        return self._kept(name, plan, lambda seen, rows: self.loss.losses(seen, reference, rows), self.loss.each)

    def measured(self, plan: Schedule) -> tuple[Array, float]:
        """Losses and relative cost of a setting."""
        found = self.setting(plan)
        work, full = (_mean(one["multiply_adds"]) for one in (found, self.reference))
        return found["found"], work / full

    def _kept(
        self, name: str, plan: Schedule, keep: Callable[[Array, slice], Array], each: tuple[int, ...]
    ) -> dict[str, Array]:
        """Measurements of a plan; of every image something of shape `each` is kept."""
        if name not in self.found:
            run = partial(self._run, plan, keep)
            self.found[name] = run() if self.folder is None else self._stored(self.folder, name, plan, run, each)
        return self.found[name]

    def _stored(
        self, folder: Path, name: str, plan: Schedule, run: Callable[[], dict[str, Array]], each: tuple[int, ...]
    ) -> dict[str, Array]:
        """The content of a file; if there is none, what is measured now, and written."""
        wanted = {"calibration": _opened(folder, self.identity), "part": name}
        file, store = folder / f"{name}.safetensors", self.model.store
        kept = file.exists()
        if not kept:
            store.write(file, run(), wanted, argument="resume")
        found, metadata = store.read(file, "resume")
        folders.require_metadata("resume", file, wanted, metadata)
        statistics = [part for part in found if part.startswith(_STATISTIC)]
        shapes = dict.fromkeys(["multiply_adds", *statistics], (len(self.images),)) | {
            "found": (len(self.images), *each)
        }
        got = {part: tuple(value.shape) for part, value in found.items()}
        require(got == shapes, "resume", f"hold {file.name} for these images, with the shapes {shapes}", repr(got))
        if kept and (name == "dense" or self.loss.size is None):  # what is kept is what was seen
            self._require_as_now(plan, found["found"])
        return found

    def _require_as_now(self, plan: Schedule, before: Array) -> None:
        """Raise unless the first images still have what was found for them; the network may be another now."""
        rows, batch = next(self.images.again(iter))
        apart = self.loss.apart(self._seen(batch, plan)[1], before[rows, ...])
        rule = f"be of the model as it is now, with the same {self.loss.given} and settings"
        got = f"{self.loss.differ.format(apart)} for its first images"
        require(apart <= self.loss.rounding, "resume", rule, got)

    def _run(self, plan: Schedule, keep: Callable[[Array, slice], Array]) -> dict[str, Array]:
        """Of every image: what is kept of it, its multiply-adds, and the statistics for drift."""
        parts = []
        for rows, batch in self.images.again(self.progress):
            out, seen = self._seen(batch, plan, times=self.seconds.setdefault(self._name(plan), []))
            if out.scores is not None:
                xp = array_namespace(out.scores)
                require(not bool(xp.any(xp.isnan(out.scores))), "model", "give class scores that are numbers", "NaN")
            if rows.start == 0 and rows.stop > 1:
                self._require_alone(batch, plan, seen)
            drifting = sampled(
                plan, scores=out.scores, exit_depth=out.exit_depth, tokens_per_block=out.tokens_per_block
            )
            statistics = {
                _STATISTIC + name: _doubles(row, out.multiply_adds) for name, row in drifting.statistics.items()
            }
            parts.append({"found": keep(seen, rows), "multiply_adds": out.multiply_adds} | statistics)
        xp = array_namespace(*parts[0].values())
        return {name: xp.concat([part[name] for part in parts]) for name in parts[0]}

    def _seen(self, batch: Any, plan: Schedule, *, times: list[float] | None = None) -> tuple[Outcome, Array]:
        """Results of a batch, and what the loss sees of them; what is kept, in a library that has double precision.

        `times` is given the seconds that the model took for an image.
        """

        def run(one: Schedule) -> Outcome:
            return self.model.run(batch, one, size=self.loss.size)

        started = time.perf_counter()
        out = run(plan)
        out = replace(out, multiply_adds=with_doubles(out.multiply_adds))  # what has come to the CPU has been done
        if times is not None:
            times.append((time.perf_counter() - started) / max(out.multiply_adds.shape[0], 1))
        return out, self.loss.seen(out, lambda: out if plan == dense() else run(dense()))

    def _require_alone(self, batch: Any, plan: Schedule, together: Array) -> None:
        """Raise unless the first image has alone what it has in its batch: images are to be independent."""
        apart = self.loss.apart(self._seen(batch[:1, ...], plan)[1], together[:1, ...])
        rule = "treat each image by itself, for the losses of images that see each other are not independent"
        got = f"{self.loss.differ.format(apart)} for an image that is alone"
        require(apart <= self.loss.rounding, "model", rule, got)


def _mean(values: Array) -> float:
    """Mean in double precision."""
    xp = array_namespace(values)
    return float(xp.mean(xp.astype(values, xp.float64)))


def _doubles(row: Sequence[float], like: Array) -> Array:
    """Numbers as an array in double precision, of the library and on the device of another."""
    xp = array_namespace(like)
    return xp.asarray(row, dtype=xp.float64, device=device(like))


def _sample(found: Mapping[str, Array]) -> Sample:
    names = sorted(name for name in found if name.startswith(_STATISTIC))  # files have them in any order
    return Sample({name.removeprefix(_STATISTIC): tuple(plain(found[name])) for name in names})


def _opened(folder: Path, identity: Mapping[str, Any]) -> str:
    """The hash of this calibration, after a check that a folder is new or of this very one."""
    file, wanted = folder / _IDENTITY, {"schema": _SCHEMA, **json.loads(json.dumps(identity))}
    if not file.exists():
        others = sorted(one.name for one in folder.glob("*.safetensors"))
        rule = f"be a new folder, or hold the {_IDENTITY} that its other files belong to"
        require(not others, "resume", rule, f"{folder} without it, and with {', '.join(others[:4])}")
        folders.write(file, sealed.seal(wanted).encode(), argument="resume")
    require(file.is_file(), "resume", f"hold a file {_IDENTITY}", str(file))
    try:
        found = sealed.unseal(folders.text_of(file, "resume"), what="a calibration")
    except TokenExitError as error:
        raise TokenExitError(f"`resume` must hold a valid {_IDENTITY}, got {file}: {error}") from error
    other = [name for name, value in wanted.items() if found.get(name) != value]
    rule = "be a new folder, or one of the same calibration, all of which is fixed before losses are seen"
    require(not other, "resume", rule, f"{folder} with other {', '.join(other)}")
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
