"""Run folders, written by the PyTorch examples, as networks in JAX; and the ready models of the CamVid example.

The weights are read as they lie there: nothing is converted, and nothing read from a file is executed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

import tokenexit_jax as tej
from examples import about
from examples.jax import plain_vit
from tokenexit import TokenExitError, schedule, surroundings
from tokenexit.heads import MLP, Neighbourhood
from tokenexit_jax.heads import init as init_head
from tokenexit_jax.heads import read as read_head
from tokenexit_jax.models import vit, weights

_WEIGHTS = "host.safetensors"
_HEAD = "head.safetensors"
_TINY = vit.Config(image_size=(224, 224), patch=16, width=192, depth=12, heads=3)
_VITS = {"vit_tiny_patch16_224": _TINY}
_UNUSED = ("norm.", "head.", "heads.")  # of a ready model's file, whose heads have a norm of their own


@dataclass(frozen=True)
class Loaded:
    """A network with its exits, and all its weights.

    Attributes:
        model: The wrapped network.
        params: Its parameters.
        heads: Weights of its heads.
    """

    model: tej.ExitingModel
    params: tej.Params
    heads: tej.Heads

    def __call__(
        self, images: Float[Array, "images height width 3"], plan: schedule.Schedule | None = None
    ) -> tej.Output:
        """Segment images; buckets are chosen on the host."""
        return self.model(self.params, self.heads, images, plan)


def load(folder: str | Path, /) -> tuple[Loaded, about.About]:
    """Read a run folder.

    Args:
        folder: Where `examples.runs.save` wrote it.

    Returns:
        The network in float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    network, params, found = _host(Path(folder))
    model, heads = tej.load(network, folder, kind="exits")
    return Loaded(model, params, _float32(heads)), found


@dataclass(frozen=True)
class LoadedGates:
    """A network with gates, and all its weights.

    Attributes:
        model: The wrapped network.
        params: Its parameters.
        gates: Weights of its gates.
    """

    model: tej.GatedModel
    params: tej.Params
    gates: tej.Heads

    def __call__(
        self, images: Float[Array, "images height width 3"], plan: schedule.Schedule | None = None
    ) -> tej.GatedOutput:
        """Segment images; buckets are chosen on the host."""
        return self.model(self.params, self.gates, images, plan)


def load_gated(folder: str | Path, /) -> tuple[LoadedGates, about.About]:
    """Read a run folder of a network with gates.

    Args:
        folder: Where `examples.runs.save_gated` wrote it.

    Returns:
        The network in float32, and what the folder says of it.

    Raises:
        TokenExitError: If a file is missing or not what it should be.
    """
    folder = Path(folder)
    network, params, found = _host(folder)
    final = _float32(weights.read(folder / _HEAD))
    shapes = {
        name: one.shape
        for name, one in jax.eval_shape(
            lambda: init_head(MLP(), jax.random.key(0), width=network.width, classes=len(found.classes))
        ).items()
    }
    weights.require_exactly(final, shapes, argument="head")

    def head(_params: tej.Params, tokens: Array) -> Array:
        return read_head(MLP(), final, tokens)

    model, gates = tej.load(network, folder, kind="gates", head=head)
    return LoadedGates(model, params, _float32(gates)), found


def _host(folder: Path) -> tuple[tej.Network, tej.Params, about.About]:
    found = about.read(folder)
    if found.host not in _HOSTS:
        raise TokenExitError(f"`host` must be one of {sorted(_HOSTS)}, got {found.host!r}")
    try:
        network, params = _HOSTS[found.host](found.config, weights.read(folder / _WEIGHTS))
    except (TokenExitError, TypeError, KeyError) as error:
        raise TokenExitError(f"`folder` must hold a network as {about.FILE} says, got {folder}: {error}") from error
    return network, params, found


def ready(file: Path, size: tuple[int, int], /) -> Loaded:
    """A ready model of the CamVid example: a fine-tuned ViT-Tiny and its heads, in one `.npz` file.

    Args:
        file: The file.
        size: Height and width of images, in pixels.

    Returns:
        The network, in which nothing leaves yet; the head after the last block is its final one.

    Raises:
        TokenExitError: If the file does not hold what it should.
    """
    read = weights.read(file)
    kernel = read.get("patch_embed.proj.weight")
    if kernel is None or kernel.ndim != 4:
        raise TokenExitError(f"`file` must hold 'patch_embed.proj.weight', got {sorted(read)[:4]} ...")
    config = replace(_TINY, image_size=size, patch=kernel.shape[-1], final_norm=False)
    network, params = vit.split(vit.load(config, read, besides=_UNUSED))
    blocks = sorted({int(name.split(".")[1]) for name in read if name.startswith("heads.")})
    own = {block: _under(read, f"heads.{block}.") for block in blocks}
    if config.depth not in own:
        raise TokenExitError(f"`file` must hold the final head, heads.{config.depth}.*, got heads after {blocks}")
    final = own.pop(config.depth)
    plan = MLP(len(final["1.bias"]))
    model = tej.wrap(network, schedule.dense(after=sorted(own)), classes=len(final["3.bias"]), exit_heads=plan)
    heads: tej.Heads = {"exit_heads": {str(block): head for block, head in own.items()}, "head": final}
    shapes = {name: value.shape for name, value in jax.eval_shape(model.init, jax.random.key(0))["head"].items()}
    for block, head in {**own, config.depth: final}.items():
        weights.require_exactly(head, shapes, argument=f"heads.{block}")
    return Loaded(model, params, _float32(heads))


def bare_dense(loaded: Loaded) -> Callable[[Array], Array]:
    """The baseline: the network as it is without the library, in one program, and the final head.

    Args:
        loaded: The wrapped network.

    Returns:
        A function from images to the logits of their patches.
    """
    network, plan = loaded.model.network, loaded.model.head_plan

    @jax.jit
    def run(images: Array, params: tej.Params, head: dict[str, Array]) -> Array:
        embedded = network.embed(params, images)
        tokens = embedded.tokens
        for block in network.blocks:
            tokens = block(params, tokens, jnp.ones(tokens.shape[:2]), embedded.positions)
        patches = network.finish(params, tokens)[:, embedded.prefix :]
        if isinstance(plan, Neighbourhood):
            patches = surroundings.beside_all(patches, grid=embedded.grid, radius=plan.radius)
        return read_head(plan, head, patches)

    return lambda images: run(images, loaded.params, loaded.heads["head"])


def _plain(config: Mapping[str, Any], read: Mapping[str, np.ndarray]) -> tuple[tej.Network, tej.Params]:
    sizes = plain_vit.Config(**config)
    weights.require_exactly(read, plain_vit.shapes(sizes))
    return plain_vit.network(sizes), _float32(dict(read))


def _timm(config: Mapping[str, Any], read: Mapping[str, np.ndarray]) -> tuple[tej.Network, tej.Params]:
    known = {"model_name", "patch_size", "img_size", "num_classes", "final_norm", "reg_tokens"}
    if set(config) - known or config.get("model_name") not in _VITS or config.get("num_classes") != 0:
        rule = f"be one of {sorted(_VITS)} without classes, with only {sorted(known)}"
        raise TokenExitError(f"`config` must {rule}, got {dict(config)}")
    own = _VITS[config["model_name"]]
    sizes = replace(
        own,
        image_size=tuple(config.get("img_size", own.image_size)),
        patch=config.get("patch_size", own.patch),
        registers=config.get("reg_tokens", 0),
        final_norm=config.get("final_norm", True),
    )
    return vit.split(vit.load(sizes, read))


_HOSTS = {"plain": _plain, "timm": _timm}


def _under(read: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in read.items() if name.startswith(prefix)}


def _float32(tree: Any) -> Any:
    """Files hold half precision; the networks run in single."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)
