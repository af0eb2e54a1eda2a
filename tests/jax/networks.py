"""The networks of the PyTorch tests as pure functions in JAX, on the same weights.

Their parts are compiled, for what is run by itself, as by `tej.check`, would otherwise be so operation by operation: a
hundred programs instead of a few.
"""

import dataclasses
import functools
from dataclasses import dataclass

import jax
import numpy as np
import torch
from einops import rearrange
from jax import numpy as jnp

import tokenexit_jax as tej
import tokenexit_torch as tet
from tests.jax.parity import from_torch
from tests.torch import models
from tests.torch.vit import positions
from tokenexit import schedule
from tokenexit.heads import ATM, MLP, Neighbourhood, Translator

CLASSES = models.CLASSES
SIZE = (32, 40)
PATCH = 8


def along(channels, x):
    """Channels with the axes of tokens: no operation here may rely on the promotion of ranks."""
    return channels.reshape(*[1] * (x.ndim - 1), -1)


def norm(params, name, x, epsilon=1e-6):
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)
    return (scaled * along(params[f"{name}.weight"], x) + along(params[f"{name}.bias"], x)).astype(x.dtype)


def norm_of(name, epsilon, params, x):
    return norm(params, name, x, epsilon)


def linear(params, name, x):
    return x @ params[f"{name}.weight"].T + along(params[f"{name}.bias"], x)


def patches_of(params, name, images):
    """A patch embedding as a product; images have their channels last."""
    kernel = params[f"{name}.weight"]
    cut = rearrange(images, "n (gh p) (gw q) c -> n (gh gw) (c p q)", p=PATCH, q=PATCH)
    return cut @ kernel.reshape(kernel.shape[0], -1).T + along(params[f"{name}.bias"], images[..., 0])


def grid_of(images):
    return images.shape[1] // PATCH, images.shape[2] // PATCH


@functools.cache
def timm_network(heads=3, prefix=1, depth=5):
    """A timm `VisionTransformer`, whose parameters are its `state_dict`."""

    def embed(params, images):
        tokens = patches_of(params, "patch_embed.proj", images)
        first = [params[name] for name in ("cls_token", "reg_token") if name in params]
        first = [jnp.broadcast_to(one, (len(tokens), *one.shape[1:])) for one in first]
        tokens = jnp.concatenate([*first, tokens], axis=1) + params["pos_embed"]
        return tej.Embedded(tokens, prefix, grid_of(images))

    def block(params, tokens, counts, positions, index):
        name = f"blocks.{index}"
        qkv = linear(params, f"{name}.attn.qkv", norm(params, f"{name}.norm1", tokens))
        q, k, v = rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=heads)
        mixed = rearrange(tej.attend(q, k, v, counts), "n t h d -> n t (h d)")
        tokens = tokens + linear(params, f"{name}.attn.proj", mixed)
        hidden = linear(params, f"{name}.mlp.fc1", norm(params, f"{name}.norm2", tokens))
        return tokens + linear(params, f"{name}.mlp.fc2", jax.nn.gelu(hidden, approximate=False))

    blocks = tuple(jax.jit(functools.partial(block, index=index)) for index in range(depth))
    return tej.Network(jax.jit(embed), blocks, functools.partial(norm_of, "norm", 1e-6), 48)


@functools.cache
def plain_network(heads=2, depth=5, placed=False):
    """The demo's own ViT, without prefix tokens; `placed` adds something that belongs to each place in every block."""

    def embed(params, images):
        grid = grid_of(images)
        table = jnp.asarray(positions(grid, 32).numpy())
        slots = jnp.arange(grid[0] * grid[1])
        travelling = jnp.sin(slots[:, None] * jnp.arange(1, 33)[None]) if placed else None
        tokens = patches_of(params, "patches", images)
        return tej.Embedded(tokens + table.astype(tokens.dtype)[None], 0, grid, travelling)

    def block(params, tokens, counts, positions, index):
        name = f"blocks.{index}"
        tokens = tokens if positions is None else tokens + positions
        qkv = linear(params, f"{name}.attention.qkv", norm(params, f"{name}.norm1", tokens, 1e-5))
        q, k, v = rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=heads)
        mixed = rearrange(tej.attend(q, k, v, counts), "n t h d -> n t (h d)")
        tokens = tokens + linear(params, f"{name}.attention.out", mixed)
        hidden = linear(params, f"{name}.mlp.0", norm(params, f"{name}.norm2", tokens, 1e-5))
        return tokens + linear(params, f"{name}.mlp.2", jax.nn.gelu(hidden, approximate=False))

    blocks = tuple(jax.jit(functools.partial(block, index=index)) for index in range(depth))
    return tej.Network(jax.jit(embed), blocks, functools.partial(norm_of, "norm", 1e-5), 32)


def heads_of(model):
    """The heads of a PyTorch model that is wrapped."""
    exit_heads = {after: from_torch(head) for after, head in model.exit_heads.items()}
    return {"exit_heads": exit_heads, "head": from_torch(model.head)}


def images_of(images):
    """Images with their channels last."""
    return jnp.asarray(np.moveaxis(images.numpy(), 1, -1))


@dataclass(frozen=True)
class Pair:
    """One network in both frameworks, with heads after blocks 2, 3 and 4, on the same weights."""

    theirs: tet.ExitingModel
    model: tej.ExitingModel
    params: dict
    heads: dict

    def wanted(self, plan, images):
        with torch.no_grad():
            return self.theirs(images, schedule=plan)

    def found(self, plan, images, **options):
        return dataclasses.replace(self.model, **options)(self.params, self.heads, images_of(images), plan)

    def every(self, images):
        return jax.jit(self.model.every_exit)(self.params, self.heads, images_of(images))

    def compiled(self, plan, images):
        return jax.jit(self.model.compiled)(self.params, self.heads, images_of(images), plan)


@functools.cache
def pair(kind="timm", capacities=(0.5, 1.0)):
    declared = schedule.dense(after=(2, 3, 4))
    host, network = {
        "timm": lambda: (models.timm_vit(depth=5, size=SIZE), timm_network()),
        "timm, registers": lambda: (models.timm_vit(depth=5, size=SIZE, prefix=3), timm_network(prefix=3)),
        "plain": lambda: (models.plain_host(depth=5), plain_network()),
        "placed": lambda: (models.placed(), plain_network(depth=6, placed=True)),
        "masks": lambda: (models.timm_vit(depth=5, size=SIZE), timm_network()),
        "around": lambda: (models.timm_vit(depth=5, size=SIZE), timm_network()),
        "translating": lambda: (models.timm_vit(depth=5, size=SIZE), timm_network()),
    }[kind]()
    if kind == "around":
        plan = Neighbourhood(hidden=16)
        torch.manual_seed(1)
        theirs = tet.wrap(host, declared, num_classes=CLASSES, exit_heads=plan).eval()
        with torch.no_grad():
            for head in [*theirs.exit_heads.values(), theirs.head]:
                head[-1].weight.mul_(12)
    elif kind == "translating":
        plan = Translator(24)
        torch.manual_seed(1)
        theirs = tet.wrap(host, declared, num_classes=CLASSES, exit_heads=plan).eval()
        with torch.no_grad():
            theirs.head[-1].weight.mul_(12)
            for head in theirs.exit_heads.values():
                head.skip.weight.add_(0.1 * torch.randn_like(head.skip.weight))
                head.mlp[3].weight.normal_(std=0.3)
                head.log_error.weight.normal_(std=0.5)
                head.log_error.bias.fill_(-1)
    elif kind == "masks":
        plan = ATM(layers=1, attention_heads=2)
        torch.manual_seed(1)
        theirs = tet.wrap(host, declared, num_classes=CLASSES, exit_heads=plan).eval()
        for head in [*theirs.exit_heads.values(), theirs.head]:
            models.lively_masks(head)
    else:
        plan, theirs = MLP(), models.wrapped(host, declared)
    model = tej.wrap(network, declared, classes=CLASSES, exit_heads=plan, capacities=capacities)
    return Pair(theirs, model, from_torch(theirs.model), heads_of(theirs))
