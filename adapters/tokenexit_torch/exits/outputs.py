"""Outputs of models with exits."""

from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from tokenexit.area import Area
from tokenexit.summaries import summary

__all__ = ["DecodedOutput", "Output"]


class Output(NamedTuple):
    """Output of a model with exits.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
            Logits, or for mask heads the logarithm of presence times mask.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        exits: The blocks after which an exit head ran.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
        area: The area of the images that the grid covers; None if it is the whole of them.
        capacity_per_block: In the static layout, how many entries each block worked on for each image, with a token or
            without: what is more than `tokens_per_block` was wasted. None in packed rows.
        overflow: In the static layout, how many entries of each image left, or merged into others, only because there
            was no room for them.
        merges: The blocks after which tokens could merge.
        merged_size: How many patches ran on as one with every patch, itself among them: 1 where it has not merged.
            None for a plan without merges.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"]
    exit_depth: Int[Tensor, "images grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]
    area: Area | None = None
    capacity_per_block: Int[Tensor, "images blocks"] | None = None
    overflow: Int[Tensor, "images"] | None = None
    merges: tuple[int, ...] = ()
    merged_size: Int[Tensor, "images grid_height grid_width"] | None = None

    @property
    def worked_per_block(self) -> Int[Tensor, "images blocks"]:
        """Entries that each block worked on for each image."""
        return self.tokens_per_block if self.capacity_per_block is None else self.capacity_per_block

    def summary(self) -> str:
        """Sentences about the call: after which blocks patches left, how many merged, what share of the work was left.

        They wait for an accelerator.
        """
        return summary(self.exit_depth, self.tokens_per_block, merged_size=self.merged_size, overflow=self.overflow)

    def __repr__(self) -> str:
        """The summary, where it can be known."""
        return f"<{type(self).__name__}: {self.summary()}>" if _known(self.exit_depth) else _listed(self)

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Pixels beyond the last whole patch, where the network leaves some out, get the logits of the patch beside them.

        Args:
            size: Height and width at which the whole images are shown, in pixels.

        Returns:
            The interpolated logits.
        """
        return upsampled(self.logits, size, self.area)


class DecodedOutput(NamedTuple):
    """Output of a model with exits and a decoder of its own.

    Attributes:
        decoded: The model's own output, as its class has it.
        exit_depth: After how many blocks every patch left; `DecodingModel.depth` if it never did.
        tokens_per_block: How many tokens of each image ran through each block before the decoder, prefix tokens
            included.
        exits: The blocks after which an exit head ran.
        area: The area of the images that the grid covers; None if it is the whole of them.
        capacity_per_block: In the static layout, how many entries each block worked on for each image. None in packed
            rows.
        overflow: In the static layout, how many entries of each image left, or merged into others, only because there
            was no room for them.
        merges: The blocks after which tokens could merge.
        merged_size: How many patches ran on as one with every patch, itself among them: 1 where it has not merged.
            None for a plan without merges.
    """

    decoded: Any
    exit_depth: Int[Tensor, "images grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    exits: tuple[int, ...]
    area: Area | None = None
    capacity_per_block: Int[Tensor, "images blocks"] | None = None
    overflow: Int[Tensor, "images"] | None = None
    merges: tuple[int, ...] = ()
    merged_size: Int[Tensor, "images grid_height grid_width"] | None = None

    @property
    def worked_per_block(self) -> Int[Tensor, "images blocks"]:
        """Entries that each block worked on for each image."""
        return self.tokens_per_block if self.capacity_per_block is None else self.capacity_per_block

    def summary(self) -> str:
        """Sentences about the call: after which blocks patches left, how many merged, what share of the work was left.

        They wait for an accelerator.
        """
        return summary(self.exit_depth, self.tokens_per_block, merged_size=self.merged_size, overflow=self.overflow)

    def __repr__(self) -> str:
        """The summary, where it can be known."""
        return f"<{type(self).__name__}: {self.summary()}>" if _known(self.exit_depth) else _listed(self)


def _listed(output: tuple[Any, ...]) -> str:
    return f"{type(output).__name__}{tuple.__repr__(output)}"


def _known(values: Tensor) -> bool:
    """Whether there are numbers: none while a program is traced, or on the meta device."""
    return not values.is_meta and not torch.compiler.is_compiling() and type(values) is Tensor


def upsampled(
    logits: Float[Tensor, "images classes grid_height grid_width"], size: tuple[int, int], area: Area | None, /
) -> Float[Tensor, "images classes height width"]:
    """Class scores at another size, bilinearly. It is no part of the public API.

    Args:
        logits: Class scores of the patches, or of any map over the same area.
        size: Height and width at which the whole images are shown.
        area: The area of the images that the map covers; None if it is the whole of them.
    """
    if area is None:
        return functional.interpolate(logits, size, mode="bilinear", align_corners=False)
    for axis, pixels in zip((2, 3), area.per_patch((logits.shape[2], logits.shape[3]), size), strict=True):
        logits = _between(logits, axis, size[axis - 2], pixels)
    return logits


def _between(logits: Tensor, axis: int, side: int, pixels: float) -> Tensor:
    """Scores of pixels along an axis, from the two patches with centres around them; beyond the last, its own."""
    last = logits.shape[axis] - 1
    at = ((torch.arange(side, device=logits.device) + 0.5) / pixels - 0.5).clamp(0, last)
    low = at.floor().long()
    first, second = (logits.index_select(axis, near) for near in (low, (low + 1).clamp(max=last)))
    weight = (at - low).to(logits.dtype)
    weight = weight[:, None] if axis == 2 else weight
    return first * (1 - weight) + second * weight
