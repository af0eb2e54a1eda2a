"""Saving and loading exits: safetensors for the heads, JSON for the plan. Nothing read is ever executed.

The wrapped model's own weights are yours and are not saved; nor is a final head that you gave.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tokenexit import TokenExitError, manifest
from tokenexit.errors import require
from tokenexit.heads import HeadPlan
from tokenexit.manifest import Manifest
from tokenexit.schedule import dense
from tokenexit_torch.heads import build
from tokenexit_torch.hosts import host_of
from tokenexit_torch.running import ExitingModel
from tokenexit_torch.wrapping import wrap

__all__ = ["load", "save"]

_PLAN = "exits.json"
_WEIGHTS = "exits.safetensors"


def save(model: ExitingModel, folder: str | Path, /) -> None:
    """Write the exits of a wrapped model: `exits.json` and `exits.safetensors`.

    Args:
        model: The wrapped model.
        folder: Where to; made if it is not there.

    Raises:
        TokenExitError: If `model` is not wrapped, or its schedule has a policy that is not of the library.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
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
    for name in (_PLAN, _WEIGHTS):
        require((folder / name).is_file(), "folder", f"hold the files {_PLAN} and {_WEIGHTS}", folder)
    try:
        plan = manifest.from_json((folder / _PLAN).read_text(encoding="utf-8"))
    except (TokenExitError, UnicodeDecodeError) as error:
        raise TokenExitError(f"`folder` must hold a valid {_PLAN}, got {folder / _PLAN}: {error}") from error
    require(
        (head is None) == plan.built_head,
        "head",
        "be given exactly if the exits were saved without a final head",
        "None" if head is None else type(head).__name__,
    )
    chosen = plan.plan if exit_heads is None else exit_heads
    if chosen is None:
        raise TokenExitError("`exit_heads` must be given if the exits were saved with modules of your own, got None")
    if exit_heads is not None:
        require(plan.plan is None, "exit_heads", "be left out if a plan was saved", plan.plan)
        require(sorted(exit_heads) == list(plan.after), "exit_heads", f"follow the blocks {plan.after}", [*exit_heads])
    host = host_of(model)
    for name, found in (("width", host.width), ("depth", len(host.blocks))):
        wanted = getattr(plan, name)
        require(found == wanted, "model", f"have {name} {wanted}, as the saved exits", found)
    shapes = _shapes_in(folder / _WEIGHTS)
    if exit_heads is None and plan.plan is not None:
        _require_shapes(_planned_shapes(plan, plan.plan), shapes)  # before memory is taken for what the file claims
    classes = plan.classes if head is None else None
    wrapped = wrap(model, dense(after=plan.after), head=head, num_classes=classes, exit_heads=chosen)
    rule = f"give {plan.classes} classes, as the saved exits"
    require(wrapped.classes == plan.classes, "head", rule, wrapped.classes)
    saved = _saved(wrapped)
    _require_shapes({name: tuple(value.shape) for name, value in saved.state_dict().items()}, shapes)
    with torch.no_grad():
        saved.load_state_dict(load_file(folder / _WEIGHTS))
    wrapped.retune(plan.schedule)
    return wrapped


def _manifest(model: ExitingModel) -> Manifest:
    return Manifest(
        schedule=model.schedule,
        after=tuple(int(after) for after in model.exit_heads),
        plan=model.head_plan,
        built_head=model.built_head,
        classes=model.classes,
        width=model.host.width,
        depth=model.depth,
    )


def _saved(model: ExitingModel) -> nn.ModuleDict:
    """The modules that are saved, under the names that they have in the file."""
    parts: dict[str, nn.Module] = {"exit_heads": model.exit_heads}
    return nn.ModuleDict(parts | ({"head": model.head} if model.built_head else {}))


def _planned_shapes(plan: Manifest, head: HeadPlan) -> dict[str, tuple[int, ...]]:
    """Shapes of the heads that a manifest describes; nothing is allocated."""
    names = [f"exit_heads.{after}" for after in plan.after] + (["head"] if plan.built_head else [])
    with torch.device("meta"):
        one = build(head, width=plan.width, classes=plan.classes).state_dict()
    return {f"{name}.{key}": tuple(value.shape) for name in names for key, value in one.items()}


def _shapes_in(file: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as weights:
            return {name: tuple(weights.get_slice(name).get_shape()) for name in weights.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold a valid {_WEIGHTS}, got {file}: {error}") from error


def _require_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> None:
    differing = [
        f"{name}: {found.get(name)} instead of {wanted.get(name)}"
        for name in sorted({*wanted, *found})
        if wanted.get(name) != found.get(name)
    ]
    require(not differing, "folder", f"hold weights of the heads in {_PLAN}", ", ".join(differing[:4]))
