"""ViT-Tiny a quarter as wide, for tests of what becomes of weights and not of what they are: it has a sixteenth of them."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from examples.camvid import common, data
from examples.timm_import import import_timm
from tokenexit.heads import MLP
from tokenexit_torch.heads import build

NAME = "vit_narrow_for_tests"
WIDTH = 48


@functools.cache
def _registered() -> None:
    timm = import_timm()

    def made(pretrained: bool = False, **options: object) -> nn.Module:
        own = {name: value for name, value in options.items() if name not in ("pretrained_cfg", "cache_dir")}
        own.pop("pretrained_cfg_overlay", None)
        return timm.models.VisionTransformer(embed_dim=WIDTH, depth=12, num_heads=3, **own)

    made.__name__ = NAME
    timm.models.register_model(made)


@contextlib.contextmanager
def in_place_of_tiny() -> Iterator[None]:
    """Scripts build this network where they would build ViT-Tiny."""
    _registered()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "VIT", NAME)
        yield


def from_imagenet(out: Path) -> Path:
    """Random weights for square images, in the form of those from ImageNet."""
    torch.manual_seed(1)
    return _written(out, common.build_vit(16, (224, 224)).state_dict())


def ready(out: Path) -> Path:
    """Random weights for CamVid in the form of the ready model, with a final head that is sure of what it says."""
    torch.manual_seed(2)
    head = build(MLP(WIDTH), width=WIDTH, classes=len(data.CLASSES))
    with torch.no_grad():
        head.get_parameter("3.weight").mul_(30)
    weights = {f"heads.12.{name}": value for name, value in head.state_dict().items()}
    return _written(out, common.build_vit(16, data.SIZE).state_dict() | weights)


def _written(out: Path, weights: dict[str, torch.Tensor]) -> Path:
    np.savez(out, **{name: value.numpy() for name, value in weights.items()})
    return out
