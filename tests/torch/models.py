"""Small vision transformers for the tests, with random weights large enough that predictions differ."""

import torch
from torch import nn

import tokenexit_torch as tet
from examples.scenes.vit import Config, PlainHost, ViT
from tests.timm_import import import_timm
from tokenexit.heads import MLP

CLASSES = 5


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


def plain_host(*, width=32, heads=2, depth=6, patch=8) -> PlainHost:
    """The demo's own ViT, which has no prefix tokens."""
    torch.manual_seed(7)
    return PlainHost(_lively(ViT(Config(width=width, depth=depth, heads=heads, patch=patch))).eval())


class Placed:
    """The demo's ViT with something that belongs to each place and comes into every block, as rotary tables do."""

    def __init__(self) -> None:
        self._host = plain_host()
        self.module, self.blocks = self._host.module, self._host.blocks
        self.width, self.image_shape = self._host.width, self._host.image_shape
        self.finish = self._host.finish

    def embed(self, images):
        embedded = self._host.embed(images)
        slots = embedded.tokens.shape[1]
        table = torch.sin(torch.arange(slots)[:, None] * torch.arange(1, self.width + 1))
        return tet.Embedded(embedded.tokens, embedded.prefix, embedded.grid, positions=table)

    def run(self, index, tokens, positions):
        return self.blocks[index](tokens + positions)

    def dense(self, images):
        embedded = self.embed(images)
        tokens = embedded.tokens
        for block in self.blocks:
            tokens = block(tokens + embedded.positions)
        return self.finish(tokens)


def wrapped(model, plan, **options) -> tet.ExitingModel:
    """The model with exits after blocks 2, 3 and 4 whose confidences spread over (0, 1)."""
    return wrapped_after(model, plan, after=(2, 3, 4), **options)


def wrapped_after(model, plan, *, after, **options) -> tet.ExitingModel:
    """The model with exits after some blocks whose confidences spread over (0, 1)."""
    from tokenexit import schedule

    torch.manual_seed(1)
    exiting = tet.wrap(model, schedule.dense(after=after), num_classes=CLASSES, exit_heads=MLP(), **options).eval()
    with torch.no_grad():
        for head in [*exiting.exit_heads.values(), exiting.head]:
            head[-1].weight.mul_(12)
    exiting.retune(plan)
    return exiting


def images(count=3, size=(32, 48), seed=0) -> torch.Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def _lively(module: nn.Module) -> nn.Module:
    """Scale the linear layers up: freshly initialised blocks hardly change their tokens, or not at all."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and "blocks" in name:
                if not parameter.any():
                    nn.init.trunc_normal_(parameter, std=0.02)
                parameter.mul_(3)
    return module
