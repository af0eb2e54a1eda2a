"""Semantic tokens on CamVid (STViT, CVPR 2023): the middle blocks run on few tokens, the last ones on all again."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from examples import runs
from examples.camvid.gated import head_like
from tokenexit import semantic


@dataclass(frozen=True)
class Shrunk:
    """Where semantic tokens take over, and how many.

    Attributes:
        after: Blocks that have run before.
        until: Blocks after which all tokens are there again.
        tokens: Rows and columns of semantic tokens, for 22 x 30 patches.
    """

    after: int = 3
    until: int = 10
    tokens: tuple[int, int] = (6, 8)


VARIANTS = {
    "stvit": Shrunk(),
    "stvit-late": Shrunk(after=4, until=9),
    "stvit-many": Shrunk(tokens=(11, 15)),
}
"""By the name that `--method` takes; 0.52, 0.68 and 0.60 of the dense multiply-adds."""


def new_model(vit: nn.Module, final: nn.Module, variant: Shrunk) -> runs.Segmenter:
    """A network on semantic tokens, whose layers start from the blocks that they replace, and its final head."""
    plan = semantic.stvit(tokens=variant.tokens)
    model = tet.wrap_semantic(vit, plan, after=variant.after, until=variant.until)
    return runs.Segmenter(model, head_like(final))


def loss(
    model: runs.Segmenter,
    teacher: runs.Segmenter | None,
    images: Float[Tensor, "images 3 height width"],
    criterion: Callable[[Tensor | None], Callable[[Tensor], Tensor]],
) -> Float[Tensor, ""]:
    """The loss of a step: class scores, and how far the last map is from that of the network before, both normed.

    Args:
        model: The network.
        teacher: The network as it was before it learned, if it is to be imitated.
        images: The images.
        criterion: From the class scores to imitate, if there are any, to the loss of class scores.
    """
    map = model.model(images).map
    if teacher is None:
        return criterion(None)(model.read(map))
    with torch.no_grad():
        wanted = teacher.dense(images)
        wish = teacher.read(wanted)
    return criterion(wish)(model.read(map)) + functional.mse_loss(_normed(map), _normed(wanted))


def _normed(map: Tensor) -> Tensor:
    return functional.layer_norm(map.movedim(1, -1).float(), map.shape[1:2])
