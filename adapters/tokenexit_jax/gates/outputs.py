"""Output of models with gates."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from tokenexit import TokenExitError
from tokenexit.area import Area
from tokenexit.cost import Cost
from tokenexit_jax._given import require_size
from tokenexit_jax.exits.outputs import require_cost, upsampled
from tokenexit_jax.pytrees import register

__all__ = ["GatedOutput"]


@dataclass(frozen=True)
class GatedOutput:
    """Output of a model with gates. A pytree: its arrays all have the images first, and the other fields are static.

    Attributes:
        logits: Class scores of every patch; None without a head.
        maps: Features of all patches by the blocks that have run, skipped ones as they are: for any decoder. After
            the last block they are finished, by the final norm.
        keep: Which patches each gate keeps.
        probability: Keep probability of every patch at each gate.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        capacity_per_block: How many entries each block worked on for each image, with a token that ran or without; 0 if
            it did not run. What is more than `tokens_per_block` was wasted.
        overflow: How many tokens of each image were skipped, at any of the gates, only because the greatest capacity
            had no room for them.
        gates: After how many blocks these gates stood.
        keys: Key set of active tokens: active tokens only, or all.
        area: The area of the images that the grid covers; None if it is the whole of them.
    """

    logits: Float[Array, "images grid_height grid_width classes"] | None
    maps: dict[int, Float[Array, "images grid_height grid_width width"]]
    keep: Bool[Array, "images gates grid_height grid_width"]
    probability: Float[Array, "images gates grid_height grid_width"]
    tokens_per_block: Int[Array, "images blocks"]
    capacity_per_block: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    gates: tuple[int, ...]
    keys: Literal["running", "all"]
    area: Area | None = None

    def upsample(self, size: tuple[int, int]) -> Float[Array, "images height width classes"]:
        """The logits at another size, bilinearly, as by `Output.upsample`.

        Args:
            size: Height and width at which the whole images are shown, in pixels, neither less than the grid's.

        Returns:
            The interpolated logits.

        Raises:
            TokenExitError: If there are none, for the model has no head, or `size` is no height and width.
        """
        if self.logits is None:
            raise TokenExitError("`head` must be given to `wrap_gates` for logits, got None")
        require_size(size)
        return upsampled(self.logits, size, self.area)

    def multiply_adds(self, cost: Cost, /) -> Int[np.ndarray, "images"]:
        """Multiply-adds that the call stands for, gates, head and patch embedding included; no decoder of yours.

        They are of tokens, not of empty entries, and the same as PyTorch's: where all tokens are keys, skipped ones are
        counted with three matrices of the channels squared, and as keys in attention, though here they have run through
        the whole block. `capacity_per_block` is what was run.

        Args:
            cost: What the parts cost: `GatedModel.cost`.

        Returns:
            Multiply-adds per image, on the host.

        Raises:
            TokenExitError: If the cost is of another network.
        """
        require_cost(cost)
        height, across = self.keep.shape[2:]
        ran, patches = np.asarray(self.tokens_per_block).astype(np.int64), height * across
        gates = [cost.exit_heads[after] for after in self.gates]
        return cost.gated(ran, patches=patches, slots=cost.prefix + patches, gates=gates, keys=self.keys)


_GATED = ("logits", "maps", "keep", "probability", "tokens_per_block", "capacity_per_block", "overflow")
register(GatedOutput, leaves=_GATED)
