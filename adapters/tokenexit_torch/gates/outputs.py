"""Output of models with gates."""

from typing import Literal, NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from tokenexit import TokenExitError
from tokenexit.area import Area
from tokenexit_torch.exits.outputs import upsampled

__all__ = ["GatedOutput"]


class GatedOutput(NamedTuple):
    """Output of a model with gates.

    Attributes:
        logits: Class scores of every patch; None without a head.
        maps: Features of all patches by the blocks that have run, skipped ones as they are: for any decoder. After
            the last block they are finished, by the final norm.
        keep: Which patches each gate keeps.
        probability: Keep probability of every patch at each gate.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        gates: After how many blocks these gates stood.
        keys: Key set of active tokens: active tokens only, or all.
        area: The area of the images that the grid covers; None if it is the whole of them.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"] | None
    maps: dict[int, Float[Tensor, "images dim grid_height grid_width"]]
    keep: Bool[Tensor, "images gates grid_height grid_width"]
    probability: Float[Tensor, "images gates grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    gates: tuple[int, ...]
    keys: Literal["running", "all"]
    area: Area | None = None

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly, as by `Output.upsample`.

        Args:
            size: Height and width at which the whole images are shown, in pixels.

        Returns:
            The interpolated logits.

        Raises:
            TokenExitError: If there are none, for the model has no head.
        """
        if self.logits is None:
            raise TokenExitError("`head` must be given to `wrap_gates` for logits, got None")
        return upsampled(self.logits, size, self.area)
