"""What a run has cost: multiply-adds, from the tokens that really ran through each block.

One multiply-add counts as one. Linear and convolution layers and the two products of attention count; norms,
activations and biases do not. Heads and the patch embedding are included, everything that exits cost as well.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from jaxtyping import Int

from tokenexit._array import Array, array_namespace
from tokenexit.errors import require

__all__ = ["Cost", "token_blocks"]


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of the parts of a vision transformer.

    Attributes:
        embed: Patch embedding, per patch.
        blocks: Linear layers of each block, per token.
        width: Channels; attention adds `2 * tokens * width` per token, for tokens of the same image.
        prefix: Tokens per image that are not patches; heads are not counted for them.
        exit_heads: Exit heads by the block they follow, per patch.
        head: Final head, per patch.
    """

    embed: int
    blocks: tuple[int, ...]
    width: int
    prefix: int
    exit_heads: Mapping[int, int]
    head: int

    def multiply_adds(
        self, tokens_per_block: Int[Array, "images blocks"], /, *, patches: int, exits: Collection[int] = ()
    ) -> Int[Array, "images"]:
        """Multiply-adds executed for each image.

        Args:
            tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
            patches: Patches of an image.
            exits: Blocks after which an exit head ran.

        Returns:
            Multiply-adds per image, int64.

        Raises:
            TokenExitError: If the blocks are not those of this cost, or an exit has no head.
        """
        require(
            tokens_per_block.ndim == 2 and tokens_per_block.shape[1] == len(self.blocks),
            "tokens_per_block",
            f"have shape (images, {len(self.blocks)})",
            f"shape {tuple(tokens_per_block.shape)}",
        )
        unknown = sorted(set(exits) - set(self.exit_heads))
        require(not unknown, "exits", f"be among the blocks with an exit head, {sorted(self.exit_heads)}", unknown)
        xp = array_namespace(tokens_per_block)
        tokens = xp.astype(tokens_per_block, xp.int64)
        total = xp.full_like(tokens[:, 0], patches * self.embed)
        for block, linear in enumerate(self.blocks):
            ran = tokens[:, block]
            total = total + ran * linear + 2 * self.width * ran * ran
        heads = {after: self.exit_heads[after] for after in exits} | {len(self.blocks): self.head}
        for after, head in heads.items():
            ran = tokens[:, after - 1] - self.prefix
            total = total + head * xp.where(ran > 0, ran, xp.zeros_like(ran))
        return total


def token_blocks(tokens_per_block: Int[Array, "images blocks"], /, *, slots: int) -> float:
    """Tokens run through blocks, as a fraction of all tokens through all blocks.

    Args:
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        slots: Tokens of an image, prefix tokens included.

    Returns:
        1 for the dense network, less if tokens left.

    Raises:
        TokenExitError: If there is no image, block or slot.
    """
    images, blocks = tokens_per_block.shape
    require(
        images * blocks * slots > 0,
        "tokens_per_block",
        "have at least one image, block and slot",
        f"shape {(images, blocks)} with slots={slots}",
    )
    xp = array_namespace(tokens_per_block)
    return int(xp.sum(tokens_per_block)) / (images * blocks * slots)
