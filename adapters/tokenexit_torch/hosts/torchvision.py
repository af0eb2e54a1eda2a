"""torchvision's vision transformer as a host."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from tokenexit import TokenExitError
from tokenexit.errors import require
from tokenexit_torch.attention import attend
from tokenexit_torch.hosts.protocol import Embedded, full_name

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
        plain = not isinstance(vit.conv_proj, nn.Sequential)
        require(plain, "model", "embed its patches by one convolution", "one with conv_stem_configs")
        self._vit = vit
        self.module: nn.Module = model
        self.width: int = vit.hidden_dim
        self.image_shape: tuple[int, int, int] = (vit.conv_proj.weight.shape[1], vit.image_size, vit.image_size)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """See `Host.blocks`."""
        return tuple(self._vit.encoder.layers)

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        encoder, side = self._vit.encoder, self._vit.image_size // self._vit.patch_size
        tokens, covered = encoder.dropout(self._tokens(images) + encoder.pos_embedding), side * self._vit.patch_size
        return Embedded(tokens, 1, (side, side), covers=(covered, covered))

    def run(self, index: int, tokens: Tensor, _positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        with _BySteps():
            return self._vit.encoder.layers[index](tokens)

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


class _BySteps(TorchFunctionMode):
    """`nn.MultiheadAttention` in steps, of which one is attention that can be taken over, by the weights it hands on.

    Its own fast path is not taken while a mode is there.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (_attended if func is _MULTIHEAD else func)(*args, **(kwargs or {}))


_MULTIHEAD = functional.multi_head_attention_forward


def _attended(
    query: Float[Tensor, "tokens rows width"],
    key: Tensor,
    value: Tensor,
    _width: int,
    heads: int,
    weight: Tensor,
    bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout: float,
    out_weight: Tensor,
    out_bias: Tensor | None,
    training: bool = True,
    **options: Any,
) -> tuple[Float[Tensor, "tokens rows width"], None]:
    """As `torch.nn.functional.multi_head_attention_forward` for tokens that attend to themselves."""
    alike = query is key and key is value and bias_k is None and bias_v is None and not add_zero_attn
    names = ("key_padding_mask", "attn_mask", "use_separate_proj_weight", "need_weights", "is_causal")
    given = [name for name in names if isinstance(options.get(name), Tensor) or options.get(name)]
    if not alike or given:
        rule = "attend to the tokens that they are given alone, without a mask, as torchvision's do"
        raise TokenExitError(f"`model.blocks` must {rule}, got {given or 'other keys'}")
    projected = functional.linear(query.transpose(0, 1), weight, bias)
    pattern = "rows tokens (three heads width) -> three rows heads tokens width"
    q, k, v = rearrange(projected, pattern, three=3, heads=heads)
    mixed = attend(q, k, v, dropout_p=dropout if training else 0.0)
    found = functional.linear(
        rearrange(mixed, "rows heads tokens width -> rows tokens (heads width)"), out_weight, out_bias
    )
    return found.transpose(0, 1), None
