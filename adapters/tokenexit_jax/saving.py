"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the manifest.

A save is one act (`tokenexit.folders`), and refuses what could not be loaded. Nothing read is ever executed. The files
are those of the PyTorch adapter, which reads what this one wrote, and the other way round. The parameters of the
network are yours and are not saved; nor is a final head that you gave. What is written and what is refused is the
core's, `tokenexit.manifest` and `tokenexit.weights`.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, overload

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float
from safetensors import safe_open
from safetensors.flax import save as to_bytes

from tokenexit import TokenExitError, folders, manifest, weights
from tokenexit.errors import require
from tokenexit.folders import Kind
from tokenexit.manifest import HeadManifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit.weights import Spec
from tokenexit_jax.exits.model import ExitingModel, shapes_of, validated_heads
from tokenexit_jax.gates.model import GatedModel, fitting_gates, shapes_of_gates
from tokenexit_jax.networks.protocol import Heads, Network, Params
from tokenexit_jax.semantic.model import SemanticModel, fitting_layers, shapes_of_layers
from tokenexit_jax.wrapping import Capacities, wrap, wrap_gates, wrap_semantic

__all__ = ["load", "save"]

Head = Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None
Buckets = Capacities | None

_BUCKETS: Capacities = (0.25, 0.5, 0.75, 1.0)


def save(model: ExitingModel | GatedModel | SemanticModel, weights: Mapping[str, Any], folder: str | Path, /) -> None:
    """Write the exits, the gates or the semantic layers of a wrapped model, and its plan.

    Written are `exits.json`, `gates.json` or `semantic.json`, and the file of weights that it names. Over a folder that
    holds the same already, an interruption leaves the old ones or the new ones. The capacities are not among them: they
    are of the machine that runs the model.

    Args:
        model: The model, wrapped by `wrap`, `wrap_gates` or `wrap_semantic`. Parameters of the network, and a final
            head that you gave, are not saved.
        weights: Weights of its heads, gates or layers, as `model.init` makes them.
        folder: Where to; made if it is not there. It may hold exits, gates and semantic layers side by side.

    Raises:
        TokenExitError: If `model` is not wrapped, its schedule has a policy that is not of the library, the weights are
            not of the model, not floating or not finite, or the folder cannot be written to. Nothing is written then.
    """
    manifest.write(folder, *_described(model, weights))


@overload
def load(
    network: Network, folder: str | Path, /, *, kind: Literal["exits"], head: Head = None, capacities: Buckets = None
) -> tuple[ExitingModel, Heads]: ...
@overload
def load(
    network: Network,
    folder: str | Path,
    /,
    *,
    kind: Literal["gates"],
    head: Head = None,
    taps: Iterable[int] | None = None,
    capacities: Buckets = None,
) -> tuple[GatedModel, Heads]: ...
@overload
def load(
    network: Network, folder: str | Path, /, *, kind: Literal["semantic"]
) -> tuple[SemanticModel, dict[str, Array]]: ...
@overload
def load(
    network: Network,
    folder: str | Path,
    /,
    *,
    kind: None = None,
    head: Head = None,
    taps: Iterable[int] | None = None,
    capacities: Buckets = None,
) -> tuple[ExitingModel | GatedModel | SemanticModel, dict[str, Any]]: ...
def load(
    network: Network,
    folder: str | Path,
    /,
    *,
    kind: Kind | None = None,
    head: Head = None,
    taps: Iterable[int] | None = None,
    capacities: Buckets = None,
) -> tuple[ExitingModel | GatedModel | SemanticModel, dict[str, Any]]:
    """Wrap a network with exits, gates or semantic layers that were saved, here or by the PyTorch adapter.

    Args:
        network: The network to wrap, as for the `wrap*` that made what was saved.
        folder: Where it was written.
        kind: What to load: `exits`, `gates` or `semantic`. If left out, what the folder holds. Named, a type
            checker also infers what is returned.
        head: Your final head, if you gave one when exits were saved, or if there is one beside gates.
        taps: With gates: after how many blocks maps are handed out; the last if left out.
        capacities: With exits or gates: buckets, as for `wrap`.

    Returns:
        The wrapped model, and the weights of its heads, gates or layers.

    Raises:
        TokenExitError: If a file is missing or not what it should be, what it holds is of another network or kind, its
            heads were modules of your own or translate for a decoder, the folder holds several kinds and none is named,
            or an option is given that is for another kind.
    """
    options = {"head": head, "taps": taps, "capacities": capacities}
    return folders.load_by_kind(_LOADERS, network, folder, kind, options)


def _load_exits(
    network: Network, folder: str | Path, /, *, head: Head = None, capacities: Capacities = _BUCKETS
) -> tuple[ExitingModel, Heads]:
    saved, file = manifest.read(folder, "exits")
    rule = "hold translators for a final head: those for a decoder's taps run in PyTorch alone"
    require(not saved.taps, "folder", rule, f"translators for the taps {saved.taps}")
    manifest.require_final_head(saved, head)
    plan = manifest.require_head_plan(saved, "exits")
    manifest.require_network(saved, "exits", argument="network", width=network.width, depth=network.depth)
    declared = dense(after=saved.after)
    model = wrap(network, declared, classes=saved.classes, exit_heads=plan, head=head, capacities=capacities)
    model = replace(model.retuned(saved.schedule), fitted=saved.fitted)
    return model, _read(file, shapes_of(model), "exits")


def _load_gates(
    network: Network,
    folder: str | Path,
    /,
    *,
    head: Head = None,
    taps: Iterable[int] | None = None,
    capacities: Capacities = _BUCKETS,
) -> tuple[GatedModel, Heads]:
    saved, file = manifest.read(folder, "gates")
    plan = manifest.require_head_plan(saved, "gates")
    manifest.require_network(saved, "gates", argument="network", width=network.width, depth=network.depth)
    model = wrap_gates(network, dense(after=saved.after), head=head, gates=plan, taps=taps, capacities=capacities)
    read = _read(file, {"gates": shapes_of_gates(model)}, "gates")
    return model.retuned(saved.schedule), read["gates"]


def _load_semantic(network: Network, folder: str | Path, /) -> tuple[SemanticModel, dict[str, Array]]:
    saved, file = manifest.read(folder, "semantic")
    manifest.require_network(saved, "semantic", argument="network", width=network.width, depth=network.depth)
    model = wrap_semantic(
        network, saved.semantic_plan,
        after=saved.after, until=saved.until, heads=saved.heads, hidden=saved.hidden, epsilon=saved.epsilon,
    )  # fmt: skip
    return model, _read(file, shapes_of_layers(model), "semantic")


_LOADERS: Mapping[str, tuple[Kind, Callable[..., Any]]] = {
    "exits": ("exits", _load_exits),
    "gates": ("gates", _load_gates),
    "semantic": ("semantic", _load_semantic),
}


def _described(model: Any, values: Any) -> tuple[Kind, HeadManifest | SemanticManifest, bytes]:
    """Kind and manifest of a model, and its weights as the bytes of a file, after a check that they are its own."""
    match model:
        case ExitingModel():
            built, sizes = model.head is None, (model.classes, model.network.width, model.depth)
            saved = HeadManifest(model.schedule, model.after, model.head_plan, built, *sizes, model.fitted)
            return "exits", saved, _to_bytes(validated_heads(model, values), shapes_of(model), "heads")
        case GatedModel():
            width, depth = model.network.width, model.depth
            saved = HeadManifest(model.schedule, model.after, model.gate_plan, False, 2, width=width, depth=depth)
            gates, wanted = {"gates": fitting_gates(model, values)}, {"gates": shapes_of_gates(model)}
            return "gates", saved, _to_bytes(gates, wanted, "gates")
        case SemanticModel():
            block, _ = model.tokens.blocks
            layers = SemanticManifest(
                model.plan, model.after, model.until, heads=block.heads, hidden=block.inside, epsilon=block.epsilon,
                width=model.network.width, depth=model.depth,
            )  # fmt: skip
            return "semantic", layers, _to_bytes(fitting_layers(model, values), shapes_of_layers(model), "layers")
    rule = "be wrapped by `wrap`, `wrap_gates` or `wrap_semantic`"
    raise TokenExitError(f"`model` must {rule}, got {type(model).__name__}")


def _named(tree: Any) -> dict[str, Any]:
    """The weights, in their order, under the names that they have in the file."""
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _specs(tree: Any) -> dict[str, Spec]:
    return {name: Spec(tuple(leaf.shape), str(leaf.dtype)) for name, leaf in _named(tree).items()}


def _to_bytes(given: Any, wanted: Any, argument: str) -> bytes:
    """Weights as the bytes of a safetensors file, after a check that they can be loaded."""
    found = {name: jnp.asarray(value) for name, value in _named(given).items()}
    rule = "be weights to be saved"
    weights.require_specs(argument, rule, _specs(wanted), _specs(found))
    weights.require_finite(argument, rule, _not_finite(found))
    return to_bytes(found)


def _read(file: Path, like: Any, kind: Kind) -> Any:
    """The weights, in their places; nothing is read before names, shapes and dtypes are seen to be right."""
    rule, wanted = manifest.weights_rule(kind), _specs(like)
    weights.require_specs("folder", rule, wanted, weights.read_specs(file))
    with safe_open(file, framework="flax") as opened:
        read = {name: opened.get_tensor(name) for name in wanted}
    weights.require_finite("folder", rule, _not_finite(read))
    return jax.tree.unflatten(jax.tree.structure(like), list(read.values()))


def _not_finite(found: Mapping[str, Array]) -> Iterable[str]:
    return (name for name, value in found.items() if not jnp.isfinite(value).all())
