"""What each exit got wrong: tokens that left, beside what the dense network and the labels say of them."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch
from einops import reduce
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.nn import functional

import tokenexit_torch as tet
from examples import shell
from examples.camvid import data
from tokenexit import schedule


class Outcome(IntEnum):
    """What a token's class is worth, beside the dense network's and the label."""

    AS_DENSE = 0
    """As dense says, and not wrong: right, or without a label."""
    BOTH_WRONG = 1
    """As dense says, and wrong."""
    LOST = 2
    """Wrong where dense is right."""
    GAINED = 3
    """Right where dense is wrong."""
    OTHER = 4
    """Not as dense says, and neither is right: both are wrong, or there is no label."""


@dataclass(frozen=True)
class Tokens:
    """The class of each patch.

    Attributes:
        exiting: From the head at which it left, or the final one.
        dense: From the dense network.
        truth: Most of its pixels' labels; `data.IGNORE` where most have none.
        depth: After how many blocks it left.
    """

    exiting: Int[Tensor, "images height width"]
    dense: Int[Tensor, "images height width"]
    truth: Int[Tensor, "images height width"]
    depth: Int[Tensor, "images height width"]

    @property
    def outcome(self) -> Int[Tensor, "images height width"]:
        """The `Outcome` of each patch, whether it left or not."""
        differs, right = self.exiting != self.dense, self.exiting == self.truth
        found = torch.full_like(self.exiting, Outcome.AS_DENSE)
        found[~differs & ~right & (self.truth != data.IGNORE)] = Outcome.BOTH_WRONG
        found[differs] = Outcome.OTHER
        found[differs & (self.dense == self.truth)] = Outcome.LOST
        found[differs & right] = Outcome.GAINED
        return found


@dataclass(frozen=True)
class Picture:
    """One image, as it is shown.

    Attributes:
        name: Of its frame.
        photo: Colours.
        label: Class of each pixel, or `data.IGNORE`.
        dense: The dense network's.
        exiting: With exits.
        at: Which of the images in `Tokens` it is.
    """

    name: str
    photo: UInt8[np.ndarray, "height width 3"]
    label: Int[Tensor, "height width"]
    dense: Int[Tensor, "height width"]
    exiting: Int[Tensor, "height width"]
    at: int


@dataclass(frozen=True)
class Tally:
    """Tokens that ran through so many blocks and no more.

    Attributes:
        after: The blocks.
        tokens: How many tokens.
        changed: Those with another class than dense.
        lost: Those that are wrong by the labels where dense is right.
        gained: Those that are right where dense is wrong.
    """

    after: int
    tokens: int
    changed: int
    lost: int
    gained: int


def tally(tokens: Tokens, /, after: Sequence[int]) -> tuple[Tally, ...]:
    """Count by the block after which tokens left; the last of `after` is the network's depth, for those that never did.

    Args:
        tokens: Of all images.
        after: The blocks.
    """
    outcome = tokens.outcome
    counts = [torch.bincount(outcome[tokens.depth == block], minlength=len(Outcome)).tolist() for block in after]
    return tuple(
        Tally(block, sum(count), sum(count[Outcome.LOST :]), count[Outcome.LOST], count[Outcome.GAINED])
        for block, count in zip(after, counts, strict=True)
    )


def majority(
    label: Int[Tensor, "images height width"], /, grid: tuple[int, int]
) -> Int[Tensor, "images grid_height grid_width"]:
    """The most frequent label of each patch, that of pixels without a class included; the lowest of several."""
    height, width = grid
    ones = functional.one_hot(label, data.IGNORE + 1)
    return reduce(ones, "b (h p) (w q) c -> b h w c", "sum", h=height, w=width).argmax(-1)


@torch.inference_mode()
def look(
    model: tet.ExitingModel,
    plan: schedule.Schedule,
    batches: data.Batches,
    shown: Collection[int],
    device: torch.device,
) -> tuple[Tokens, tuple[Picture, ...]]:
    """Run a plan and the dense network over a split.

    Args:
        model: The network with its exit heads.
        plan: When tokens leave.
        batches: The split.
        shown: Which of its images to keep whole.
        device: Where the model is.

    Returns:
        The tokens of all images, and the images to show.
    """
    parts, pictures, start = [], [], 0
    for images, labels in shell.progress(batches, desc="dense and with exits"):
        outs = [model(images.to(device), schedule=one) for one in (schedule.dense(), plan)]
        of_dense, of_exits = (out.logits.argmax(1).cpu() for out in outs)
        grid = (of_dense.shape[1], of_dense.shape[2])
        parts.append((of_exits, of_dense, majority(labels, grid), outs[1].exit_depth.cpu()))
        here = [at for at in range(start, start + len(images)) if at in shown]
        whole = [out.upsample(data.SIZE).argmax(1).cpu() for out in outs] if here else []
        for at in here:
            frame = batches.frames[at]
            photo = np.asarray(data.read(frame)[0])[data.ROWS]
            full = (classes[at - start] for classes in whole)
            pictures.append(Picture(frame.image.stem, photo, labels[at - start], *full, at=at))
        start += len(images)
    return Tokens(*map(torch.cat, zip(*parts, strict=True))), tuple(pictures)
