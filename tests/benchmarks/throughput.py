"""Images a second: dense, with exits, and the limit that no bookkeeping could pass.

    python -m tests.benchmarks.throughput --host vit_small_patch16_224 --size 512 --batch 8 --keep 1.0,0.7,0.5,0.3
    python -m tests.benchmarks.throughput --host vit_large_patch16_224 --size 1024 --batch 8 --dtype bfloat16 \\
        --device cuda --compile

The network is one of timm's, with random weights and three exits, after a quarter, half and three quarters of its
blocks. Under `--keep` 0.5, half of its token-blocks run: who leaves is drawn beforehand, and images keep
different shares, 30 % more or less than the mean. All else is as with the library's own rule: its exit heads
(`heads.MLP`), `NeighboursAgree` and the retention of five tokens a class are computed at every exit, though they do not
decide here. A call is a whole one, from images to class scores of every patch.

- `dense`: the network itself, and its head; `compiled` by `torch.compile`.
- `limit`: the same blocks on as many tokens, in a plain batch of images that all keep the same: no exit heads, no
  policy, no gather, no scatter.
- `packed`: exits, in one packed row; `compiled` between two exits.
- `static`: exits with a fixed number of entries, those of the fullest image; `compiled` as one program, on CUDA in a
  CUDA graph.
- `short`: the network cut short after as many blocks as make the same token-blocks.

Everything is timed in turn, in a new order every round; ratios are taken round by round. A line for each is printed, and
all of it as JSON; on CUDA with the names of the attention kernels that ran.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import tokenexit_torch as tet
from tests.benchmarks.clock import interleaved
from tests.benchmarks.contenders import (
    Dense,
    Limit,
    cut_short,
    following,
    launched,
    network,
    quartiles,
    ratios,
    setting,
    versions,
)
from tests.timm_import import import_timm


def contenders(given: argparse.Namespace, images: Tensor) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, Any]]:
    """What is timed, by name, and what is known of each."""
    of = network(
        import_timm().create_model(given.host, img_size=given.size, num_classes=0), images, classes=given.classes
    )
    compiled: dict[str, Any] = {"mode": "reduce-overhead"} if images.is_cuda else {}
    dense = Dense(of.model, of.prefix)
    found: dict[str, Callable[[Tensor], Any]] = {"dense": dense}
    known: dict[str, Any] = {"dense": {"keep": 1.0}}
    if given.compile:
        found["dense, compiled"], known["dense, compiled"] = torch.compile(dense, **compiled), {"keep": 1.0}
    for keep in given.keep:
        one = setting(keep, patches=of.patches, batch=given.batch, spread=given.spread, device=images.device)
        model = following(of.model, one.schedule(of))
        output = model(images)
        ran = output.tokens_per_block.double().mean().item() / of.slots
        work = int(model.multiply_adds(output).sum())
        note = {"keep": keep, "token_blocks": ran, "multiply_adds": work}
        of_keep: dict[str, Callable[[Tensor], Any]] = {
            "limit": Limit(of, one.means),
            "packed": model,
            "static": tet.StaticModel(model, capacities=one.capacities(of)),
            "short": cut_short(of, max(1, round(keep * of.model.depth))),
        }
        if given.compile:
            call = torch.compile(of_keep["limit"], dynamic=False)
            of_keep["limit, compiled"] = call
            of_keep["packed, compiled"] = torch.compile(of_keep["packed"], dynamic=True)
            of_keep["static, compiled"] = torch.compile(of_keep["static"], fullgraph=True, **compiled)
        found |= {f"{name} {keep:g}": call for name, call in of_keep.items()}
        known |= {f"{name} {keep:g}": {**note, "contender": name} for name in of_keep}
    return found, known


@torch.inference_mode()
def measured(given: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contender."""
    torch.manual_seed(0)
    place = {"device": given.device, "dtype": getattr(torch, given.dtype)}
    images = torch.randn(given.batch, 3, given.size, given.size).to(**place)
    calls, known = contenders(given, images)
    seconds = interleaved(
        {name: lambda call=call: call(images) for name, call in calls.items()},
        rounds=given.rounds,
        at_least=given.at_least,
        wait=lambda: torch.cuda.synchronize() if images.is_cuda else None,
    )
    rows = []
    for name in calls:
        row: dict[str, Any] = {"contender": name, **known[name], "ms": [1000 * s for s in quartiles(seconds[name])]}
        row["of_dense"] = ratios(seconds[name], seconds["dense"])
        limit = f"limit {known[name]['keep']:g}"
        row["of_limit"] = ratios(seconds[name], seconds[limit]) if limit in seconds else None
        if images.is_cuda:
            row["kernels"] = launched(lambda name=name: calls[name](images)).attention
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of Markdown: medians, quartiles in brackets."""
    lines = ["| what | token-blocks | ms a batch | of dense | of the limit |", "|---|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["ms"]
        of = [
            "" if ratio is None else f"{ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}]"
            for ratio in (row["of_dense"], row["of_limit"])
        ]
        ran = f"{row.get('token_blocks', 1.0):.3f}"
        lines.append(f"| {row['contender']} | {ran} | {middle:.1f} [{low:.1f}, {high:.1f}] | {' | '.join(of)} |")
    return "\n".join(lines)


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """What ran it."""
    return {**versions(given.device), "threads": torch.get_num_threads(), "timm": import_timm().__version__}


def shares(text: str) -> list[float]:
    """Numbers from more than a quarter to 1, with commas between them."""
    values = [float(one) for one in text.split(",")]
    if not all(0.25 < value <= 1 for value in values):
        raise argparse.ArgumentTypeError(f"must be more than 0.25, for all run in the first quarter, got {text}")
    return values


def arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.throughput", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--host", default="vit_small_patch16_224", help="a ViT of timm (default %(default)s)")
    parser.add_argument("--size", type=int, default=512, metavar="PX", help="side of an image (default %(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="images (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu or cuda (default cpu)")
    parser.add_argument(
        "--keep", type=shares, default=[1.0, 0.7, 0.5, 0.3], help="token-blocks (default 1.0,0.7,0.5,0.3)"
    )
    parser.add_argument("--spread", type=float, default=0.3, help="of what images keep (default %(default)s)")
    parser.add_argument("--classes", type=int, default=19, help="(default %(default)s)")
    parser.add_argument("--compile", action="store_true", help="time what torch.compile makes of each as well")
    parser.add_argument("--rounds", type=int, default=9, help="(default %(default)s)")
    parser.add_argument(
        "--at-least", type=float, default=0.5, metavar="SECONDS", help="of a round (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; torch's own choice by default")
    parser.add_argument("--json", type=Path, help="file for the figures; else they are printed")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    given = arguments(words)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    rows = measured(given)
    print(table(rows))
    settings = {
        name: str(value) if name == "device" else value for name, value in vars(given).items() if name != "json"
    }
    text = json.dumps({"settings": settings, "machine": machine(given), "rows": rows}, indent=1)
    print(text) if given.json is None else given.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
