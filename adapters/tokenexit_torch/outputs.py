"""What wrapped models return."""

from typing import Literal, NamedTuple

from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

__all__ = ["Output", "StaticOutput"]


class Output(NamedTuple):
    """What a wrapped model returns.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
            Logits, or for mask heads the logarithm of presence times mask.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        exits: The blocks after which an exit head ran.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"]
    exit_depth: Int[Tensor, "images grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Args:
            size: Height and width, in pixels.

        Returns:
            The interpolated logits.
        """
        return upsampled(self.logits, size)


class StaticOutput(NamedTuple):
    """What a static model returns.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        capacity_per_block: How many entries each block worked on for each image, with a token or without. What is more
            than `tokens_per_block` was wasted.
        overflow: How many tokens of each image left only because there was no room for them.
        exits: The blocks after which an exit head ran.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"]
    exit_depth: Int[Tensor, "images grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    capacity_per_block: Int[Tensor, "images blocks"]
    overflow: Int[Tensor, "images"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly.

        Args:
            size: Height and width, in pixels.

        Returns:
            The interpolated logits.
        """
        return upsampled(self.logits, size)


def upsampled(
    logits: Float[Tensor, "images classes grid_height grid_width"], size: tuple[int, int], /
) -> Float[Tensor, "images classes height width"]:
    """Class scores at another size, bilinearly. It is no part of the public API."""
    return functional.interpolate(logits, size, mode="bilinear", align_corners=False)
