"""A plain vision transformer in a hundred lines, and the few that let its tokens leave early.

To bring a ViT of your own, write what `PlainHost` writes: where the tokens come from, how one block runs on any of
them, and what follows the last block.
"""

import math
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

import tokenexit_torch as tet


@dataclass(frozen=True)
class Config:
    """Size of the network.

    Attributes:
        width: Channels of a token; a multiple of 4 and of `heads`.
        depth: Blocks.
        heads: Attention heads.
        patch: Side of a patch, in pixels.

    Raises:
        ValueError: If the width cannot be split.
    """

    width: int = 128
    depth: int = 12
    heads: int = 2
    patch: int = 8

    def __post_init__(self) -> None:
        if self.width % 4 or self.width % self.heads:
            raise ValueError(f"`width` must be a multiple of 4 and of `heads` ({self.heads}), got {self.width}")


class Attention(nn.Module):
    """Every token looks at every other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    """Attention, then an MLP on each token; both add to what was there."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)
        # A new block adds next to nothing, so that even a deep network learns from the first step.
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(last.weight)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch tokens width"]:
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    """Patches in, one token per patch out; there is no cls token, and any image size that patches divide will do."""

    def __init__(self, config: Config = Config()) -> None:
        super().__init__()
        self.config = config
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.blocks = nn.ModuleList(Block(config.width, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens width"]:
        """Patches as tokens, row by row, each with its position.

        Raises:
            ValueError: If patches do not divide the images.
        """
        if any(side % self.config.patch for side in images.shape[-2:]):
            raise ValueError(f"`images` must have sides that {self.config.patch} divides, got {tuple(images.shape)}")
        features = self.patches(images)
        tokens = rearrange(features, "batch width gh gw -> batch (gh gw) width")
        return tokens + positions(tuple(features.shape[-2:]), self.config.width).to(tokens)

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens width"]:
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def positions(grid: tuple[int, int], width: int) -> Float[Tensor, "tokens width"]:
    """Sines and cosines of how far down (half of the channels) and how far across (the other half) each patch is.

    Places are shares of the picture, so that a small picture and a large one of the same street get the same positions.
    """
    rates = 40.0 * torch.exp(torch.arange(width // 4) * (-4 * math.log(1000.0) / width))
    rows, columns = (torch.outer((torch.arange(count) + 0.5) / count, rates) for count in grid)
    rows, columns = (torch.cat((angles.sin(), angles.cos()), dim=1) for angles in (rows, columns))
    both = torch.cat((rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)), dim=2)
    return rearrange(both, "gh gw width -> (gh gw) width")


class PlainHost:
    """What tokenexit needs to know about `ViT`; see `tokenexit_torch.Host`."""

    def __init__(self, vit: ViT) -> None:
        self.module = vit
        self.blocks = vit.blocks
        self.width = vit.config.width
        self.image_shape = (3, 4 * vit.config.patch, 6 * vit.config.patch)  # any size works: a small one to check with

    def embed(self, images: Float[Tensor, "batch 3 height width"]) -> tet.Embedded:
        patch = self.module.config.patch
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        return tet.Embedded(self.module.embed(images), prefix=0, grid=grid)

    def run(self, index: int, tokens: Float[Tensor, "batch tokens width"], _positions: None) -> Tensor:
        return self.blocks[index](tokens)

    def finish(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return self.module.norm(tokens)

    def dense(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens width"]:
        return self.module(images)
