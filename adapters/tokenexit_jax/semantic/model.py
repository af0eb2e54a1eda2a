"""A vision transformer of pure functions whose middle blocks, or last ones, run on semantic tokens (STViT, CVPR 2023).

The early blocks run on all tokens. Two layers make semantic tokens of them, in the place of two blocks, and the next
blocks, as they are, run on these alone. Then a layer recovers all tokens, in the place of a third block, and the last
blocks run on all of them again; or nothing is recovered, and the network ends on semantic tokens. The layers that are
put in can start from the weights of the blocks that they replace, as far as those have the shapes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from einops import rearrange
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit.adapting import require_places
from tokenexit.errors import require
from tokenexit.semantic import SemanticPlan
from tokenexit_jax._counting import network_cost
from tokenexit_jax._given import new_keys
from tokenexit_jax._layers import Weights, named, part
from tokenexit_jax.heads import build as building
from tokenexit_jax.networks.checks import embed, run_block
from tokenexit_jax.networks.protocol import Network, Params
from tokenexit_jax.pytrees import register
from tokenexit_jax.semantic.layers import Recovery, SemanticTokens

__all__ = ["Adopted", "SemanticModel", "SemanticOutput"]

_TIMM_NAMES = {
    "norm1": "norm1", "q": "attn.qkv", "kv": "attn.qkv", "proj": "attn.proj", "scale1": "ls1.gamma",
    "norm2": "norm2", "mlp.0": "mlp.fc1", "mlp.2": "mlp.fc2", "scale2": "ls2.gamma",
}  # fmt: skip


@dataclass(frozen=True)
class SemanticOutput:
    """What a model on semantic tokens returns. A pytree, of which `prefix` and `grid` are static.

    Attributes:
        tokens: The finished tokens, in the order of the network: prefix tokens, then those of the grid, row by row.
        prefix: How many of them are no part of the grid.
        grid: Height and width of the grid: of the patches if they were recovered, else of the semantic tokens.
        valid: Which tokens of the grid stand for anything; None for all. Where windows hang far over the edge of the
            patches, some semantic tokens do not, and hold no meaning.
    """

    tokens: Float[Array, "images tokens width"]
    prefix: int
    grid: tuple[int, int]
    valid: Bool[Array, "images grid_height grid_width"] | None

    @property
    def map(self) -> Float[Array, "images grid_height grid_width width"]:
        """The tokens of the grid as a map, channels last: for decoders."""
        return rearrange(self.tokens[:, self.prefix :], "i (h w) c -> i h w c", h=self.grid[0])


register(SemanticOutput, leaves=("tokens", "valid"))


class Adopted(NamedTuple):
    """Weights of layers that start from those of the blocks that they replace.

    Attributes:
        layers: The weights of all layers, adopted or new.
        kept: Where each weight that is not new comes from, by names.
        new: The names of those that are new, and must be trained.
        left: Weights of the replaced blocks for which there was no place.
    """

    layers: dict[str, Array]
    kept: dict[str, str]
    new: tuple[str, ...]
    left: tuple[str, ...]


@dataclass(frozen=True)
class SemanticModel:
    """A vision transformer on semantic tokens; made by `wrap_semantic`. It holds no weights, and nothing changes it.

    A call is a function for `jax.jit` and `jax.grad`: shapes follow from those of the images.

    Attributes:
        network: The wrapped network. Nothing runs the blocks that were replaced.
        tokens: The layers that make semantic tokens, in the place of two blocks.
        recovery: The layer that recovers all tokens, in the place of a third; None if they are not.
        after: After how many blocks there are semantic tokens.
        until: After how many blocks all tokens are recovered; None if they are not.
    """

    network: Network
    tokens: SemanticTokens
    recovery: Recovery | None
    after: int
    until: int | None

    @property
    def plan(self) -> SemanticPlan:
        """How semantic tokens come about."""
        return self.tokens.plan

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return self.network.depth

    @property
    def replaced(self) -> tuple[int, ...]:
        """Blocks of the network, counted from 0, whose place other layers take."""
        two = (self.after, self.after + 1)
        return two if self.until is None else (*two, self.until - 1)

    def init(self, key: Array, /) -> dict[str, Array]:
        """New weights of the layers that are put in.

        Args:
            key: Random key.

        Returns:
            The weights by the names that they have in PyTorch's model: `tokens.first.q.weight` and so on, float32.
        """
        return _new_layers(self.tokens, self.recovery, key)

    def adopt(self, layers: Weights, blocks: Mapping[str, Any], /) -> Adopted:
        """Start layers from the weights of the blocks that they replace, where the shapes allow.

        Train the result in any case: these blocks have never seen pooled tokens.

        Args:
            layers: The weights of the layers, as `init` makes them.
            blocks: Weights of the network under timm's names, `blocks.3.attn.qkv.weight` and so on, as
                `tokenexit_jax.models.weights.read` gives them; others in it are passed over.

        Returns:
            The weights of the layers, and which of them come from where.

        Raises:
            TokenExitError: If `layers` are not of the model, `blocks` have none of a block that is replaced, or have
                layer-scale, for which the plan has no place.
        """
        layers, kept, left = dict(fitting_layers(self, layers)), {}, []
        named = isinstance(blocks, Mapping) and all(isinstance(name, str) for name in blocks)
        require(named, "blocks", "be weights by name, as `weights.read` gives them", type(blocks).__name__)
        for index, (layer, own) in zip(self.replaced, _put_in(self, layers), strict=True):
            source = part(blocks, f"blocks.{index}")
            names = f"have weights of block {index}, named blocks.{index}.norm1.weight and so on"
            require(len(source) > 0, "blocks", names, f"{list(blocks)[:4]}")
            scaled = "ls1.gamma" in source and self.plan.layer_scale is None
            require(not scaled, "plan", "have a layer_scale, as the blocks do: theirs comes in its place", None)
            taken = dict(_adopted(own, source, self.network.width))
            layers |= {f"{layer}.{name}": value for name, (_, value) in taken.items()}
            kept |= {f"{layer}.{name}": f"blocks.{index}.{theirs}" for name, (theirs, _) in taken.items()}
            names = {theirs for theirs, _ in taken.values()}
            left += [f"blocks.{index}.{theirs}" for theirs in source if theirs not in names]
        return Adopted(layers, kept, tuple(name for name in layers if name not in kept), tuple(left))

    def __call__(self, params: Params, layers: Weights, images: Array) -> SemanticOutput:
        """Run a batch. Differentiable.

        Args:
            params: Parameters of the network.
            layers: Weights of the layers that are put in.
            images: The images, as the network takes them.

        Returns:
            The finished tokens.

        Raises:
            TokenExitError: If the network's parts do not fit each other, the weights are not of the model, the blocks
                ask for positions, which semantic tokens do not have, or the grid has no room for the plan.
        """
        layers = fitting_layers(self, layers)
        embedded = embed(self.network, params, images)
        rule = "give no positions: semantic tokens have none"
        require(embedded.positions is None, "network.embed", rule, "some")
        prefix, grid = embedded.prefix, embedded.grid
        require_places(self.plan, grid)
        row = self._run(params, embedded.tokens, range(self.after))
        map = rearrange(row[:, prefix:], "i (h w) c -> i h w c", h=grid[0])
        found = self.tokens(part(layers, "tokens"), map, prefix=row[:, :prefix] if prefix else None)
        row, valid = found.to_row()
        end = self.depth if self.until is None else self.until - 1
        row = self._run(params, row, range(self.after + 2, end), valid)
        found, marks = found.from_row(row), found.valid_map
        if self.until is None or self.recovery is None:
            map, grid = found.map, (found.grid.height, found.grid.width)
        else:
            map, marks = self.recovery(part(layers, "recovery"), map, found), None
        row = jnp.concatenate([row[:, :prefix], rearrange(map, "i h w c -> i (h w) c")], axis=1)
        row = self._run(params, row, range(self.depth if self.until is None else self.until, self.depth))
        return SemanticOutput(self.network.finish(params, row), prefix, grid, marks)

    def multiply_adds(self, params: Params, images: Any) -> int:
        """Multiply-adds of an image, the patch embedding included, heads that come later not; nothing is run.

        Args:
            params: Parameters of the network, or `jax.ShapeDtypeStruct` in their place.
            images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

        Returns:
            Multiply-adds: linear and convolution layers, and the two products of attention.

        Raises:
            TokenExitError: If a block is none whose cost is known, as for `ExitingModel.cost`.
        """
        cost, (first, _) = network_cost(self.network, params, images), self.tokens.blocks
        grid = jax.eval_shape(partial(embed, self.network), params, images).grid
        require_places(self.plan, grid)
        sizes = {"after": self.after, "until": self.until, "hidden": first.inside}
        return cost.decoder + cost.semantic(self.plan, grid, **sizes)

    def _run(self, params: Params, row: Array, indexes: range, valid: Array | None = None) -> Array:
        """Blocks on a row of tokens; those that stand for nothing count as no key."""
        counts = jnp.ones(row.shape[:2], dtype=jnp.float32) if valid is None else valid.astype(jnp.float32)
        for index in indexes:
            row = run_block(self.network, index, params, row, counts, None)
        return row


def fitting_layers(model: SemanticModel, layers: Weights) -> Weights:
    """The weights of the layers, if they have the names and shapes of the model's. It is no part of the public API.

    Raises:
        TokenExitError: If they do not.
    """
    require(isinstance(layers, Mapping), "layers", "be weights by name, as `init` makes them", type(layers).__name__)
    return building.require_same_structure(dict(layers), shapes_of_layers(model), argument="layers")


def shapes_of_layers(model: SemanticModel) -> dict[str, Any]:
    """The weights of the layers as `jax.ShapeDtypeStruct`. It is no part of the public API."""
    return _shapes(model.tokens, model.recovery)


@lru_cache
def _shapes(tokens: SemanticTokens, recovery: Recovery | None) -> dict[str, Any]:
    return jax.eval_shape(lambda: _new_layers(tokens, recovery, jax.random.key(0)))


def _new_layers(tokens: SemanticTokens, recovery: Recovery | None, key: Array) -> dict[str, Array]:
    of_tokens, of_recovery = new_keys(key)
    new = named(tokens.init(of_tokens), "tokens")
    return new if recovery is None else new | named(recovery.init(of_recovery), "recovery")


def _put_in(model: SemanticModel, layers: Weights) -> list[tuple[str, Weights]]:
    """The layers that were put in, in the order of the blocks that they replace."""
    names = ["tokens.first", "tokens.second", *([] if model.recovery is None else ["recovery.block"])]
    return [(name, part(layers, name)) for name in names]


def _adopted(own: Weights, source: Mapping[str, Any], width: int) -> Iterator[tuple[str, tuple[str, Array]]]:
    """The weights of a layer that a block has, and under which name."""
    rows = {"q": slice(width), "kv": slice(width, None)}
    for name, value in own.items():
        layer, _, kind = name.rpartition(".")
        theirs = _TIMM_NAMES[layer or name] + (f".{kind}" if layer else "")
        found = source.get(theirs)
        if found is not None and layer in rows:
            found = found[rows[layer]] if len(found) == 3 * width else None
        if found is not None and found.shape == value.shape:
            yield name, (theirs, jnp.asarray(found, dtype=value.dtype))
