"""What a wrapped model returns."""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from tokenexit.cost import Cost
from tokenexit_jax.pytrees import register

__all__ = ["Output"]


@dataclass(frozen=True)
class Output:
    """What a wrapped model returns. A pytree: its arrays all have the images first, and the other fields are static.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
            Logits, or for mask heads the logarithm of presence times mask.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        capacity_per_block: How many entries each block worked on for each image, with a token or without; 0 if it did
            not run. What is more than `tokens_per_block` was wasted.
        overflow: How many tokens of each image left only because the greatest capacity had no room for them.
        exits: The blocks with an exit head that the plan asks; of a finished batch it reads nothing.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
    """

    logits: Float[Array, "images grid_height grid_width classes"]
    exit_depth: Int[Array, "images grid_height grid_width"]
    tokens_per_block: Int[Array, "images blocks"]
    capacity_per_block: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]

    def upsample(self, size: tuple[int, int]) -> Float[Array, "images height width classes"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Args:
            size: Height and width, in pixels, neither less than the grid's.

        Returns:
            The interpolated logits.
        """
        images, _, _, classes = self.logits.shape
        return jax.image.resize(self.logits, (images, *size, classes), "bilinear")

    def multiply_adds(self, cost: Cost, /) -> Int[np.ndarray, "images"]:
        """Multiply-adds that the call stands for, heads and patch embedding included: of tokens, not of empty entries.

        Args:
            cost: What the parts cost: `ExitingModel.cost`.

        Returns:
            Multiply-adds per image, on the host.

        Raises:
            TokenExitError: If the cost is of another network.
        """
        height, width = self.exit_depth.shape[1:]
        ran = np.asarray(self.tokens_per_block)
        return cost.multiply_adds(ran, patches=height * width, exits=self.exits, head_on=self.head_on)


_ARRAYS = ("logits", "exit_depth", "tokens_per_block", "capacity_per_block", "overflow")
register(Output, leaves=_ARRAYS)
