"""Models of Hugging Face's transformers whose vision transformer feeds a decoder of their own."""

from collections.abc import Mapping, Sequence
from itertools import islice
from types import SimpleNamespace
from typing import Any

from einops import einsum
from jaxtyping import Float
from torch import Tensor, finfo, nn

from tokenexit.errors import require
from tokenexit_torch.hosts.decoding import Given, Last, Passing, Reached, view
from tokenexit_torch.hosts.protocol import Embedded, full_name
from tokenexit_torch.hosts.transformers import pair, require_interceptable, whole_patches, with_prefix

__all__ = ["TransformersDPT", "TransformersEoMT"]

_MODELS = "transformers.models"
_EOMT_DINOV3 = f"{_MODELS}.eomt_dinov3.modeling_eomt_dinov3.EomtDinov3ForUniversalSegmentation"
EOMTS = (f"{_MODELS}.eomt.modeling_eomt.EomtForUniversalSegmentation", _EOMT_DINOV3)
"""The classes that `TransformersEoMT` takes. It is no part of the public API."""

_DPT_SEGMENTATION = f"{_MODELS}.dpt.modeling_dpt.DPTForSemanticSegmentation"
_DPT_DEPTH = f"{_MODELS}.dpt.modeling_dpt.DPTForDepthEstimation"
_DEPTH_ANYTHING = f"{_MODELS}.depth_anything.modeling_depth_anything.DepthAnythingForDepthEstimation"
DPTS = (_DPT_SEGMENTATION, _DPT_DEPTH, _DEPTH_ANYTHING)
"""The classes that `TransformersDPT` takes. It is no part of the public API."""

_DINOV2 = f"{_MODELS}.dinov2.modeling_dinov2.Dinov2Backbone"


class TransformersEoMT:
    """EoMT of transformers, on DINOv2 or DINOv3: a ViT whose last blocks have queries among their tokens.

    Tokens leave in the blocks before these. For the first block with queries all are there again. Its images have the
    size of its config.

    Args:
        model: An `EomtForUniversalSegmentation` or `EomtDinov3ForUniversalSegmentation`, of transformers 5.17 or later.
            It is not changed.

    Raises:
        TokenExitError: If the model is another class, has another attention than `"sdpa"`, or no block before its
            queries.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) in EOMTS, "model", "be an EoMT of transformers", full_name(model))
        eomt: Any = model
        config = eomt.config
        self._eomt = eomt
        early = self._early
        require(early > 0, "model", "have blocks before its queries", f"{config.num_blocks} of {len(eomt.layers)} with")
        self._rotary = full_name(model) == _EOMT_DINOV3
        self._prefix: int = 1 + config.num_register_tokens
        self.module: nn.Module = model
        self.width: int = config.hidden_size
        self.image_shape: tuple[int, int, int] = (config.num_channels, *pair(config.image_size))
        self.classes: int | None = config.num_labels
        self._require_plain()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those before the first with queries, as they are now."""
        return tuple(islice(self._eomt.layers, self._early))

    @property
    def embedding(self) -> nn.Module:
        """See `DecodingHost`."""
        return self._eomt.embeddings

    @property
    def taps(self) -> Sequence[int]:
        """See `DecodingHost`."""
        return (self._early,)

    @property
    def _early(self) -> int:
        return len(self._eomt.layers) - self._eomt.config.num_blocks

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        eomt = self._eomt
        self._require_plain()
        if images.shape[-2:] != self.image_shape[1:]:
            raise ValueError(f"its masks are of images of {self.image_shape[1]} x {self.image_shape[2]}")
        grid, covers = whole_patches(images, eomt.config)
        if not self._rotary:
            return Embedded(eomt.embeddings(images), self._prefix, grid, covers=covers)
        tokens = eomt.dropout(eomt.embeddings(images))
        tables = eomt.rope_embeddings(images.to(tokens.dtype))
        return Embedded(tokens, self._prefix, grid, with_prefix(tables, self._prefix), covers, pairs=1)

    def run(self, index: int, tokens: Tensor, positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        given = {} if positions is None else {"position_embeddings": positions.unbind(dim=1)}
        return self._eomt.layers[index](tokens, **given)

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """The tokens: the norm that follows belongs to the decoder."""
        return tokens

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        *before, last = self.blocks
        layers = nn.ModuleList([*before, Last(last)])
        try:
            view(self._eomt, layers=layers)(images)
        except Reached as reached:
            return reached.tokens
        raise AssertionError("the last of the layers raises")

    def own(self, images: Float[Tensor, "images channels height width"], /, **inputs: Any) -> Any:
        """See `DecodingHost.own`."""
        return self._eomt(images, **_asked(inputs))

    def decode(self, taken: Mapping[int, Tensor], embedded: Embedded, images: Tensor, /, **inputs: Any) -> Any:
        """See `DecodingHost.decode`."""
        early = self._early
        ready = Given(taken[early], num_prefix_tokens=self._prefix)
        layers = [*(Passing() for _ in range(early)), *self._eomt.layers[early:]]
        parts: dict[str, nn.Module] = {"embeddings": ready, "layers": nn.ModuleList(layers)}
        if embedded.positions is not None:
            # Those of the other blocks: in training they are drawn. And there has been dropout.
            tables = embedded.positions[self._prefix :].unbind(dim=1)
            parts |= {"rope_embeddings": Given(tables), "dropout": nn.Identity()}
        return view(self._eomt, **parts)(images, **_asked(inputs))

    def class_scores(self, decoded: Any, /) -> Float[Tensor, "images classes height width"]:
        """Logarithms of the masks of each class, summed over queries, as for semantic segmentation."""
        classes = decoded.class_queries_logits.float().softmax(dim=-1)[..., :-1]
        masks = decoded.masks_queries_logits.float().sigmoid()
        pattern = "images queries classes, images queries height width -> images classes height width"
        summed = einsum(classes, masks, pattern)
        return summed.clamp(min=finfo(summed.dtype).tiny).log()

    def _require_plain(self) -> None:
        require_interceptable(self._eomt.config, self._eomt.layers)
        _require_nothing_asked(self._eomt.config)


class TransformersDPT:
    """DPT or Depth Anything of transformers, on a plain ViT: a decoder of maps from several depths.

    For each of these maps all tokens are there. A DPT without a `backbone_config` takes square images of any size, one
    on a `Dinov2Backbone`, as Depth Anything is, takes any.

    Args:
        model: A `DPTForSemanticSegmentation`, `DPTForDepthEstimation` or `DepthAnythingForDepthEstimation`, of
            transformers 5.17 or later. It is not changed.

    Raises:
        TokenExitError: If the model is another class, hybrid, on another backbone, or has another attention than
            `"sdpa"`.
    """

    def __init__(self, model: nn.Module) -> None:
        require(full_name(model) in DPTS, "model", "be a DPT or Depth Anything of transformers", full_name(model))
        dpt: Any = model
        self._dpt = dpt
        anything = full_name(model) == _DEPTH_ANYTHING
        hybrid = not anything and dpt.config.is_hybrid
        require(not hybrid, "model", "have a plain vision transformer", "a hybrid, whose first maps are convolved")
        self._backed = anything or (full_name(model) == _DPT_DEPTH and dpt.config.backbone_config is not None)
        if self._backed:
            require(
                full_name(dpt.backbone) == _DINOV2, "model.backbone", "be a Dinov2Backbone", full_name(dpt.backbone)
            )
        config = self._vit.config
        self.module: nn.Module = model
        self.width: int = config.hidden_size
        self.image_shape: tuple[int, int, int] = (config.num_channels, *pair(config.image_size))
        self.classes: int | None = dpt.config.num_labels if full_name(model) == _DPT_SEGMENTATION else None
        self._require_plain()

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """Those before the last tap, as they are now."""
        return tuple(islice(self._vit.encoder.layer, self.taps[-1]))

    @property
    def embedding(self) -> nn.Module:
        """See `DecodingHost`."""
        return self._vit.embeddings

    @property
    def taps(self) -> Sequence[int]:
        """See `DecodingHost`."""
        if self._backed:
            found = (self._vit.stage_names.index(name) for name in self._vit.out_features)
        else:
            found = (index + 1 for index in self._dpt.config.backbone_out_indices)
        return tuple(sorted({tap for tap in found if tap > 0}))

    @property
    def _vit(self) -> Any:
        return self._dpt.backbone if self._backed else self._dpt.dpt

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        """See `Host.embed`."""
        self._require_plain()
        grid, covers = whole_patches(images, self._vit.config)
        if not self._backed and grid[0] != grid[1]:
            raise ValueError(f"its maps are square, which {grid[0]} x {grid[1]} patches are not")
        embedded = self._vit.embeddings(images)
        tokens = embedded if self._backed else embedded.last_hidden_states
        return Embedded(tokens, 1, grid, covers=covers)

    def run(self, index: int, tokens: Tensor, _positions: Tensor | None, /) -> Tensor:
        """See `Host.run`."""
        return self._vit.encoder.layer[index](tokens)

    def finish(self, tokens: Float[Tensor, "*tokens width"], /) -> Float[Tensor, "*tokens width"]:
        """The tokens: the norm that follows, if any does, belongs to the decoder."""
        return tokens

    def dense(
        self, images: Float[Tensor, "images channels height width"], /
    ) -> Float[Tensor, "images slots channels_out"]:
        """See `Host.dense`."""
        return self._vit(images, output_hidden_states=True, return_dict=True).hidden_states[self.taps[-1]]

    def own(self, images: Float[Tensor, "images channels height width"], /, **inputs: Any) -> Any:
        """See `DecodingHost.own`."""
        return self._dpt(images, **_asked(inputs))

    def decode(self, taken: Mapping[int, Tensor], embedded: Embedded, images: Tensor, /, **inputs: Any) -> Any:
        """See `DecodingHost.decode`."""
        states = tuple(taken.get(after) for after in range(1, len(self.blocks) + 1))
        known = SimpleNamespace(hidden_states=(embedded.tokens, *states), attentions=None)
        vit = Given(known)
        if self._backed:
            # Which maps are given on, and whether normed, is the backbone's own business.
            vit = view(self._vit, embeddings=Given(embedded.tokens), encoder=vit)
        return view(self._dpt, **{"backbone" if self._backed else "dpt": vit})(images, **_asked(inputs))

    def class_scores(self, decoded: Any, /) -> Float[Tensor, "images classes height width"]:
        """Its logits."""
        require(self.classes is not None, "model", "score classes", full_name(self._dpt))
        return decoded.logits

    def _require_plain(self) -> None:
        require_interceptable(self._vit.config, self.blocks)
        _require_nothing_asked(self._vit.config)
        _require_nothing_asked(self._dpt.config)


def _asked(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with: it gives named parts, and no states of blocks, which run in two parts."""
    require(inputs.get("return_dict") in (None, True), "return_dict", "be True or left out", inputs.get("return_dict"))
    for name in ("output_hidden_states", "output_attentions"):
        require(not inputs.get(name), name, "be False or left out, for blocks run in two parts", inputs.get(name))
    return {**inputs, "return_dict": True}


def _require_nothing_asked(config: Any) -> None:
    """Blocks run in two parts, so that none has all of their states."""
    require(not config.output_hidden_states, "model.config", "ask for no hidden states", "output_hidden_states=True")
