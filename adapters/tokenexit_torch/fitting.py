"""Fit exit heads to a frozen network, without labels.

The final head's predictions are the targets.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tokenexit.errors import require
from tokenexit_torch._modules import evaluating
from tokenexit_torch.running import ExitingModel

__all__ = ["FitReport", "fit_exits"]

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True)
class FitReport:
    """How well the exit heads foretell the final head.

    Attributes:
        agreement: Fraction of the patches seen on which the exit head and the final head predict the same class, by
            the block that the exit head follows.
        patches: How many patches were seen.
    """

    agreement: dict[int, float]
    patches: int


def fit_exits(
    model: ExitingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    steps: int = 1200,
    patches_per_step: int = 4096,
    learning_rate: float = 2e-3,
    weight_decay: float = 0.01,
    generator: torch.Generator | None = None,
    progress: Progress = tqdm,
) -> FitReport:
    """Fit the exit heads to the final head's predictions; everything else stays frozen.

    Tokens after each block with an exit head are computed once and kept in memory, in the dtype of the model:
    `images * patches * width` numbers for every exit. Patches with a NaN or an infinity are left out.

    Args:
        model: The wrapped model; its exit heads are changed in place.
        images: Images without labels: a tensor, or batches of them.
        steps: Optimiser steps, shared by all heads.
        patches_per_step: Patches drawn for each step.
        learning_rate: Of AdamW; falls to zero along a cosine.
        weight_decay: Of AdamW.
        generator: Draws the patches; seeded with 0 if left out.
        progress: Wraps each of the two loops; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The agreement of each head with the final head.

    Raises:
        TokenExitError: If the model has no exit heads, or mask heads, which read whole images and not patches drawn
            from many; there are no images; or a number is out of range.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
    require(len(model.exit_heads) > 0, "model", "have exit heads", "none")
    rule = "have heads that treat each token by itself: `mask_loss` trains those that read whole images"
    require(not model.gives_masks, "model", rule, "mask heads")
    require(steps >= 1, "steps", "be at least 1", steps)
    require(patches_per_step >= 2, "patches_per_step", "be at least 2", patches_per_step)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    batches = images.split(8) if isinstance(images, Tensor) else images
    with torch.inference_mode(False), torch.enable_grad():
        features, target = _trace(model, batches, progress)
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


@torch.no_grad()
def _trace(model: ExitingModel, batches: Iterable[Tensor], progress: Progress) -> tuple[dict[int, Tensor], Tensor]:
    """Patches after each block with an exit head, `(patches, width)`, and the final logits, `(patches, classes)`."""
    features: dict[int, list[Tensor]] = {int(after): [] for after in model.exit_heads}
    target = []
    with evaluating(model):
        for images in progress(batches):
            *exits, (_, finished) = model.patches_after(images).items()
            for after, patches in exits:
                features[after].append(rearrange(patches, "images patches width -> (images patches) width"))
            target.append(rearrange(model.head(finished), "images patches classes -> (images patches) classes").float())
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
