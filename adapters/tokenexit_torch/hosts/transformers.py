"""Vision transformers of Hugging Face's transformers as hosts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit.errors import require
from tokenexit_torch.hosts.protocol import Embedded, full_name

__all__ = ["TransformersViT"]


@dataclass(frozen=True)
class _Parts:
    """What a class of models calls its parts. Names further in are never used: they change between releases.

    Attributes:
        blocks: The list of blocks.
        norm: The norm that the model's own output has gone through; None if there is none.
        before: A norm between the embedding and the blocks.
        given: What a block asks for besides tokens, by name.
        cls: How many class tokens there are.
        registers: Whether there are register tokens as well, as many as the config says.
        rotary: What makes the tables of rotary positions.
        must_ask: Whether it interpolates its positions, for images of another size than the config's, only when asked.
    """

    blocks: str
    norm: str | None
    before: str | None = None
    given: tuple[str, ...] = ()
    cls: int = 1
    registers: bool = False
    rotary: str | None = None
    must_ask: bool = False


_MODELS = "transformers.models"
PARTS = {
    f"{_MODELS}.vit.modeling_vit.ViTModel": _Parts("layers", "layernorm", must_ask=True),
    f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Model": _Parts("encoder.layer", "layernorm"),
    f"{_MODELS}.dinov2_with_registers.modeling_dinov2_with_registers.Dinov2WithRegistersModel": _Parts(
        "encoder.layer", "layernorm", registers=True
    ),
    f"{_MODELS}.dinov3_vit.modeling_dinov3_vit.DINOv3ViTModel": _Parts(
        "model.layer", "norm", registers=True, rotary="rope_embeddings"
    ),
    f"{_MODELS}.siglip.modeling_siglip.SiglipVisionModel": _Parts(
        "encoder.layers", "post_layernorm", given=("attention_mask",), cls=0, must_ask=True
    ),
    f"{_MODELS}.clip.modeling_clip.CLIPVisionModel": _Parts(
        "encoder.layers", None, before="pre_layrnorm", given=("attention_mask",), must_ask=True
    ),
}
"""The classes that `TransformersViT` takes. It is no part of the public API."""


class TransformersViT:
    """A ViT, DINOv2 with or without registers, DINOv3, SigLIP or CLIP of transformers: the vision model without a head.

    Its attention must be `"sdpa"`, as it is unless another was asked for. Images of another size than the config's are
    taken as well, with positions that the model itself interpolates. CLIP's own output has no final norm, so there is
    none here.

    Args:
        model: The model, of transformers 5.17 or later. It is not changed.

    Raises:
        TokenExitError: If the model is another class, or has another attention.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) in PARTS, "model", "be a vision model of transformers", full_name(model))
        vit: Any = model
        self._parts = PARTS[full_name(model)]
        self._vit = vit
        self.module: nn.Module = model
        self.width: int = vit.config.hidden_size
        self.image_shape: tuple[int, int, int] = (vit.config.num_channels, *pair(vit.config.image_size))
        self._require_interceptable()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        return tuple(self._blocks)

    @property
    def _blocks(self) -> Any:
        return self._vit.get_submodule(self._parts.blocks)

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        self._require_interceptable()
        vit, parts = self._vit, self._parts
        tokens = vit.embeddings(images, **self._resizing(images))
        if parts.before is not None:
            tokens = vit.get_submodule(parts.before)(tokens)
        prefix = parts.cls + (vit.config.num_register_tokens if parts.registers else 0)
        grid, covers = whole_patches(images, vit.config)
        positions = None
        if parts.rotary is not None:
            positions = with_prefix(vit.get_submodule(parts.rotary)(images), prefix)
        return Embedded(tokens, prefix, grid, positions, covers, pairs=1)

    def run(self, index: int, tokens: Tensor, positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        given: dict[str, Any] = dict.fromkeys(self._parts.given)
        if positions is not None:
            given["position_embeddings"] = positions.unbind(dim=1)
        return self._blocks[index](tokens, **given)

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """See `Host.finish`."""
        norm = self._parts.norm
        return tokens if norm is None else self._vit.get_submodule(norm)(tokens)

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        return self._vit(images, **self._resizing(images), return_dict=True).last_hidden_state

    def _resizing(self, images: Tensor) -> dict[str, bool]:
        """Options of the call beside images: none, unless it would refuse their size."""
        own = tuple(images.shape[-2:]) == self.image_shape[1:]
        return {} if own or not self._parts.must_ask else {"interpolate_pos_encoding": True}

    def _require_interceptable(self) -> None:
        require_interceptable(self._vit.config, self._blocks)


def require_interceptable(config: Any, blocks: Iterable[Any]) -> None:
    """Raise unless attention runs where it can be taken over. Both can be changed at any time. Not public.

    Args:
        config: What the blocks look up their attention in.
        blocks: The blocks.

    Raises:
        TokenExitError: If attention would run across images.
    """
    attention = config._attn_implementation
    rule = 'attend by "sdpa": call model.set_attn_implementation("sdpa")'
    require(attention == "sdpa", "model", rule, repr(attention))
    checkpoints = any(block.gradient_checkpointing for block in blocks)
    require(not checkpoints, "model", "not checkpoint its gradients", "activation checkpointing switched on")


def with_prefix(tables: tuple[Tensor, Tensor], prefix: int) -> Float[Tensor, "slots two width"]:
    """Rotary tables, cosine and sine, of all slots: prefix tokens are not turned. It is no part of the public API."""
    cos, sin = tables
    still = torch.stack([cos.new_ones(prefix, cos.shape[1]), sin.new_zeros(prefix, sin.shape[1])], dim=1)
    return torch.cat([still, torch.stack([cos, sin], dim=1)])


def whole_patches(images: Tensor, config: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid, and the pixels that it covers: those beyond the last whole patch are left out. Not public."""
    height, width = pair(config.patch_size)
    rows, columns = images.shape[-2] // height, images.shape[-1] // width
    return (rows, columns), (rows * height, columns * width)


def pair(size: Any) -> tuple[int, int]:
    """Height and width, where a config gives one number for both. It is no part of the public API."""
    height, width = size if isinstance(size, Sequence) else (size, size)
    return height, width
