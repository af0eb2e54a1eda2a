"""The fastest setting that is certified for a model with exits, from images alone.

    found = calibrate(model, images, at_most=0.02, preprocessing="RGB, 0 to 1, ImageNet mean and std")
    print(found)                                      # the choice, what is certified, and what it rests on
    model.retune(found.report.schedule)

Every setting is run as it will be in use. A replay of one dense pass would be faster, but does not know that tokens
that stay no longer see those that have left, which is the loss that has to be bounded.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from tokenexit import TokenExitError, drift, folders, ladders, risks, sealed
from tokenexit._plain import is_whole, require_share
from tokenexit.bounds import Test
from tokenexit.calibration import Report, certify_in_turn
from tokenexit.certificate import Certificate
from tokenexit.drift import Sample
from tokenexit.errors import require
from tokenexit.schedule import Schedule, dense, truncated
from tokenexit_torch._curve import draw
from tokenexit_torch._features import in_batches, require_plain
from tokenexit_torch._files import digest, fingerprint, read, require_marks, write
from tokenexit_torch._modules import evaluating
from tokenexit_torch.certifying import fingerprints
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.decoder import DecodingModel, class_scores, pooled, require_placed
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput, Output, upsampled

__all__ = ["Calibrated", "calibrate", "default_settings", "drift_sample"]

Progress = Callable[[Iterable], Iterable]
Risk = Literal["disagreement", "error increase", "IoU loss"]
Scores = Callable[[Any], Float[Tensor, "images classes height width"]]
Chains = tuple[tuple[Schedule, ...], tuple[tuple[int, ...], ...]]
Keep = Callable[[Tensor, slice], Tensor]

_SCHEMA = 2
_IDENTITY = "calibration.json"
_ROUNDING = 0.01  # share of the pixels of an image whose class rounding may change, from one batch to another
_THRESHOLDS = (0.999, 0.998, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
_STATISTIC = "statistic "


@dataclass(frozen=True)
class Calibrated:
    """What a calibration gives. `str` is the report in words.

    Attributes:
        report: The choice, the curve of all settings that were run, and the assumptions.
        certificate: What was certified, for this model; None for "never exit", which needs none.
        before: How the chosen setting behaves on the calibration images, for `tokenexit.drift.compare`.
    """

    report: Report
    certificate: Certificate | None
    before: Sample

    def plot(self, file: str | Path, /) -> None:
        """Draw the curve: loss and upper bound of every setting that was run, by its cost. It needs `matplotlib`.

        Args:
            file: Where to; its ending tells the format, as .png or .svg.
        """
        draw(self.report, file)

    def __str__(self) -> str:
        """The report in words."""
        return str(self.report)


def calibrate(
    model: ExitingModel | DecodingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    at_most: float,
    preprocessing: str,
    confidence: float = 0.95,
    risk: Risk = "disagreement",
    labels: Integer[Tensor, "images rows columns"] | None = None,
    ignore: int | None = None,
    classes: Sequence[int] | None = None,
    scores: Scores | None = None,
    settings: Sequence[Schedule] | None = None,
    chains: Sequence[Sequence[int]] | None = None,
    test: Test = "betting",
    size: tuple[int, int] | None = None,
    seed: int = 0,
    allow_fitted: str | None = None,
    resume: str | Path | None = None,
    progress: Progress = tqdm,
) -> Calibrated:
    """Choose the fastest setting whose loss, on average over images, is certified to be small enough.

    Settings are run one after the other on all images, each chain up to the first that fails. What lies behind it
    could not be certified whatever its losses are, and is not run. The model is left as it is: `retune` it to the
    choice, `report.schedule`, which is `schedule.dense()` if nothing is certified.

    Args:
        model: The wrapped model, its exit heads trained or fitted. It is run in evaluation mode, and under
            `torch.autocast` if that is active.
        images: Images of one size that are independent draws from what the model will see, no two of them equal, and
            that nothing was trained, fitted or searched on: a tensor, or batches that can be gone through again and
            again, in the same order. Those that `fit_exits` has shown to the exit heads (`model.fitted`) are refused.
        at_most: The mean loss that is not to be exceeded, as 0.02.
        preprocessing: What is done to images before the model sees them, in your own words, for the certificate.
        confidence: With which confidence it is not.
        risk: The loss of an image. `disagreement`: share of its pixels whose class is another one than in the dense
            run, for which no labels are needed. `error increase`: share of its pixels that are wrong with exits, less
            that in the dense run, and 0 where it is not positive. `IoU loss` (`tokenexit.risks.iou_loss`): its mean is
            at most `at_most` for a class exactly if its IoU is at least `1 - at_most`, intersection and union being
            means over images of their shares of the pixels that count.
        labels: Class of every pixel, from 0 to `model.classes - 1`, for `error increase`. For `IoU loss`, what the
            classes are compared with; the dense run if left out.
        ignore: Label of pixels that do not count. Every image must have one that does.
        classes: For `IoU loss`: the classes that are to keep it; all if left out. One that no image has cannot be
            certified, and a rare one takes thousands of images: leave it out, before you see a loss.
        scores: For a model with a decoder of its own: turns its output into class scores, logits of any resolution.
            The model's own classes if left out.
        settings: What to choose from, each chain from the most careful to the boldest, in an order that was fixed
            before these images were seen; `default_settings(model)` if left out.
        chains: Settings that are tested one after another, by their places, if they are not all one ladder;
            `1 - confidence` is shared among the chains.
        test: Which test (`tokenexit.bounds`).
        size: Height and width of the label maps that are compared: class scores are upsampled to it, as by
            `Output.upsample`, before the best class is taken. That of the images if left out, and that of `labels` in
            any case; the patch grid for what is used patch by patch, which is faster, and leaves patches as they are.
        seed: Of the order in which the test takes the images.
        allow_fitted: Why images that the exit heads were fitted to may be among these all the same, in your own words,
            which the report and the certificate repeat.
        resume: Folder for what has been measured. A calibration that was interrupted goes on from it, to the same
            report. Whatever is found there is bound to this calibration and to its own content by hashes.
        progress: Wraps each pass over the images, the first of which only looks at them; `tqdm` shows a bar, `iter`
            shows nothing.

    Returns:
        The report, the certificate, and a sample for drift.

    Raises:
        TokenExitError: If the model is not wrapped by `wrap` or `wrap_decoder`, or has one class; there are fewer
            images than the test needs, were all losses 0, which is found before the model is run; they differ in size
            or from one pass to the next, two of them are equal, or the heads were fitted to some; labels, classes or
            `scores` are missing or not wanted; a label is none of the classes, or an image has no pixel that counts; a
            setting lets images of a batch trade with each other, or does not fit the model; an image's result depends
            on its batch; the folder is of another calibration, incomplete or damaged; class scores are NaN; or a number
            is out of range.
    """
    outcomes = _outcomes(model, scores)
    rule = "have two classes or more to be calibrated: of one class every pixel agrees with every other"
    require(model.classes >= 2, "model", rule, model.classes)
    require_share(at_most, "at_most")
    require(callable(progress), "progress", "be a function around a loop, as `tqdm` or `iter`", repr(progress))
    _require_labels(risk, labels, ignore)
    watched = _watched(risk, classes, model.classes)
    plans, places = _planned(model, settings, chains)
    seen = _look(images, progress)
    notes = _notes(model, seen, allow_fitted)
    shown = _size(size, labels, seen)
    if labels is not None:
        _require_counting(labels, model.classes, ignore)
    prints = fingerprints(model, resolution=seen.resolution, preprocessing=preprocessing)
    options: dict[str, Any] = {
        "at_most": at_most, "confidence": confidence, "risk": _in_words(risk, at_most, watched, labels, scores, shown),
        "test": test, "chains": places, "seed": seed,
    }  # fmt: skip
    identity = options | {
        "settings": [plan.to_dict() for plan in plans], "images": seen.identity, "fingerprints": asdict(prints),
        "labels": None if labels is None else fingerprint([labels]), "ignore": ignore, "allow_fitted": allow_fitted,
    }  # fmt: skip
    runs = _Runs(
        model, outcomes, seen, plans, _Loss(risk, at_most, labels, ignore, watched, model.classes), shown,
        None if resume is None else Path(resume), identity, progress,
    )  # fmt: skip
    report = certify_in_turn(plans, runs.measured, images=len(seen), **options)
    report = replace(report, notes=notes + _note_of_one_class(runs.reference["found"]))
    before = runs.reference if report.chosen is None else runs.setting(report.schedule)
    return Calibrated(report, None if report.chosen is None else report.certificate(prints), _sample(before))


def drift_sample(
    model: ExitingModel | DecodingModel, output: Output | DecodedOutput, /, *, scores: Scores | None = None
) -> Sample:
    """The statistics of a batch in use, to be compared with `Calibrated.before` (`tokenexit.drift.compare`).

    Args:
        model: The model, with the plan that was calibrated.
        output: What it returned for images in use.
        scores: For a model with a decoder of its own: as for `calibrate`.

    Returns:
        For each image, the mean confidence of the outcome, averaged to patches, and the share of patches that left at
        each exit.

    Raises:
        TokenExitError: If the model is not wrapped, or `scores` are missing or not wanted.
    """
    return _drift(output, _reader(model, scores)(output), [exit.after for exit in model.schedule.active])


def default_settings(model: ExitingModel | DecodingModel, /) -> Chains:
    """What `calibrate` chooses from, unless it is told.

    Args:
        model: The wrapped model.

    Returns:
        Settings, and two chains of their places: the model's own plan at confidences from 0.999 down to 0.5, and the
        network cut short after each of its exit heads, the last first. What is cut short is what exits have to beat.
        Under a decoder of the model's own, the decoder is given the features of the block cut after.

    Raises:
        TokenExitError: If the model's plan has no thresholds of confidence.
    """
    compared = set[str]().union(*(exit.policy.compared_scores for exit in model.schedule.exits))
    rule = "be given for a plan without thresholds of confidence, of which alone there is a default ladder"
    require(compared == {"confidence"}, "settings", rule, sorted(compared) or "a plan with none")
    ladder = ladders.by_threshold(model.schedule, thresholds=_THRESHOLDS)
    cut = tuple(truncated(after=after) for after in sorted(map(int, model.exit_heads), reverse=True))
    if isinstance(model, DecodingModel):
        cut = tuple(replace(one, carry=model.schedule.carry) for one in cut)
    return (*ladder, *cut), (tuple(range(len(ladder))), tuple(range(len(ladder), len(ladder) + len(cut))))


@dataclass(frozen=True, eq=False)
class _Images:
    """Images that were looked at once, to be gone through again.

    Attributes:
        batches: The batches.
        digests: The digest of each image.
        resolution: Their height and width.
    """

    batches: Iterable[Tensor]
    digests: tuple[str, ...]
    resolution: tuple[int, int]

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def identity(self) -> str:
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def again(self, progress: Progress) -> Iterator[tuple[slice, Tensor]]:
        """The batches, and where their images are among all; refused if they are not those of the first pass."""
        start = 0
        for batch in progress(self.batches):
            rows = slice(start, start + len(batch))
            self._require(tuple(map(digest, batch)) == self.digests[rows])
            yield rows, batch
            start += len(batch)
        self._require(start == len(self))

    def _require(self, same: bool) -> None:
        rule = "be the same in every pass: neither shuffled, nor drawn anew, nor an iterator that ends"
        require(same, "images", rule, "others than in the first pass")


def _look(images: Any, progress: Progress) -> _Images:
    """Images, looked at once: of one size, and no two of them equal."""
    batches = in_batches(images)
    digests: list[str] = []
    sizes = set()
    for batch in progress(batches):
        rule = "come in batches that are one tensor of images, their labels in `labels`"
        require(isinstance(batch, Tensor), "images", rule, type(batch).__name__)
        require_plain(batch)
        sizes.add((batch.shape[2], batch.shape[3]))
        digests += [digest(image) for image in batch]
    require(len(digests) > 0, "images", "hold at least one image", "none")
    require(len(sizes) == 1, "images", "be of one size, for which alone a certificate holds", sorted(sizes))
    first: dict[str, int] = {}
    for at, one in enumerate(digests):
        if first.setdefault(one, at) != at:
            rule = "be independent, and so no two of them equal: leave copies out"
            got = f"{len(digests) - len(set(digests))} copies among {len(digests)}, image {at} of image {first[one]}"
            require(False, "images", rule, got)
    return _Images(batches, tuple(digests), sizes.pop())


def _notes(model: WithExits, seen: _Images, allow_fitted: str | None) -> tuple[str, ...]:
    """What a report has to say of the images, after a check that the exit heads have not seen them."""
    words = allow_fitted is None or (isinstance(allow_fitted, str) and allow_fitted.strip() != "")
    require(words, "allow_fitted", "be a reason in your own words, or None", repr(allow_fitted))
    known = len(set(model.fitted).intersection(seen.digests))
    if known == 0:
        return ()
    rule = (
        "be others than those that `fit_exits` has shown to the exit heads, for which alone their losses would hold: "
        "calibrate on other images, or give a reason as `allow_fitted`"
    )
    require(allow_fitted is not None, "images", rule, f"{known} of {len(seen)} that were fitted to")
    return (f"The exit heads were fitted to {known} of these {len(seen)} images, for this reason: {allow_fitted}",)


def _note_of_one_class(maps: Tensor) -> tuple[str, ...]:
    """What a report has to say of a dense run that tells nothing apart."""
    least, most = maps.aminmax()
    if least != most:
        return ()
    return (f"The dense run gives class {int(least)} to every pixel of every image, so that agreement says little.",)


def _require_labels(risk: str, labels: Tensor | None, ignore: int | None) -> None:
    require(risk in get_args(Risk), "risk", f"be one of {', '.join(get_args(Risk))}", repr(risk))
    if labels is None:
        require(risk != "error increase", "labels", "be given for `error increase`", None)
        require(ignore is None, "ignore", "be left out where there are no labels", ignore)
        return
    whole = isinstance(labels, Tensor) and not (labels.is_floating_point() or labels.is_complex())
    whole = whole and labels.dtype != torch.bool
    got = str(labels.dtype) if isinstance(labels, Tensor) else type(labels).__name__
    require(whole, "labels", "be a tensor of whole numbers", got)
    require(risk != "disagreement", "labels", "be left out for `disagreement`", f"shape {tuple(labels.shape)}")


def _require_counting(labels: Tensor, classes: int, ignore: int | None) -> None:
    """Raise unless every label is a class or to be ignored, and every image has a pixel that counts."""
    labels = labels.long()
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    strange = labels[counts & ((labels < 0) | (labels >= classes))]
    also = "" if ignore is None else f", or {ignore} to be ignored"
    got = f"{strange[:1].tolist()} and {len(strange) - 1} more"
    require(len(strange) == 0, "labels", f"be classes from 0 to {classes - 1}{also}", got)
    void = (~counts.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    rule = "have a pixel that counts in every image: leave images without one out, for nothing is known about them"
    require(not void, "labels", rule, f"none in {len(void)} of {len(labels)} images, the first being {void[:1]}")


def _watched(risk: str, classes: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The classes that have a loss each; none if a loss is of all pixels."""
    if risk != "IoU loss":
        require(classes is None, "classes", "be left out unless the risk is `IoU loss`", classes)
        return ()
    sequence = classes is None or isinstance(classes, Sequence)
    require(sequence, "classes", f"be a sequence of some of 0 to {count - 1}", repr(classes))
    found = tuple(range(count)) if classes is None else tuple(classes)
    known = all(is_whole(one, least=0) and one < count for one in found)
    once = known and len(found) == len(set(found)) > 0
    require(once, "classes", f"be some of 0 to {count - 1}, each once", found)
    return found


def _in_words(
    risk: str,
    at_most: float,
    watched: tuple[int, ...],
    labels: Tensor | None,
    scores: Scores | None,
    shown: tuple[int, int],
) -> str:
    """The risk, for the report."""
    of = "" if scores is None else " of the classes of `scores`"
    at = f"{of} at {shown[0]} x {shown[1]} pixels"
    if not watched:
        return f"{risk}{at}"
    against = "the dense run" if labels is None else "labels"
    each = f"of each of the classes {', '.join(map(str, watched))} (IoU with {against} at least {1 - at_most:g})"
    return f"{risk} {each}{at}"


def _planned(
    model: ExitingModel | DecodingModel, settings: Sequence[Schedule] | None, chains: Sequence[Sequence[int]] | None
) -> Chains:
    """The settings and their chains, after a check that the model can follow them and images stay independent."""
    if settings is None:
        require(chains is None, "chains", "be left out if `settings` are", chains)
        settings, chains = default_settings(model)
    for plan in map(model.checked, settings):
        rule = "hold no BatchBudget, under which the images of a batch are not independent"
        require('"BatchBudget"' not in json.dumps(plan.to_dict()), "settings", rule, repr(plan))
    return tuple(settings), tuple(map(tuple, [range(len(settings))] if chains is None else chains))


def _size(size: tuple[int, int] | None, labels: Tensor | None, seen: _Images) -> tuple[int, int]:
    """In which the label maps are compared."""
    if labels is not None:
        fits = labels.ndim == 3 and len(labels) == len(seen)
        require(fits, "labels", f"be of shape ({len(seen)}, height, width)", labels)
        own = (labels.shape[1], labels.shape[2])
        require(size in (None, own), "size", f"be that of `labels`, {own}, or left out", size)
        return own
    shown = seen.resolution if size is None else size
    sides = len(shown) == 2 and all(is_whole(side, least=1) for side in shown)
    require(sides, "size", "be a height and a width from 1 up, in pixels", repr(shown))
    return (shown[0], shown[1])


class _Outcome(NamedTuple):
    """What a model with exits says of a batch.

    Attributes:
        output: What it returned.
        scores: Class scores at any resolution, of the area that the grid covers.
        multiply_adds: Executed, of every image.
    """

    output: Output | DecodedOutput
    scores: Tensor
    multiply_adds: Tensor

    def label_maps(self, size: tuple[int, int]) -> Tensor:
        """Class of every pixel, image by image: upsampled scores of a batch may be large."""
        patches = self.output.exit_depth.shape[1:] == size == self.scores.shape[2:]
        area = None if patches else self.output.area
        found = torch.cat([upsampled(one, size, area).argmax(dim=1) for one in self.scores.split(1)])
        return found.to(torch.int16 if self.scores.shape[1] <= 2**15 else torch.int32).cpu()


Outcomes = Callable[[Tensor, Schedule], _Outcome]


def _outcomes(model: ExitingModel | DecodingModel, scores: Scores | None) -> Outcomes:
    """A model as it is calibrated, whatever reads the tokens in the end."""
    read = _reader(model, scores)
    decoder_of = cache(model.decoder_multiply_adds) if isinstance(model, DecodingModel) else lambda _: 0

    def outcome(images: Tensor, plan: Schedule) -> _Outcome:
        output: Any = model(images, schedule=plan)
        work = model.multiply_adds(output) + decoder_of((images.shape[2], images.shape[3]))
        return _Outcome(output, read(output), work)

    return outcome


def _reader(
    model: ExitingModel | DecodingModel, scores: Scores | None
) -> Callable[[Any], Float[Tensor, "images classes height width"]]:
    """From what a model returns to class scores, at any resolution."""
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    if isinstance(model, DecodingModel):
        read = class_scores(model, scores, argument="scores")

        def placed(output: DecodedOutput) -> Tensor:
            require_placed(output.area, scores, "scores")
            return read(output.decoded, len(output.exit_depth))

        return placed
    require(scores is None, "scores", "be left out for a model with a final head", repr(scores))
    return lambda output: output.logits


def _drift(output: Output | DecodedOutput, scores: Tensor, after: Sequence[int]) -> Sample:
    """The statistics of a batch; class scores are averaged to patches."""
    grid = (output.exit_depth.shape[1], output.exit_depth.shape[2])
    patches = scores if scores.shape[2:] == grid else pooled(scores, grid)
    return drift.sample(patches.float(), output.exit_depth, after=after)


@dataclass(frozen=True, eq=False)
class _Loss:
    """The loss of every image; where classes are watched, one for each of them."""

    risk: Risk
    at_most: float
    labels: Tensor | None
    ignore: int | None
    watched: tuple[int, ...]
    classes: int

    def __call__(self, maps: Tensor, reference: Tensor, rows: slice) -> Tensor:
        truth = None if self.labels is None else self.labels[rows].cpu().long()
        if self.risk == "IoU loss":
            pairs = zip(maps.split(1), (reference if truth is None else truth).split(1), strict=True)
            return torch.cat([self._of_classes(one, other) for one, other in pairs])  # a mask for each class is large
        if truth is None:
            return risks.disagreement(maps, reference)
        return risks.error_increase(maps, reference, truth, classes=self.classes, ignore=self.ignore)

    def _of_classes(self, maps: Tensor, reference: Tensor) -> Tensor:
        valid = None if self.ignore is None else reference != self.ignore
        return risks.iou_loss(maps, reference, classes=self.watched, at_least=1 - self.at_most, valid=valid)


@dataclass(frozen=True, eq=False)
class _Runs:
    """Every setting, run on all images when it is first asked for, or read from the folder where that is kept."""

    model: WithExits
    outcomes: Outcomes
    images: _Images
    plans: tuple[Schedule, ...]
    loss: _Loss
    size: tuple[int, int]
    folder: Path | None
    identity: Mapping[str, Any]
    progress: Progress
    found: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    @property
    def reference(self) -> dict[str, Tensor]:
        """The label maps that all others are compared with."""
        return self._kept("dense", dense(), lambda maps, _: maps, self.size)

    def setting(self, plan: Schedule) -> dict[str, Tensor]:
        """The losses of a setting; the dense network has run before it."""
        reference = self.reference["found"]
        name, watched = f"setting-{self.plans.index(plan):03d}", self.loss.watched
        losses = (len(watched),) if watched else ()
        return self._kept(name, plan, lambda maps, rows: self.loss(maps, reference[rows], rows), losses)

    def measured(self, plan: Schedule) -> tuple[Tensor, float]:
        """Losses and relative cost of a setting."""
        found = self.setting(plan)
        work, full = (one["multiply_adds"].double().mean().item() for one in (found, self.reference))
        return found["found"], work / full

    def _kept(self, name: str, plan: Schedule, keep: Keep, each: tuple[int, ...]) -> dict[str, Tensor]:
        """What was measured of a plan; of every image something of shape `each` is kept."""
        if name not in self.found:
            run = partial(self._run, plan, keep)
            self.found[name] = run() if self.folder is None else self._stored(self.folder, name, plan, run, each)
        return self.found[name]

    def _stored(
        self, folder: Path, name: str, plan: Schedule, run: Callable[[], dict[str, Tensor]], each: tuple[int, ...]
    ) -> dict[str, Tensor]:
        """What a file holds; if there is none, what is made now, and written."""
        marks = {"calibration": _opened(folder, self.identity), "part": name}
        file = folder / f"{name}.safetensors"
        kept = file.exists()
        if not kept:
            write(file, run(), marks, argument="resume")
        found, there = read(file, "resume")
        require_marks("resume", file, marks, there)
        shapes = dict.fromkeys(["multiply_adds", *_statistics(plan)], (len(self.images),)) | {
            "found": (len(self.images), *each)
        }
        got = {part: tuple(value.shape) for part, value in found.items()}
        require(got == shapes, "resume", f"hold {file.name} for these images, with the shapes {shapes}", repr(got))
        if kept and name == "dense":
            self._require_as_now(found["found"])
        return found

    @torch.no_grad()
    def _require_as_now(self, maps: Tensor) -> None:
        """Raise unless the network still gives the first images the classes that were found; it may be another now."""
        with evaluating(self.model):
            rows, batch = next(self.images.again(iter))
            apart = _apart(self.outcomes(batch, dense()).label_maps(self.size), maps[rows])
        rule = "be of the model as it is now, with the same `scores` and settings"
        got = f"label maps of its first images that differ in {apart:.2%} of the pixels"
        require(apart <= _ROUNDING, "resume", rule, got)

    @torch.no_grad()
    def _run(self, plan: Schedule, keep: Keep) -> dict[str, Tensor]:
        """Of every image: what is kept of its label map, its multiply-adds, and the statistics for drift."""
        parts = []
        after = [exit.after for exit in plan.active]
        with evaluating(self.model):
            for rows, batch in self.images.again(self.progress):
                out = self.outcomes(batch, plan)
                require(not bool(out.scores.isnan().any()), "model", "give class scores that are numbers", "NaN")
                maps = out.label_maps(self.size)
                if rows.start == 0 and len(batch) > 1:
                    self._require_alone(batch, plan, maps)
                sampled = _drift(out.output, out.scores, after).statistics.items()
                statistics = {_STATISTIC + name: torch.tensor(row, dtype=torch.float64) for name, row in sampled}
                found = {"found": keep(maps, rows)}
                parts.append(found | {"multiply_adds": out.multiply_adds.cpu()} | statistics)
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _require_alone(self, batch: Tensor, plan: Schedule, maps: Tensor) -> None:
        """Raise unless the first image has the classes alone that it has in its batch: images are to be independent."""
        apart = _apart(self.outcomes(batch[:1], plan).label_maps(self.size), maps[:1])
        rule = "treat each image by itself, for the losses of images that see each other are not independent"
        got = f"another class for {apart:.2%} of the pixels of an image that is alone"
        require(apart <= _ROUNDING, "model", rule, got)


def _apart(maps: Tensor, others: Tensor) -> float:
    """In which share of the pixels label maps differ."""
    return (maps != others).double().mean().item()


def _statistics(plan: Schedule) -> list[str]:
    """The names under which the statistics of a plan are kept."""
    return [_STATISTIC + name for name in ("confidence", *(f"share after {exit.after}" for exit in plan.active))]


def _sample(found: Mapping[str, Tensor]) -> Sample:
    names = sorted(name for name in found if name.startswith(_STATISTIC))  # files have them in any order
    return Sample({name.removeprefix(_STATISTIC): tuple(found[name].tolist()) for name in names})


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
