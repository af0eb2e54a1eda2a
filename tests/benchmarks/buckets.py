"""What exits cost in JAX beside the blocks that they leave to run, and where buckets waste.

    python -m tests.benchmarks.buckets --images 1 8 --rounds 9

A plain ViT with random weights runs drawn images: dense; with exits, in buckets chosen on the host; with exits, in one
program; and its stages by themselves, each as a dense batch of as many tokens as the bucket that was used, with the
heads that read there, and nothing else. The last is the least that running in these buckets can cost: what the others
take more is for gathering, policies and bookkeeping. Thresholds are set so that of all patches a given share stays at
each exit, in a dense run. Everything is timed in turn, in a new order every round; the figures are medians, and
dense is 1. `held` is the share of entries, in the blocks after the first exit, that held a token.
"""

import argparse
import functools
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from einops import rearrange
from jax import Array
from jax import numpy as jnp

import tokenexit_jax as tej
from tests.benchmarks.clock import interleaved
from tokenexit import schedule
from tokenexit.heads import MLP
from tokenexit_jax.heads import build as building

PATCH = 16


@dataclass(frozen=True)
class Block:
    """A plain pre-norm block; without counts it attends as if there were no library."""

    index: int
    attention_heads: int

    def __call__(self, params: dict, tokens: Array, counts: Array | None, _positions: None) -> Array:
        p = params["blocks"][self.index]
        qkv = normed(tokens) @ p["qkv"]
        q, k, v = rearrange(qkv, "n t (three h d) -> three n t h d", three=3, h=self.attention_heads)
        mixed = jax.nn.dot_product_attention(q, k, v) if counts is None else tej.attend(q, k, v, counts)
        tokens = tokens + rearrange(mixed, "n t h d -> n t (h d)") @ p["out"]
        return tokens + jax.nn.gelu(normed(tokens) @ p["up"]) @ p["down"]


def normed(x: Array) -> Array:
    return jax.nn.standardize(x, axis=-1)


def embed(params: dict, images: Array) -> tej.Embedded:
    cut = rearrange(images, "n (gh p) (gw q) c -> n (gh gw) (p q c)", p=PATCH, q=PATCH)
    return tej.Embedded(cut @ params["embed"], 0, (images.shape[1] // PATCH, images.shape[2] // PATCH))


def finish(_params: dict, tokens: Array) -> Array:
    return normed(tokens)


def drawn(args: argparse.Namespace) -> dict:
    width = args.width
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    random = np.random.default_rng(args.seed)

    def matrix(rows: int, columns: int) -> Array:
        return jnp.asarray(random.normal(size=(rows, columns)) * rows**-0.5, dtype=jnp.float32)

    blocks = [{name: matrix(*shape) for name, shape in shapes.items()} for _ in range(args.depth)]
    return {"embed": matrix(3 * PATCH * PATCH, width), "blocks": blocks}


def pictures(args: argparse.Namespace, count: int, seed: int) -> Array:
    """Noise that differs from picture to picture in its scale, so that some of them are easier than others."""
    random = np.random.default_rng(seed)
    scale = random.uniform(0.3, 1.5, size=(count, 1, 1, 1))
    return jnp.asarray(scale * random.normal(size=(count, *args.size, 3)), dtype=jnp.float32)


def with_shares(model: tej.ExitingModel, params: dict, heads: tej.Heads, images: Array, stay: Sequence[float]) -> Any:
    """The plan with thresholds by which these shares of all patches stay, as a dense run has it."""
    every = jax.jit(model.every_exit)(params, heads, images)
    left, thresholds = np.zeros(every[model.after[0]].shape[:3], dtype=bool), {}
    for after, share in zip(model.after, stay, strict=True):
        certain = np.asarray(jax.nn.softmax(every[after]).max(axis=-1))
        gone = 1 - share / max((~left).mean(), 1e-9)
        thresholds[after] = float(np.quantile(certain[~left], 1 - min(max(gone, 0.0), 1.0)))
        left |= certain > thresholds[after]
    return model.schedule.with_threshold(thresholds)


def stages_alone(
    model: tej.ExitingModel, params: dict, heads: tej.Heads, images: Array, room: Sequence[int]
) -> Callable[[], object]:
    """Every stage as a dense batch of as many tokens as it had entries, with its head."""
    stops = [*model.after, model.depth]

    @functools.partial(jax.jit, static_argnames=("start", "stop"))
    def stage(params: dict, head: dict, given: Array, *, start: int, stop: int) -> Array:
        tokens = embed(params, given).tokens if start == 0 else given
        for block in model.network.blocks[start:stop]:
            tokens = block(params, tokens, None, None)
        tokens = finish(params, tokens) if stop == model.depth else tokens
        return building.read(model.head_plan, head, tokens)

    every = []
    for start, stop in zip([0, *model.after], stops, strict=True):
        if room[start]:
            shape = (images.shape[0], int(room[start]), model.network.width)
            given = images if start == 0 else jax.random.normal(jax.random.key(start), shape)
            head = heads["head"] if stop == model.depth else heads["exit_heads"][str(stop)]
            every.append(functools.partial(stage, params, head, given, start=start, stop=stop))
    return lambda: jax.block_until_ready([run() for run in every])


def dense_alone(model: tej.ExitingModel, params: dict, heads: tej.Heads, images: Array) -> Callable[[], object]:
    """The network and its final head, without this library."""

    @jax.jit
    def dense(params: dict, head: dict, images: Array) -> Array:
        tokens = embed(params, images).tokens
        for block in model.network.blocks:
            tokens = block(params, tokens, None, None)
        return building.read(model.head_plan, head, finish(params, tokens))

    return lambda: jax.block_until_ready(dense(params, heads["head"], images))


def measured(args: argparse.Namespace, count: int, seed: int) -> dict[str, Any]:
    params, images = drawn(args), pictures(args, count, seed)
    blocks = tuple(Block(index, args.heads) for index in range(args.depth))
    network = tej.Network(embed, blocks, finish, args.width)
    plan = schedule.dtop(after=args.after, threshold=0.5)
    model = tej.wrap(network, plan, classes=args.classes, exit_heads=MLP(), capacities=tuple(args.capacities))
    heads = model.init(jax.random.key(args.seed))
    model = model.retuned(with_shares(model, params, heads, images, args.stay))
    out = model(params, heads, images)
    room, ran = (np.asarray(counted) for counted in (out.capacity_per_block, out.tokens_per_block))
    program = jax.jit(model.compiled)
    after = args.after[0]
    seconds = interleaved(
        {
            "dense": dense_alone(model, params, heads, images),
            "stages": stages_alone(model, params, heads, images, room[0]),
            "host": lambda: jax.block_until_ready(model(params, heads, images)),
            "program": lambda: jax.block_until_ready(program(params, heads, images, model.schedule)),
        },
        rounds=args.rounds,
        at_least=args.at_least,
    )
    return {
        "images": count,
        "seed": seed,
        "room": room[0].tolist(),
        "held": float(ran[:, after:].sum() / max(room[:, after:].sum(), 1)),
        "held_by_stage": [float(ran[:, at].sum() / max(room[:, at].sum(), 1)) for at in args.after],
        "overflow": int(np.asarray(out.overflow).sum()),
        "dense_seconds": statistics.median(seconds["dense"]),
        **{
            name: statistics.median(one / dense for one, dense in zip(seconds[name], seconds["dense"], strict=True))
            for name in ("stages", "host", "program")
        },
        **{
            f"{name}_to_stages": statistics.median(
                one / stages for one, stages in zip(seconds[name], seconds["stages"], strict=True)
            )
            for name in ("host", "program")
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| images | entries after each exit | held | dense, ms | stages | host | program | host / stages | program / stages |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        entries = ", ".join(map(str, dict.fromkeys(row["room"])))
        ratios = [row[name] for name in ("stages", "host", "program", "host_to_stages", "program_to_stages")]
        figures = " | ".join(f"{ratio:.3f}" for ratio in ratios)
        held, dense = f"{100 * row['held']:.0f} %", f"{1000 * row['dense_seconds']:.1f}"
        lines.append(f"| {row['images']} | {entries} | {held} | {dense} | {figures} |")
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 8], help="batch sizes (default: 1 8)")
    parser.add_argument("--batches", type=int, default=2, help="batches of each size (default: 2)")
    parser.add_argument("--size", type=int, nargs=2, default=[480, 352], help="pixels (default: 480 352)")
    parser.add_argument("--width", type=int, default=192, help="channels (default: 192)")
    parser.add_argument("--heads", type=int, default=3, help="attention heads (default: 3)")
    parser.add_argument("--depth", type=int, default=12, help="blocks (default: 12)")
    parser.add_argument("--classes", type=int, default=11, help="classes of the heads (default: 11)")
    parser.add_argument("--after", type=int, nargs="+", default=[3, 6, 8], help="exits (default: 3 6 8)")
    parser.add_argument("--stay", type=float, nargs="+", default=[0.7, 0.45, 0.3],
                        help="share of all patches that stays at each exit (default: 0.7 0.45 0.3)")  # fmt: skip
    parser.add_argument("--capacities", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0],
                        help="buckets (default: 0.25 0.5 0.75 1)")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=9, help="how often each is timed (default: 9)")
    parser.add_argument("--at-least", type=float, default=0.2, metavar="SECONDS",
                        help="short calls are repeated for this long in each round (default: 0.2)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(given)
    if len(args.stay) != len(args.after):
        parser.error(f"--stay needs {len(args.after)} shares, one for each exit, got {len(args.stay)}")
    return args


def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    rows = [measured(args, count, args.seed + batch) for count in args.images for batch in range(args.batches)]
    settings = {**vars(args), "jax": jax.__version__, "device": jax.devices()[0].device_kind}
    print(table(rows), end="\n\n")
    print(json.dumps({"settings": settings, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
