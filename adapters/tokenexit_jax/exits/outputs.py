"""What a wrapped model returns."""

from dataclasses import dataclass
from typing import Literal

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer
from jaxtyping import Float, Int

from tokenexit.area import Area
from tokenexit.cost import Cost
from tokenexit.errors import require
from tokenexit.summaries import summary
from tokenexit_jax._given import require_size
from tokenexit_jax.pytrees import register

__all__ = ["Output", "require_cost", "upsampled"]


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
        area: The area of the images that the grid covers; None if it is the whole of them.
        merged_size: How many patches ran on as one with every patch, itself among them: 1 where it has not merged.
            None for a plan without merges.
    """

    logits: Float[Array, "images grid_height grid_width classes"]
    exit_depth: Int[Array, "images grid_height grid_width"]
    tokens_per_block: Int[Array, "images blocks"]
    capacity_per_block: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]
    area: Area | None = None
    merged_size: Int[Array, "images grid_height grid_width"] | None = None

    def upsample(self, size: tuple[int, int]) -> Float[Array, "images height width classes"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Pixels beyond the last whole patch, where the network leaves some out, get the logits of the patch beside them.

        Args:
            size: Height and width at which the whole images are shown, in pixels, neither less than the grid's.

        Returns:
            The interpolated logits.

        Raises:
            TokenExitError: If `size` is no height and width.
        """
        require_size(size)
        return upsampled(self.logits, size, self.area)

    def summary(self) -> str:
        """Sentences about the call: after which blocks patches left, how many merged, what share of the work was left.

        They wait for an accelerator, and cannot be traced.
        """
        return summary(self.exit_depth, self.tokens_per_block, merged_size=self.merged_size, overflow=self.overflow)

    def __repr__(self) -> str:
        """The summary; the shape of the logits where numbers are not known, as in a traced program."""
        known = isinstance(self.exit_depth, jax.Array | np.ndarray) and not isinstance(self.exit_depth, Tracer)
        shape = tuple(getattr(self.logits, "shape", ()))
        return f"<{type(self).__name__}: {self.summary() if known else f'logits of shape {shape}'}>"

    def multiply_adds(self, cost: Cost, /) -> Int[np.ndarray, "images"]:
        """Multiply-adds that the call stands for, heads and patch embedding included: of tokens, not of empty entries.

        Args:
            cost: What the parts cost: `ExitingModel.cost`.

        Returns:
            Multiply-adds per image, on the host.

        Raises:
            TokenExitError: If the cost is of another network.
        """
        require_cost(cost)
        height, width = self.exit_depth.shape[1:]
        ran = np.asarray(self.tokens_per_block)
        return cost.multiply_adds(ran, patches=height * width, exits=self.exits, head_on=self.head_on)


_ARRAYS = ("logits", "exit_depth", "tokens_per_block", "capacity_per_block", "overflow", "merged_size")
register(Output, leaves=_ARRAYS)


def require_cost(cost: Cost, /) -> None:
    """Raise a `TokenExitError` unless it is a cost."""
    require(isinstance(cost, Cost), "cost", "be what `model.cost` gives", type(cost).__name__)


def upsampled(
    logits: Array, size: tuple[int, int], area: Area | None, /
) -> Float[Array, "images height width classes"]:
    """Class scores of patches at another size, bilinearly."""
    images, height, width, classes = logits.shape
    shape = (images, *size, classes)
    if area is None:
        return jax.image.resize(logits, shape, "bilinear")
    for axis, pixels in zip((1, 2), area.per_patch((height, width), size), strict=True):
        logits = _between(logits, axis, size[axis - 1], pixels)
    return logits


def _between(logits: Array, axis: int, side: int, pixels: float) -> Array:
    """Scores of pixels along an axis, from the two patches with centres around them; beyond the last, its own."""
    last = logits.shape[axis] - 1
    at = jnp.clip((jnp.arange(side) + 0.5) / pixels - 0.5, 0, last)
    low = jnp.floor(at).astype(jnp.int32)
    first, second = (jnp.take(logits, near, axis=axis) for near in (low, jnp.minimum(low + 1, last)))
    weight = (at - low).astype(logits.dtype).reshape((1, side, 1, 1) if axis == 1 else (1, 1, side, 1))
    return first * (1 - weight) + second * weight
