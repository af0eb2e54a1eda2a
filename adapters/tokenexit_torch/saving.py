"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the plan.

A save is one act (`tokenexit.folders`), and refuses what could not be loaded. Nothing read is ever executed. The
wrapped model's own weights are yours and are not saved; nor is a final head that you gave.
"""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tokenexit import TokenExitError, folders, manifest
from tokenexit.errors import require
from tokenexit.folders import Kind
from tokenexit.heads import HeadPlan
from tokenexit.manifest import Manifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit_torch._files import require_shapes, require_weights
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.heads import build
from tokenexit_torch.hosts import Host
from tokenexit_torch.registry import decoding_host_of, host_of
from tokenexit_torch.shrinking import SemanticModel, new_layers, together
from tokenexit_torch.wrapping import ready, unwrapped_host, wrap, wrap_decoder, wrap_gates

__all__ = ["load", "load_decoder", "load_gates", "load_semantic", "save", "save_gates", "save_semantic"]


def save(model: ExitingModel | DecodingModel, folder: str | Path, /) -> None:
    """Write the exits of a wrapped model: `exits.json`, and the file of weights that it names.

    Over a folder that holds exits already, an interruption leaves the old ones or the new ones.

    Args:
        model: The model, wrapped by `wrap`, or by `wrap_decoder`, whose decoder is part of the model and not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not wrapped, its schedule has a policy that is not of the library, a head is
            compiled, quantised, sharded, parametrised or not finite, so that it could not be loaded, or the folder
            cannot be written to. Nothing is written then.
    """
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    plan = _manifest(model)
    wanted = None if plan.plan is None else _planned(plan, plan.plan, "exit_heads")
    folders.save(folder, "exits", manifest.to_dict(plan), _weights(_saved(model), wanted))


def load(
    folder: str | Path,
    model: Any,
    /,
    *,
    head: nn.Module | None = None,
    exit_heads: Mapping[int, nn.Module] | None = None,
) -> ExitingModel:
    """Wrap a model with exits that were saved.

    Args:
        folder: Where `save` wrote them.
        model: The model to wrap, as for `wrap`.
        head: Your final head, if you gave one when the exits were saved.
        exit_heads: Modules for the exit heads, if you gave modules then; their weights are loaded into them.

    Returns:
        The model with exits; heads that are built anew are in the dtype and on the device of `model`.

    Raises:
        TokenExitError: If a file is missing or not what it should be, or the exits are of another network.
    """
    plan, file = folders.read(folder, "exits", manifest.from_dict)
    require(
        (head is None) == plan.built_head,
        "head",
        "be given exactly if the exits were saved without a final head",
        "None" if head is None else type(head).__name__,
    )
    chosen = _chosen(plan, exit_heads, "exit_heads")
    _require_fits(plan, host_of(model), "exits")
    _require_planned(plan, file, "exit_heads")
    classes = plan.classes if head is None else None
    wrapped = wrap(model, dense(after=plan.after), head=head, num_classes=classes, exit_heads=chosen)
    rule = f"give {plan.classes} classes, as the saved exits"
    require(wrapped.classes == plan.classes, "head", rule, wrapped.classes)
    _fill(_saved(wrapped), file, "exits")
    wrapped.fitted = plan.fitted
    wrapped.retune(plan.schedule)
    return wrapped


def load_decoder(
    folder: str | Path, model: Any, /, *, exit_heads: Mapping[int, nn.Module] | None = None
) -> DecodingModel:
    """Wrap a model with a decoder of its own with exits that were saved.

    Args:
        folder: Where `save` wrote them.
        model: The model to wrap, as for `wrap_decoder`.
        exit_heads: Modules for the exit heads, if you gave modules then; their weights are loaded into them.

    Returns:
        The model with exits; heads that are built anew are in the dtype and on the device of `model`.

    Raises:
        TokenExitError: If a file is missing or not what it should be, or the exits are of another network.
    """
    plan, file = folders.read(folder, "exits", manifest.from_dict)
    require(not plan.built_head, "folder", "hold exits of a model with a decoder of its own", "a final head as well")
    chosen = _chosen(plan, exit_heads, "exit_heads")
    _require_fits(plan, decoding_host_of(model), "exits")
    _require_planned(plan, file, "exit_heads")
    wrapped = wrap_decoder(model, dense(after=plan.after), exit_heads=chosen, num_classes=plan.classes)
    _fill(_saved(wrapped), file, "exits")
    wrapped.fitted = plan.fitted
    wrapped.retune(plan.schedule)
    return wrapped


def save_gates(model: GatedModel, folder: str | Path, /) -> None:
    """Write the gates of a wrapped model: `gates.json`, and the file of weights that it names; one act, as `save`.

    Args:
        model: The model with gates. Its own weights and its head are yours, and are not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` has no gates, its schedule has a policy that is not of the library, a gate could not
            be loaded, as for `save`, or the folder cannot be written to. Nothing is written then.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    after = tuple(int(block) for block in model.gates)
    plan = Manifest(
        model.schedule, after, model.gate_plan, built_head=False, classes=2, width=model.host.width, depth=model.depth
    )
    wanted = None if plan.plan is None else _planned(plan, plan.plan, "gates")
    weights = _weights(nn.ModuleDict({"gates": model.gates}), wanted)
    folders.save(folder, "gates", manifest.to_dict(plan), weights)


def load_gates(
    folder: str | Path,
    model: Any,
    /,
    *,
    head: nn.Module | None = None,
    gates: Mapping[int, nn.Module] | None = None,
    taps: Iterable[int] | None = None,
) -> GatedModel:
    """Wrap a model with gates that were saved.

    Args:
        folder: Where `save_gates` wrote them.
        model: The model to wrap, as for `wrap_gates`.
        head: Your final head, if there is one.
        gates: Modules for the gates, if you gave modules when they were saved; their weights are loaded into them.
        taps: After how many blocks maps are handed out; the last if left out.

    Returns:
        The model with gates; those that are built anew are in the dtype and on the device of `model`.

    Raises:
        TokenExitError: If a file is missing or not what it should be, or the gates are of another network.
    """
    plan, file = folders.read(folder, "gates", manifest.from_dict)
    require(plan.classes == 2 and not plan.built_head, "folder", "hold gates", f"heads of {plan.classes} classes")
    _require_fits(plan, host_of(model), "gates")
    chosen = _chosen(plan, gates, "gates")
    _require_planned(plan, file, "gates")
    wrapped = wrap_gates(model, dense(after=plan.after), head=head, gates=chosen, taps=taps)
    _fill(nn.ModuleDict({"gates": wrapped.gates}), file, "gates")
    wrapped.retune(plan.schedule)
    return wrapped


def save_semantic(model: SemanticModel, folder: str | Path, /) -> None:
    """Write the layers of a model on semantic tokens: `semantic.json`, and the file of weights that it names.

    It is one act, as `save`.

    Args:
        model: The model on semantic tokens. The weights of the model that it wraps are yours, and are not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not on semantic tokens, a layer could not be loaded, as for `save`, or the folder
            cannot be written to. Nothing is written then.
    """
    rule = "be on semantic tokens, as `wrap_semantic` gives"
    require(isinstance(model, SemanticModel), "model", rule, type(model).__name__)
    block = model.tokens.first
    plan = SemanticManifest(
        model.plan, model.after, model.until, heads=block.heads, hidden=block.hidden, epsilon=block.norm1.eps,
        width=model.host.width, depth=model.depth,
    )  # fmt: skip
    weights = _weights(model.layers, _semantic_layers(plan))
    folders.save(folder, "semantic", manifest.semantic_to_dict(plan), weights)


def load_semantic(folder: str | Path, model: Any, /) -> SemanticModel:
    """Let blocks of a model run on semantic tokens, with layers that were saved.

    Args:
        folder: Where `save_semantic` wrote them.
        model: The model to wrap, as for `wrap_semantic`.

    Returns:
        The model on semantic tokens; its layers are in the dtype and on the device of `model`.

    Raises:
        TokenExitError: If a file is missing or not what it should be, or the layers are of another network.
    """
    plan, file = folders.read(folder, "semantic", manifest.semantic_from_dict)
    host = unwrapped_host(model)
    _require_fits(plan, host, "layers")
    _require_shapes(_semantic_layers(plan), file, "semantic")  # before memory is taken for what the file claims
    wrapped = SemanticModel(host, *_new_layers(plan)(), after=plan.after, until=plan.until)
    _fill(wrapped.layers, file, "semantic")
    return ready(wrapped)


def _new_layers(plan: SemanticManifest) -> partial[Any]:
    return partial(
        new_layers, plan.plan, plan.until,
        width=plan.width, heads=plan.heads, hidden=plan.hidden, epsilon=plan.epsilon,
    )  # fmt: skip


def _semantic_layers(plan: SemanticManifest) -> dict[str, Tensor]:
    """What layers of this plan hold; nothing is allocated."""
    with torch.device("meta"):
        return together(*_new_layers(plan)()).state_dict()


def _require_fits(plan: Manifest | SemanticManifest, host: Host, what: str) -> None:
    for name, found in (("width", host.width), ("depth", len(host.blocks))):
        wanted = getattr(plan, name)
        require(found == wanted, "model", f"have {name} {wanted}, as the saved {what}", found)


def _chosen(plan: Manifest, given: Mapping[int, nn.Module] | None, argument: str) -> HeadPlan | Mapping[int, nn.Module]:
    """The plan that was saved, or the modules that are given where there was none."""
    chosen = plan.plan if given is None else given
    if chosen is None:
        raise TokenExitError(f"`{argument}` must be given if they were saved as modules of your own, got None")
    if given is not None:
        require(plan.plan is None, argument, "be left out if a plan was saved", plan.plan)
        require(sorted(given) == list(plan.after), argument, f"follow the blocks {plan.after}", [*given])
    return chosen


def _manifest(model: ExitingModel | DecodingModel) -> Manifest:
    return Manifest(
        schedule=model.schedule,
        after=tuple(int(after) for after in model.exit_heads),
        plan=model.head_plan,
        built_head=isinstance(model, ExitingModel) and model.built_head,
        classes=model.classes,
        width=model.host.width,
        depth=model.depth,
        fitted=model.fitted,
    )


def _saved(model: ExitingModel | DecodingModel) -> nn.ModuleDict:
    """The modules that are saved, under the names that they have in the file."""
    parts: dict[str, nn.Module] = {"exit_heads": model.exit_heads}
    return nn.ModuleDict(parts | ({"head": model.head} if isinstance(model, ExitingModel) and model.built_head else {}))


def _weights(modules: nn.ModuleDict, wanted: Mapping[str, Tensor] | None) -> bytes:
    """The weights of modules as the bytes of a safetensors file, after a check that they can be loaded.

    Args:
        modules: The modules.
        wanted: What modules hold that are built from the plan; None if there is no plan.
    """
    state: dict[str, Any] = modules.state_dict()
    for name, value in state.items():
        plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta
        rule = "have heads of plain tensors to be saved, not quantised, and gathered if they are sharded"
        require(plain, "model", rule, f"{type(value).__name__} for {name}")
    like = state if wanted is None else wanted
    rule = "have heads with the weights that their plan describes to be saved (not compiled, parametrised or adapted)"
    require_weights("model", rule, like, state)
    # Copies, for safetensors refuses tensors that share memory.
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    return to_bytes(copies)


def _fill(modules: nn.ModuleDict, file: Path, kind: Kind) -> None:
    """Put saved weights in the place of those that are there."""
    wanted = modules.state_dict()
    _require_shapes(wanted, file, kind)
    found = load_file(file)
    require_weights("folder", _described(kind), wanted, found)
    with torch.no_grad():
        modules.load_state_dict(found)


def _require_planned(plan: Manifest, file: Path, of: str) -> None:
    """Shapes as the plan has them, if it has a plan of heads; before memory is taken for what the file claims."""
    if plan.plan is not None:
        _require_shapes(_planned(plan, plan.plan, of), file, "gates" if of == "gates" else "exits")


def _planned(plan: Manifest, head: HeadPlan, of: str) -> dict[str, Tensor]:
    """What the heads hold that a manifest describes; nothing is allocated."""
    names = [f"{of}.{after}" for after in plan.after] + (["head"] if plan.built_head else [])
    with torch.device("meta"):
        one = build(head, width=plan.width, classes=plan.classes).state_dict()
    return {f"{name}.{key}": value for name in names for key, value in one.items()}


def _require_shapes(wanted: Mapping[str, Tensor], file: Path, kind: Kind) -> None:
    try:
        with safe_open(file, framework="pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold valid weights, got {file}: {error}") from error
    found = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    require_shapes("folder", _described(kind), wanted, found)


def _described(kind: Kind) -> str:
    return f"hold the weights that {kind}.json describes"
