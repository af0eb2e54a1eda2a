"""Fit exit heads to a frozen network, with or without labels.

The predictions of the final head are the targets, or those of the model's own decoder; labels may have a say in them.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor, nn
from tqdm import tqdm

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit_torch._files import fingerprint
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.decoder import DecodingModel, class_scores, pooled, require_placed
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.training._features import FINAL, TARGET, Material, Rows, Seen, Teacher, gathered
from tokenexit_torch.training._fit import Fit, Recipe

__all__ = ["FitReport", "HeldOut", "fit_exits"]

Progress = Callable[[Iterable], Iterable]
Targets = Callable[[Any], Float[Tensor, "images classes height width"]]
Images = Float[Tensor, "_ channels _ _"]
Labels = Integer[Tensor, "_ _ _"]

_STATE = "fit.safetensors"


@dataclass(frozen=True)
class HeldOut:
    """How well the exit heads do on images that they were not fitted to.

    Attributes:
        agreement: Fraction of their patches on which the exit head and the final head, or the decoder, predict the
            same class, by the block that the exit head follows.
        patches: How many patches these are.
        images: Of how many images.
    """

    agreement: dict[int, float]
    patches: int
    images: int


@dataclass(frozen=True)
class FitReport:
    """How well the exit heads foretell the final head, or the decoder; `str(report)` says it in words.

    Attributes:
        agreement: Fraction of the patches fitted to on which the exit head and the final head, or the decoder, predict
            the same class, by the block that the exit head follows.
        patches: How many patches these are.
        images: Of how many images.
        steps: How many steps were taken.
        kept_step: After which of them the heads were as they now are: the last, unless images were held out.
        stopped_early: Whether the held-out loss ended the fit before its last step.
        held_out: The same for images held out; None if there were none.
    """

    agreement: dict[int, float]
    patches: int
    images: int
    steps: int
    kept_step: int
    stopped_early: bool
    held_out: HeldOut | None

    def __str__(self) -> str:
        stopped = ", stopped early" if self.stopped_early else ""
        lines = [
            f"Fitted to {self.patches} patches of {self.images} images; held out: "
            + ("none." if self.held_out is None else f"{self.held_out.patches} patches of {self.held_out.images}."),
            f"{self.steps} steps{stopped}; the heads are those after step {self.kept_step}.",
            "They predict what the final head, or the decoder, predicts:",
        ]
        for after, agreement in self.agreement.items():
            held = "" if self.held_out is None else f", {self.held_out.agreement[after]:.1%} of those held out"
            lines.append(f"  after block {after}: on {agreement:.1%} of the patches fitted{held}")
        return "\n".join(lines)


def fit_exits(
    model: ExitingModel | DecodingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Images | tuple[Images, Labels] | list[Tensor]],
    /,
    *,
    targets: Targets | None = None,
    label_weight: float = 0.5,
    ignore: int = -100,
    held_out: float = 0.0,
    check_every: int = 50,
    patience: int = 5,
    cache: Literal["memory"] | Path | None = "memory",
    resume: str | Path | None = None,
    steps: int = 1200,
    patches_per_step: int = 4096,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    generator: torch.Generator | None = None,
    progress: Progress = tqdm,
) -> FitReport:
    """Fit the exit heads to the predictions of the final head, or of the model's decoder; all else stays frozen.

    A patch's target is what the final head gives for it, as probabilities. With labels it is
    `(1 - w) * probabilities + w * shares`: `shares` of the classes among the labelled pixels of the patch, and
    `w = label_weight * the share of its pixels that have a label`. Patches with a NaN or an infinity are left out.

    What the network says of the images is kept where `cache` says, in the dtype of the model. One patch takes
    `exits * width` numbers in that dtype, twice as many for `heads.Neighbourhood`, and 4 bytes for each class and 4
    more.

    Args:
        model: The wrapped model; its exit heads are changed in place, at the end. It keeps the digests of the images
            (`model.fitted`), so that no certificate comes to rest on images that the heads have seen.
        images: A tensor; or batches, each of them a tensor or a pair of images and labels: classes of pixels, in any
            resolution. They are gone through once, unless `cache` is None.
        targets: For a model with a decoder of its own: turns its output into class scores, logits of any resolution,
            which are averaged to patches as probabilities. The model's own classes if left out.
        label_weight: What labels weigh in the targets, between 0 and 1. It does nothing without labels.
        ignore: Label of pixels that do not count.
        held_out: Share of the images, the last ones, that heads are not fitted to: at least one, unless it is 0. With
            it, the weights that have the lowest mean loss on these images are kept, and the fit may stop early.
        check_every: After how many steps the loss on images held out is looked at, and `resume` written.
        patience: How many checks in a row without a lower loss end the fit.
        cache: `"memory"`: on the device of the model. A folder: one file for every batch, written once, then read where
            a step needs it; a later call with the same model and batches reads instead of running the network. None:
            nowhere; every step runs the network on the next batch and draws patches of that one, so that `images` are
            gone through again and again, and must be the same batches in the same order. Images held out are in memory
            then.
        resume: Folder in which an interrupted fit is found, if the same call is made again; it ends with the same
            weights and report, on a CPU to the last bit. `fit.safetensors` is written there at checks and on an
            interrupt, and removed at the end. Another `targets` function is not noticed, and the random numbers of
            heads with dropout are not kept.
        steps: Optimiser steps, shared by all heads.
        patches_per_step: Patches drawn for each step.
        learning_rate: Of AdamW; falls to zero along a cosine.
        weight_decay: Of AdamW.
        generator: Draws the patches; seeded with 0 if left out.
        progress: Wraps each of the two loops; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The agreement of each head with what it was fitted to.

    Raises:
        TokenExitError: If the model has no exit heads, or mask heads, which read whole images and not patches drawn
            from many; `targets` are missing for a model without classes, or not wanted; there are no images; labels
            are not classes; `cache` or `resume` hold what is of another model, of other images or options; or a number
            is out of range.
    """
    seen = _seen(model, targets)
    recipe = Recipe(steps, patches_per_step, learning_rate, weight_decay, held_out, check_every, patience)
    _require_in_range(recipe, label_weight)
    require(callable(progress), "progress", "be a function around a loop, as `tqdm` or `iter`", repr(progress))
    known = cache in ("memory", None) or isinstance(cache, Path)
    require(known, "cache", 'be "memory", a pathlib.Path or None', repr(cache))
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.inference_mode(False), torch.enable_grad():
        teacher = Teacher(model, seen, label_weight=label_weight, ignore=ignore)
        material = gathered(images, teacher, cache=cache, held_out=held_out, progress=progress)
        fit = Fit(model.exit_heads, recipe, generator)
        file = None if resume is None else Path(resume) / _STATE
        marks = {} if file is None else _marks(fit, model.exit_heads, teacher, material, streamed=cache is None)
        if file is not None:
            _go_on(fit, file, marks)
        _run(fit, material, file, marks, progress)
    weights, kept_step = fit.kept
    model.exit_heads.load_state_dict(weights)
    model.fitted = tuple(sorted(material.digests.union(model.fitted)))
    report = _report(model.exit_heads, material, fit.step, kept_step, stopped_early=fit.step < steps)
    if file is not None:
        with suppress(OSError):  # a later call goes on from the last step, to the same end
            file.unlink(missing_ok=True)
    return report


def _seen(model: ExitingModel | DecodingModel, targets: Targets | None) -> Seen:
    """What the network says of images, after a check that its exit heads can be fitted to it."""
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    require(len(model.exit_heads) > 0, "model", "have exit heads", "none")
    rule = "have heads that give no masks: `mask_loss` trains those that read whole images"
    require(not model.gives_masks, "model", rule, "mask heads")
    if isinstance(model, DecodingModel):
        return _of_decoder(model, targets)
    require(targets is None, "targets", "be left out for a model with a final head", repr(targets))
    return model.patches_and_output


def _of_decoder(model: DecodingModel, targets: Targets | None) -> Seen:
    """Patches before every exit head of some images, and what the decoder says of them."""
    read = class_scores(model, targets, argument="targets")

    def seen(images: Tensor) -> tuple[dict[int, Tensor], Tensor, Area | None, tuple[int, int]]:
        exits, decoded, area, grid = model.patches_and_output(images)
        require_placed(area, targets, "targets")
        scores = read(decoded, len(images))
        patches = rearrange(pooled(scores, grid), "images classes height width -> images (height width) classes")
        return exits, patches, area, grid

    return seen


def _require_in_range(recipe: Recipe, label_weight: float) -> None:
    for name, least in (("steps", 1), ("patches_per_step", 2), ("check_every", 1), ("patience", 1)):
        value = getattr(recipe, name)
        require(is_whole(value, least=least), name, f"be at least {least}", value)
    require(0 <= recipe.held_out < 1, "held_out", "be at least 0 and less than 1", recipe.held_out)
    require(0 <= label_weight <= 1, "label_weight", "be between 0 and 1", label_weight)


def _marks(fit: Fit, heads: nn.ModuleDict, teacher: Teacher, material: Material, *, streamed: bool) -> dict[str, str]:
    """What the result of a fit depends on, by name, before its first step."""
    shapes = repr([(name, tuple(value.shape)) for name, value in heads.state_dict().items()])
    return (
        teacher.marks
        | {name: str(value) for name, value in dataclasses.asdict(fit.recipe).items()}
        | {"images": material.fingerprint, "heads": hashlib.sha256(shapes.encode()).hexdigest()}
        | {"generator": fingerprint([fit.generator.get_state()]), "cache": "None" if streamed else "kept"}
    )


def _go_on(fit: Fit, file: Path, marks: dict[str, str]) -> None:
    """Be where the same call was interrupted, if it was."""
    if not file.exists():
        return
    try:
        fit.go_on(file, marks)
    except TokenExitError:
        if file.exists():
            raise
        # Another process, with the same call, has come to its end meanwhile.


def _run(fit: Fit, material: Material, file: Path | None, marks: dict[str, str], progress: Progress) -> None:
    """Fit until the last step or until it is stopped, and write where it is from time to time."""

    def write() -> None:
        if file is not None:
            fit.write(file, marks)

    recipe, whole = fit.recipe, True
    draws = material.fitted.draws(recipe.patches_per_step, fit.generator, fit.step)
    try:
        for _ in progress(range(fit.step, recipe.steps)):
            if fit.stopped:
                break
            whole = False
            fit.learn(next(draws))
            if fit.due and material.held_out is not None:
                fit.check(material.held_out)
            whole = True
            if fit.due:
                write()
    except (KeyboardInterrupt, SystemExit):
        if whole:  # an interrupt within a step leaves what the last check has written
            write()
        raise


def _report(heads: nn.ModuleDict, material: Material, steps: int, kept_step: int, *, stopped_early: bool) -> FitReport:
    fitted, held = material.images
    agreement, patches = _agreement(heads, material.fitted.chunks())
    held_out = None if material.held_out is None else HeldOut(*_agreement(heads, material.held_out.chunks()), held)
    return FitReport(agreement, patches, fitted, steps, kept_step, stopped_early, held_out)


@torch.no_grad()
def _agreement(heads: nn.ModuleDict, chunks: Iterable[Rows]) -> tuple[dict[int, float], int]:
    """On which share of the patches each head predicts the class of the final head, and how many there are."""
    right, patches = dict.fromkeys(heads, 0), 0
    device = next(heads.parameters()).device
    with evaluating(heads):
        for rows in chunks:
            patches += len(rows[TARGET])
            for after, head in heads.items():
                right[after] += int((head(rows[after].to(device)).argmax(dim=-1) == rows[FINAL].to(device)).sum())
    require(patches > 0, "images", "give finite tokens", "NaN or infinity for every patch")
    return {int(after): count / patches for after, count in right.items()}, patches
