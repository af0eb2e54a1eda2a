"""Models of other libraries, small and with random weights, and how their own code runs them, for the tests of hosts."""

import dataclasses
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from tests.torch import models, oracle
from tokenexit import policies, schedule
from tokenexit.carries import Prediction
from tokenexit.schedule import Exit, Schedule

SIZE, PATCH, WIDTH, HEADS, DEPTH = (32, 32), 8, 32, 2, 4
GRID, PATCHES = (4, 4), 16
AFTER = (1, 2)


@dataclass(frozen=True)
class Foreign:
    """A model of another library, as that library runs it.

    Attributes:
        make: Builds it, once: each call gives a copy.
        prefix: How many of its tokens are no patches.
        dense: Its own forward: finished tokens of images.
        blocks: Its blocks.
        tables: What its blocks take by name, for images and the patches of them that run: rotary tables.
    """

    make: Callable[[], nn.Module]
    prefix: int
    dense: Callable[[Any, Tensor], Tensor]
    blocks: Callable[[Any], Any]
    tables: Callable[[Any, Tensor, Tensor, int], dict[str, Any]] = lambda *_: {}

    def __post_init__(self) -> None:
        object.__setattr__(self, "make", models.once(self.make))

    def embedded(self, model: nn.Module, images: Tensor) -> Tensor:
        """What its first block is given by its own forward."""
        seen = []
        hook = self.blocks(model)[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
        self.dense(model, images)
        hook.remove()
        return seen[0]

    def run(self, model: nn.Module, index: int, tokens: Tensor, images: Tensor, patches: Tensor) -> Tensor:
        """Block `index`, called as its own library does, on all prefix tokens and these patches of one image."""
        return self.blocks(model)[index](tokens, **self.tables(model, images, patches, index))

    def alone(self, model: nn.Module, image: Tensor) -> oracle.Alone:
        """One image of the size of the model, in its own code."""

        def run(block: int, row: Tensor, slots: Tensor) -> Tensor:
            return self.run(model, block, row, image, slots[self.prefix :] - self.prefix)

        def finish(tokens: Tensor) -> Tensor:
            """The final norm alone, by the model's own forward: its last block is made to give these tokens."""
            hook = self.blocks(model)[-1].register_forward_hook(lambda *_: tokens)
            found = self.dense(model, image)
            hook.remove()
            return found

        return oracle.Alone(self.embedded(model, image), self.prefix, GRID, run, finish)


class Told(policies.Policy):
    """Lets go those that it is told to, by image and place."""

    def __init__(self, leave):
        self.leave = leave

    def leaves(self, evidence):
        return self.leave[evidence.image, evidence.position.clamp(min=0)]


def told(images, *, seed=0, carry=Prediction(), done=None) -> Schedule:
    """After each of two blocks, other tokens leave: few of the first image, many of the last; all of `done`."""
    shares = torch.linspace(0.2, 0.7, images)[:, None]
    random = torch.Generator().manual_seed(seed)
    masks = [torch.rand(images, PATCHES, generator=random) < shares for _ in AFTER]
    if done is not None:
        masks[0][done] = True
    return Schedule(tuple(Exit(after, Told(mask)) for after, mask in zip(AFTER, masks, strict=True)), carry)


def depths_of(plan: Schedule, blocks: int) -> Tensor:
    """After how many of the blocks each token leaves by a plan of `told`, (images, rows, columns)."""
    first, second = (one.policy.leave.unflatten(1, GRID) for one in plan.exits)
    depth = torch.where(second, AFTER[1], blocks)
    return torch.where(first, AFTER[0], depth)


def one_of(plan: Schedule, number: int) -> Schedule:
    """A plan of `told` for one image alone."""
    own = tuple(Exit(one.after, Told(one.policy.leave[number : number + 1])) for one in plan.exits)
    return dataclasses.replace(plan, exits=own)


def exiting(model: nn.Module | Foreign) -> tet.ExitingModel:
    """Its heads hand the tokens out as they are; a `Foreign` is made and wrapped once, and this is a copy."""
    if isinstance(model, Foreign):
        return _exiting_once(model)
    heads = {after: nn.Identity() for after in AFTER}
    return tet.wrap(model, schedule.dense(after=AFTER), head=nn.Identity(), exit_heads=heads)


@models.once
def _exiting_once(foreign: Foreign) -> tet.ExitingModel:
    return exiting(foreign.make())


def lively(model: nn.Module) -> nn.Module:
    """Weights that change tokens a lot: freshly initialised blocks hardly do."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.5)
    return model.eval()


def distilled() -> nn.Module:
    deit = models.import_timm().models.deit
    return lively(
        deit.VisionTransformerDistilled(
            img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=0
        )
    )


def eva(**options: Any) -> nn.Module:
    made = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
    return lively(models.import_timm().models.eva.Eva(**made, num_classes=0, **options))


def eva_tables(model: Any, images: Tensor, patches: Tensor, index: int) -> dict[str, Any]:
    if model.rope is None:
        return {}
    table = model.rope.get_embed(shape=[side // PATCH for side in images.shape[-2:]])
    return {"rope": table[index][:, patches] if table.ndim == 4 else table[patches]}


def transformers_model(kind: str, name: str, **options: Any) -> nn.Module:
    """A model of transformers; in its tests, an installed timm makes sure that torchvision can be imported."""
    models.import_timm()
    pytest.importorskip("transformers", reason="transformers is not installed")
    source = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    configs = importlib.import_module(f"transformers.models.{kind}.configuration_{kind}")
    config = getattr(configs, f"{name.partition('Model')[0].partition('For')[0]}Config")
    sizes = {"image_size": SIZE[0], "patch_size": PATCH, "hidden_size": WIDTH, "num_hidden_layers": DEPTH}
    return lively(getattr(source, name)(config(**sizes, num_attention_heads=HEADS, **options)))


def torchvision_vit(**options: Any) -> nn.Module:
    models.import_timm()
    source = importlib.import_module("torchvision.models.vision_transformer")
    sizes = {"image_size": SIZE[0], "patch_size": PATCH, "hidden_dim": WIDTH, "num_layers": DEPTH}
    return lively(source.VisionTransformer(**sizes, num_heads=HEADS, mlp_dim=64, **options))


def encoded(model: Any, images: Tensor) -> Tensor:
    """What its encoder gives in its own forward."""
    seen = []
    hook = model.encoder.register_forward_hook(lambda _, __, given: seen.append(given))
    model(images)
    hook.remove()
    return seen[0]


def dinov3_tables(model: Any, images: Tensor, patches: Tensor, _: int) -> dict[str, Any]:
    cos, sin = model.rope_embeddings(images)
    return {"position_embeddings": (cos[patches], sin[patches])}


def _states(model: Any, images: Tensor) -> Tensor:
    own = tuple(images.shape[-2:]) == SIZE or "Dino" in type(model).__name__ or "DINO" in type(model).__name__
    return model(images, **({} if own else {"interpolate_pos_encoding": True})).last_hidden_state


def _maskless(*_: Any) -> dict[str, Any]:
    return {"attention_mask": None}


def _blocks(model: Any) -> Any:
    return model.blocks


def _features(model: Any, images: Tensor) -> Tensor:
    return model.forward_features(images)


_EVA = {"dense": _features, "blocks": _blocks, "tables": eva_tables}
_ROTARY = {"use_rot_pos_emb": True}
_DINO = {
    "rope_type": "dinov3", "rope_rotate_half": True, "rope_temperature": 100, "use_abs_pos_emb": False,
    "num_reg_tokens": 4, "dynamic_img_size": True, "use_fc_norm": False, "init_values": 1e-5, "qkv_bias": False,
}  # fmt: skip
FOREIGN = {
    "timm distilled": Foreign(distilled, 2, _features, _blocks),
    "timm EVA": Foreign(partial(eva, use_abs_pos_emb=True), 1, **_EVA),
    "timm EVA-02": Foreign(partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, **_ROTARY), 1, **_EVA),
    "timm DINOv3": Foreign(partial(eva, **_ROTARY, **_DINO), 5, **_EVA),
    "timm rotary, by block": Foreign(
        partial(eva, **_ROTARY, attn_type="rope", rope_type="mixed", class_token=False, use_abs_pos_emb=False),
        0,
        **_EVA,
    ),
    "torchvision": Foreign(torchvision_vit, 1, encoded, lambda model: model.encoder.layers),
    "transformers ViT": Foreign(
        partial(transformers_model, "vit", "ViTModel", intermediate_size=64), 1, _states, lambda model: model.layers
    ),
    "transformers DINOv2": Foreign(
        partial(transformers_model, "dinov2", "Dinov2Model", use_swiglu_ffn=True),
        1,
        _states,
        lambda model: model.encoder.layer,
    ),
    "transformers DINOv2 with registers": Foreign(
        partial(transformers_model, "dinov2_with_registers", "Dinov2WithRegistersModel", num_register_tokens=3),
        4,
        _states,
        lambda model: model.encoder.layer,
    ),
    "transformers DINOv3": Foreign(
        partial(transformers_model, "dinov3_vit", "DINOv3ViTModel", intermediate_size=64, num_register_tokens=2),
        3,
        _states,
        lambda model: model.model.layer,
        dinov3_tables,
    ),
    "transformers SigLIP": Foreign(
        partial(transformers_model, "siglip", "SiglipVisionModel", intermediate_size=64),
        0,
        _states,
        lambda model: model.encoder.layers,
        _maskless,
    ),
    "transformers CLIP": Foreign(
        partial(transformers_model, "clip", "CLIPVisionModel", intermediate_size=64),
        1,
        _states,
        lambda model: model.encoder.layers,
        _maskless,
    ),
}
