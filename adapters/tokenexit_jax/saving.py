"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the plan.

A save is one act (`tokenexit.folders`), and refuses what could not be loaded. Nothing read is ever executed. The files
are those of the PyTorch adapter, which reads what this one wrote, and the other way round. The parameters of the
network are yours and are not saved; nor is a final head that you gave.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save as to_bytes

from tokenexit import TokenExitError, folders, manifest
from tokenexit.errors import require
from tokenexit.folders import Kind
from tokenexit.manifest import Manifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit_jax._layers import Weights
from tokenexit_jax.exits.model import ExitingModel, shapes_of, validated_heads
from tokenexit_jax.gates.model import GatedModel, fitting_gates, shapes_of_gates
from tokenexit_jax.networks import Heads, Network, Params
from tokenexit_jax.shrinking import SemanticModel, fitting_layers, shapes_of_layers
from tokenexit_jax.wrapping import Capacities, wrap, wrap_gates, wrap_semantic

__all__ = ["load", "load_gates", "load_semantic", "save", "save_gates", "save_semantic"]

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_WHOLE = ("int32", "int64")  # counts of batches; the PyTorch adapter writes the longer ones
_TYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64"}


def save(model: ExitingModel, heads: Heads, folder: str | Path, /) -> None:
    """Write the exits of a wrapped model: `exits.json`, and the file of weights that it names.

    Over a folder that holds exits already, an interruption leaves the old ones or the new ones. The capacities are not
    among them: they are of the machine that runs the model.

    Args:
        model: The wrapped model.
        heads: Weights of its heads.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not wrapped, its schedule has a policy that is not of the library, the weights are
            not of its heads, not floating or not finite, or the folder cannot be written to. Nothing is written then.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
    weights = _weights(validated_heads(model, heads), shapes_of(model), "heads")
    folders.save(folder, "exits", manifest.to_dict(_manifest(model)), weights)


def load(
    folder: str | Path,
    network: Network,
    /,
    *,
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None = None,
    capacities: Capacities = (0.25, 0.5, 0.75, 1.0),
) -> tuple[ExitingModel, Heads]:
    """Wrap a network with exits that were saved, here or by the PyTorch adapter.

    Args:
        folder: Where they were written.
        network: The network to wrap, as for `wrap`.
        head: Your final head, if you gave one when the exits were saved.
        capacities: Buckets, as for `wrap`.

    Returns:
        The model with exits, and the weights of its heads.

    Raises:
        TokenExitError: If a file is missing or not what it should be, the exits are of another network, or their heads
            were modules of your own.
    """
    plan, file = folders.read(folder, "exits", manifest.from_dict)
    given = "None" if head is None else repr(head)
    rule = "be given exactly if the exits were saved without a final head"
    require((head is None) == plan.built_head, "head", rule, given)
    if plan.plan is None:
        raise TokenExitError("`folder` must hold heads built from a plan, got modules of another framework's own")
    _require_fits(plan, network, "exits")
    declared = dense(after=plan.after)
    model = wrap(network, declared, classes=plan.classes, exit_heads=plan.plan, head=head, capacities=capacities)
    model = replace(model.retuned(plan.schedule), fitted=plan.fitted)
    return model, _read(file, shapes_of(model), "exits")


def save_gates(model: GatedModel, gates: Heads, folder: str | Path, /) -> None:
    """Write the gates of a wrapped model: `gates.json`, and the file of weights that it names; one act, as `save`.

    The capacities are not among them: they are of the machine that runs the model.

    Args:
        model: The model with gates. Parameters of the network and its head are yours, and are not saved.
        gates: Weights of its gates.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` has no gates, its schedule has a policy that is not of the library, the weights are
            not of its gates, not floating or not finite, or the folder cannot be written to. Nothing is written then.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    width, depth = model.network.width, model.depth
    plan = Manifest(model.schedule, model.after, model.gate_plan, built_head=False, classes=2, width=width, depth=depth)
    weights = _weights({"gates": fitting_gates(model, gates)}, {"gates": shapes_of_gates(model)}, "gates")
    folders.save(folder, "gates", manifest.to_dict(plan), weights)


def load_gates(
    folder: str | Path,
    network: Network,
    /,
    *,
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None = None,
    taps: Iterable[int] | None = None,
    capacities: Capacities = (0.25, 0.5, 0.75, 1.0),
) -> tuple[GatedModel, Heads]:
    """Wrap a network with gates that were saved, here or by the PyTorch adapter.

    Args:
        folder: Where they were written.
        network: The network to wrap, as for `wrap_gates`.
        head: Your final head, if there is one.
        taps: After how many blocks maps are handed out; the last if left out.
        capacities: Buckets, as for `wrap_gates`.

    Returns:
        The model with gates, and the weights of its gates.

    Raises:
        TokenExitError: If a file is missing or not what it should be, the gates are of another network, or were modules
            of your own.
    """
    plan, file = folders.read(folder, "gates", manifest.from_dict)
    require(plan.classes == 2 and not plan.built_head, "folder", "hold gates", f"heads of {plan.classes} classes")
    if plan.plan is None:
        raise TokenExitError("`folder` must hold gates built from a plan, got modules of another framework's own")
    _require_fits(plan, network, "gates")
    model = wrap_gates(network, dense(after=plan.after), head=head, gates=plan.plan, taps=taps, capacities=capacities)
    read = _read(file, {"gates": shapes_of_gates(model)}, "gates")
    return model.retuned(plan.schedule), read["gates"]


def save_semantic(model: SemanticModel, layers: Weights, folder: str | Path, /) -> None:
    """Write the layers of a model on semantic tokens: `semantic.json`, and the file of weights that it names.

    It is one act, as `save`.

    Args:
        model: The model on semantic tokens. The parameters of the network are yours, and are not saved.
        layers: Weights of the layers that were put in.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not on semantic tokens, the weights are not of its layers, not floating or not
            finite, or the folder cannot be written to. Nothing is written then.
    """
    rule = "be on semantic tokens, as `wrap_semantic` gives"
    require(isinstance(model, SemanticModel), "model", rule, type(model).__name__)
    block, _ = model.tokens.blocks
    plan = SemanticManifest(
        model.plan, model.after, model.until, heads=block.heads, hidden=block.inside, epsilon=block.epsilon,
        width=model.network.width, depth=model.depth,
    )  # fmt: skip
    weights = _weights(fitting_layers(model, layers), shapes_of_layers(model), "layers")
    folders.save(folder, "semantic", manifest.semantic_to_dict(plan), weights)


def load_semantic(folder: str | Path, network: Network, /) -> tuple[SemanticModel, dict[str, Array]]:
    """Let blocks of a network run on semantic tokens, with layers that were saved, here or by the PyTorch adapter.

    Args:
        folder: Where they were written.
        network: The network to wrap, as for `wrap_semantic`.

    Returns:
        The model on semantic tokens, and the weights of its layers.

    Raises:
        TokenExitError: If a file is missing or not what it should be, or the layers are of another network.
    """
    plan, file = folders.read(folder, "semantic", manifest.semantic_from_dict)
    _require_fits(plan, network, "layers")
    model = wrap_semantic(
        network, plan.plan,
        after=plan.after, until=plan.until, heads=plan.heads, hidden=plan.hidden, epsilon=plan.epsilon,
    )  # fmt: skip
    return model, _read(file, shapes_of_layers(model), "semantic")


def _require_fits(plan: Manifest | SemanticManifest, network: Network, what: str) -> None:
    for name, found in (("width", network.width), ("depth", network.depth)):
        wanted = getattr(plan, name)
        require(found == wanted, "network", f"have {name} {wanted}, as the saved {what}", found)


def _manifest(model: ExitingModel) -> Manifest:
    return Manifest(
        schedule=model.schedule,
        after=model.after,
        plan=model.head_plan,
        built_head=model.head is None,
        classes=model.classes,
        width=model.network.width,
        depth=model.depth,
        fitted=model.fitted,
    )


def _named(heads: Heads) -> dict[str, Any]:
    """The weights, in their order, under the names that they have in the file."""
    leaves = jax.tree.leaves_with_path(heads)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _weights(given: Any, wanted: Any, argument: str) -> bytes:
    """Weights as the bytes of a safetensors file, after a check that they can be loaded."""
    weights = {name: jnp.asarray(value) for name, value in _named(given).items()}
    source = "be weights to be saved"
    _require_kinds(argument, source, _named(wanted), {name: str(value.dtype) for name, value in weights.items()})
    _require_finite(argument, source, weights)
    return to_bytes(weights)


def _read(file: Path, like: Heads, kind: Kind) -> Heads:
    """The weights, in their places; nothing is read before the shapes are seen to be right."""
    wanted, source = _named(like), f"hold the weights that {kind}.json describes"
    try:
        with safe_open(file, framework="flax") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            _require_shapes({name: tuple(leaf.shape) for name, leaf in wanted.items()}, found, source)
            # By the names that safetensors has for them: some types cannot be read at all.
            types = {name: _TYPES.get(kind, kind) for name in wanted if (kind := weights.get_slice(name).get_dtype())}
            _require_kinds("folder", source, wanted, types)
            read = {name: weights.get_tensor(name) for name in wanted}
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold valid weights, got {file}: {error}") from error
    _require_finite("folder", source, read)
    return jax.tree.unflatten(jax.tree.structure(like), list(read.values()))


def _require_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], source: str) -> None:
    every = [*sorted(found), *sorted({*wanted} - {*found})]
    names = [name for name in every if wanted.get(name) != found.get(name)]
    got = ", ".join(f"{name}: {found.get(name)} instead of {wanted.get(name)}" for name in names[:4])
    require(not names, "folder", source, got)


def _require_kinds(argument: str, source: str, wanted: Mapping[str, Any], found: Mapping[str, str]) -> None:
    """Raise a `TokenExitError` unless weights, by the names of their types, are of the kinds of others."""
    for name, kind in found.items():
        kinds = _FLOATING if jnp.issubdtype(wanted[name].dtype, jnp.floating) else _WHOLE
        require(kind in kinds, argument, f"{source}, in {', '.join(kinds)}", f"{name} in {kind}")


def _require_finite(argument: str, source: str, found: Mapping[str, Array]) -> None:
    for name, value in found.items():
        finite = bool(jnp.isfinite(value).all())
        require(finite, argument, f"{source}, all of them finite", f"NaN or infinity in {name}")
