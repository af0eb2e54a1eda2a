"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the plan.

Nothing read is ever executed. The files are those of the PyTorch adapter, which reads what this one wrote, and the
other way round. The parameters of the network are yours and are not saved; nor is a final head that you gave.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.flax import save_file

from tokenexit import TokenExitError, manifest
from tokenexit.errors import require
from tokenexit.manifest import Manifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit_jax._layers import Weights
from tokenexit_jax.gating import GatedModel, fitting_gates, shapes_of_gates
from tokenexit_jax.networks import Heads, Network, Params
from tokenexit_jax.running import ExitingModel, fitting, shapes_of
from tokenexit_jax.shrinking import SemanticModel, fitting_layers, shapes_of_layers
from tokenexit_jax.wrapping import Capacities, wrap, wrap_gates, wrap_semantic

__all__ = ["load", "load_gates", "load_semantic", "save", "save_gates", "save_semantic"]

_PLAN = "exits.json"
_WEIGHTS = "exits.safetensors"
_GATE_PLAN = "gates.json"
_GATE_WEIGHTS = "gates.safetensors"
_SEMANTIC_PLAN = "semantic.json"
_SEMANTIC_WEIGHTS = "semantic.safetensors"

Plan = TypeVar("Plan", Manifest, SemanticManifest)


def save(model: ExitingModel, heads: Heads, folder: str | Path, /) -> None:
    """Write the exits of a wrapped model: `exits.json` and `exits.safetensors`.

    The capacities are not among them: they are of the machine that runs the model.

    Args:
        model: The wrapped model.
        heads: Weights of its heads.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not wrapped, its schedule has a policy that is not of the library, or the weights
            are not of its heads.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
    text = manifest.to_json(_manifest(model))
    weights = {name: jnp.asarray(value) for name, value in _named(fitting(model, heads)).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _WEIGHTS)
    (folder / _PLAN).write_text(text, encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _PLAN, _WEIGHTS, manifest.from_json)
    given = "None" if head is None else repr(head)
    rule = "be given exactly if the exits were saved without a final head"
    require((head is None) == plan.built_head, "head", rule, given)
    if plan.plan is None:
        raise TokenExitError("`folder` must hold heads built from a plan, got modules of another framework's own")
    _require_fits(plan, network, "exits")
    declared = dense(after=plan.after)
    model = wrap(network, declared, classes=plan.classes, exit_heads=plan.plan, head=head, capacities=capacities)
    return model.retuned(plan.schedule), _read(folder / _WEIGHTS, shapes_of(model), _PLAN)


def save_gates(model: GatedModel, gates: Heads, folder: str | Path, /) -> None:
    """Write the gates of a wrapped model: `gates.json` and `gates.safetensors`.

    The capacities are not among them: they are of the machine that runs the model.

    Args:
        model: The model with gates. Parameters of the network and its head are yours, and are not saved.
        gates: Weights of its gates.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` has no gates, its schedule has a policy that is not of the library, or the weights
            are not of its gates.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    width, depth = model.network.width, model.depth
    plan = Manifest(model.schedule, model.after, model.gate_plan, built_head=False, classes=2, width=width, depth=depth)
    text = manifest.to_json(plan)
    weights = {name: jnp.asarray(value) for name, value in _named({"gates": fitting_gates(model, gates)}).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _GATE_WEIGHTS)
    (folder / _GATE_PLAN).write_text(text, encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _GATE_PLAN, _GATE_WEIGHTS, manifest.from_json)
    require(plan.classes == 2 and not plan.built_head, "folder", "hold gates", f"heads of {plan.classes} classes")
    if plan.plan is None:
        raise TokenExitError("`folder` must hold gates built from a plan, got modules of another framework's own")
    _require_fits(plan, network, "gates")
    model = wrap_gates(network, dense(after=plan.after), head=head, gates=plan.plan, taps=taps, capacities=capacities)
    read = _read(folder / _GATE_WEIGHTS, {"gates": shapes_of_gates(model)}, _GATE_PLAN)
    return model.retuned(plan.schedule), read["gates"]


def save_semantic(model: SemanticModel, layers: Weights, folder: str | Path, /) -> None:
    """Write the layers of a model on semantic tokens: `semantic.json` and `semantic.safetensors`.

    Args:
        model: The model on semantic tokens. The parameters of the network are yours, and are not saved.
        layers: Weights of the layers that were put in.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not on semantic tokens, or the weights are not of its layers.
    """
    rule = "be on semantic tokens, as `wrap_semantic` gives"
    require(isinstance(model, SemanticModel), "model", rule, type(model).__name__)
    block, _ = model.tokens.blocks
    plan = SemanticManifest(
        model.plan, model.after, model.until, heads=block.heads, hidden=block.inside, epsilon=block.epsilon,
        width=model.network.width, depth=model.depth,
    )  # fmt: skip
    weights = {name: jnp.asarray(value) for name, value in fitting_layers(model, layers).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / _SEMANTIC_WEIGHTS)
    (folder / _SEMANTIC_PLAN).write_text(manifest.semantic_to_json(plan), encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _SEMANTIC_PLAN, _SEMANTIC_WEIGHTS, manifest.semantic_from_json)
    _require_fits(plan, network, "layers")
    model = wrap_semantic(
        network, plan.plan,
        after=plan.after, until=plan.until, heads=plan.heads, hidden=plan.hidden, epsilon=plan.epsilon,
    )  # fmt: skip
    return model, _read(folder / _SEMANTIC_WEIGHTS, shapes_of_layers(model), _SEMANTIC_PLAN)


def _read_plan(folder: Path, plan: str, weights: str, read: Callable[[str], Plan]) -> Plan:
    for name in (plan, weights):
        require((folder / name).is_file(), "folder", f"hold the files {plan} and {weights}", folder)
    try:
        return read((folder / plan).read_text(encoding="utf-8"))
    except (TokenExitError, UnicodeDecodeError) as error:
        raise TokenExitError(f"`folder` must hold a valid {plan}, got {folder / plan}: {error}") from error


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
    )


def _named(heads: Heads) -> dict[str, Any]:
    """The weights, in their order, under the names that they have in the file."""
    leaves = jax.tree.leaves_with_path(heads)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _read(file: Path, like: Heads, plan: str) -> Heads:
    """The weights, in their places; nothing is read before the shapes are seen to be right."""
    wanted = {name: tuple(leaf.shape) for name, leaf in _named(like).items()}
    try:
        with safe_open(file, framework="flax") as weights:
            found = {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
            _require_shapes(wanted, found, plan)
            read = [weights.get_tensor(name) for name in wanted]
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold a valid {file.name}, got {file}: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(like), read)


def _require_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], plan: str) -> None:
    differing = [
        f"{name}: {found.get(name)} instead of {wanted.get(name)}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]
    require(not differing, "folder", f"hold the weights that {plan} describes", ", ".join(differing[:4]))
