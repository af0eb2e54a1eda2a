"""What a run takes on one machine: seconds, by how many tokens an image has in each block.

    table = tet.measure_latency(model, images)         # once on each machine; JSON by to_dict
    seconds = table.seconds(output.tokens_per_block, exits=3)

Time does not follow multiply-adds: attention runs at another rate than linear layers, kernels have steps, exit and
merge points take time themselves. A search over many plans (`tokenexit.search`) wants to know it without timing each.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from jaxtyping import Float, Real

from tokenexit._array import Array, array_namespace, like_numbers, searchsorted, take
from tokenexit._plain import is_number, is_whole, require_keys
from tokenexit.errors import require

__all__ = ["Latency"]


@dataclass(frozen=True)
class Latency:
    """Seconds of a network for a batch of some size, on the machine where it was measured.

    Attributes:
        batch: Images of the batch.
        tokens: Numbers of tokens of each image for which a block was measured, ascending.
        block: Seconds that one block takes for the batch at each of them.
        rest: Seconds of all but the blocks: patch embedding, final norm, final head or decoder.
        exit: Seconds of an exit point, its head included.
        merge: Seconds of a merge point by similarity. One by agreement reads a head: count it as an exit as well.
    """

    batch: int
    tokens: tuple[int, ...]
    block: tuple[float, ...]
    rest: float
    exit: float
    merge: float

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `batch` is no whole number from 1 up, `tokens` are not ascending whole numbers from 1 up,
                there is not one time for each, or a time is negative or not finite.
        """
        require(is_whole(self.batch, least=1), "batch", "be a whole number from 1 up", repr(self.batch))
        row = isinstance(self.tokens, tuple) and all(is_whole(count, least=1) for count in self.tokens)
        ascending = row and len(self.tokens) > 0 and list(self.tokens) == sorted(set(self.tokens))
        require(ascending, "tokens", "be an ascending tuple of whole numbers from 1 up", repr(self.tokens))
        one_each = isinstance(self.block, tuple) and len(self.block) == len(self.tokens)
        rule = f"be a tuple of {len(self.tokens)} times, one for each of `tokens`"
        require(one_each, "block", rule, repr(self.block))
        times = {"block": self.block, "rest": (self.rest,), "exit": (self.exit,), "merge": (self.merge,)}
        for name, values in times.items():
            real = all(is_number(value) and 0 <= value < math.inf for value in values)
            require(real, name, "be seconds, from 0 up and finite", repr(values))

    def seconds(
        self, tokens_per_block: Real[Array, "images blocks"], /, *, exits: int = 0, merges: int = 0
    ) -> Float[Array, "images"]:
        """Seconds of each image, as a share of a batch of images like it.

        Between two measured numbers of tokens the time of a block is interpolated; below the least it is in proportion
        to the tokens, and above the largest it goes on as between the last two.

        Args:
            tokens_per_block: Tokens of each image in each block, as outputs have them.
            exits: Exit heads that are read.
            merges: Merge points.

        Returns:
            Seconds, as float32.

        Raises:
            TokenExitError: If `exits` or `merges` is no whole number from 0 up.
        """
        for name, count in (("exits", exits), ("merges", merges)):
            require(is_whole(count), name, "be a whole number from 0 up", repr(count))
        xp, (images, blocks) = array_namespace(tokens_per_block), tokens_per_block.shape
        counts = xp.astype(xp.reshape(tokens_per_block, (images * blocks,)), xp.float32)
        # From nothing on, so that there are two points to go between everywhere.
        known = like_numbers((0.0, *map(float, self.tokens)), counts)
        times = like_numbers((0.0, *self.block), counts)
        after = xp.clip(searchsorted(known, counts), 1, len(self.tokens))
        low, high = take(known, after - 1), take(known, after)
        share = (counts - low) / (high - low)
        found = take(times, after - 1) * (1 - share) + take(times, after) * share
        once = self.rest + exits * self.exit + merges * self.merge
        return (xp.sum(xp.reshape(found, (images, blocks)), axis=1) + once) / self.batch

    def to_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return asdict(self) | {"tokens": list(self.tokens), "block": list(self.block)}

    @staticmethod
    def from_dict(data: Mapping[str, Any], /) -> "Latency":
        """The table that `to_dict` wrote down.

        Args:
            data: What `to_dict` returned, or its like read from a file.

        Returns:
            The same.

        Raises:
            TokenExitError: If a key is missing or unknown, or a value is out of range.
        """
        require_keys(data, "latency", {"batch", "tokens", "block", "rest", "exit", "merge"})
        for name in ("tokens", "block"):
            require(isinstance(data[name], list), name, "be a list", repr(data[name]))
        return Latency(**{**data, "tokens": tuple(data["tokens"]), "block": tuple(data["block"])})
