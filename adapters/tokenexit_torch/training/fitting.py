"""Fit exit heads to a frozen network, with or without labels.

The predictions of the final head are the targets, or those of the model's own decoder; labels may be mixed in.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from einops import rearrange
from jaxtyping import Float, Integer
from torch import Tensor
from tqdm import tqdm

from tokenexit.adapting import Progress
from tokenexit.area import Area
from tokenexit.carries import Prediction
from tokenexit.errors import require
from tokenexit.fitting import FitReport, HeldOut, Recipe, fit
from tokenexit.schedule import Schedule, measured
from tokenexit_torch import _files
from tokenexit_torch._images import in_batches
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.decoder import DecodingModel, class_scores, pooled, require_placed
from tokenexit_torch.exits.forward import taps_of
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.heads.reading import head_input
from tokenexit_torch.training._learner import Learner
from tokenexit_torch.training._teacher import Seen, Teacher
from tokenexit_torch.training._through import DecoderLoss
from tokenexit_torch.training.merges import require_again, similarities_over

__all__ = ["FitReport", "HeldOut", "fit_exits"]

Targets = Callable[[Any], Float[Tensor, "images classes height width"]]
Images = Float[Tensor, "_ channels _ _"]
Labels = Integer[Tensor, "_ _ _"]
Value = TypeVar("Value")


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
    decoder_steps: int = 0,
    decoder_images: int = 2,
    decoder_loss: DecoderLoss | None = None,
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

    Translators (`heads.Translator`) are fitted to the last block's tokens, as they are if nothing leaves or merges. The
    loss is the squared error behind the final norm, relative to each channel's variance over the patches fitted to,
    plus the cross-entropy of the final head's scores with the target above; norm and head stay frozen. The variance
    takes one more pass over what is fitted to.

    Under a decoder translators can be fitted through it as well (`decoder_steps`): images run by the model's plan as it
    is, with its merges and its exits, and the loss is the change of the decoder's output beside that of the dense
    network, plus the loss above. It is worth trying where the squared errors of all channels are not what the decoder
    minds.

    Shares of its merges are measured on the way, as by `fit_merges`, but with no token leaving, since the heads of
    exits are still to be fitted: where tokens leave before a merge, retune the model to the plan with shares
    afterwards, and call `fit_merges`.

    Where the model's plan merges tokens, heads are fitted to tokens as they merge before them, in order of depth: those
    that merges by agreement ask before those behind them, each time with a pass over the images.

    What the network predicts for the images is kept according to `cache`, in the dtype of the model. One patch takes
    `exits * width` numbers in that dtype, twice as many for `heads.Neighbourhood`, `width` more where translators are
    fitted, and 4 bytes for each class and 4 more.

    Args:
        model: The wrapped model; its exit heads are changed in place, at the end. It keeps the digests of the images
            (`model.fitted`), so that no certificate comes to rest on images that the heads have seen.
        images: A tensor; or batches, each of them a tensor or a pair of images and labels: classes of pixels, in any
            resolution. They are gone through once, unless `cache` is None.
        targets: For a model with a decoder of its own: turns its output into class scores, logits of any resolution,
            which are averaged to patches as probabilities. If left out, the model's own classes, or what a
            decoder returns, if that is a tensor of as many channels as exit heads have classes.
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
        decoder_steps: Steps after these, through the decoder; for translators, and a plan in which tokens leave. Heads
            that merges ask before others are not among those fitted by them.
        decoder_images: Images of each of them, one batch after the other.
        decoder_loss: Their loss, from the decoder's output and that of the dense network to a tensor without axes. If
            left out: where the model's output has classes the divergence of their probabilities, elsewhere the squared
            error of each tensor relative to its variance.
        patches_per_step: Patches drawn for each step; as many as there are, if these are fewer (of the batch, without a
            cache).
        learning_rate: Of AdamW; falls to zero along a cosine.
        weight_decay: Of AdamW.
        generator: Draws the patches; seeded with 0 if left out.
        progress: Wraps each of the two loops; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The agreement of each head with what it was fitted to, and what translators miss.

    Raises:
        TokenExitError: If the model has no exit heads, or mask heads, which read whole images and not patches drawn
            from many; `targets` are missing for a model without classes, or not wanted; there are no images; labels
            are not classes; `cache` or `resume` hold what is of another model, of other images or options; or a number
            is out of range.
    """
    recipe = Recipe(
        steps, patches_per_step, learning_rate, weight_decay, held_out, check_every, patience,
        decoder_steps=decoder_steps, decoder_images=decoder_images,
    )  # fmt: skip
    require(decoder_loss is None or decoder_steps > 0, "decoder_loss", "be given with `decoder_steps`", decoder_steps)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.inference_mode(False), torch.enable_grad():
        seen, batches, reports = _seen(model, targets), in_batches(images), []
        phases, plan, shown = _phases(model), model.schedule, set[str]()
        if decoder_steps > 0:
            _require_through(model)
        passes = len(phases) + sum(merge.share is not None for merge in plan.merges) + 2 * (decoder_steps > 0)
        require_again(batches, passes)
        similarities = similarities_over(model, batches, shown, progress=progress)

        def staying(part: Schedule) -> Tensor:  # the heads of exits are still to be fitted
            return similarities(replace(part, exits=(), carry=Prediction()))

        with evaluating(model):
            for after in phases:
                plan = measured(plan, staying, until=max(after))
                merges = tuple(merge for merge in plan.merges if merge.after < max(after))
                own, state = cache, resume
                if len(phases) > 1:
                    own = cache / f"after-{max(after)}" if isinstance(cache, Path) else cache
                    state = None if resume is None else Path(resume) / f"after-{max(after)}"
                teacher = Teacher(
                    model,
                    _before_heads(model, seen, after, Schedule(merges=merges, keys=plan.keys)),
                    label_weight=label_weight,
                    ignore=ignore,
                    merges=merges,
                    keys=plan.keys,
                )
                options = {"weight_decay": weight_decay, "after": after, "decoder_loss": decoder_loss}
                learner = Learner(model, generator, **options)
                options = {"cache": own, "resume": state, "store": _files, "progress": progress}
                last = after is phases[-1]
                part = recipe if last else replace(recipe, decoder_steps=0)
                reports.append(fit(learner, batches, teacher, part, **options))
        if plan.merges:
            model.retune(measured(plan, staying))
            model.fitted = tuple(sorted(shown.union(model.fitted)))
        return _together(reports)


def _require_through(model: ExitingModel | DecodingModel) -> None:
    """Raise unless heads can be fitted through a decoder."""
    known = isinstance(model, DecodingModel) and len(model.translated_after) > 0
    require(known, "decoder_steps", "be 0 without translators under a decoder", type(model).__name__)
    rule = "be 0 for a plan in which no token leaves: `retune` the model to the plan that it is to run by"
    require(len(model.schedule.active) > 0, "decoder_steps", rule, repr(model.schedule))
    weights = list(model.parameters())
    wide = all(one.dtype == torch.float32 and not one.is_inference() for one in weights)
    rule = "be 0 for weights in half precision, or made in inference mode: fit a float32 model, and convert it"
    require(wide, "decoder_steps", rule, sorted({str(one.dtype) for one in weights}))


def _phases(model: ExitingModel | DecodingModel) -> list[list[int]]:
    """Heads that are fitted together, in order of depth.

    Where tokens merge by agreement, the head that says what is agreed upon is fitted before those behind it.
    """
    merges, heads = model.schedule.merges, [int(block) for block in model.exit_heads]
    bounds = [merge.after for merge in merges if merge.agreed is not None]
    phases = []
    for low, high in zip([0, *bounds], [*bounds, model.depth], strict=True):
        after = [block for block in heads if low < block <= high]
        phases += [after] if after else []
    return phases


def _before_heads(model: ExitingModel | DecodingModel, seen: Seen, after: Sequence[int], merging: Schedule) -> Seen:
    """What heads read where tokens have merged before them; the targets are those of a pass without merges."""

    def read(images: Tensor) -> tuple[dict[int, Tensor], Tensor, Area | None, tuple[int, int]]:
        exits, scores, area, grid = seen(images)
        last = {model.depth: exits[model.depth]} if model.depth in exits else {}
        if not merging.merges:
            return {block: exits[block] for block in after} | last, scores, area, grid
        tapped, prefix = taps_of(model, images, merging, after)
        heads = {block: model.exit_heads[str(block)] for block in after}
        patches = {block: head_input(head, tapped[block][:, prefix:], grid=grid) for block, head in heads.items()}
        return patches | last, scores, area, grid

    return read


def _together(reports: Sequence[FitReport]) -> FitReport:
    """One report of heads that were fitted one after the other."""
    last = reports[-1]
    held = last.held_out
    if held is not None:
        parts = [report.held_out for report in reports if report.held_out is not None]
        agreement, missed = _union(part.agreement for part in parts), _union(part.missed for part in parts)
        held = replace(held, agreement=agreement, missed=missed)
    return replace(
        last,
        agreement=_union(report.agreement for report in reports),
        steps=sum(report.steps for report in reports),
        stopped_early=any(report.stopped_early for report in reports),
        held_out=held,
        missed=_union(report.missed for report in reports),
    )


def _union(parts: Iterable[dict[int, Value]]) -> dict[int, Value]:
    return {block: value for part in parts for block, value in part.items()}


def _seen(model: ExitingModel | DecodingModel, targets: Targets | None) -> Seen:
    """What the network predicts for images, after a check that its exit heads can be fitted to it."""
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
    """Patches before every exit head of some images, and what the decoder predicts for them."""
    if model.translated_after:  # nothing is asked of the decoder
        require(targets is None, "targets", "be left out for translators, which give no class scores", repr(targets))
        return model.patches_at_taps
    read = class_scores(model, targets, argument="targets")

    def seen(images: Tensor) -> tuple[dict[int, Tensor], Tensor, Area | None, tuple[int, int]]:
        exits, decoded, area, grid = model.patches_and_output(images)
        require_placed(area, targets, "targets")
        scores = read(decoded, len(images))
        patches = rearrange(pooled(scores, grid), "images classes height width -> images (height width) classes")
        return exits, patches, area, grid

    return seen
