"""What semantic tokens save: wall clock and multiply-adds of a network on semantic tokens, beside the same one dense.

    python -m tests.benchmarks.semantic --what vit --batch 16 --rounds 9
    python -m tests.benchmarks.semantic --what swin --batch 16 --rounds 9

Networks have random weights and a head of 1000 classes. `vit` is DeiT at 224 px: dense; on 16 semantic tokens from
block 4 to the end; with all tokens recovered for the last block; and cut short after as many blocks as cost about what
16 semantic tokens do. `swin` is Swin with a convolutional stem: dense, and with a third stage on semantic tokens
(STViT-R). A call is a whole one, from images to class scores. Everything is timed in turn, in a new order every round;
speed-ups are taken round by round. One line of JSON for each contender: lower quartile, median and upper quartile.
"""

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from examples.counting import multiply_adds
from tests.benchmarks.clock import interleaved
from tests.timm_import import import_timm
from tokenexit import semantic

Contenders = Mapping[str, Callable[[Tensor], Tensor]]


def of_vit(size: str, *, after: int, until: int, place: Mapping) -> Contenders:
    """DeiT, and what is made of it."""
    vit = import_timm().create_model(f"deit_{size}_patch16_224").eval().to(**place)
    short = tet.wrap_semantic(vit, semantic.stvit(), after=after, until=None)
    recovered = tet.wrap_semantic(vit, semantic.stvit(), after=after, until=until)
    one = torch.zeros(1, 3, 224, 224, **place)
    wanted = multiply_adds(lambda: vit.forward_head(short(one).tokens))
    cuts = {depth: cut_short(vit, depth) for depth in range(1, len(vit.blocks))}
    depth, truncated = min(cuts.items(), key=lambda cut: abs(multiply_adds(lambda: cut[1](one)) - wanted))
    return {
        "dense": vit,
        "16 semantic tokens": lambda images: vit.forward_head(short(images).tokens),
        f"recovered after block {until}": lambda images: vit.forward_head(recovered(images).tokens),
        f"truncated after block {depth}": truncated,
    }


def cut_short(vit: Any, depth: int) -> nn.Module:
    """The same network with its first blocks alone."""
    cut = copy.deepcopy(vit)
    cut.blocks = cut.blocks[:depth]
    return cut


def of_swin(size: str, *, place: Mapping) -> Contenders:
    """Swin, and STViT-R of the same size."""
    build = {"small": tet.models.swin_small, "base": tet.models.swin_base}[size]
    plans = {"dense": None, "STViT-R": semantic.stvit_r()}
    return {
        name: tet.models.SwinClassifier(build(plan=plan), classes=1000).eval().to(**place)
        for name, plan in plans.items()
    }


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


@torch.inference_mode()
def measured(given: argparse.Namespace) -> list[dict]:
    """A row for each contender."""
    torch.manual_seed(0)
    place = {"device": given.device, "dtype": getattr(torch, given.dtype)}
    if given.what == "vit":
        contenders = of_vit(given.size, after=given.after, until=given.until, place=place)
    else:
        contenders = of_swin(given.size, place=place)
    images = torch.randn(given.batch, 3, 224, 224).to(**place)
    work = {name: multiply_adds(lambda call=call: call(images[:1])) for name, call in contenders.items()}
    seconds = interleaved(
        {name: lambda call=call: call(images) for name, call in contenders.items()},
        rounds=given.rounds,
        at_least=given.at_least,
        wait=lambda: torch.cuda.synchronize(given.device) if given.device.type == "cuda" else None,
    )
    machine = {"device": str(given.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    if given.device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(given.device)
    return [
        {
            "what": given.what, "size": given.size, "contender": name, "batch": given.batch, "dtype": given.dtype,
            **machine,
            "multiply_adds": work[name], "of_dense": work[name] / work["dense"],
            "ms": [1000 * value for value in quartiles(seconds[name])],
            "images_per_second": quartiles([given.batch / value for value in seconds[name]]),
            "speed_up": quartiles([dense / own for dense, own in zip(seconds["dense"], seconds[name], strict=True)]),
        }
        for name in contenders
    ]  # fmt: skip


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.semantic", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--what", choices=("vit", "swin"), default="vit", help="(default %(default)s)")
    parser.add_argument("--size", choices=("small", "base"), default="small", help="(default %(default)s)")
    parser.add_argument("--after", type=int, default=4, help="blocks of DeiT before (default %(default)s)")
    parser.add_argument("--until", type=int, default=11, help="blocks until all are recovered (default %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(default %(default)s)")
    parser.add_argument(
        "--at-least", type=float, default=0.5, metavar="SECONDS", help="of a round (default %(default)s)"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    given = parser.parse_args()
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    for row in measured(given):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
