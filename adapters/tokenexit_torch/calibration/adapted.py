"""The fastest setting that is certified for a model with exits, from images alone.

    found = calibrate(model, images, at_most=0.02, preprocessing="RGB, 0 to 1, ImageNet mean and std")
    print(found)                                      # the choice, what is certified, and what it rests on
    model.retune(found.report.schedule)

Every setting is run as it will be in use. A replay of one dense pass would be faster, but does not know that tokens
that stay no longer see those that have left, which is the loss that has to be bounded.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit.guarantees import calibrate as core
from tokenexit.guarantees.bounds import Test
from tokenexit.guarantees.calibrate import AdaptedModel, Calibrated, Chains, Kind, Level, Outcome, Progress, Risk
from tokenexit.guarantees.drift import Sample
from tokenexit.schedule import Schedule, dense
from tokenexit_torch import _files
from tokenexit_torch._images import in_batches, require_plain
from tokenexit_torch._modules import evaluating
from tokenexit_torch.calibration.certificate import fingerprints
from tokenexit_torch.exits.decoder import DecodingModel, class_scores, pooled, require_placed
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import DecodedOutput, Output, upsampled

__all__ = ["calibrate", "default_settings", "drift_sample", "label_maps"]

Scores = Callable[[Any], Float[Tensor, "images classes height width"]]


def calibrate(
    model: ExitingModel | DecodingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    at_most: float,
    preprocessing: str,
    confidence: float = 0.95,
    risk: Kind | Risk = "disagreement",
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
        risk: The loss of an image. `disagreement`: share of its pixels that get another class than in the dense
            run, for which no labels are needed. `error increase`: share of its pixels that are wrong with exits, less
            that in the dense run, and 0 where it is not positive. `IoU loss` (`tokenexit.guarantees.risks.iou_loss`):
            its mean is at most `at_most` for a class exactly if its IoU is at least `1 - at_most`, intersection and
            union being means over images of their shares of the pixels that count. Or a loss of your own, `Risk("what
            it is, in your words", function)`, from two outputs of the model for a batch, one under a setting and one
            of the dense run, to a loss in [0, 1] for each image: for a decoder of the model's own that gives no
            classes, for example. The dense network is run anew beside every setting then, since outputs may be
            anything, and large; the words are in the report and the certificate.
        labels: Class of every pixel, from 0 to `model.classes - 1`, for `error increase`. For `IoU loss`, what the
            classes are compared with; the dense run if left out.
        ignore: Label of pixels that do not count. Every image must have one that does.
        classes: For `IoU loss`: the classes that are to keep it; all if left out. One that no image has cannot be
            certified, and a rare one takes thousands of images: leave it out, before you see a loss.
        scores: For a model with a decoder of its own: turns its output into class scores, logits of any resolution. If
            left out, the model's own classes, or what a decoder returns, if that is a tensor of two channels or more.
            A loss of your own needs none.
        settings: What to choose from, each chain from the most careful to the boldest, in an order that was fixed
            before these images were seen; `default_settings(model)` if left out.
        chains: Settings that are tested one after another, by their places, if they are not all one ladder;
            `1 - confidence` is shared among the chains.
        test: Which test (`tokenexit.guarantees.bounds`).
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
            on its batch; a loss of your own is not in [0, 1], NaN, or not one for each image; the folder is of another
            calibration, incomplete or damaged; class scores are NaN; or a number is out of range.
    """
    loss = isinstance(risk, Risk) and risk.loss is not None
    batches = in_batches(images)
    adapted = _adapted(model, scores, preprocessing, None if loss else batches)
    tensor = labels is None or isinstance(labels, Tensor)
    require(tensor, "labels", "be a tensor of whole numbers", type(labels).__name__)
    if isinstance(risk, Risk):
        for name, value in (("labels", labels), ("ignore", ignore), ("classes", classes), ("size", size)):
            require(value is None, name, "be given in `risk` where that is a Risk, and not beside it", value)
        risk = replace(risk, loss=risk.loss and torch.no_grad()(risk.loss))
    else:
        risk = Risk(risk, labels=None if labels is None else labels.cpu(), ignore=ignore, classes=classes, size=size)
    return core.calibrate(
        adapted,
        batches,
        level=Level(at_most, confidence, test, seed),
        risk=risk if scores is None else replace(risk, scores="`scores`"),
        settings=settings,
        chains=chains,
        allow_fitted=allow_fitted,
        resume=resume,
        progress=progress,
    )


def drift_sample(
    model: ExitingModel | DecodingModel, output: Output | DecodedOutput, /, *, scores: Scores | None = None
) -> Sample:
    """The statistics of a batch in use, to be compared with `Calibrated.before` (`tokenexit.guarantees.drift.compare`).

    Args:
        model: The model, with the plan that was calibrated.
        output: What it returned for images in use.
        scores: For a model with a decoder of its own: as for `calibrate`.

    Returns:
        For each image, the mean confidence of the outcome, averaged to patches, if there are class scores; the share of
        patches that left at each exit; and the tokens of an average block, where tokens merge or there are no scores.

    Raises:
        TokenExitError: If the model is not wrapped, or `scores` are not wanted.
    """
    read = _reader(model, scores, reads="anything")
    found = None if read is None else _of_patches(output, read(output))
    return core.sampled(
        model.schedule, scores=found, exit_depth=output.exit_depth, tokens_per_block=output.tokens_per_block
    )


def default_settings(model: ExitingModel | DecodingModel, /) -> Chains:
    """Settings that `calibrate` chooses from by default.

    Args:
        model: The wrapped model.

    Returns:
        Settings, and chains of their places: the model's own plan at confidences from 0.999 down to 0.5, its merges as
        they are; or at 0.05 to 3 times the foretold errors that it allows (`tokenexit.guarantees.ladders.by_error`);
        or, where no token leaves, its merges at 0.05 to 3 times their distances (`by_distance` there). Then the network
        cut short after each of its exit heads, the last first, if there are any: what exits have to beat. Under a
        decoder of the model's own, the decoder is given the features of the block cut after, or their translations.

    Raises:
        TokenExitError: If the model's plan has no thresholds of confidence or of foretold errors, nor merges by
            similarity alone.
    """
    carry = model.schedule.carry if isinstance(model, DecodingModel) else None
    return core.default_settings(model.schedule, after=map(int, model.exit_heads), carry=carry)


Reads = Literal["class scores", "anything"]
"""What a loss is computed from: class scores, which must be there then, or whatever the model returns."""


def _adapted(
    model: ExitingModel | DecodingModel, scores: Scores | None, preprocessing: str, batches: Iterable[Any] | None
) -> AdaptedModel:
    """The model as the core calibrates it; without images by a loss of the user's own, which asks for no classes."""
    read = _reader(model, scores, reads="anything" if batches is None else "class scores")
    decoder = cache(model.decoder_multiply_adds) if isinstance(model, DecodingModel) else None
    return AdaptedModel(
        run=partial(_run, model, read, decoder),
        look=_look,
        check=model.checked,
        settings=partial(default_settings, model),
        fingerprints=lambda resolution: fingerprints(model, resolution=resolution, preprocessing=preprocessing),
        store=_files,
        classes=model.classes if batches is None or read is None else _classes(model, read, batches),
        fitted=model.fitted,
    )


def _classes(model: ExitingModel | DecodingModel, read: Scores, batches: Iterable[Any]) -> int:
    """Number of classes that are compared: that of the heads, or of what a decoder makes of one image."""
    first: Any = None if model.classes else next(iter(batches), None)
    if first is None:
        return model.classes
    _look(first)
    run: Any = model
    with torch.no_grad(), evaluating(model):
        return read(run(first[:1], schedule=dense())).shape[1]


def _look(batch: Any) -> tuple[tuple[int, int], tuple[str, ...]]:
    """Height and width of images, and the digest of each."""
    rule = "come in batches that are one tensor of images, their labels in `labels`"
    require(isinstance(batch, Tensor), "images", rule, type(batch).__name__)
    require_plain(batch)
    return (batch.shape[2], batch.shape[3]), tuple(map(_files.digest, batch))


@torch.no_grad()
def _run(
    model: ExitingModel | DecodingModel,
    read: Scores | None,
    decoder: Callable[[tuple[int, int]], int] | None,
    images: Tensor,
    schedule: Schedule,
    /,
    *,
    size: tuple[int, int] | None,
) -> Outcome:
    """A batch in evaluation mode; a decoder of the model's own counts in the multiply-adds."""
    with evaluating(model):
        output: Any = model(images, schedule=schedule)
        scores = None if read is None else read(output)
        work = model.multiply_adds(output) + (0 if decoder is None else decoder((images.shape[2], images.shape[3])))
    grid = output.exit_depth.shape[1:]
    maps = None if size is None or scores is None else label_maps(scores, size, output.area, grid=grid)
    patches = None if scores is None else _of_patches(output, scores)
    return Outcome(maps, patches, output.exit_depth, work.cpu(), output.tokens_per_block, output)


def label_maps(scores: Tensor, size: tuple[int, int], area: Area | None, *, grid: tuple[int, ...]) -> Tensor:
    """Class of every pixel, image by image: upsampled scores of a batch may be large."""
    placed = None if grid == size == scores.shape[2:] else area  # patch by patch, there is nothing to be placed
    found = torch.cat([upsampled(one, size, placed).argmax(dim=1) for one in scores.split(1)])
    return found.to(torch.int16 if scores.shape[1] <= 2**15 else torch.int32).cpu()


def _of_patches(output: Output | DecodedOutput, scores: Tensor) -> Tensor:
    """Class scores averaged to patches."""
    grid = (output.exit_depth.shape[1], output.exit_depth.shape[2])
    return (scores if scores.shape[2:] == grid else pooled(scores, grid)).float()


def _reader(model: ExitingModel | DecodingModel, scores: Scores | None, *, reads: Reads) -> Scores | None:
    """From what a model returns to class scores, at any resolution; None if there are none, nor any needed."""
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    if isinstance(model, DecodingModel):
        if reads == "anything" and scores is None and model.host.classes is None:
            return None
        read = class_scores(model, scores, argument="scores")

        def placed(output: DecodedOutput) -> Tensor:
            require_placed(output.area, scores, "scores")
            return read(output.decoded, len(output.exit_depth))

        return placed
    require(scores is None, "scores", "be left out for a model with a final head", repr(scores))
    return lambda output: output.logits
