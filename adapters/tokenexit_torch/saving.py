"""Saving and loading exits, gates and semantic tokens: safetensors for the weights, JSON for the manifest.

A save is one act (`tokenexit.folders`), and refuses what could not be loaded. Nothing read is ever executed. The
wrapped model's own weights are yours and are not saved; nor is a final head that you gave. What is written and what is
refused is the core's, `tokenexit.manifest` and `tokenexit.weights`.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from tokenexit import TokenExitError, folders, manifest, weights
from tokenexit.errors import require
from tokenexit.folders import Kind
from tokenexit.heads import HeadPlan
from tokenexit.manifest import HeadManifest, SemanticManifest
from tokenexit.schedule import dense
from tokenexit.weights import Spec
from tokenexit_torch._files import require_weights, specs
from tokenexit_torch.exits.decoder import DecodingModel
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.heads import build
from tokenexit_torch.hosts.given import Features, Reads
from tokenexit_torch.hosts.protocol import Host
from tokenexit_torch.hosts.registry import decoding_host_of, host_of
from tokenexit_torch.semantic.model import SemanticModel, new_layers, together
from tokenexit_torch.wrapping import ready, unwrapped_host, wrap, wrap_decoder, wrap_gates

__all__ = ["load", "save"]

Head = nn.Module | None
Modules = Mapping[int, nn.Module] | None
Blocks = Iterable[int] | None
WithExitHeads = TypeVar("WithExitHeads", ExitingModel, DecodingModel)


def save(model: ExitingModel | DecodingModel | GatedModel | SemanticModel, folder: str | Path, /) -> None:
    """Write the exits, the gates or the semantic layers of a wrapped model, and its plan.

    Written are `exits.json`, `gates.json` or `semantic.json`, and the file of weights that it names. Over a folder that
    holds the same already, an interruption leaves the old ones or the new ones.

    Args:
        model: The model, wrapped by `wrap`, `wrap_decoder`, `wrap_gates` or `wrap_semantic`. The weights of the model
            that it wraps, its decoder and a final head that you gave are not saved.
        folder: Where to; made if it is not there. It may hold exits, gates and semantic layers side by side.

    Raises:
        TokenExitError: If `model` is not wrapped, its schedule has a policy that is not of the library, a head or layer
            is compiled, quantised, sharded, parametrised or not finite, so that it could not be loaded, or the folder
            cannot be written to. Nothing is written then.
    """
    kind, saved, modules = _described(model)
    manifest.write(folder, kind, saved, _to_bytes(modules, _planned(saved, kind)))


@overload
def load(
    model: Any, folder: str | Path, /, *, kind: Literal["exits"], head: Head = None, exit_heads: Modules = None
) -> ExitingModel: ...
@overload
def load(
    model: Any,
    folder: str | Path,
    /,
    *,
    kind: Literal["decoder"],
    exit_heads: Modules = None,
    taps: Blocks = None,
    decoder: nn.Module | None = None,
    features: Features | None = None,
    reads: Reads | None = None,
) -> DecodingModel: ...
@overload
def load(
    model: Any,
    folder: str | Path,
    /,
    *,
    kind: Literal["gates"],
    head: Head = None,
    gates: Modules = None,
    taps: Blocks = None,
) -> GatedModel: ...
@overload
def load(model: Any, folder: str | Path, /, *, kind: Literal["semantic"]) -> SemanticModel: ...
@overload
def load(
    model: Any,
    folder: str | Path,
    /,
    *,
    kind: None = None,
    head: Head = None,
    exit_heads: Modules = None,
    gates: Modules = None,
    taps: Blocks = None,
) -> ExitingModel | GatedModel | SemanticModel: ...
def load(
    model: Any,
    folder: str | Path,
    /,
    *,
    kind: Literal["exits", "decoder", "gates", "semantic"] | None = None,
    head: Head = None,
    exit_heads: Modules = None,
    gates: Modules = None,
    taps: Blocks = None,
    decoder: nn.Module | None = None,
    features: Features | None = None,
    reads: Reads | None = None,
) -> ExitingModel | DecodingModel | GatedModel | SemanticModel:
    """Wrap a model with exits, gates or semantic layers that were saved, here or by the JAX adapter.

    Args:
        model: The model to wrap, as for the `wrap*` that made what was saved.
        folder: Where `save` wrote it.
        kind: What to load: `exits`, as by `wrap` with a head; `decoder`, exits as by `wrap_decoder`, or by `wrap` with
            a decoder; `gates`; or `semantic`. If left out, what the folder holds, exits as by `wrap` with a head, or
            with a decoder where `decoder` is given.
            Named, a type checker also infers what is returned.
        head: Your final head, if you gave one when exits were saved, or if there is one beside gates.
        exit_heads: Modules for the exit heads, if you gave modules when they were saved; their weights are loaded into
            them.
        gates: Modules for the gates, likewise.
        taps: With gates, or a decoder of yours: after how many blocks maps are handed out; the last if left out.
        decoder: Your decoder, if you gave one to `wrap`.
        features: What it reads, as for `wrap`.
        reads: Likewise.

    Returns:
        The wrapped model; heads, gates and layers that are built anew are in the dtype and on the device of `model`.

    Raises:
        TokenExitError: If a file is missing or not what it should be, what it holds is of another network or kind, the
            folder holds several kinds and none is named, or an option is given that is for another kind.
    """
    options = {"head": head, "exit_heads": exit_heads, "gates": gates, "taps": taps}
    options |= {"decoder": decoder, "features": features, "reads": reads}
    kind = "decoder" if kind is None and decoder is not None else kind
    return folders.load_by_kind(_LOADERS, model, folder, kind, options)


def refill(model: ExitingModel | DecodingModel, folder: str | Path, /) -> None:
    """Put saved exits of the same kind into a model that is wrapped. Not public."""
    saved, file = manifest.read(folder, "exits")
    heads = [int(block) for block in model.exit_heads]
    require(list(saved.after) == heads, "folder", f"hold exits after the blocks {heads}", list(saved.after))
    _put(model, saved, file)


def _load_exits(model: Any, folder: str | Path, /, *, head: Head = None, exit_heads: Modules = None) -> ExitingModel:
    saved, file = manifest.read(folder, "exits")
    manifest.require_final_head(saved, head)
    chosen = _chosen(saved, file, "exits", host_of(model), exit_heads, "exit_heads")
    classes = saved.classes if head is None else None
    wrapped = wrap(model, dense(after=saved.after), head=head, num_classes=classes, exit_heads=chosen)
    manifest.require_classes(saved, wrapped.classes)
    return _with_saved(wrapped, saved, file)


def _load_decoder(
    model: Any,
    folder: str | Path,
    /,
    *,
    exit_heads: Modules = None,
    taps: Blocks = None,
    decoder: nn.Module | None = None,
    features: Features = "normalised",
    reads: Reads = "patches",
) -> DecodingModel:
    saved, file = manifest.read(folder, "exits")
    rule = "hold exits of a model with a decoder of its own"
    require(not saved.built_head, "folder", rule, "a final head as well, for kind='exits'")
    host = decoding_host_of(model) if decoder is None else host_of(model)
    chosen = _chosen(saved, file, "exits", host, exit_heads, "exit_heads")
    plan, options = dense(after=saved.after), {"exit_heads": chosen, "num_classes": saved.classes or None}
    if decoder is None:
        wrapped = wrap_decoder(model, plan, **options)
    else:
        tapped = None if taps is None else tuple(taps)
        wrapped = wrap(model, plan, decoder=decoder, taps=tapped, features=features, reads=reads, **options)
    rule = f"be the taps of the saved translators, {saved.taps}"
    require(saved.taps in ((), wrapped.taps), "taps", rule, wrapped.taps)
    return _with_saved(wrapped, saved, file)


def _load_gates(
    model: Any, folder: str | Path, /, *, head: Head = None, gates: Modules = None, taps: Blocks = None
) -> GatedModel:
    saved, file = manifest.read(folder, "gates")
    chosen = _chosen(saved, file, "gates", host_of(model), gates, "gates")
    wrapped = wrap_gates(model, dense(after=saved.after), head=head, gates=chosen, taps=taps)
    _fill(nn.ModuleDict({"gates": wrapped.gates}), file, "gates")
    wrapped.retune(saved.schedule)
    return wrapped


def _load_semantic(model: Any, folder: str | Path, /) -> SemanticModel:
    saved, file = manifest.read(folder, "semantic")
    host = unwrapped_host(model)
    _require_saved(saved, file, "semantic", host)
    wrapped = SemanticModel(host, *_new_layers(saved), after=saved.after, until=saved.until)
    _fill(wrapped.layers, file, "semantic")
    return ready(wrapped)


_LOADERS: Mapping[str, tuple[Kind, Callable[..., Any]]] = {
    "exits": ("exits", _load_exits),
    "decoder": ("exits", _load_decoder),
    "gates": ("gates", _load_gates),
    "semantic": ("semantic", _load_semantic),
}


def _described(model: Any) -> tuple[Kind, HeadManifest | SemanticManifest, nn.ModuleDict]:
    """Kind and manifest of a model, and the modules that are saved, under the names that they have in the file."""
    match model:
        case ExitingModel() | DecodingModel():
            built = isinstance(model, ExitingModel) and model.built_head
            after = tuple(int(block) for block in model.exit_heads)
            sizes = model.classes, model.host.width, model.depth
            taps = model.taps if isinstance(model, DecodingModel) and model.translated_after else ()
            known = {"fitted": model.fitted, "taps": taps, "assessed": model.assessed}
            saved = HeadManifest(model.schedule, after, model.head_plan, built, *sizes, **known)
            return "exits", saved, _exit_modules(model)
        case GatedModel():
            after, width, depth = tuple(int(block) for block in model.gates), model.host.width, model.depth
            saved = HeadManifest(model.schedule, after, model.gate_plan, False, classes=2, width=width, depth=depth)
            return "gates", saved, nn.ModuleDict({"gates": model.gates})
        case SemanticModel():
            block = model.tokens.first
            layers = SemanticManifest(
                model.plan, model.after, model.until, heads=block.heads, hidden=block.hidden, epsilon=block.norm1.eps,
                width=model.host.width, depth=model.depth,
            )  # fmt: skip
            return "semantic", layers, model.layers
    rule = "be wrapped by `wrap`, `wrap_decoder`, `wrap_gates` or `wrap_semantic`"
    raise TokenExitError(f"`model` must {rule}, got {type(model).__name__}")


def _exit_modules(model: ExitingModel | DecodingModel) -> nn.ModuleDict:
    parts: dict[str, nn.Module] = {"exit_heads": model.exit_heads}
    return nn.ModuleDict(parts | ({"head": model.head} if isinstance(model, ExitingModel) and model.built_head else {}))


def _with_saved(wrapped: WithExitHeads, saved: HeadManifest, file: Path) -> WithExitHeads:
    """A model with exits that has the weights, the images seen and the schedule that were saved."""
    _put(wrapped, saved, file)
    return wrapped


def _put(wrapped: ExitingModel | DecodingModel, saved: HeadManifest, file: Path) -> None:
    _fill(_exit_modules(wrapped), file, "exits")
    wrapped.fitted, wrapped.assessed = saved.fitted, saved.assessed
    wrapped.retune(saved.schedule)


def _chosen(
    saved: HeadManifest, file: Path, kind: Kind, host: Host, given: Modules, argument: str
) -> HeadPlan | Mapping[int, nn.Module]:
    """The plan of heads that was saved, or the user's modules, after a check that they are for this network."""
    chosen = manifest.choose_heads(saved, given, argument=argument)
    _require_saved(saved, file, kind, host)
    return chosen


def _require_saved(saved: HeadManifest | SemanticManifest, file: Path, kind: Kind, host: Host) -> None:
    """Raise unless a save is of this network, and has the weights of its plan; before memory is taken for them."""
    manifest.require_network(saved, kind, argument="model", width=host.width, depth=len(host.blocks))
    wanted = _planned(saved, kind)
    if wanted is not None:
        weights.require_specs("folder", manifest.weights_rule(kind), wanted, weights.read_specs(file))


def _planned(saved: HeadManifest | SemanticManifest, kind: Kind) -> dict[str, Spec] | None:
    """Specs of the weights that a manifest describes, with no memory for them; None for the user's own modules."""
    if isinstance(saved, SemanticManifest):
        with torch.device("meta"):
            return specs(together(*_new_layers(saved)).state_dict())
    plan, sizes = saved.head_plan, {"width": saved.width, "classes": saved.classes}
    if plan is None:
        return None

    def described(plan: HeadPlan, targets: int = 1) -> dict[str, Spec]:
        with torch.device("meta"):
            return specs(build(plan, targets=targets, **sizes).state_dict())

    final = described(plan.final) if saved.built_head else None
    return manifest.head_specs(saved, kind, lambda targets: described(plan, targets), final)


def _new_layers(saved: SemanticManifest) -> tuple[Any, Any]:
    return new_layers(
        saved.semantic_plan, saved.until,
        width=saved.width, heads=saved.heads, hidden=saved.hidden, epsilon=saved.epsilon,
    )  # fmt: skip


def _to_bytes(modules: nn.ModuleDict, wanted: Mapping[str, Spec] | None) -> bytes:
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
    rule = "have heads with the weights that their plan describes to be saved (not compiled, parametrised or adapted)"
    require_weights("model", rule, specs(state) if wanted is None else wanted, state)
    # Copies, for safetensors refuses tensors that share memory.
    copies = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    return to_bytes(copies)


def _fill(modules: nn.ModuleDict, file: Path, kind: Kind) -> None:
    """Put saved weights in the place of those that are there."""
    wanted, rule = specs(modules.state_dict()), manifest.weights_rule(kind)
    weights.require_specs("folder", rule, wanted, weights.read_specs(file))
    found = load_file(file)
    require_weights("folder", rule, wanted, found)
    with torch.no_grad():
        modules.load_state_dict(found)
