"""A vision transformer of Equinox modules with tokens that leave early.

    python -m examples.jax.equinox_vit

An Equinox module is a pytree: it is the parameters itself, and its methods are the pure functions that the adapter
takes. The network has random weights; what is shown is that nothing changes as long as nothing leaves, and what
runs when half of the tokens do.
"""

from collections.abc import Callable
from dataclasses import dataclass

import equinox as eqx
import jax
import numpy as np
from einops import rearrange
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

import tokenexit_jax as tej
from examples import shell
from tokenexit import cost, policies, schedule
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax.heads import read


class Block(eqx.Module):
    """Attention, then an MLP on each token; both add to what was there."""

    norm1: eqx.nn.LayerNorm
    qkv: eqx.nn.Linear
    out: eqx.nn.Linear
    norm2: eqx.nn.LayerNorm
    grow: eqx.nn.Linear
    shrink: eqx.nn.Linear
    heads: int = eqx.field(static=True)

    def __init__(self, width: int, heads: int, *, key: Array) -> None:
        keys = jax.random.split(key, 4)
        self.norm1, self.norm2 = eqx.nn.LayerNorm(width), eqx.nn.LayerNorm(width)
        self.qkv = eqx.nn.Linear(width, 3 * width, key=keys[0])
        self.out = eqx.nn.Linear(width, width, key=keys[1])
        self.grow = eqx.nn.Linear(width, 4 * width, key=keys[2])
        self.shrink = eqx.nn.Linear(4 * width, width, key=keys[3])
        self.heads = heads

    @eqx.filter_jit
    def __call__(
        self, tokens: Float[Array, "images entries width"], counts: Float[Array, "images entries"]
    ) -> Float[Array, "images entries width"]:
        pattern = "images entries (three heads wide) -> three images entries heads wide"
        normed = each(self.qkv, each(self.norm1, tokens))
        query, key, value = rearrange(normed, pattern, three=3, heads=self.heads)
        mixed = tej.attend(query, key, value, counts)  # in place of the module's own softmax: the one change
        tokens = tokens + each(self.out, rearrange(mixed, "images entries heads wide -> images entries (heads wide)"))
        return tokens + each(self.shrink, jax.nn.gelu(each(self.grow, each(self.norm2, tokens)), approximate=False))


class ViT(eqx.Module):
    """Patches and a class token in, tokens out."""

    patches: eqx.nn.Linear
    first: Float[Array, "width"]
    places: Float[Array, "slots width"]
    blocks: list[Block]
    norm: eqx.nn.LayerNorm
    patch: int = eqx.field(static=True)

    def __init__(
        self, width: int = 32, depth: int = 3, heads: int = 2, patch: int = 8, *, grid: tuple[int, int], key: Array
    ) -> None:
        for_patches, for_first, for_places, *for_blocks = jax.random.split(key, 3 + depth)
        self.patches = eqx.nn.Linear(3 * patch**2, width, key=for_patches)
        self.first = 0.02 * jax.random.normal(for_first, (width,))
        self.places = 0.02 * jax.random.normal(for_places, (1 + grid[0] * grid[1], width))
        self.blocks = [Block(width, heads, key=one) for one in for_blocks]
        self.norm = eqx.nn.LayerNorm(width)
        self.patch = patch

    @eqx.filter_jit
    def embed(self, images: Float[Array, "images height width 3"]) -> tej.Embedded:
        grid = images.shape[1] // self.patch, images.shape[2] // self.patch
        pattern = "images (rows p) (columns q) colours -> images (rows columns) (p q colours)"
        tokens = each(self.patches, rearrange(images, pattern, p=self.patch, q=self.patch))
        first = jnp.broadcast_to(self.first, (len(images), 1, len(self.first)))
        return tej.Embedded(jnp.concatenate([first, tokens], axis=1) + self.places[None], prefix=1, grid=grid)

    def finish(self, tokens: Float[Array, "*tokens width"]) -> Float[Array, "*tokens width"]:
        return each(self.norm, tokens)

    def __call__(self, images: Float[Array, "images height width 3"]) -> Float[Array, "images slots width"]:
        tokens = self.embed(images).tokens
        for block in self.blocks:
            tokens = block(tokens, jnp.ones(tokens.shape[:2]))
        return self.finish(tokens)


def each(layer: Callable[[Array], Array], tokens: Float[Array, "*tokens wide"]) -> Float[Array, "*tokens out"]:
    """A layer on every token: Equinox's own take one."""
    for _ in tokens.shape[:-1]:
        layer = jax.vmap(layer)
    return layer(tokens)


@dataclass(frozen=True)
class _Run:
    """Block `index` of whatever module is given as the parameters."""

    index: int

    def __call__(self, vit: ViT, tokens: Array, counts: Array, _positions: None) -> Array:
        return vit.blocks[self.index](tokens, counts)


def network(vit: ViT) -> tej.Network:
    """The module's methods as the parts between which tokens can leave; the module itself is the parameters."""
    blocks = tuple(_Run(index) for index in range(len(vit.blocks)))
    return tej.Network(ViT.embed, blocks, ViT.finish, width=len(vit.first))


def main() -> None:
    """Run from the command line."""
    images = jax.random.normal(jax.random.key(0), (2, 48, 64, 3))
    vit = ViT(grid=(6, 8), key=jax.random.key(1))
    model = tej.wrap(network(vit), schedule.dense(after=(1, 2)), classes=5)
    tej.check(model, vit, images, dense=ViT.__call__)
    heads = model.init(jax.random.key(2))

    dense = model(vit, heads, images)
    halved = model(vit, heads, images, Schedule((Exit(1, policies.Budget(0.5)), Exit(2, policies.Budget(0.25)))))
    for name, out in (("dense", dense), ("half leaves, then half of the rest", halved)):
        share = cost.token_blocks(np.asarray(out.tokens_per_block), slots=49)
        print(f"{name:<36} token-blocks {share:.3f}, tokens of an image by block {out.tokens_per_block[0].tolist()}")

    own = read(model.head_plan, heads["head"], vit(images)[:, 1:])  # without the library
    assert np.allclose(dense.logits.reshape(own.shape), own, atol=1e-5)
    assert (halved.exit_depth == 1).any()


if __name__ == "__main__":
    shell.exit_with(main)
