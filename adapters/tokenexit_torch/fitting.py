"""Fit exit heads to a frozen network, without labels.

The predictions of the final head are the targets, or those of the model's own decoder.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tokenexit.errors import require
from tokenexit_torch._modules import evaluating
from tokenexit_torch.decoding import DecodingModel, pooled
from tokenexit_torch.running import ExitingModel

__all__ = ["FitReport", "fit_exits"]

Progress = Callable[[Iterable], Iterable]
Targets = Callable[[Any], Float[Tensor, "images classes height width"]]


@dataclass(frozen=True)
class FitReport:
    """How well the exit heads foretell the final head, or the decoder.

    Attributes:
        agreement: Fraction of the patches seen on which the exit head and the final head, or the decoder, predict the
            same class, by the block that the exit head follows.
        patches: How many patches were seen.
    """

    agreement: dict[int, float]
    patches: int


def fit_exits(
    model: ExitingModel | DecodingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    targets: Targets | None = None,
    steps: int = 1200,
    patches_per_step: int = 4096,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    generator: torch.Generator | None = None,
    progress: Progress = tqdm,
) -> FitReport:
    """Fit the exit heads to the predictions of the final head, or of the model's decoder; all else stays frozen.

    Tokens after each block with an exit head are computed once and kept in memory, in the dtype of the model:
    `images * patches * width` numbers for every exit. Patches with a NaN or an infinity are left out.

    Args:
        model: The wrapped model; its exit heads are changed in place.
        images: Images without labels: a tensor, or batches of them.
        targets: For a model with a decoder of its own: turns its output into class scores, logits of any resolution,
            which are averaged to patches as probabilities. The model's own classes if left out.
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
            from many; `targets` are missing for a model without classes, or not wanted; there are no images; or a
            number is out of range.
    """
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    require(len(model.exit_heads) > 0, "model", "have exit heads", "none")
    rule = "have heads that treat each token by itself: `mask_loss` trains those that read whole images"
    require(not model.gives_masks, "model", rule, "mask heads")
    seen = _of_decoder(model, targets) if isinstance(model, DecodingModel) else _of_head(model, targets)
    require(steps >= 1, "steps", "be at least 1", steps)
    require(patches_per_step >= 2, "patches_per_step", "be at least 2", patches_per_step)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batches = images.split(8) if isinstance(images, Tensor) else images
    with torch.inference_mode(False), torch.enable_grad():
        features, target = _trace(model, seen, batches, progress)
        # Copies in float32: half precision cannot hold the steps, and an interrupt leaves the model as it was.
        heads = {int(after): copy.deepcopy(head).float().requires_grad_() for after, head in model.exit_heads.items()}
        optimizer = torch.optim.AdamW(
            [parameter for head in heads.values() for parameter in head.train().parameters()],
            lr=learning_rate,
            weight_decay=weight_decay,
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in progress(range(steps)):
            drawn = torch.randint(
                target.shape[0], (patches_per_step,), generator=generator, device=generator.device
            ).to(target.device)
            wish = target[drawn].softmax(dim=-1)
            losses = [
                functional.cross_entropy(head(features[after][drawn].float()), wish) for after, head in heads.items()
            ]
            optimizer.zero_grad()
            torch.stack(losses).sum().backward()
            optimizer.step()
            scheduler.step()
    with torch.no_grad():
        for after, head in heads.items():
            model.exit_heads[str(after)].load_state_dict(head.state_dict())
    return FitReport(_agreement(model.exit_heads, features, target), target.shape[0])


_Seen = Callable[[Tensor], tuple[dict[int, Tensor], Tensor]]


def _of_head(model: ExitingModel, targets: Targets | None) -> _Seen:
    """Patches before every exit head of some images, and what the final head says of them."""
    require(targets is None, "targets", "be left out for a model with a final head", repr(targets))

    def seen(images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        *exits, (_, finished) = model.patches_after(images).items()
        return dict(exits), model.head(finished)

    return seen


def _of_decoder(model: DecodingModel, targets: Targets | None) -> _Seen:
    """Patches before every exit head of some images, and what the decoder says of them."""
    rule = "be given for a model whose output has no classes: a function from it to class scores"
    require(targets is not None or model.host.classes is not None, "targets", rule, "None")
    scores_of = model.host.class_scores if targets is None else targets

    def seen(images: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        exits, decoded, grid = model.patches_and_output(images)
        scores = scores_of(decoded)
        fits = isinstance(scores, Tensor) and scores.ndim == 4 and scores.shape[:2] == (len(images), model.classes)
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        rule = f"give class scores of shape ({len(images)}, {model.classes}, height, width)"
        require(fits, "targets", rule, got)
        return exits, rearrange(pooled(scores, grid), "images classes height width -> images (height width) classes")

    return seen


@torch.no_grad()
def _trace(
    model: nn.Module, seen: _Seen, batches: Iterable[Tensor], progress: Progress
) -> tuple[dict[int, Tensor], Tensor]:
    """Patches after each block with an exit head, `(patches, width)`, and logits to meet, `(patches, classes)`."""
    features: dict[int, list[Tensor]] = {}
    target = []
    with evaluating(model):
        for images in progress(batches):
            exits, wish = seen(images)
            for after, patches in exits.items():
                rows = rearrange(patches, "images patches width -> (images patches) width")
                features.setdefault(after, []).append(rows)
            target.append(rearrange(wish, "images patches classes -> (images patches) classes").float())
    require(sum(map(len, target)) > 0, "images", "hold at least one image", "none")
    rows = {after: torch.cat(parts) for after, parts in features.items()}
    wanted = torch.cat(target)
    finite = torch.stack([part.isfinite().all(dim=1) for part in (wanted, *rows.values())]).all(dim=0)
    require(bool(finite.any()), "images", "give finite tokens", "NaN or infinity for every patch")
    return {after: part[finite] for after, part in rows.items()}, wanted[finite]


@torch.no_grad()
def _agreement(heads: nn.ModuleDict, features: dict[int, Tensor], target: Tensor) -> dict[int, float]:
    final = target.argmax(dim=-1)
    agreement = {}
    for after, head in heads.items():
        with evaluating(head):
            parts = [head(part).argmax(dim=-1) for part in features[int(after)].split(65536)]
        agreement[int(after)] = (torch.cat(parts) == final).float().mean().item()
    return agreement
