"""Merging of tokens in timm's vision transformers: what tokens that leave early are measured against.

`ToMe` merges the most similar tokens in every block (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023).
`Local` merges windows of alike tokens in an early block, and may merge alike tokens wherever they are in a later one
(Norouzi et al., ALGM: Adaptive Local-then-Global Token Merging, CVPR 2024). Both are written from the rules in the
papers, need no training, and give every patch what the token says that it has become part of. Each image merges by
itself, whatever else is in its batch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet
from tokenexit import TokenExitError
from tokenexit_torch.attention import attending_per_image


@dataclass(frozen=True)
class Row:
    """Tokens of all images in one row, image after image.

    Attributes:
        tokens: The tokens; those of an image in the order of the first tokens that they were.
        size: Of how many tokens each is the mean.
        entry: Which entry of the row the tokens of each image have become part of.
        lengths: Entries of each image.
    """

    tokens: Float[Tensor, "entries width"]
    size: Float[Tensor, "entries"]
    entry: Int64[Tensor, "images slots"]
    lengths: tuple[int, ...]

    @staticmethod
    def of(batch: Float[Tensor, "images slots width"], /) -> "Row":
        """A row in which nothing has merged yet."""
        images, slots, _ = batch.shape
        entry = torch.arange(images * slots, device=batch.device).unflatten(0, (images, slots))
        return Row(batch.flatten(0, 1), batch.new_ones(images * slots), entry, (slots,) * images)


def merged(row: Row, gone: Int[Tensor, "pairs"], into: Int[Tensor, "pairs"], lengths: Sequence[int], /) -> Row:
    """Entries merge into others: each of these becomes the mean of all, weighted by their sizes.

    Args:
        row: The row.
        gone: The entries that merge into others, each once.
        into: Into which, none of which is itself gone.
        lengths: Entries of each image that are left.

    Returns:
        The shorter row, its entries in the order that they had.
    """
    stay = torch.ones_like(row.size, dtype=torch.bool).index_fill_(0, gone, False)
    # Their number is known, so that an accelerator is not waited for.
    kept = torch.nonzero_static(stay, size=sum(lengths)).squeeze(1)
    rank = stay.cumsum(0) - 1
    target = rank.index_select(0, into)
    weight = row.size.index_select(0, gone)
    size = row.size.index_select(0, kept).index_add_(0, target, weight)
    share = weight / size.index_select(0, target)
    # A mean moves towards what joins it: nothing is read or written but the pairs.
    moved = (row.tokens.index_select(0, gone) - row.tokens.index_select(0, into)) * share[:, None]
    tokens = row.tokens.index_select(0, kept).index_add_(0, target, moved)
    found = rank.index_copy_(0, gone, target)
    return Row(tokens, size, found[row.entry], tuple(lengths))


class Pairs(NamedTuple):
    """Tokens of images, each with the other token that it is most like.

    Attributes:
        gone: Which tokens, by their place in the image.
        into: Which other of each.
        similarity: How like the two are.
    """

    gone: Int64[Tensor, "images pairs"]
    into: Int64[Tensor, "images pairs"]
    similarity: Float[Tensor, "images pairs"]


def most_alike(features: Float[Tensor, "images tokens channels"], count: int, /, *, prefix: int) -> Pairs:
    """Bipartite soft matching: of every second patch the nearest among the others, and the nearest of these pairs.

    Args:
        features: What is compared, by its cosine.
        count: How many pairs of each image; no more than a half of its patches.
        prefix: Leading tokens that are no patches, and in no pair.

    Returns:
        The pairs. Tokens that are gone are in one each; others may be in several.
    """
    unit = functional.normalize(features[:, prefix:], dim=-1)
    similarity = unit[:, 1::2] @ unit[:, ::2].mT
    # The nearest of each costs more than how near it is: it is looked for where it is needed.
    best, chosen = similarity.amax(dim=-1).topk(count, dim=-1)
    images = torch.arange(len(unit), device=unit.device)[:, None]
    nearest = similarity[images, chosen].argmax(dim=-1)
    return Pairs(prefix + 1 + 2 * chosen, prefix + 2 * nearest, best)


def alike(
    tokens: Float[Tensor, "images rows columns width"], /, *, side: int
) -> Float[Tensor, "images window_rows window_columns"]:
    """Mean cosine of all pairs of tokens in each window.

    Args:
        tokens: The tokens of a grid; what is left over beside whole windows belongs to none.
        side: Rows and columns of a window.
    """
    rows, columns = (places // side * side for places in tokens.shape[1:3])
    unit = functional.normalize(tokens[:, :rows, :columns], dim=-1)
    pattern = "images (rows down) (columns along) width -> images rows columns (down along) width"
    total = rearrange(unit, pattern, down=side, along=side).sum(dim=3).square().sum(dim=-1)
    number = side * side
    # The square of the sum is all ordered pairs, and each token with itself.
    return (total - number) / (number * (number - 1))


def window_pairs(
    chosen: Bool[Tensor, "images window_rows window_columns"], /, *, side: int, grid: tuple[int, int], prefix: int
) -> tuple[Int64[Tensor, "pairs"], Int64[Tensor, "pairs"]]:
    """Entries of a row of whole images that merge, and into which: those of windows into the first of each.

    Args:
        chosen: Which windows merge.
        side: Rows and columns of a window.
        grid: Rows and columns of the patches.
        prefix: Leading tokens of an image that are no patches.
    """
    image, row, column = chosen.nonzero().unbind(dim=1)
    first = image * (prefix + grid[0] * grid[1]) + prefix + row * side * grid[1] + column * side
    places = torch.arange(side, device=chosen.device)
    offsets = (places[:, None] * grid[1] + places).flatten()[1:]
    return (first[:, None] + offsets).flatten(), first.repeat_interleave(len(offsets))


class Work(NamedTuple):
    """What a block has run on.

    Attributes:
        attention: Tokens of each image in its attention.
        mlp: Tokens of each image in its MLP.
        matching: Multiply-adds of comparing the tokens of each image.
    """

    attention: tuple[int, ...]
    mlp: tuple[int, ...]
    matching: tuple[int, ...]


class Pass(NamedTuple):
    """What a network says of images when their tokens merge.

    Attributes:
        logits: Class scores of patches: those of the tokens that they have become part of.
        blocks: What each block has run on.
        read: Tokens of each image that the head has read.
        maps: What the head says after blocks that are tapped, in the same way.
    """

    logits: Float[Tensor, "images classes rows columns"]
    blocks: tuple[Work, ...]
    read: tuple[int, ...]
    maps: Mapping[int, Float[Tensor, "images classes rows columns"]]

    @property
    def tokens_per_block(self) -> Float[Tensor, "images blocks"]:
        """Tokens of each image in each block, the mean of its two halves."""
        return torch.tensor([[work.attention, work.mlp] for work in self.blocks]).double().mean(dim=1).T


class Network:
    """A vision transformer of timm and its final head, in the halves of its blocks.

    Args:
        host: The vision transformer.
        head: Reads each token by itself.
        taps: After how many blocks it is to be read, besides the end.

    Raises:
        TokenExitError: If it is no `VisionTransformer` of timm with plain blocks.
    """

    def __init__(self, host: tet.Host, head: nn.Module, /, *, taps: Collection[int] = ()) -> None:
        parts = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
        plain = isinstance(host, tet.hosts.TimmViT) and all(
            isinstance(getattr(block, part, None), nn.Module) for block in host.blocks for part in parts
        )
        if not plain:
            raise TokenExitError(f"`host` must be a timm VisionTransformer with plain blocks, got {host.module}")
        self.host, self.head, self.taps = host, head, taps
        self.blocks: Sequence[Any] = host.blocks

    def attended(
        self, block: int, tokens: Float[Tensor, "images tokens width"], /
    ) -> tuple[Float[Tensor, "images tokens width"], Float[Tensor, "images tokens channels"]]:
        """The tokens after the attention of a block, and its keys, in the mean over heads."""
        part = self.blocks[block]
        attention = part.attn
        every = rearrange(
            attention.qkv(part.norm1(tokens)),
            "images tokens (three heads width) -> three images heads tokens width",
            three=3,
            heads=attention.num_heads,
        )
        query, key, value = every.unbind(0)
        key = attention.k_norm(key)
        mixed = functional.scaled_dot_product_attention(attention.q_norm(query), key, value)
        mixed = rearrange(mixed, "images heads tokens width -> images tokens (heads width)")
        return tokens + part.ls1(attention.proj(attention.norm(mixed))), key.mean(dim=1)

    def fed(self, block: int, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """The tokens after the MLP of a block."""
        part = self.blocks[block]
        return tokens + part.ls2(part.mlp(part.norm2(tokens)))

    def read(self, row: Row, embedded: tet.Embedded, /) -> Float[Tensor, "images classes rows columns"]:
        """Class scores of all patches of what a row has become: a head that reads single tokens reads each once."""
        scores = self.head(self.host.finish(row.tokens))[row.entry[:, embedded.prefix :]]
        return rearrange(scores, "i (rows columns) classes -> i classes rows columns", rows=embedded.grid[0])

    def multiply_adds(self, made: Pass, /) -> Int[Tensor, "images"]:
        """Multiply-adds of each image, as `tokenexit.cost` counts them; the products of matching count as well."""
        images, _, rows, columns = made.logits.shape
        vit: Any = self.host.module
        total = torch.full((images,), rows * columns * vit.patch_embed.proj.weight.numel())
        for part, work in zip(self.blocks, made.blocks, strict=True):
            attention, mlp, matching = (torch.tensor(counts) for counts in work)
            total += attention * _products(part.attn) + 2 * self.host.width * attention**2
            total += mlp * _products(part.mlp) + matching
        return total + torch.tensor(made.read) * _products(self.head)


def _products(module: nn.Module) -> int:
    """Multiply-adds of the linear layers inside, for one token."""
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


@dataclass(frozen=True)
class ToMe:
    """Merging of the most similar tokens in every block, between its attention and its MLP.

    Tokens are compared by the cosine of their keys, in the mean over heads; every second may merge into one of the
    others. Prefix tokens stay as they are. Two choices are those under which a network on CamVid lost least: the tokens
    that are left keep their order, where the paper puts what is left of the second tokens first; and in attention each
    counts once, without the paper's proportional attention, which was slower as well.

    Attributes:
        count: How many tokens of each image merge in a block; no more than a half of its patches.
    """

    count: int

    def __call__(self, network: Network, images: Float[Tensor, "images channels height width"], /) -> Pass:
        """Class scores of images."""
        embedded = network.host.embed(images)
        row, ran, maps = Row.of(embedded.tokens), [], {}
        for block in range(len(network.blocks)):
            before = row.lengths
            batch, keys = network.attended(block, row.tokens.unflatten(0, (len(images), -1)))
            patches = batch.shape[1] - embedded.prefix
            count = min(self.count, patches // 2)
            row = replace(row, tokens=batch.flatten(0, 1))
            if count:
                pairs = most_alike(keys, count, prefix=embedded.prefix)
                start = torch.arange(len(images), device=keys.device)[:, None] * batch.shape[1]
                lengths = tuple(length - count for length in before)
                row = merged(row, (start + pairs.gone).flatten(), (start + pairs.into).flatten(), lengths)
            row = replace(row, tokens=network.fed(block, row.tokens))
            matching = _compared(patches) * keys.shape[-1] if count else 0
            ran.append(Work(before, row.lengths, (matching,) * len(images)))
            if block + 1 in network.taps:
                maps[block + 1] = network.read(row, embedded)
        return Pass(network.read(row, embedded), tuple(ran), row.lengths, maps)


@dataclass(frozen=True)
class Local:
    """Merging of windows whose tokens are alike, between attention and MLP of an early block.

    In attention a token counts once, however many it is the mean of: weighing it was slower and no better.

    Attributes:
        above: A window merges if the mean cosine of its tokens is above this.
        side: Rows and columns of a window.
        block: In which block, counted from 1.
        then: In which later block tokens merge wherever they are: every second one, if the cosine to the nearest of
            the others is above the same; None for none.
    """

    above: float
    side: int = 2
    block: int = 1
    then: int | None = None

    def __call__(self, network: Network, images: Float[Tensor, "images channels height width"], /) -> Pass:
        """Class scores of images. The tokens that are left run in one packed row."""
        embedded = network.host.embed(images)
        row, ran, maps = Row.of(embedded.tokens), [], {}
        for block in range(1, len(network.blocks) + 1):
            before, nothing = row.lengths, (0,) * len(images)
            if block <= self.block:
                batch, _ = network.attended(block - 1, self._batch(row))
                row, matching = replace(row, tokens=batch.flatten(0, 1)), nothing
                if block == self.block:
                    row = self._windows(row, embedded)
            else:
                with attending_per_image(before):
                    tokens, _ = network.attended(block - 1, row.tokens[None])
                row, matching = replace(row, tokens=tokens[0]), nothing
                if block == self.then:
                    row, matching = self._anywhere(row, embedded.prefix)
            row = replace(row, tokens=network.fed(block - 1, row.tokens))
            ran.append(Work(before, row.lengths, matching))
            if block in network.taps:
                maps[block] = network.read(row, embedded)
        return Pass(network.read(row, embedded), tuple(ran), row.lengths, maps)

    def _batch(self, row: Row) -> Tensor:
        return row.tokens.unflatten(0, (len(row.lengths), -1))

    def _windows(self, row: Row, embedded: tet.Embedded) -> Row:
        grid, prefix = embedded.grid, embedded.prefix
        patches = self._batch(row)[:, prefix:].unflatten(1, grid)
        chosen = alike(patches, side=self.side) > self.above
        each = self.side * self.side - 1
        lengths = [
            length - each * merging
            for length, merging in zip(row.lengths, chosen.sum(dim=(1, 2)).tolist(), strict=True)
        ]
        return merged(row, *window_pairs(chosen, side=self.side, grid=grid, prefix=prefix), lengths)

    def _anywhere(self, row: Row, prefix: int) -> tuple[Row, tuple[int, ...]]:
        gone, into, lengths, matching, start = [], [], [], [], 0
        for length in row.lengths:
            patches = length - prefix
            features = row.tokens[None, start : start + length]
            pairs = most_alike(features, patches // 2, prefix=prefix)
            near = pairs.similarity > self.above
            gone.append(start + pairs.gone[near])
            into.append(start + pairs.into[near])
            lengths.append(length - len(gone[-1]))
            matching.append(_compared(patches) * features.shape[-1])
            start += length
        return merged(row, torch.cat(gone), torch.cat(into), lengths), tuple(matching)


def _compared(patches: int) -> int:
    """Pairs that `most_alike` compares."""
    return (patches // 2) * (patches - patches // 2)
