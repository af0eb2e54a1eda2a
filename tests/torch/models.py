"""Small vision transformers for the tests, with random weights large enough that predictions differ.

What is asked for again is a copy of what was made first: each test may do with its own what it likes.
"""

import copy
import functools

import torch
from torch import nn

import tokenexit_torch as tet
from tests.timm_import import import_timm
from tests.torch.vit import Placed, PlainHost, ViT
from tokenexit import schedule
from tokenexit.heads import MLP

CLASSES = 5


def once(make):
    """`make`, called once for each specification; each call gets a copy, and the random state that `make` left."""

    @functools.cache
    def first(*given, **options):
        with torch.inference_mode(False):  # whoever asks first
            made = make(*given, **options)
        return made, torch.get_rng_state()

    @functools.wraps(make)
    def again(*given, **options):
        made, random = first(*given, **options)
        torch.set_rng_state(random)
        return copy.deepcopy(made)

    return again


@once
def timm_vit(*, heads=3, prefix=1, size=(32, 48), patch=8, depth=6, **options) -> nn.Module:
    """A timm VisionTransformer of width 48; `prefix` counts cls and registers."""
    timm = import_timm()
    torch.manual_seed(heads + 10 * prefix)
    tokens = {"class_token": prefix > 0, "reg_tokens": max(prefix - 1, 0), "global_pool": "token" if prefix else "avg"}
    vit = timm.models.vision_transformer.VisionTransformer(
        img_size=size, patch_size=patch, embed_dim=48, depth=depth, num_heads=heads, num_classes=0, fc_norm=False,
        **tokens, **options,
    )  # fmt: skip
    return _lively(vit).eval()


@once
def plain_host(*, width=32, heads=2, depth=6, patch=8, kind=PlainHost) -> PlainHost:
    """A ViT of one's own, which has no prefix tokens."""
    torch.manual_seed(7)
    return kind(_lively(ViT(width, depth, heads, patch)).eval())


def placed() -> Placed:
    """The same, and something that belongs to each place comes into every block."""
    return plain_host(kind=Placed)


def wrapped(host, plan, *, after=(2, 3, 4), **options) -> tet.ExitingModel:
    """A model with exits whose confidences spread over (0, 1).

    Args:
        host: A model, or what makes one: then it is wrapped once for all tests, and this is a copy.
        plan: The plan.
        after: After which blocks there is an exit.
        **options: What is made.
    """
    exiting = _exiting_once(host, after, **options) if makes(host) else _exiting(host, after)
    exiting.retune(plan)
    return exiting


def makes(host):
    """Whether it makes a model, and is none."""
    return callable(host) and not isinstance(host, nn.Module)


def _exiting(model, after):
    torch.manual_seed(1)
    exiting = tet.wrap(model, schedule.dense(after=after), num_classes=CLASSES, exit_heads=MLP()).eval()
    with torch.no_grad():
        for head in [*exiting.exit_heads.values(), exiting.head]:
            head[-1].weight.mul_(12)
    return exiting


@once
def _exiting_once(make, after, **options):
    return _exiting(make(**options), after)


def images(count=3, size=(32, 48), seed=0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def pictures(count=3, size=(32, 48), seed=0):
    """Images of which some parts are smooth: neighbouring patches are alike there."""
    random = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 2, 3, generator=random)
    smooth = nn.functional.interpolate(coarse, size, mode="nearest")
    noise = torch.randn(count, 3, *size, generator=random)
    busy = nn.functional.interpolate((torch.rand(count, 1, 2, 3, generator=random) < 0.4).float(), size)
    return smooth + noise * (0.05 + busy)


class Convolving(nn.Module):
    """A decoder of two convolutions, which also reads prefix tokens if it is given any."""

    def __init__(self, dim, maps=1):
        super().__init__()
        self.first = nn.ModuleList(nn.Conv2d(dim, 8, 3, padding=1) for _ in range(maps))
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, maps, prefix=None):
        maps = maps if isinstance(maps, list) else [maps]
        found = sum(first(one) for first, one in zip(self.first, maps, strict=True))
        if prefix is not None:
            found = found + sum(one.mean() for one in (prefix if isinstance(prefix, list) else [prefix]))
        return {"map": self.last(found.relu())}


def _lively(module: nn.Module) -> nn.Module:
    """Scale the linear layers up: freshly initialised blocks hardly change their tokens, or not at all."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "blocks" in name:
                if not parameter.any():
                    nn.init.trunc_normal_(parameter, std=0.02)
                parameter.mul_(3)
    return module


def lively_masks(head):
    """A mask head whose queries attend to some tokens more than to others."""
    with torch.no_grad():
        for layer in head.layers:
            layer.query.weight.mul_(5)
            layer.key_value.weight.mul_(5)
        head.presence.weight.mul_(3)
    return head
