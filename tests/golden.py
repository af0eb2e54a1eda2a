# ruff: noqa: T201, B023, E731, C416, SIM
"""A record of what the library computes, to compare before and after its code is moved; removed when that is done.

    python -m tests.golden write FILE       # at the commit to start from
    python -m tests.golden compare FILE     # after every step, on the same machine

Everything of PyTorch must be equal to the bit. JAX's floating results may differ by 1e-6: fusion may move.
It stands on the public API alone, and builds its own models, so that it runs before and after.
"""

import argparse
import dataclasses
import hashlib
import pickle
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import tokenexit_torch as tet
from examples.timm_import import import_timm
from tokenexit import policies, schedule
from tokenexit.carries import Feature, MaskPrediction, Preserved
from tokenexit.heads import ATM, FCN, MLP, Neighbourhood
from tokenexit.policies import Budget, ConfidenceAbove, MarginAbove, NeighboursAgree, Patience, PerClass
from tokenexit.schedule import Exit, Schedule

CLASSES, AFTER, SIZE = 5, (1, 2, 3), (32, 40)


# Models -------------------------------------------------------------------------------------------------------------


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim in (2, 4):
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif parameter.ndim == 1:
                parameter.add_(0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(std=0.5)
    return model.eval()


def timm_vit(**options: Any) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 0}
    return lively(import_timm().models.vision_transformer.VisionTransformer(**sizes | options))


def eva(**options: Any) -> nn.Module:
    sizes = {"img_size": SIZE, "patch_size": 8, "embed_dim": 32, "depth": 5, "num_heads": 2, "num_classes": 0}
    return lively(import_timm().models.eva.Eva(**sizes, **options))


def transformers_model(kind: str, **options: Any) -> nn.Module:
    import_timm()
    import transformers

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind.partition('Model')[0]}Config")
    return lively(getattr(transformers, kind)(config(**sizes, **options)))


def torchvision_vit() -> nn.Module:
    import_timm()
    from torchvision.models.vision_transformer import VisionTransformer

    return lively(VisionTransformer(image_size=32, patch_size=8, hidden_dim=32, num_layers=5, num_heads=2, mlp_dim=64))


BARE = {"class_token": False, "global_pool": "avg", "fc_norm": False}
HOSTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int]]] = {
    "timm": (timm_vit, SIZE),
    "registers": (partial(timm_vit, reg_tokens=2, init_values=0.5), SIZE),
    "bare": (partial(timm_vit, **BARE), SIZE),
    "eva02": (partial(eva, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, use_rot_pos_emb=True), SIZE),
    "mixed rope": (
        partial(
            eva, use_rot_pos_emb=True, attn_type="rope", rope_type="mixed", class_token=False, use_abs_pos_emb=False
        ),
        SIZE,
    ),
    "torchvision": (torchvision_vit, (32, 32)),
    "dinov2": (partial(transformers_model, "Dinov2Model", use_swiglu_ffn=True), (32, 32)),
    "dinov3": (partial(transformers_model, "DINOv3ViTModel", intermediate_size=64, num_register_tokens=2), (32, 32)),
    "siglip": (partial(transformers_model, "SiglipVisionModel", intermediate_size=64), (32, 32)),
}


def images(count: int = 3, size: tuple[int, int] = SIZE, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(seed))


def loud(model: Any, factor: float = 12.0) -> Any:
    """Confidences that spread over (0, 1)."""
    with torch.no_grad():
        for head in [*model.exit_heads.values(), *([model.head] if hasattr(model, "head") else [])]:
            last = [one for one in head.modules() if isinstance(one, nn.Linear)][-1]
            last.weight.mul_(factor)
    return model


@cache
def exiting(name: str, head: str = "mlp") -> tet.ExitingModel:
    torch.manual_seed(1)
    plan = {
        "mlp": MLP(),
        "fcn": FCN(8),
        "around": Neighbourhood(16, 1),
        "atm": ATM(layers=1, attention_heads=2),
    }[head]
    model = tet.wrap(HOSTS[name][0](), schedule.dense(after=AFTER), num_classes=CLASSES, exit_heads=plan).eval()
    if head == "atm":
        torch.manual_seed(2)
        with torch.no_grad():
            for one in [*model.exit_heads.values(), model.head]:
                for parameter in one.parameters():
                    parameter.normal_(std=0.5)
        return model
    return loud(model)


def all_exits(policy: policies.Policy, carry: Any = None, cell: int | None = None) -> Schedule:
    made = Schedule(tuple(Exit(after, policy) for after in AFTER), cell=cell)
    return made if carry is None else dataclasses.replace(made, carry=carry)


PLANS: dict[str, Schedule] = {
    "dense": schedule.dense(),
    "truncated": schedule.truncated(after=2),
    "dtop": schedule.dtop(after=AFTER, threshold=0.6, per_class=1),
    "neighbours": schedule.neighbours(radius={1: 1, 2: 1, 3: 0}, threshold=0.4, per_class=1),
    "cells": schedule.neighbours(radius={1: 1, 2: 0}, threshold=0.4, per_class=0, cell=2),
    "paumer": schedule.paumer(after=(1, 3), threshold=0.4),
    "budget": schedule.paumer(keep={1: 0.7, 2: 0.5, 3: 0.2}),
    "folding": Schedule((Exit(1, ConfidenceAbove(0.5)), Exit(2, ConfidenceAbove(0.6))), Feature("decoder", 0.1)),
    "rejoining": all_exits(ConfidenceAbove(0.6), Feature("last block")),
    "patience": all_exits(Patience(1) & MarginAbove(0.3), cell=3),
    "per class": all_exits(
        (ConfidenceAbove(PerClass((0.5, 0.6, 0.7, 0.8, 0.4))) | ~MarginAbove(0.2)).with_minimum(per_image=2)
    ),
    "batch budget": all_exits(policies.BatchBudget(0.6, by="margin")),
    "count": all_exits(Budget(7)),
    "all at once": all_exits(policies.always()),
}
FEATURES = {name: PLANS[name] for name in ("dense", "paumer", "budget", "folding", "rejoining")}
MASKED = {
    "frozen": all_exits(ConfidenceAbove(0.5).retaining(per_class=1)),
    "reweighed": all_exits(ConfidenceAbove(0.5), MaskPrediction()),
    "reweighed, cells": all_exits(NeighboursAgree(0.3), MaskPrediction(), cell=2),
}
GATED = {
    f"{returning}, {keys}, {before}": schedule.svit(
        after=(1, 2), threshold=0.5, carry=Preserved(returning=returning, keys=keys, before=before)
    )
    for returning in ("every gate", "never")
    for keys in ("running", "all")
    for before in ("decoder", "last block")
}
SAMPLED: dict[str, dict[str, Any]] = {
    "published": {},
    "detached, cool, coins": {"gate_input": "detached", "temperature": 0.5, "random": 0.3},
}


# Records ------------------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Numbers as hashes of their bytes, types and shapes; containers item by item."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(value.tobytes()).hexdigest()[:16]
        return f"{value.dtype}{value.shape}:{digest}:{float(np.nan_to_num(value.astype(np.float64)).sum()):.6g}"
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def fields(output: Any) -> Any:
    names = "logits exit_depth tokens_per_block capacity_per_block overflow exits head_on"
    return plain([getattr(output, name) for name in names.split()])


def folder(path: Path) -> dict[str, str]:
    return {one.name: hashlib.sha256(one.read_bytes()).hexdigest() for one in sorted(path.rglob("*")) if one.is_file()}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    found = {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}
    model.zero_grad()
    return found


class Waits(TorchDispatchMode):
    """Counts what an accelerator would be waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = str(func)
        self.count += "_local_scalar_dense" in name or "nonzero" in name or "masked_select" in name
        return func(*args, **(kwargs or {}))


def torch_exits() -> Iterator[tuple[str, Any]]:
    for host, (_, size) in HOSTS.items():
        model = exiting(host)
        for name, plan in PLANS.items():
            if name == "folding" and host in ("bare", "mixed rope", "siglip"):
                continue
            if host not in ("timm", "bare") and name in ("count", "per class", "batch budget", "truncated"):
                continue
            with torch.no_grad():
                out = model(images(size=size), schedule=plan)
                yield f"torch/{host}/{name}/packed", plain([*out[:5]])
                yield f"torch/{host}/{name}/cost", plain(model.multiply_adds(out))
                static = tet.StaticModel(model, capacities={1: 0.8, 2: 0.7, 3: 0.5})
                yield f"torch/{host}/{name}/static", fields(static(images(size=size), schedule=plan))
    model = exiting("timm")
    for name in ("dtop", "cells", "folding", "rejoining"):
        with torch.no_grad():
            shapes = (SIZE, (40, 32), SIZE)
            sized = tet.wrap(
                timm_vit(dynamic_img_size=True),
                schedule.dense(after=AFTER),
                head=model.head,
                exit_heads=heads_of(model),
            ).eval()
            several = [images(1, size, seed)[0] for seed, size in enumerate(shapes)]
            found = sized.mixed(several, schedule=PLANS[name])
            yield f"torch/mixed/{name}", plain([[*one[:5]] for one in found])
    with torch.no_grad():
        yield "torch/every exit", plain(model.every_exit(images()))
        yield "torch/patches after", plain(model.patches_after(images()))
        for name in ("dtop", "rejoining", "dense"):
            with Waits() as waits:
                model(images(), schedule=PLANS[name])
            yield f"torch/waits/{name}", waits.count
            with Waits() as waits:
                tet.StaticModel(model, capacities=0.7)(images(), schedule=PLANS[name])
            yield f"torch/waits/{name}/static", waits.count
        double = exiting("registers").double()
        for name, plan in PLANS.items():
            yield f"torch/double/{name}", plain([*double(images().double(), schedule=plan)[:5]])
        double.float()


def heads_of(model: Any) -> dict[int, nn.Module]:
    return {int(after): head for after, head in model.exit_heads.items()}


def torch_heads() -> Iterator[tuple[str, Any]]:
    for head, plans in (("around", PLANS), ("fcn", PLANS), ("atm", MASKED)):
        model = exiting("registers", head)
        for name, plan in plans.items():
            if head != "atm" and name not in ("dtop", "cells", "rejoining", "dense"):
                continue
            with torch.no_grad():
                yield f"torch/{head}/{name}/packed", plain([*model(images(), schedule=plan)[:5]])
                if head != "atm":
                    static = tet.StaticModel(model, capacities=0.6)
                    yield f"torch/{head}/{name}/static", fields(static(images(), schedule=plan))
    yield "torch/every mask", plain({k: [*v] for k, v in exiting("registers", "atm").every_mask(images()).items()})


def torch_training() -> Iterator[tuple[str, Any]]:
    labels = torch.randint(0, CLASSES, (3, *SIZE), generator=torch.Generator().manual_seed(3))
    for head, plans in (("mlp", PLANS), ("fcn", PLANS), ("around", PLANS), ("atm", MASKED)):
        model = exiting("registers", head)
        model.train()
        for name, plan in plans.items():
            if head in ("fcn", "around") and name not in ("dtop", "rejoining"):
                continue
            stages = tet.Staged(model)(images(), schedule=plan)
            loss = stages.loss(lambda logits: tet.pixel_cross_entropy(logits, labels))
            if head == "atm":
                loss = loss + stages.loss_of_masks(lambda maps: tet.mask_loss(maps, labels))
            yield f"torch/staged/{head}/{name}", plain([loss, stages.logits, [*stages.output[:5]]])
            yield f"torch/gradients/{head}/{name}", plain(gradients(model, loss))
            if head != "atm":
                out = model(images(), schedule=plan).logits.square().sum()
                yield f"torch/gradients, bare/{head}/{name}", plain(gradients(model, out))
        model.eval()


def torch_decoders() -> Iterator[tuple[str, Any]]:
    import_timm()
    import transformers

    vit = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2}
    neck = {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5]}
    eomt = {"num_blocks": 2, "num_queries": 6, "num_register_tokens": 2, "num_upscale_blocks": 1, "num_labels": 3}
    dpt = {"intermediate_size": 64, "backbone_out_indices": [0, 1, 2, 3], "num_labels": 3}
    torch.manual_seed(0)  # not all parameters are drawn anew
    made = {
        "eomt": lively(transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**vit, **eomt))),
        "dpt": lively(transformers.DPTForSemanticSegmentation(transformers.DPTConfig(**vit, **neck, **dpt))),
    }
    for name, host in made.items():
        torch.manual_seed(1)
        after = (1, 2)
        model = tet.wrap_decoder(host, schedule.dense(after=after), num_classes=3).eval()
        loud(model)
        for plan_name, plan in FEATURES.items():
            if any(block not in after for block in plan.after):
                plan = dataclasses.replace(plan, exits=tuple(one for one in plan.exits if one.after in after))
            with torch.no_grad():
                out = model(images(size=(32, 32)), schedule=plan)
            decoded = {key: value for key, value in dict(out.decoded).items() if isinstance(value, Tensor)}
            yield f"torch/{name}/{plan_name}", plain([decoded, *out[1:4]])
            yield f"torch/{name}/{plan_name}/cost", plain(model.multiply_adds(out))
        yield f"torch/{name}/every exit", plain(model.every_exit(images(size=(32, 32))))


def torch_gates() -> Iterator[tuple[str, Any]]:
    for host in ("timm", "registers", "mixed rope"):
        torch.manual_seed(3)
        head = nn.Linear(32, 4)
        model = tet.wrap_gates(HOSTS[host][0](), schedule.svit(after=(1, 2, 3)), head=head, taps=(2, 5)).eval()
        with torch.no_grad():
            for gate in model.gates.values():
                gate[-1].weight.mul_(8)
                gate[-1].bias.zero_()
        for name, plan in GATED.items():
            with torch.no_grad():
                out = model(images(), schedule=plan)
                yield f"torch/gates/{host}/{name}", plain([*out[:7]])
                yield f"torch/gates/{host}/{name}/cost", plain(model.multiply_adds(out))
                yield f"torch/gates/{host}/{name}/masked", plain([*model.masked(images(), schedule=plan)[:7]])
            if host == "timm":
                yield (
                    f"torch/gates/{name}/gradients",
                    plain(gradients(model, model(images(), schedule=plan).logits.square().sum())),
                )
                model.retune(plan)
                for way, options in SAMPLED.items():
                    sampled = tet.Sampled(model, rates={1: 0.7, 2: 0.5, 3: 0.3}, **options).train()
                    drawn = sampled(images(), generator=torch.Generator().manual_seed(5))
                    yield f"torch/sampled/{name}/{way}", plain([*drawn])
                    loss = drawn.output.logits.square().mean() + 4 * drawn.ratio_loss()
                    yield f"torch/sampled/{name}/{way}/gradients", plain(gradients(model, loss))
                rates = tet.gate_thresholds(model, images(5).split(2), rates={1: 0.7, 2: 0.5}, progress=iter)
                yield f"torch/rates/{name}", rates.to_dict()
                model.eval()
        with tempfile.TemporaryDirectory() as place:
            tet.save(model, Path(place) / "gates")
            yield f"torch/saved gates/{host}", folder(Path(place))


def torch_workflows() -> Iterator[tuple[str, Any]]:
    shown = [images(4, seed=seed) for seed in range(10, 14)]
    for head in ("mlp", "around", "fcn", "atm"):
        with tempfile.TemporaryDirectory() as place:
            tet.save(exiting("registers", head), Path(place) / "exits")
            yield f"torch/saved/{head}", folder(Path(place))
    model = exiting("registers")
    model.retune(PLANS["dtop"])
    recorded = tet.trace(model, shown, progress=iter)
    for name in ("dtop", "neighbours", "cells", "patience", "per class", "count", "truncated", "dense"):
        yield f"torch/replay/{name}", plain([*recorded.replay(PLANS[name])[:5]])
    with tempfile.TemporaryDirectory() as place:
        made = tet.calibrate(
            model, shown, at_most=0.9, preprocessing="none", progress=iter, resume=Path(place) / "resume"
        )
        yield "torch/calibrated", plain([str(made.report), repr(made.certificate)])
        again = tet.calibrate(
            model, shown, at_most=0.9, preprocessing="none", progress=iter, resume=Path(place) / "resume"
        )
        yield "torch/calibrated, resumed", plain([str(again.report), repr(again.certificate)])
    plan = dataclasses.replace(PLANS["neighbours"], exits=PLANS["neighbours"].exits[:2])
    torch.manual_seed(4)
    fresh = tet.wrap(timm_vit(), plan, num_classes=CLASSES)
    loud(fresh)
    report = tet.fit_exits(fresh, shown, steps=20, patches_per_step=64, held_out=0.25, check_every=10, progress=iter)
    yield "torch/fitted", plain([report, {name: one for name, one in fresh.state_dict().items()}])


def torch_programs() -> Iterator[tuple[str, Any]]:
    from torch._dynamo.testing import CompileCounterWithBackend

    for name in ("dtop", "rejoining", "cells"):
        torch.compiler.reset()
        model, programs = exiting("registers"), CompileCounterWithBackend("eager")
        model.retune(PLANS[name])
        compiled = torch.compile(model, dynamic=True, backend=programs)
        with torch.no_grad():
            for seed in range(3):
                compiled(images(3, seed=seed))
        yield f"torch/programs/{name}", programs.frame_count
        torch.compiler.reset()
        programs = CompileCounterWithBackend("eager")
        compiled = torch.compile(tet.StaticModel(model, capacities=0.7), fullgraph=True, backend=programs)
        with torch.no_grad():
            compiled(images(3))
        yield f"torch/programs/{name}/static", programs.frame_count
    torch.compiler.reset()


# JAX ----------------------------------------------------------------------------------------------------------------


class Near:
    """Floating results of JAX."""

    def __init__(self, value: Any) -> None:
        self.value = np.asarray(value)

    def same(self, other: "Near") -> bool:
        close = {"rtol": 1e-6, "atol": 1e-6, "equal_nan": True}
        return self.value.shape == other.value.shape and np.allclose(self.value, other.value, **close)


def jax_record(*, exits: bool = True, gates: bool = True) -> Iterator[tuple[str, Any]]:
    import jax
    from jax import numpy as jnp

    import tokenexit_jax as tej

    jax.config.update("jax_disable_most_optimizations", True)
    torch.manual_seed(0)  # hosts are made before anything else is seeded, and timm draws the bias of its first layer

    def tree(value: Any) -> Any:
        floating = lambda one: (
            Near(one) if np.issubdtype(np.asarray(one).dtype, np.floating) else plain(np.asarray(one))
        )
        return [floating(one) for one in jax.tree.leaves(value)]

    class Compilations:
        count = 0

        def __call__(self, event: str, *_: Any, **__: Any) -> None:
            self.count += event == "/jax/core/compile/backend_compile_duration"

    compilations = Compilations()
    jax.monitoring.register_event_duration_secs_listener(compilations)

    def norm(params: Any, name: str, x: Any) -> Any:
        centred = x - x.mean(axis=-1, keepdims=True)
        scaled = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
        return scaled * params[f"{name}.weight"] + params[f"{name}.bias"]

    def linear(params: Any, name: str, x: Any) -> Any:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def network(prefix: int, placed: bool = False) -> Any:
        def embed(params: Any, x: Any) -> Any:
            n, h, w, _ = x.shape
            cut = x.reshape(n, h // 8, 8, w // 8, 8, 3).transpose(0, 1, 3, 5, 2, 4).reshape(n, h * w // 64, 192)
            tokens = cut @ params["patch_embed.proj.weight"].reshape(32, -1).T + params["patch_embed.proj.bias"]
            first = [params[name] for name in ("cls_token", "reg_token") if name in params]
            first = [jnp.broadcast_to(one, (n, *one.shape[1:])) for one in first]
            tokens = jnp.concatenate([*first, tokens], axis=1) + params["pos_embed"]
            slots = jnp.arange(tokens.shape[1])
            table = 0.1 * jnp.sin(slots[:, None] * jnp.arange(1, 33)[None]) if placed else None
            return tej.Embedded(tokens, prefix, (h // 8, w // 8), table)

        def block(params: Any, tokens: Any, counts: Any, positions: Any, index: int) -> Any:
            name = f"blocks.{index}"
            tokens = tokens if positions is None else tokens + positions
            qkv = linear(params, f"{name}.attn.qkv", norm(params, f"{name}.norm1", tokens))
            q, k, v = (one[:, :, 0] for one in jnp.split(qkv.reshape(*qkv.shape[:2], 3, 2, 16), 3, axis=2))
            mixed = tej.attend(q, k, v, counts)
            tokens = tokens + linear(params, f"{name}.attn.proj", mixed.reshape(tokens.shape))
            hidden = jax.nn.gelu(
                linear(params, f"{name}.mlp.fc1", norm(params, f"{name}.norm2", tokens)), approximate=False
            )
            return tokens + linear(params, f"{name}.mlp.fc2", hidden)

        blocks = tuple(partial(block, index=index) for index in range(5))
        return tej.Network(embed, blocks, lambda params, x: norm(params, "norm", x), 32)

    def of(module: nn.Module) -> Any:
        return {name: jnp.asarray(value.detach().numpy().copy()) for name, value in module.state_dict().items()}

    def shown(count: int = 3) -> Any:
        return jnp.asarray(np.moveaxis(images(count).numpy(), 1, -1))

    for kind, host, options, heads in (
        (
            ("timm", timm_vit(pos_embed="learn"), {"prefix": 1}, "mlp"),
            ("bare, placed", timm_vit(**BARE), {"prefix": 0, "placed": True}, "mlp"),
            ("around", timm_vit(), {"prefix": 1}, "around"),
            ("masks", timm_vit(), {"prefix": 1}, "atm"),
        )
        if exits
        else ()
    ):
        theirs = exiting("timm" if heads != "mlp" or options["prefix"] else "bare", heads)
        weights = {
            "exit_heads": {after: of(one) for after, one in theirs.exit_heads.items()},
            "head": of(theirs.head),
        }
        model = tej.wrap(
            network(**options), schedule.dense(after=AFTER), classes=CLASSES, exit_heads=theirs.head_plan,
            capacities=(0.5, 0.8),
        )  # fmt: skip
        plans = MASKED if heads == "atm" else PLANS
        for name, plan in plans.items():
            if name == "folding" and not options["prefix"]:
                continue
            if heads == "around" and name not in ("dtop", "cells"):
                continue
            if kind == "bare, placed" and name not in ("dtop", "rejoining", "patience"):
                continue
            if kind == "timm" and name in ("truncated", "batch budget", "count", "paumer", "all at once"):
                continue
            before = compilations.count
            yield f"jax/{kind}/{name}/call", tree(model(of(host), weights, shown(), plan))
            yield f"jax/{kind}/{name}/programs", compilations.count - before
            before = compilations.count
            compiled = jax.jit(model.compiled)
            yield f"jax/{kind}/{name}/compiled", tree(compiled(of(host), weights, shown(), plan))
            if kind in ("timm", "masks"):
                labels = jnp.asarray(np.random.default_rng(0).integers(0, CLASSES, (3, *SIZE)))

                def loss(w: Any, plan: Schedule = plan, host: Any = host, model: Any = model) -> Any:
                    stages = tej.staged(model, of(host), w, shown(), plan)
                    return stages.loss(lambda logits: tej.pixel_cross_entropy(logits, labels))

                yield f"jax/{kind}/{name}/gradients", tree(jax.jit(jax.value_and_grad(loss))(weights))
        yield f"jax/{kind}/every exit", tree(model.every_exit(of(host), weights, shown()))
        with tempfile.TemporaryDirectory() as place:
            tej.save(model, weights, Path(place) / "exits")
            yield f"jax/{kind}/saved", folder(Path(place))
    if not gates:
        return

    host = timm_vit()
    torch.manual_seed(3)
    classes = nn.Linear(32, 4)
    theirs = tet.wrap_gates(host, schedule.svit(after=(1, 2, 3)), head=classes, taps=(2, 5)).eval()
    with torch.no_grad():
        for gate in theirs.gates.values():
            gate[-1].weight.mul_(8)
            gate[-1].bias.zero_()
    params = of(theirs.model) | {f"classes.{name}": value for name, value in of(classes).items()}
    weights = {after: of(gate) for after, gate in theirs.gates.items()}
    model = tej.wrap_gates(
        network(prefix=1), schedule.svit(after=(1, 2, 3)), head=lambda p, x: linear(p, "classes", x), taps=(2, 5),
        capacities=(0.7, 0.9),
    )  # fmt: skip
    for name, plan in GATED.items():
        before = compilations.count
        yield f"jax/gates/{name}/call", tree(model(params, weights, shown(), plan))
        yield f"jax/gates/{name}/programs", compilations.count - before
        yield f"jax/gates/{name}/compiled", tree(jax.jit(model.compiled)(params, weights, shown(), plan))
        yield f"jax/gates/{name}/masked", tree(jax.jit(model.masked)(params, weights, shown(), plan))
        before = compilations.count
        rates = tej.gate_thresholds(model.retuned(plan), params, weights, shown(5), rates={1: 0.7, 2: 0.5})
        yield f"jax/rates/{name}", rates.to_dict()
        yield f"jax/rates/{name}/programs", compilations.count - before
        for way, options in SAMPLED.items():

            def drawn(trained: Any, plan: Schedule = plan, options: Any = options) -> Any:
                given = {"key": jax.random.key(5), "rates": {1: 0.7, 2: 0.5, 3: 0.3}, **options}
                found = tej.sampled(model, *trained, shown(), plan, **given)
                return jnp.square(found.output.logits).mean() + 4 * found.ratio_loss(), found

            found = jax.jit(jax.value_and_grad(drawn, has_aux=True))((params, weights))
            yield f"jax/sampled/{name}/{way}", tree(found)
    yield "jax/gates/cost", plain(model.cost(params, shown()))
    with tempfile.TemporaryDirectory() as place:
        tej.save(model, weights, Path(place) / "gates")
        yield "jax/saved gates", folder(Path(place))


# Command ------------------------------------------------------------------------------------------------------------

PARTS = {
    "exits": torch_exits,
    "heads": torch_heads,
    "training": torch_training,
    "decoders": torch_decoders,
    "gates": torch_gates,
    "workflows": torch_workflows,
    "programs": torch_programs,
    "jax": partial(jax_record, gates=False),
    "jax gates": partial(jax_record, exits=False),
}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Near):
        return isinstance(other, Near) and one.same(other)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("write", "compare"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for part in arguments.only:
        found |= dict(PARTS[part]())
        print(part, len(found), flush=True)
    if arguments.what == "write":
        arguments.file.write_bytes(pickle.dumps(found))
        return 0
    wanted = pickle.loads(arguments.file.read_bytes())
    prefixes = {key.split("/")[0] for key in found}
    missing = [key for key in wanted if key not in found and key.split("/")[0] in prefixes]
    differing = [key for key in found if key in wanted and not same(found[key], wanted[key])]
    added = [key for key in found if key not in wanted]
    for word, keys in (
        ("missing", missing if set(arguments.only) == set(PARTS) else []),
        ("differs", differing),
        ("new", added),
    ):
        for key in keys:
            print(f"{word}: {key}")
    print(f"{len(found)} records, {len(differing)} differ")
    return 1 if differing or (missing and set(arguments.only) == set(PARTS)) else 0


if __name__ == "__main__":
    sys.exit(main())
