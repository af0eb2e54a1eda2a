"""A plain vision transformer in Flax NNX, which takes the weights of timm's `VisionTransformer` under their own names.

It needs the extra `nnx`, and is imported by itself:

    from tokenexit_jax import vit, weights

    config = vit.Config(image_size=(352, 480), patch=16, width=192, depth=12, heads=3)
    model = vit.load(config, weights.read("vit_tiny.safetensors"), besides=("head.",))
    network, params = vit.split(model)
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
from einops import rearrange
from flax import nnx
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from tokenexit.adapting import aligned
from tokenexit.errors import require
from tokenexit_jax._given import require_array
from tokenexit_jax.attention import attend
from tokenexit_jax.models.weights import require_exactly
from tokenexit_jax.networks.protocol import Embedded, Network, Params

__all__ = ["Config", "ViT", "load", "split"]

_norm = partial(nnx.LayerNorm, epsilon=1e-6, use_fast_variance=False)


@dataclass(frozen=True)
class Config:
    """What a network is made of; every field has a counterpart in timm's `VisionTransformer`.

    Attributes:
        image_size: Height and width of the images, in pixels.
        patch: Side of a patch, in pixels; it divides both.
        width: Channels of a token; a multiple of `heads`.
        depth: Blocks.
        heads: Attention heads.
        hidden: Channels between the two layers of a block's MLP; four times the width if None.
        channels: Channels of the images.
        class_token: Whether a class token comes first.
        registers: Register tokens after it.
        positions: What has a position embedding: all tokens, or patches alone (timm's `no_embed_class`).
        qkv_bias: Whether queries, keys and values have a bias.
        qk_norm: Whether queries and keys are normed in each attention head.
        layer_scale: Whether each branch of a block is scaled by a learned factor for each channel.
        final_norm: Whether a norm follows the last block.
    """

    image_size: tuple[int, int]
    patch: int = 16
    width: int = 192
    depth: int = 12
    heads: int = 3
    hidden: int | None = None
    channels: int = 3
    class_token: bool = True
    registers: int = 0
    positions: Literal["all", "patches"] = "all"
    qkv_bias: bool = True
    qk_norm: bool = False
    layer_scale: bool = False
    final_norm: bool = True

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If a size is less than 1, patches do not divide the image, or heads the width.
        """
        for name in ("patch", "width", "depth", "heads", "channels"):
            require(_is_whole(getattr(self, name), 1), name, "be a whole number from 1 up", repr(getattr(self, name)))
        require(self.hidden is None or _is_whole(self.hidden, 1), "hidden", "be None or from 1 up", repr(self.hidden))
        require(_is_whole(self.registers, 0), "registers", "be a whole number from 0 up", repr(self.registers))
        size = self.image_size
        fits = isinstance(size, tuple) and len(size) == 2 and all(_is_whole(side, 1) for side in size)
        fits = fits and not any(side % self.patch for side in size)
        require(fits, "image_size", f"be a height and a width that {self.patch} divides", repr(size))
        require(self.width % self.heads == 0, "heads", f"divide the width, {self.width}", self.heads)
        require(self.positions in ("all", "patches"), "positions", "be 'all' or 'patches'", repr(self.positions))

    @property
    def prefix(self) -> int:
        """How many leading tokens are no patches."""
        return int(self.class_token) + self.registers

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the patch grid."""
        height, width = self.image_size
        return height // self.patch, width // self.patch


class ViT(nnx.Module):
    """The network, with random weights; `load` gives it weights from a file.

    Args:
        config: What it is made of.
        rngs: Where random weights come from.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        super().__init__()
        width, patch = config.width, (config.patch, config.patch)
        patches = config.grid[0] * config.grid[1]
        placed = patches + (config.prefix if config.positions == "all" else 0)
        draw = nnx.initializers.normal(0.02)
        self.config = config
        self.cls_token = nnx.Param(draw(rngs.params(), (1, 1, width))) if config.class_token else None
        self.reg_token = nnx.Param(draw(rngs.params(), (1, config.registers, width))) if config.registers else None
        self.pos_embed = nnx.Param(draw(rngs.params(), (1, placed, width)))
        self.patch_embed = _PatchEmbed(config.channels, width, patch, rngs=rngs)
        self.blocks = nnx.List([_Block(config, rngs=rngs) for _ in range(config.depth)])
        self.norm = _norm(width, rngs=rngs) if config.final_norm else None

    def __call__(self, images: Float[Array, "images height width channels"]) -> Float[Array, "images slots wide"]:
        """The tokens after all blocks and the final norm: the dense network.

        Args:
            images: The images, channels last.

        Returns:
            The tokens, prefix tokens first.

        Raises:
            TokenExitError: If the images are of another size.
        """
        tokens = self.embed(images).tokens
        for block in self.blocks:
            tokens = block(tokens, jnp.ones(tokens.shape[:2]))
        return self.finish(tokens)

    def embed(self, images: Float[Array, "images height width channels"]) -> Embedded:
        """Images as tokens.

        Args:
            images: The images, channels last.

        Returns:
            The tokens before the first block.

        Raises:
            TokenExitError: If the images are of another size.
        """
        require_array(images, "images")
        shape = (*self.config.image_size, self.config.channels)
        first = images.ndim == 4 and images.shape[1] == shape[2] != images.shape[3]
        got = f"{images.shape}{': the channels come first, and belong last' if first else ''}"
        require(images.shape[1:] == shape, "images", f"have shape (images, {', '.join(map(str, shape))})", got)
        patches = rearrange(self.patch_embed(images), "images rows columns wide -> images (rows columns) wide")
        places = self.pos_embed[...]
        before = [
            jnp.broadcast_to(tokens[...], (images.shape[0], *tokens.shape[1:]))
            for tokens in (self.cls_token, self.reg_token)
            if tokens is not None
        ]
        if self.config.positions == "patches":
            tokens = jnp.concatenate([*before, patches + places], axis=1)
        else:
            tokens = jnp.concatenate([*before, patches], axis=1) + places
        return Embedded(tokens, self.config.prefix, self.config.grid)

    def finish(self, tokens: Float[Array, "*tokens wide"]) -> Float[Array, "*tokens wide"]:
        """The final norm, if there is one.

        Args:
            tokens: Tokens as the last block leaves them.

        Returns:
            Tokens as the final head reads them.
        """
        return tokens if self.norm is None else self.norm(tokens)


def load(config: Config, weights: Mapping[str, Any], /, *, besides: tuple[str, ...] = ()) -> ViT:
    """The network with weights under timm's names.

    Args:
        config: What it is made of.
        weights: Arrays by name, as `tokenexit_jax.models.weights.read` gives them: every tensor of the network in its
            shape, and nothing unknown. They become float32.
        besides: What else is in the file, by the beginning of its names, and is passed over: `("head.",)`.

    Returns:
        The network.

    Raises:
        TokenExitError: Naming the tensors that are missing, unknown or of another shape.
    """
    require(isinstance(config, Config), "config", "be a tokenexit_jax.models.vit.Config", type(config).__name__)
    named = isinstance(weights, Mapping) and all(isinstance(name, str) for name in weights)
    require(named, "weights", "be arrays by name, as `weights.read` gives them", type(weights).__name__)
    require(isinstance(besides, tuple), "besides", 'be a tuple of beginnings of names, as ("head.",)', repr(besides))
    blank = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(blank)
    wanted = {_timm_name(path): (path, leaf) for path, leaf in nnx.to_flat_state(state)}
    given = {name: value for name, value in weights.items() if not (besides and name.startswith(besides))}
    require_exactly(given, {name: _timm_shape(path, leaf.shape) for name, (path, leaf) in wanted.items()})
    found = [
        (path, leaf.replace(_from_timm(path, jnp.asarray(given[name], dtype=jnp.float32))))
        for name, (path, leaf) in wanted.items()
    ]
    return nnx.merge(graph, nnx.from_flat_state(found))


def split(model: ViT, /) -> tuple[Network, Params]:
    """The network as pure functions and their parameters: what `tokenexit_jax.wrap` takes, and what an optimiser does.

    Args:
        model: The network; it stays as it is.

    Returns:
        The functions, which are equal for networks of one configuration, and the NNX state.

    Raises:
        TokenExitError: If `model` is no `ViT`.
    """
    require(isinstance(model, ViT), "model", "be a tokenexit_jax.models.vit.ViT", type(model).__name__)
    graph, params = nnx.split(model)
    blocks = tuple(_RunBlock(graph, index) for index in range(model.config.depth))
    return Network(_RunEmbed(graph), blocks, _RunFinish(graph), model.config.width), params


class _PatchEmbed(nnx.Module):
    def __init__(self, channels: int, width: int, patch: tuple[int, int], *, rngs: nnx.Rngs) -> None:
        super().__init__()
        self.proj = nnx.Conv(channels, width, patch, strides=patch, padding="VALID", rngs=rngs)

    def __call__(self, images: Array) -> Array:
        return self.proj(images)


class _Attention(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        super().__init__()
        width, each = config.width, config.width // config.heads
        self.heads = config.heads
        self.qkv = nnx.Linear(width, 3 * width, use_bias=config.qkv_bias, rngs=rngs)
        self.q_norm = _norm(each, rngs=rngs) if config.qk_norm else None
        self.k_norm = _norm(each, rngs=rngs) if config.qk_norm else None
        self.proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, tokens: Array, counts: Array) -> Array:
        pattern = "images entries (three heads wide) -> three images entries heads wide"
        query, key, value = rearrange(self.qkv(tokens), pattern, three=3, heads=self.heads)
        query = query if self.q_norm is None else self.q_norm(query)
        key = key if self.k_norm is None else self.k_norm(key)
        gathered = attend(query, key, value, counts)
        return self.proj(rearrange(gathered, "images entries heads wide -> images entries (heads wide)"))


class _MLP(nnx.Module):
    def __init__(self, width: int, hidden: int, *, rngs: nnx.Rngs) -> None:
        super().__init__()
        self.fc1 = nnx.Linear(width, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, tokens: Array) -> Array:
        return self.fc2(jax.nn.gelu(self.fc1(tokens), approximate=False))


class _LayerScale(nnx.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nnx.Param(jnp.full(width, 1e-5))

    def __call__(self, tokens: Array) -> Array:
        return tokens * aligned(self.gamma[...], tokens.ndim)


class _Block(nnx.Module):
    def __init__(self, config: Config, *, rngs: nnx.Rngs) -> None:
        super().__init__()
        self.norm1 = _norm(config.width, rngs=rngs)
        self.attn = _Attention(config, rngs=rngs)
        self.ls1 = _LayerScale(config.width) if config.layer_scale else None
        self.norm2 = _norm(config.width, rngs=rngs)
        self.mlp = _MLP(config.width, config.hidden or 4 * config.width, rngs=rngs)
        self.ls2 = _LayerScale(config.width) if config.layer_scale else None

    def __call__(self, tokens: Array, counts: Array) -> Array:
        attended = self.attn(self.norm1(tokens), counts)
        tokens = tokens + (attended if self.ls1 is None else self.ls1(attended))
        changed = self.mlp(self.norm2(tokens))
        return tokens + (changed if self.ls2 is None else self.ls2(changed))


# The parts as functions. Frozen data, so that they are equal, and compiled once, for networks of one configuration.


@dataclass(frozen=True)
class _RunEmbed:
    graph: nnx.GraphDef[ViT]

    def __call__(self, params: Params, images: Array) -> Embedded:
        return nnx.merge(self.graph, params).embed(images)


@dataclass(frozen=True)
class _RunBlock:
    graph: nnx.GraphDef[ViT]
    index: int

    def __call__(self, params: Params, tokens: Array, counts: Array, _positions: None) -> Array:
        return nnx.merge(self.graph, params).blocks[self.index](tokens, counts)


@dataclass(frozen=True)
class _RunFinish:
    graph: nnx.GraphDef[ViT]

    def __call__(self, params: Params, tokens: Array) -> Array:
        return nnx.merge(self.graph, params).finish(tokens)


def _timm_name(path: tuple[Any, ...]) -> str:
    """The name in timm of what NNX finds by a path."""
    *owner, kind = map(str, path)
    return ".".join([*owner, {"kernel": "weight", "scale": "weight"}.get(kind, kind)])


def _timm_shape(path: tuple[Any, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    if path[-1] != "kernel":
        return shape
    *side, wide, out = shape
    return (out, wide, *side)


def _from_timm(path: tuple[Any, ...], value: Array) -> Array:
    """A weight in the layout that NNX has: kernels have the channels that come out on the last axis."""
    if path[-1] != "kernel":
        return value
    return rearrange(value, "out wide ... -> ... wide out")


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
