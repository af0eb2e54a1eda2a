"""Similarities at which tokens merge, measured on images: from the share of the cells that is to merge."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.adapting import Progress
from tokenexit.errors import require
from tokenexit.schedule import Schedule, measured
from tokenexit_torch._files import digest
from tokenexit_torch._images import in_batches, parted
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.forward import similarities_of
from tokenexit_torch.exits.model import ExitingModel

__all__ = ["fit_merges", "require_again", "similarities_over"]


def fit_merges(
    model: ExitingModel | DecodingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Any],
    /,
    *,
    progress: Progress = tqdm,
) -> Schedule:
    """Measure the similarities at which the wanted shares of cells merge, and let the model follow that plan.

    Merge by merge, in order of depth, the network is run up to it under the plan so far, exits included, and the
    similarity is taken that the wanted share of the cells of 2 x 2 exceeds, of those that could merge there, over all
    images. Heads that exits or merges by agreement read must be fitted before. Only similarities are kept, one number
    for each cell.

    Args:
        model: The wrapped model, whose plan has shares (`schedule.Merge`). It keeps the digests of the images
            (`model.fitted`), so that no certificate comes to rest on them.
        images: A tensor; or batches, each of them a tensor or a pair of images and labels, which are not looked at.
            They are gone through once for each share.
        progress: Wraps each loop; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The plan that the model follows now; the same if it had no shares.

    Raises:
        TokenExitError: If the model is not wrapped by `wrap` or `wrap_decoder`, there are no images, they can be gone
            through only once for several shares, or no cell of them could merge.
    """
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    batches, seen = in_batches(images), set[str]()
    require_again(batches, sum(merge.share is not None for merge in model.schedule.merges))
    plan = measured(model.schedule, similarities_over(model, batches, seen, progress=progress))
    model.retune(plan)
    model.fitted = tuple(sorted(seen.union(model.fitted)))
    return plan


def similarities_over(
    model: WithExits[Any], batches: Iterable[Any], seen: set[str], /, *, progress: Progress
) -> Callable[[Schedule], Float[Tensor, "cells"]]:
    """What `schedule.measured` asks for; the digests of the images are added to those that are seen. Not public."""

    @torch.no_grad()
    def measure(plan: Schedule) -> Tensor:
        parts, own = [torch.zeros(0)], plan.merges[-1].after
        with evaluating(model):
            for batch in progress(batches):
                images, _ = parted(batch)
                seen.update(map(digest, images))
                found = similarities_of(model, images, plan)
                parts += [] if found is None else [found[~found.isnan()].cpu()]
        every = torch.cat(parts)
        rule = f"have cells that could merge after block {own}, where a share is wanted"
        require(len(every) > 0, "images", rule, "none")
        return every

    return measure


def require_again(batches: Iterable[Any], passes: int, /) -> None:
    """Raise unless batches can be gone through so often. Not public."""
    rule = "be a tensor, or batches that can be gone through again, for a plan with several shares or agreements"
    require(passes <= 1 or not isinstance(batches, Iterator), "images", rule, type(batches).__name__)
