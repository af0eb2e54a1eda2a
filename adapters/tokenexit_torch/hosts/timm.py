"""timm's vision transformers as hosts."""

import sys
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit.errors import require
from tokenexit_torch.attention import turning
from tokenexit_torch.hosts.protocol import Embedded, full_name

__all__ = ["TimmEva", "TimmViT"]

TIMM_VITS = ("timm.models.vision_transformer.VisionTransformer", "timm.models.deit.VisionTransformerDistilled")
"""The classes that `TimmViT` takes. It is no part of the public API, nor is the next."""

TIMM_EVA = "timm.models.eva.Eva"


class TimmViT:
    """A timm `VisionTransformer`, distilled or not: any size and patch, any prefix tokens, fixed or dynamic image size.

    Args:
        model: The model. It is not changed.

    Raises:
        TokenExitError: If the model is another class, or drops patches at random in training.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) in TIMM_VITS, "model", "be a timm VisionTransformer", full_name(model))
        vit: Any = model
        keeps = isinstance(vit.patch_drop, nn.Identity)
        require(keeps, "model", "keep all its patches", "one with patch_drop_rate > 0")
        self._vit = vit
        self.module: nn.Module = model
        self.width: int = vit.embed_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        return tuple(self._vit.blocks)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Host.image_shape`: `set_input_size` changes it."""
        return _image_shape(self._vit.patch_embed)

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        vit = self._vit
        _require_no_checkpoints(vit)
        tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(images)))
        grid, covers = _grid(vit.patch_embed, images)
        return Embedded(tokens, vit.num_prefix_tokens, grid, covers=covers)

    def run(self, index: int, tokens: Tensor, _positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        return self._vit.blocks[index](tokens)

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """See `Host.finish`."""
        return self._vit.norm(tokens)

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        return self._vit.forward_features(images)


class TimmEva:
    """A timm `Eva`: EVA-02, DINOv3 and all that timm builds of it, with absolute, rotary or both kinds of positions.

    The table of rotary positions travels with the tokens. Prefix tokens are not turned: their sine is 0, their cosine
    is 1.

    Args:
        model: The model, of timm 1.0.20 or later. It is not changed.

    Raises:
        TokenExitError: If the model is another class, or drops patches at random in training.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) == TIMM_EVA, "model", "be a timm Eva", full_name(model))
        eva: Any = model
        require(eva.patch_drop is None, "model", "keep all its patches", "one with patch_drop_rate > 0")
        self._eva = eva
        self.module: nn.Module = model
        self.width: int = eva.embed_dim

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        return tuple(self._eva.blocks)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """See `Host.image_shape`: `set_input_size` changes it."""
        return _image_shape(self._eva.patch_embed)

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        eva = self._eva
        _require_no_checkpoints(eva)
        tokens, table = eva._pos_embed(eva.patch_embed(images))
        prefix, (grid, covers) = eva.num_prefix_tokens, _grid(eva.patch_embed, images)
        positions = None if table is None else _by_slot(table, prefix)
        return Embedded(eva.norm_pre(tokens), prefix, grid, positions, covers, pairs=-1)

    def run(self, index: int, tokens: Tensor, positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        block = self._eva.blocks[index]
        if positions is None:
            return block(tokens)
        # A block by itself would take the first tokens of the row for the prefix, and the others for one image's.
        table = (
            positions
            if positions.ndim == 2
            else rearrange(positions[:, index], "tokens heads table -> heads tokens table")
        )
        rotate = sys.modules["timm.layers"].apply_rot_embed_cat
        with turning(lambda found: rotate(found, table, half=block.attn.rotate_half)) as attention:
            tokens = block(tokens)
        rule = "call torch.nn.functional.scaled_dot_product_attention once"
        require(attention.calls == 1, f"model.blocks[{index}]", rule, f"{attention.calls} calls")
        return tokens

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """See `Host.finish`."""
        return self._eva.norm(tokens)

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        return self._eva.forward_features(images)


def _by_slot(table: Tensor, prefix: int) -> Tensor:
    """A table of sines and cosines by slot, from `(patches, table)`, or `(depth, heads, patches, table)`."""
    if table.ndim == 4:
        table = rearrange(table, "depth heads patches table -> patches depth heads table")
    still = torch.zeros_like(table[:1]).expand(prefix, *table.shape[1:]).clone()
    still[..., table.shape[-1] // 2 :] = 1
    return torch.cat([still, table])


def _grid(patch_embed: Any, images: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid, and the pixels that it covers: a fixed size may be cut off, `dynamic_img_pad` pads."""
    rows, columns = patch_embed.dynamic_feat_size(images.shape[-2:])
    height, width = patch_embed.feat_ratio(as_scalar=False)
    return (rows, columns), (rows * height, columns * width)


def _image_shape(patch_embed: Any) -> tuple[int, int, int]:
    size = patch_embed.img_size or tuple(4 * side for side in patch_embed.patch_size)
    return (patch_embed.proj.weight.shape[1], *size)


def _require_no_checkpoints(model: Any) -> None:
    # What is computed again in the backward pass would not know which tokens belong to which image.
    rule = "not checkpoint its gradients"
    require(not model.grad_checkpointing, "model", rule, "set_grad_checkpointing()")
