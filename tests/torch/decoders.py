"""Models of transformers with a decoder of their own, small and with random weights, and how their own code runs them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.torch import models, oracle
from tests.torch.hosts import lively

SIZE, PATCH, WIDTH, HEADS, DEPTH = (32, 32), 8, 32, 2, 5
GRID = (4, 4)
CLASSES = 3


@dataclass(frozen=True)
class Decoder:
    """A model of another library whose ViT feeds a decoder of its own.

    Attributes:
        make: Builds it, once: each call gives a copy.
        prefix: How many of its tokens are no patches.
        taps: After how many blocks its decoder looks at all tokens.
        blocks: Its blocks.
        tables: What its blocks take by name, for images and the patches of them that run: rotary tables.
        classes: Whether its output has classes.
    """

    make: Callable[[], nn.Module]
    prefix: int
    taps: tuple[int, ...]
    blocks: Callable[[Any], Any]
    tables: Callable[[Any, Tensor, Tensor], dict[str, Any]] = lambda *_: {}
    classes: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "make", models.once(self.make))

    def embedded(self, model: Any, images: Tensor) -> Tensor:
        """What its first block is given by its own forward."""
        seen = []
        hook = self.blocks(model)[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        model(images)
        hook.remove()
        return seen[0]

    def run(self, model: Any, index: int, tokens: Tensor, images: Tensor, patches: Tensor) -> Tensor:
        """Block `index`, called as its own library does, on all prefix tokens and these patches of one image."""
        return self.blocks(model)[index](tokens, **self.tables(model, images, patches))

    def alone(self, model: Any, image: Tensor) -> oracle.Alone:
        """One image of the size of the model, in its own code, up to its decoder."""

        def run(block: int, row: Tensor, slots: Tensor) -> Tensor:
            return self.run(model, block, row, image, slots[self.prefix :] - self.prefix)

        return oracle.Alone(self.embedded(model, image), self.prefix, GRID, run, lambda tokens: tokens)

    def decoded(self, model: Any, images: Tensor, taken: Mapping[int, Tensor]) -> dict[str, Tensor]:
        """Its own forward, in which the blocks before the taps are made to give these tokens."""
        hooks = [
            # First of all hooks: the library's own, which collect states, shall see what is given.
            self.blocks(model)[after - 1].register_forward_hook(lambda *_, given=given: given, prepend=True)
            for after, given in taken.items()
        ]
        found = dict(model(images))
        for hook in hooks:
            hook.remove()
        return found


def eomt(name: str, *, masks: float = 1.0, **options: Any) -> nn.Module:
    """An EoMT; `masks` is what its training anneals: how probably queries attend within their masks."""
    sizes = {"num_blocks": 2, "num_queries": 6, "num_register_tokens": 2, "num_upscale_blocks": 1}
    options = {"hidden_dropout_prob": 0.2} | options  # in training
    model: Any = lively(made(name, **_VIT, **sizes, num_labels=CLASSES, **options))
    with torch.no_grad():
        model.attn_mask_probs.fill_(masks)
    return model


def dpt(name: str, **options: Any) -> nn.Module:
    """A DPT on a ViT of its own, whose last block feeds no map."""
    vit = {"intermediate_size": 64, "backbone_out_indices": [0, 1, 2, 3], "num_labels": CLASSES}
    return _deep(lively(made(name, **_VIT, **_NECK, **vit, **options)))


def on_backbone(name: str, backbone: Any = None, **options: Any) -> nn.Module:
    """A DPT or Depth Anything on a backbone."""
    backbone = dinov2() if backbone is None else backbone
    more = {"reassemble_hidden_size": WIDTH, "head_hidden_size": 8} if name.startswith("DepthAnything") else {}
    return _deep(lively(made(name, backbone_config=backbone, patch_size=PATCH, **_NECK, **more, **options)))


def _deep(model: Any) -> nn.Module:
    """Depths above zero, where the last activation cuts them off."""
    if "Depth" in type(model).__name__:
        *_, bias = (one for one in model.head.parameters() if one.shape == (1,))
        with torch.no_grad():
            bias.fill_(3.0)
    return model


def dinov2(kind: str = "Dinov2", **options: Any) -> Any:
    """The config of a backbone, whose last block feeds no map unless it is said to."""
    chosen = {"out_indices": [1, 2, 3, 4], "reshape_hidden_states": False} | options
    return getattr(transformers(), f"{kind}Config")(**_VIT, **chosen)


def made(name: str, **options: Any) -> nn.Module:
    """A model by the name of its class."""
    config = getattr(transformers(), f"{name.partition('For')[0]}Config")
    torch.manual_seed(0)  # what is added to, and not drawn anew, by `lively`
    return getattr(transformers(), name)(config(**options))


def transformers() -> Any:
    """The library; an installed timm makes sure that torchvision can be imported."""
    models.import_timm()
    return pytest.importorskip("transformers", reason="transformers is not installed")


def _rotary(model: Any, images: Tensor, patches: Tensor) -> dict[str, Any]:
    cos, sin = model.rope_embeddings(images)
    return {"position_embeddings": (cos[patches], sin[patches])}


_VIT = {
    "image_size": SIZE[0],
    "patch_size": PATCH,
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
}
_NECK = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5]}
_EOMT, _DINOV3 = "EomtForUniversalSegmentation", "EomtDinov3ForUniversalSegmentation"
_SEGMENTATION, _DEPTH = "DPTForSemanticSegmentation", "DPTForDepthEstimation"
_ANYTHING = "DepthAnythingForDepthEstimation"


def _layers(model: Any) -> Any:
    return model.layers


def _of_dpt(model: Any) -> Any:
    return model.dpt.encoder.layer


def _of_backbone(model: Any) -> Any:
    return model.backbone.encoder.layer


_FOUR = (1, 2, 3, 4)
DECODERS = {
    "EoMT": Decoder(partial(eomt, _EOMT), 3, (3,), _layers),
    "EoMT, annealed": Decoder(partial(eomt, _EOMT, masks=0.0, use_swiglu_ffn=True), 3, (3,), _layers),
    "EoMT-DINOv3": Decoder(partial(eomt, _DINOV3, intermediate_size=64), 3, (3,), _layers, _rotary),
    "DPT, segmentation": Decoder(partial(dpt, _SEGMENTATION), 1, _FOUR, _of_dpt),
    "DPT, depth": Decoder(partial(dpt, _DEPTH, readout_type="ignore"), 1, _FOUR, _of_dpt, classes=False),
    "DPT on DINOv2": Decoder(partial(on_backbone, _DEPTH), 1, _FOUR, _of_backbone, classes=False),
    "Depth Anything": Decoder(partial(on_backbone, _ANYTHING), 1, _FOUR, _of_backbone, classes=False),
    "Depth Anything, from the embedding on": Decoder(
        lambda: on_backbone(_ANYTHING, dinov2(out_indices=[0, 2, 3, 5], apply_layernorm=False, use_swiglu_ffn=True)),
        1,
        (2, 3, 5),
        _of_backbone,
        classes=False,
    ),
}
