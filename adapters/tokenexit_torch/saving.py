"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the plan.

Nothing read is ever executed. The wrapped model's own weights are yours and are not saved; nor is a final head that you
gave.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tokenexit import TokenExitError, manifest
from tokenexit.errors import require
from tokenexit.heads import HeadPlan
from tokenexit.manifest import Manifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit_torch.decoding import DecodingModel
from tokenexit_torch.gating import GatedModel
from tokenexit_torch.heads import build
from tokenexit_torch.hosts import Host
from tokenexit_torch.registry import decoding_host_of, host_of
from tokenexit_torch.running import ExitingModel
from tokenexit_torch.shrinking import SemanticModel, new_layers, together
from tokenexit_torch.wrapping import ready, unwrapped_host, wrap, wrap_decoder, wrap_gates

__all__ = ["load", "load_decoder", "load_gates", "load_semantic", "save", "save_gates", "save_semantic"]

_PLAN = "exits.json"
_WEIGHTS = "exits.safetensors"
_GATE_PLAN = "gates.json"
_GATE_WEIGHTS = "gates.safetensors"
_SEMANTIC_PLAN = "semantic.json"
_SEMANTIC_WEIGHTS = "semantic.safetensors"

Plan = TypeVar("Plan", Manifest, SemanticManifest)


def save(model: ExitingModel | DecodingModel, folder: str | Path, /) -> None:
    """Write the exits of a wrapped model: `exits.json` and `exits.safetensors`.

    Args:
        model: The model, wrapped by `wrap`, or by `wrap_decoder`, whose decoder is part of the model and not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not wrapped, or its schedule has a policy that is not of the library.
    """
    known = isinstance(model, ExitingModel | DecodingModel)
    require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
    text = manifest.to_json(_manifest(model))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in _saved(model).state_dict().items()}, folder / _WEIGHTS)
    (folder / _PLAN).write_text(text, encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _PLAN, _WEIGHTS, manifest.from_json)
    require(
        (head is None) == plan.built_head,
        "head",
        "be given exactly if the exits were saved without a final head",
        "None" if head is None else type(head).__name__,
    )
    chosen = _chosen(plan, exit_heads, "exit_heads")
    _require_fits(plan, host_of(model), "exits")
    _require_planned(plan, folder)
    classes = plan.classes if head is None else None
    wrapped = wrap(model, dense(after=plan.after), head=head, num_classes=classes, exit_heads=chosen)
    rule = f"give {plan.classes} classes, as the saved exits"
    require(wrapped.classes == plan.classes, "head", rule, wrapped.classes)
    _load_into(wrapped, folder)
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
    folder = Path(folder)
    plan = _read_plan(folder, _PLAN, _WEIGHTS, manifest.from_json)
    require(not plan.built_head, "folder", "hold exits of a model with a decoder of its own", "a final head as well")
    chosen = _chosen(plan, exit_heads, "exit_heads")
    _require_fits(plan, decoding_host_of(model), "exits")
    _require_planned(plan, folder)
    wrapped = wrap_decoder(model, dense(after=plan.after), exit_heads=chosen, num_classes=plan.classes)
    _load_into(wrapped, folder)
    wrapped.retune(plan.schedule)
    return wrapped


def save_gates(model: GatedModel, folder: str | Path, /) -> None:
    """Write the gates of a wrapped model: `gates.json` and `gates.safetensors`.

    Args:
        model: The model with gates. Its own weights and its head are yours, and are not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` has no gates, or its schedule has a policy that is not of the library.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    after = tuple(int(block) for block in model.gates)
    plan = Manifest(
        model.schedule, after, model.gate_plan, built_head=False, classes=2, width=model.host.width, depth=model.depth
    )
    text = manifest.to_json(plan)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = nn.ModuleDict({"gates": model.gates}).state_dict()
    save_file({name: value.contiguous() for name, value in saved.items()}, folder / _GATE_WEIGHTS)
    (folder / _GATE_PLAN).write_text(text, encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _GATE_PLAN, _GATE_WEIGHTS, manifest.from_json)
    require(plan.classes == 2 and not plan.built_head, "folder", "hold gates", f"heads of {plan.classes} classes")
    _require_fits(plan, host_of(model), "gates")
    chosen = _chosen(plan, gates, "gates")
    shapes = _shapes_in(folder / _GATE_WEIGHTS)
    if gates is None and plan.plan is not None:
        # Before memory is taken for what the file claims.
        _require_shapes(_planned_shapes(plan, plan.plan, "gates"), shapes, _GATE_PLAN)
    wrapped = wrap_gates(model, dense(after=plan.after), head=head, gates=chosen, taps=taps)
    saved = nn.ModuleDict({"gates": wrapped.gates})
    _require_shapes({name: tuple(value.shape) for name, value in saved.state_dict().items()}, shapes, _GATE_PLAN)
    with torch.no_grad():
        saved.load_state_dict(load_file(folder / _GATE_WEIGHTS))
    wrapped.retune(plan.schedule)
    return wrapped


def save_semantic(model: SemanticModel, folder: str | Path, /) -> None:
    """Write the layers of a model on semantic tokens: `semantic.json` and `semantic.safetensors`.

    Args:
        model: The model on semantic tokens. The weights of the model that it wraps are yours, and are not saved.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not on semantic tokens.
    """
    rule = "be on semantic tokens, as `wrap_semantic` gives"
    require(isinstance(model, SemanticModel), "model", rule, type(model).__name__)
    block = model.tokens.first
    plan = SemanticManifest(
        model.plan, model.after, model.until, heads=block.heads, hidden=block.hidden, epsilon=block.norm1.eps,
        width=model.host.width, depth=model.depth,
    )  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    saved = model.layers.state_dict()
    save_file({name: value.contiguous() for name, value in saved.items()}, folder / _SEMANTIC_WEIGHTS)
    (folder / _SEMANTIC_PLAN).write_text(manifest.semantic_to_json(plan), encoding="utf-8")


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
    folder = Path(folder)
    plan = _read_plan(folder, _SEMANTIC_PLAN, _SEMANTIC_WEIGHTS, manifest.semantic_from_json)
    host = unwrapped_host(model)
    _require_fits(plan, host, "layers")
    build = partial(
        new_layers, plan.plan, plan.until,
        width=plan.width, heads=plan.heads, hidden=plan.hidden, epsilon=plan.epsilon,
    )  # fmt: skip
    with torch.device("meta"):  # before memory is taken for what the file claims
        wanted = {name: tuple(value.shape) for name, value in together(*build()).state_dict().items()}
    _require_shapes(wanted, _shapes_in(folder / _SEMANTIC_WEIGHTS), _SEMANTIC_PLAN)
    wrapped = SemanticModel(host, *build(), after=plan.after, until=plan.until)
    with torch.no_grad():
        wrapped.layers.load_state_dict(load_file(folder / _SEMANTIC_WEIGHTS))
    return ready(wrapped)


def _read_plan(folder: Path, plan: str, weights: str, read: Callable[[str], Plan]) -> Plan:
    for name in (plan, weights):
        require((folder / name).is_file(), "folder", f"hold the files {plan} and {weights}", folder)
    try:
        return read((folder / plan).read_text(encoding="utf-8"))
    except (TokenExitError, UnicodeDecodeError) as error:
        raise TokenExitError(f"`folder` must hold a valid {plan}, got {folder / plan}: {error}") from error


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
    )


def _saved(model: ExitingModel | DecodingModel) -> nn.ModuleDict:
    """The modules that are saved, under the names that they have in the file."""
    parts: dict[str, nn.Module] = {"exit_heads": model.exit_heads}
    return nn.ModuleDict(parts | ({"head": model.head} if isinstance(model, ExitingModel) and model.built_head else {}))


def _load_into(model: ExitingModel | DecodingModel, folder: Path) -> None:
    """Put saved weights in the place of those that are there."""
    saved = _saved(model)
    shapes = {name: tuple(value.shape) for name, value in saved.state_dict().items()}
    _require_shapes(shapes, _shapes_in(folder / _WEIGHTS), _PLAN)
    with torch.no_grad():
        saved.load_state_dict(load_file(folder / _WEIGHTS))


def _require_planned(plan: Manifest, folder: Path) -> None:
    """Shapes as the plan has them, if it has a plan of heads; before memory is taken for what the file claims."""
    shapes = _shapes_in(folder / _WEIGHTS)
    if plan.plan is not None:
        _require_shapes(_planned_shapes(plan, plan.plan, "exit_heads"), shapes, _PLAN)


def _planned_shapes(plan: Manifest, head: HeadPlan, of: str) -> dict[str, tuple[int, ...]]:
    """Shapes of the heads that a manifest describes; nothing is allocated."""
    names = [f"{of}.{after}" for after in plan.after] + (["head"] if plan.built_head else [])
    with torch.device("meta"):
        one = build(head, width=plan.width, classes=plan.classes).state_dict()
    return {f"{name}.{key}": tuple(value.shape) for name in names for key, value in one.items()}


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold a valid {file.name}, got {file}: {error}") from error


def _require_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], plan: str) -> None:
    differing = [
        f"{name}: {found.get(name)} instead of {wanted.get(name)}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]
    require(not differing, "folder", f"hold the weights that {plan} describes", ", ".join(differing[:4]))
