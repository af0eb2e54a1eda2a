"""A plain vision transformer without prefix tokens, for images of any size, and its host."""

import math

import torch
from einops import rearrange
from torch import nn
from torch.nn import functional

import tokenexit_torch as tet


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, tokens):
        q, k, v = rearrange(self.qkv(tokens), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.out(rearrange(mixed, "b h n d -> b n (h d)"))


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), last)
        nn.init.zeros_(self.attention.out.weight)
        nn.init.zeros_(last.weight)

    def forward(self, tokens):
        tokens = tokens + self.attention(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class ViT(nn.Module):
    def __init__(self, width, depth, heads, patch):
        super().__init__()
        self.width, self.patch = width, patch
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def embed(self, images):
        if any(side % self.patch for side in images.shape[-2:]):
            raise ValueError(f"`images` must have sides that {self.patch} divides, got {tuple(images.shape)}")
        features = self.patches(images)
        tokens = rearrange(features, "batch width gh gw -> batch (gh gw) width")
        return tokens + positions(tuple(features.shape[-2:]), self.width).to(tokens)

    def forward(self, images):
        tokens = self.embed(images)
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)


def positions(grid, width):
    """Sines and cosines of how far down (half of the channels) and how far across (the other half) each patch is."""
    rates = 40.0 * torch.exp(torch.arange(width // 4) * (-4 * math.log(1000.0) / width))
    rows, columns = (torch.outer((torch.arange(count) + 0.5) / count, rates) for count in grid)
    rows, columns = (torch.cat((angles.sin(), angles.cos()), dim=1) for angles in (rows, columns))
    both = torch.cat((rows[:, None].expand(*grid, -1), columns[None].expand(*grid, -1)), dim=2)
    return rearrange(both, "gh gw width -> (gh gw) width")


class PlainHost:
    def __init__(self, vit):
        self.module = vit
        self.blocks = vit.blocks
        self.width = vit.width
        self.image_shape = (3, 4 * vit.patch, 6 * vit.patch)

    def embed(self, images):
        patch = self.module.patch
        grid = (images.shape[-2] // patch, images.shape[-1] // patch)
        return tet.Embedded(self.module.embed(images), prefix=0, grid=grid)

    def run(self, index, tokens, _positions):
        return self.blocks[index](tokens)

    def finish(self, tokens):
        return self.module.norm(tokens)

    def dense(self, images):
        return self.module(images)


class Placed(PlainHost):
    """With something that belongs to each place and comes into every block, as rotary tables do."""

    def embed(self, images):
        embedded = super().embed(images)
        slots = embedded.tokens.shape[1]
        table = torch.sin(torch.arange(slots)[:, None] * torch.arange(1, self.width + 1))
        return tet.Embedded(embedded.tokens, embedded.prefix, embedded.grid, positions=table)

    def run(self, index, tokens, positions):
        return self.blocks[index](tokens + positions)

    def dense(self, images):
        embedded = self.embed(images)
        tokens = embedded.tokens
        for index in range(len(self.blocks)):
            tokens = self.run(index, tokens, embedded.positions)
        return self.finish(tokens)
