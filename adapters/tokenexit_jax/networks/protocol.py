"""A vision transformer of pure functions, seen as the parts between which tokens can leave.

Nothing here holds a weight. A network is static: it is part of what is compiled, and parameters are handed to it. So
make it once, and not anew for every call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jax import Array
from jaxtyping import Float, Shaped

from tokenexit.adapting import require_takes
from tokenexit.area import Area
from tokenexit.errors import require
from tokenexit_jax.pytrees import register

__all__ = ["Embedded", "Network"]  # the names of types are offered by the package

Params = Any
"""The parameters of a network: a pytree of the user's own."""

Heads = dict[str, Any]
"""Weights of heads: `{"exit_heads": {"6": {...}, ...}, "head": {...}}`, the latter if the final head was built too."""

Block = Callable[
    [Params, Float[Array, "images entries width"], Float[Array, "images entries"], Any],
    Float[Array, "images entries width"],
]
"""One block: `block(params, tokens, counts, positions)` gives the tokens after it.

`counts`, `(images, entries)` in float32, is as how many keys each entry counts in attention: 0 if it holds no token,
1 as a rule, more if it stands for tokens that have left (`tokenexit.cells`). `attend` does so. In every image at least
one is greater than 0. `positions`, `(images, entries, ...)`, is what belongs to each entry's place, or None.
"""


@dataclass(frozen=True)
class Embedded:
    """Images as tokens, ready for the first block. A pytree, of which `tokens` and `positions` are leaves.

    Attributes:
        tokens: The tokens; prefix tokens first, then the patches of the grid, row by row.
        prefix: How many leading tokens are no patches (cls, registers). They never leave.
        grid: Height and width of the patch grid.
        positions: What belongs to each slot and travels with its token to every block (rotary tables), if anything.
        area: The area of the images that the grid covers, `tokenexit.area.Area(covered, image)`; None if it is the
            whole of them, in patches of one size. It is smaller than the images where pixels beyond the last whole
            patch are left out, and larger where images are padded to whole patches.
    """

    tokens: Float[Array, "images slots width"]
    prefix: int
    grid: tuple[int, int]
    positions: Shaped[Array, "slots ..."] | None = None
    area: Area | None = None


register(Embedded, leaves=("tokens", "positions"))


@dataclass(frozen=True)
class Network:
    """The parts of a vision transformer, as pure functions of its parameters.

    Attributes:
        embed: All that happens before the first block: `embed(params, images)` gives `Embedded`.
        blocks: The blocks, in order; see `Block`. All linear layers in them treat each token by itself.
        finish: What follows the last block and works on each token alone, the final norm: `finish(params, tokens)`.
        width: Channels of a token.
    """

    embed: Callable[[Params, Float[Array, "images ..."]], Embedded]
    blocks: tuple[Block, ...]
    finish: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens width"]]
    width: int

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a part is no function of what it is given, `blocks` no tuple of such functions, or
                `width` no whole number from 1 up.
        """
        for name in ("embed", "finish"):
            require(callable(getattr(self, name)), name, "be a function", repr(getattr(self, name)))
        blocks = isinstance(self.blocks, tuple) and len(self.blocks) > 0 and all(map(callable, self.blocks))
        require(blocks, "blocks", "be a tuple of functions, one for each block", repr(self.blocks))
        require_takes("embed", self.embed, "params", "images")
        for index, block in enumerate(self.blocks):
            require_takes(f"blocks[{index}]", block, "params", "tokens", "counts", "positions")
        require_takes("finish", self.finish, "params", "tokens")
        whole = isinstance(self.width, int) and not isinstance(self.width, bool) and self.width >= 1
        require(whole, "width", "be a whole number from 1 up", repr(self.width))

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return len(self.blocks)
