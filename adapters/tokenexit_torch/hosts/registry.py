"""Which models are taken as they are, and which are refused, and why: two closed tables by the names of classes.

Names are compared, so that no framework is imported for a question about one.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from tokenexit import TokenExitError
from tokenexit.adapting import is_whole, require_takes
from tokenexit.errors import require
from tokenexit_torch.attention import UNQUANTISED
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.eomt_dpt import DPTS, EOMTS, TransformersDPT, TransformersEoMT
from tokenexit_torch.hosts.protocol import Host, full_name
from tokenexit_torch.hosts.timm import TIMM_EVA, TIMM_VITS, TimmEva, TimmViT
from tokenexit_torch.hosts.torchvision import TORCHVISION_VIT, TorchvisionViT
from tokenexit_torch.hosts.transformers import PARTS, TransformersViT

__all__ = ["brings_decoder", "decoding_host_of", "host_of"]

_HOSTS: Mapping[str, Callable[[Any], Host]] = {
    **dict.fromkeys(TIMM_VITS, TimmViT),
    TIMM_EVA: TimmEva,
    TORCHVISION_VIT: TorchvisionViT,
    **dict.fromkeys(PARTS, TransformersViT),
}

_DECODING_HOSTS: Mapping[str, Callable[[Any], DecodingHost]] = {
    **dict.fromkeys(EOMTS, TransformersEoMT),
    **dict.fromkeys(DPTS, TransformersDPT),
}

_TAKEN = "a timm VisionTransformer or Eva, torchvision's VisionTransformer, a ViT of transformers without a head"

_TAKEN_WITH_DECODER = "an EoMT, DPT or Depth Anything of transformers"

_WINDOWS = "its blocks need the dense grid: they attend within windows of it, and stages merge its patches"
_CONVOLUTIONS = "its blocks need the dense grid: they convolve over it, and stages merge its patches"
_POOLING = "its blocks need the dense grid: they pool queries and keys over it"
_PAIRS = "its attention adds a bias for each pair of places of the dense grid"
_PAIRS_AND_STAGES = "its attention adds a bias for each pair of places, and its stages need the dense grid to shrink it"
_PAIRS_AND_WINDOWS = (
    "its blocks need the dense grid: they attend within windows of it, with a bias for each pair of places"
)
_CLASS_ATTENTION = (
    "its attention mixes heads between all pairs of tokens, and its last blocks run on the class token alone"
)

REFUSED = {
    "timm.models.swin_transformer.SwinTransformer": _WINDOWS,
    "timm.models.swin_transformer_v2.SwinTransformerV2": _WINDOWS,
    "timm.models.swin_transformer_v2_cr.SwinTransformerV2Cr": _WINDOWS,
    "timm.models.hiera.Hiera": _POOLING,
    "timm.models.hieradet_sam2.HieraDet": _POOLING,
    "timm.models.mvitv2.MultiScaleVit": _POOLING,
    "timm.models.levit.Levit": _PAIRS_AND_STAGES,
    "timm.models.cait.Cait": _CLASS_ATTENTION,
    "timm.models.vision_transformer_sam.VisionTransformerSAM": _PAIRS_AND_WINDOWS,
    "timm.models.beit.Beit": _PAIRS,
    "timm.models.vision_transformer_relpos.VisionTransformerRelPos": _PAIRS,
    "torchvision.models.swin_transformer.SwinTransformer": _WINDOWS,
    "torchvision.models.video.mvit.MViT": _POOLING,
    "transformers.models.swin.modeling_swin.SwinPreTrainedModel": _WINDOWS,
    "transformers.models.swinv2.modeling_swinv2.Swinv2PreTrainedModel": _WINDOWS,
    "transformers.models.segformer.modeling_segformer.SegformerPreTrainedModel": _CONVOLUTIONS,
    "transformers.models.hiera.modeling_hiera.HieraPreTrainedModel": _POOLING,
    "transformers.models.levit.modeling_levit.LevitPreTrainedModel": _PAIRS_AND_STAGES,
    "transformers.models.sam.modeling_sam.SamPreTrainedModel": _PAIRS_AND_WINDOWS,
    "transformers.models.sam2.modeling_sam2.Sam2PreTrainedModel": _POOLING,
    "transformers.models.vitdet.modeling_vitdet.VitDetPreTrainedModel": _PAIRS_AND_WINDOWS,
    "transformers.models.beit.modeling_beit.BeitPreTrainedModel": _PAIRS,
    "transformers.models.bit.modeling_bit.BitPreTrainedModel": "it is a convolutional network, which has no tokens",
    "tokenexit_torch.models.swin.Swin": _WINDOWS,
    "tokenexit_torch.models.swin.SwinBackbone": _WINDOWS,
    "tokenexit_torch.models.swin.SwinClassifier": _WINDOWS,
}
"""Why a class, and all that derive from it, cannot be a host. It is no part of the public API."""

_COMPILED = "its parts are called one by one: wrap it first, then compile what `wrap` returns"

_OUTSIDE = "its own forward is never called: put it around what `wrap` returns"

AROUND = {
    "torch._dynamo.eval_frame.OptimizedModule": _COMPILED,
    "torch.nn.parallel.data_parallel.DataParallel": "it runs copies of its parts: use one process for each device",
    "torch.nn.parallel.distributed.DistributedDataParallel": _OUTSIDE,
}
"""Why modules that go around others must not be inside of a host. It is no part of the public API."""


_MEMBERS = ("module", "blocks", "width", "image_shape", "embed", "run", "finish", "dense")
_DECODING_MEMBERS = (*_MEMBERS, "embedding", "taps", "classes", "own", "decode", "class_scores")


def brings_decoder(model: object, /) -> bool:
    """Whether a model has a decoder of its own, so that `decoding_host_of` takes it.

    Args:
        model: Anything.
    """
    return full_name(model) in _DECODING_HOSTS or (not isinstance(model, nn.Module) and isinstance(model, DecodingHost))


def host_of(model: object, /) -> Host:
    """The host for a model.

    Args:
        model: A timm `VisionTransformer`, also distilled, or `Eva`; a torchvision `VisionTransformer`; a `ViTModel`,
            `Dinov2Model`, `Dinov2WithRegistersModel`, `DINOv3ViTModel`, `SiglipVisionModel` or `CLIPVisionModel` of
            transformers; or an object that follows `Host`. Exactly these classes, and none that derives from them;
            not compiled, and not in `DataParallel`.

    Returns:
        The host; the object itself if it is one.

    Raises:
        TokenExitError: If there is no host for this model; where it is known why, the error says so.
    """
    _require_bare(model)
    _require_weights(model)
    if isinstance(model, nn.Module):
        _require_not_refused(model)
        if full_name(model) in _HOSTS:
            return _HOSTS[full_name(model)](model)
    elif isinstance(model, Host) and not isinstance(model, type):
        _require_declared(model)
        return model
    got = full_name(model)
    if got in _DECODING_HOSTS:
        rule = "feed no decoder of its own, which `wrap_decoder` takes, and `load` with kind='decoder'"
        raise TokenExitError(f"`model` must {rule}, got {got}")
    rule = f"be {_TAKEN} or a plain object that follows Host (docs/howto/model.md)"
    got += _of_module(model) if isinstance(model, nn.Module) else _lacking(model, _MEMBERS)
    raise TokenExitError(f"`model` must {rule}, got {got}")


def _of_module(model: nn.Module) -> str:
    """What a module that is not taken has to do with those that are, and which call serves."""
    for path, part in model.named_modules():
        if full_name(part) in _HOSTS:
            reads = "give that part, and what reads its tokens as `head=`, or its feature maps as `decoder=`"
            return f", whose part `{path}` is one: {reads}"
        stem = full_name(part).removesuffix("Backbone")
        if f"{stem}Model" in _HOSTS:
            plain, which = (
                f"{type(part).__name__.removesuffix('Backbone')}Model",
                f"whose `{path}`" if path else "which",
            )
            return (
                f", {which} gives feature maps of a {plain}: load its weights into one, as `vit = {plain}"
                "(backbone.config)` and `vit.load_state_dict(backbone.state_dict())`, and wrap that under what reads "
                "the maps, `wrap(vit, decoder=..., taps=...)` (docs/howto/decoder.md)"
            )
    taken = [name for name in map(_name_of, type(model).__mro__) if name in _HOSTS]
    if taken:
        return f", which derives from {taken[0]} and may run otherwise: load its weights into one, or write a Host"
    if all(hasattr(model, name) for name in _MEMBERS):
        return ", a torch.nn.Module: let the host be a plain object that holds the network as `module`"
    return ": if it is a vision transformer, write a Host for it, some thirty lines"


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _lacking(model: object, members: Iterable[str]) -> str:
    """What an object that is no host lacks for one, if it has any of it."""
    if isinstance(model, type):
        return f", the class {model.__name__}: give an instance of it"
    there = {name: hasattr(model, name) for name in members}
    lacking = [name for name, has in there.items() if not has]
    return f", which lacks {', '.join(lacking)}" if lacking and any(there.values()) else ""


_CALLS = {
    "embed": ("images",),
    "run": ("index", "tokens", "positions"),
    "finish": ("tokens",),
    "dense": ("images",),
    "own": ("images",),
    "decode": ("taken", "embedded", "images"),
    "class_scores": ("decoded",),
}
"""What the methods of a host are called with."""


def _require_declared(host: Host) -> None:
    """Members must be what `Host` says, and methods take what they are called with."""
    require(is_whole(host.width, least=1), "model.width", "be a whole number from 1 up", repr(host.width))
    shape: Any = host.image_shape
    whole = isinstance(shape, tuple | list) and len(shape) == 3 and all(is_whole(side, least=1) for side in shape)
    require(whole, "model.image_shape", "be (channels, height, width), whole numbers from 1 up", repr(shape))
    require(len(host.blocks) > 0, "model.blocks", "be at least one block", "none")
    for name, given in _CALLS.items():
        if hasattr(host, name):
            require_takes(f"model.{name}", getattr(host, name), *given)


def _require_bare(model: object) -> None:
    """Nothing may go around a model or a part of it: its parts are called one by one, as they are."""
    for path, part in _parts(model):
        compiled = part._compiled_call_impl is not None
        reason = AROUND.get(full_name(part), _COMPILED if compiled else None)
        if reason is not None:
            got = f"{full_name(part)}, compiled" if compiled else full_name(part)
            where = f" at `{path}`" if path else ""
            raise TokenExitError(f"`model` must have nothing around it or its parts, got {got}{where}: {reason}")
    if any(ancestor.__name__ in ("FSDPModule", "FullyShardedDataParallel") for ancestor in type(model).__mro__):
        raise TokenExitError(f"`model` must have nothing around it or its parts, got {full_name(model)}: {_OUTSIDE}")


def _require_weights(model: object) -> None:
    """Weights must be there, as numbers that do not depend on the batch."""
    module = model.module if isinstance(model, Host) else model
    if not isinstance(module, nn.Module):
        return
    if isinstance(model, Host):
        require(any(True for _ in module.parameters()), "model.module", "have parameters", "none")
    require_loaded(module, "model")
    require_not_quantised(module, "model")


def require_loaded(module: nn.Module, argument: str) -> None:
    """Raise if weights are not there. It is no part of the public API.

    Args:
        module: The module.
        argument: What it is called in the error.

    Raises:
        TokenExitError: If it has weights on meta.
    """
    meta = [name for name, weight in module.named_parameters() if weight.is_meta]
    rule = "have its weights on a device: load them before it is wrapped, and do not offload them"
    require(not meta, argument, rule, f"{len(meta)} on meta, as `{meta[0] if meta else ''}`")


def require_not_quantised(module: nn.Module, argument: str) -> None:
    """Raise if activations are quantised by the batch. It is no part of the public API.

    Args:
        module: The module.
        argument: What it is called in the error.

    Raises:
        TokenExitError: If it has a dynamically quantised layer.
    """
    found = [path for path, part in module.named_modules() if type(part).__module__.startswith(_DYNAMIC)]
    where = f"`{found[0] or type(module).__name__}`" if found else ""
    require(not found, argument, UNQUANTISED, where)


_DYNAMIC = "torch.ao.nn.quantized.dynamic"


def _parts(model: object) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a model, by their paths; of a host also its blocks, which need not lie inside its module."""
    if isinstance(model, nn.Module):
        yield from model.named_modules()
    elif isinstance(model, Host):
        require(isinstance(model.module, nn.Module), "model.module", "be a torch.nn.Module", full_name(model.module))
        yield from model.module.named_modules()
        for index, block in enumerate(model.blocks):
            require(isinstance(block, nn.Module), f"model.blocks[{index}]", "be a torch.nn.Module", full_name(block))
            yield from block.named_modules(prefix=f"blocks[{index}]")


_BEHIND = (
    "; `wrap(vit, decoder=...)` puts a decoder behind a vision transformer that `wrap` takes (docs/howto/decoder.md)"
)


def decoding_host_of(model: object, /) -> DecodingHost:
    """The host for a model whose vision transformer feeds a decoder of its own.

    Args:
        model: An `EomtForUniversalSegmentation`, `EomtDinov3ForUniversalSegmentation`, `DPTForSemanticSegmentation`,
            `DPTForDepthEstimation` or `DepthAnythingForDepthEstimation` of transformers, the latter two on a ViT; or an
            object that follows `DecodingHost`. Exactly these classes, and none that derives from them.

    Returns:
        The host; the object itself if it is one.

    Raises:
        TokenExitError: If there is no host for this model; where it is known why, the error says so.
    """
    _require_bare(model)
    _require_weights(model)
    if isinstance(model, nn.Module):
        for part in model.modules():  # the model itself comes first
            _require_not_refused(part, of=model)
        if full_name(model) in _DECODING_HOSTS:
            return _DECODING_HOSTS[full_name(model)](model)
    elif isinstance(model, DecodingHost) and not isinstance(model, type):
        _require_declared(model)
        return model
    rule = f"be {_TAKEN_WITH_DECODER}, or a plain object that follows DecodingHost (docs/howto/decoder.md)"
    got = full_name(model)
    if isinstance(model, nn.Module):
        got += _BEHIND if got in _HOSTS else f"{_of_module(model)}{_BEHIND}"
    elif isinstance(model, Host) and not isinstance(model, type):
        got += _BEHIND
    else:
        got += _lacking(model, _DECODING_MEMBERS)
    raise TokenExitError(f"`model` must {rule}, got {got}")


def _require_not_refused(part: nn.Module, *, of: nn.Module | None = None) -> None:
    """Raise if a class, or one that it derives from, is known to be no host."""
    for ancestor in type(part).__mro__:
        reason = REFUSED.get(f"{ancestor.__module__}.{ancestor.__qualname__}")
        if reason is not None:
            got = full_name(part) if of is None or of is part else f"{full_name(of)} on {full_name(part)}"
            raise TokenExitError(f"`model` must have blocks that run on any tokens, got {got}: {reason}")
