"""torchvision's vision transformer as a host."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from tokenexit.errors import require
from tokenexit_torch.hosts import Embedded, full_name

__all__ = ["TorchvisionViT"]

TORCHVISION_VIT = "torchvision.models.vision_transformer.VisionTransformer"
"""The class that `TorchvisionViT` takes. It is no part of the public API."""


class TorchvisionViT:
    """A torchvision `VisionTransformer`, as `vit_b_16` builds it; images of its own size.

    Args:
        model: The model. It is not changed.

    Raises:
        TokenExitError: If the model is another class, or has more than one convolution before its blocks.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) == TORCHVISION_VIT, "model", "be a torchvision VisionTransformer", full_name(model))
        vit: Any = model
        plain = isinstance(vit.conv_proj, nn.Conv2d)
        require(plain, "model", "embed its patches by one convolution", "one with conv_stem_configs")
        self._vit = vit
        self.module: nn.Module = model
        self.blocks: Sequence[nn.Module] = vit.encoder.layers
        self.width: int = vit.hidden_dim
        self.image_shape: tuple[int, int, int] = (vit.conv_proj.in_channels, vit.image_size, vit.image_size)

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        encoder, side = self._vit.encoder, self._vit.image_size // self._vit.patch_size
        tokens, covered = encoder.dropout(self._tokens(images) + encoder.pos_embedding), side * self._vit.patch_size
        return Embedded(tokens, 1, (side, side), covers=(covered, covered))

    def run(self, index: int, tokens: Tensor, _positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        block: Any = self.blocks[index]
        tokens = tokens + block.dropout(_attended(block.self_attention, block.ln_1(tokens)))
        return tokens + block.mlp(block.ln_2(tokens))

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """See `Host.finish`."""
        return self._vit.encoder.ln(tokens)

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        return self._vit.encoder(self._tokens(images))

    def _tokens(self, images: Tensor) -> Tensor:
        patches = self._vit._process_input(images)
        return torch.cat([self._vit.class_token.expand(len(patches), -1, -1), patches], dim=1)


def _attended(attention: nn.MultiheadAttention, tokens: Tensor) -> Tensor:
    """Self-attention by the layer's weights: the layer itself attends where nothing can take over."""
    projected = functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    pattern = "rows tokens (three heads width) -> three rows heads tokens width"
    query, key, value = rearrange(projected, pattern, three=3, heads=attention.num_heads)
    dropped = attention.dropout if attention.training else 0.0
    mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=dropped)
    return attention.out_proj(rearrange(mixed, "rows heads tokens width -> rows tokens (heads width)"))
