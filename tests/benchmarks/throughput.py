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
import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from tests.benchmarks.clock import interleaved
from tests.timm_import import import_timm
from tokenexit import policies
from tokenexit.policies import NeighboursAgree, Policy
from tokenexit.schedule import Exit, Schedule

EXITS = 3


@dataclass(frozen=True)
class Drawn(Policy):
    """Of each image those patches leave that were drawn; the library's own rule is asked all the same."""

    leave: Tensor
    own: Policy

    def leaves(self, evidence: policies.Evidence, /) -> Tensor:
        self.own(evidence)
        place = evidence.position.clamp(min=0) + evidence.image * self.leave.shape[1]
        return self.leave.flatten().index_select(0, place)


@dataclass(frozen=True)
class Setting:
    """How many patches of each image run in each quarter of the blocks."""

    keep: float
    stay: tuple[Tensor, ...]

    @property
    def means(self) -> list[int]:
        """Patches of an image of the mean size, in the quarters after the first."""
        return [round(counts.float().mean().item()) for counts in self.stay]

    def schedule(self, after: Sequence[int], *, patches: int) -> Schedule:
        """What was drawn decides; the library's own rule is computed all the same."""
        rank = torch.rand(len(self.stay[0]), patches, generator=torch.Generator().manual_seed(0)).argsort().argsort()
        exits = []
        for block, counts, radius in zip(after, self.stay, (2, 1, 0), strict=True):
            own = NeighboursAgree(0.0, radius=radius).retaining(per_class=5)
            exits.append(Exit(block, Drawn(rank.to(counts.device) >= counts[:, None], own)))
        return Schedule(tuple(exits))


def setting(keep: float, *, patches: int, batch: int, spread: float, device: torch.device) -> Setting:
    """Shares of each exit that leave `keep` of the token-blocks: 1, k, k^2 and k^3 in four quarters of the network."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + middle + middle**2 + middle**3) / 4 < keep else (low, middle)
    spread = 0.0 if batch == 1 or keep == 1 else spread  # nobody keeps more than all
    of_image = torch.linspace(1 - spread, 1 + spread, batch)
    stay = []
    for power in range(1, EXITS + 1):
        counts = (low**power * patches * of_image).round().clamp(1, patches).long()
        stay.append(counts[torch.randperm(batch, generator=torch.Generator().manual_seed(power))].to(device))
    return Setting(keep, tuple(stay))


class Limit(nn.Module):
    """Blocks on as many tokens, and nothing else."""

    def __init__(self, model: tet.ExitingModel, after: Sequence[int], means: Sequence[int]) -> None:
        super().__init__()
        self.model, self.after, self.means = model, after, means

    def forward(self, images: Tensor) -> Tensor:
        host = self.model.host
        embedded = host.embed(images)
        row, positions, start = embedded.tokens, embedded.positions, 0
        for stop, slots in zip((*self.after, self.model.depth), (*self.means, 0), strict=True):
            for block in range(start, stop):
                row = host.run(block, row, positions)
            if slots:
                row = row[:, : embedded.prefix + slots].contiguous()
                positions = None if positions is None else positions[: embedded.prefix + slots]
            start = stop
        return self.model.head(host.finish(row)[:, embedded.prefix :])


class Dense(nn.Module):
    """The network itself, and its head."""

    def __init__(self, model: tet.ExitingModel, prefix: int) -> None:
        super().__init__()
        self.model, self.prefix = model, prefix

    def forward(self, images: Tensor) -> Tensor:
        return self.model.head(self.model.host.dense(images)[:, self.prefix :])


def cut_short(vit: Any, model: tet.ExitingModel, depth: int, prefix: int) -> nn.Module:
    """The same network with its first blocks alone."""
    cut = copy.copy(vit)
    cut._modules = dict(vit._modules) | {"blocks": vit.blocks[:depth]}
    short = tet.wrap(cut, Schedule(), head=model.head)
    return Dense(short, prefix)


def contenders(given: argparse.Namespace, images: Tensor) -> tuple[dict[str, Callable[[Tensor], Any]], dict[str, Any]]:
    """What is timed, by name, and what is known of each."""
    timm = import_timm()
    vit = timm.create_model(given.host, img_size=given.size, num_classes=0).to(images).eval()
    depth = len(vit.blocks)
    after = [round(depth * (number + 1) / (EXITS + 1)) for number in range(EXITS)]
    model = tet.wrap(vit, Schedule(tuple(Exit(block, policies.never()) for block in after)), num_classes=given.classes)
    embedded = model.host.embed(images[:1])
    patches, prefix = embedded.grid[0] * embedded.grid[1], embedded.prefix
    compiled = {"mode": "reduce-overhead"} if images.is_cuda else {}
    dense = Dense(model, prefix)
    found: dict[str, Callable[[Tensor], Any]] = {"dense": dense}
    known: dict[str, Any] = {"dense": {"keep": 1.0}}
    if given.compile:
        found["dense, compiled"], known["dense, compiled"] = torch.compile(dense, **compiled), {"keep": 1.0}
    for keep in given.keep:
        one = setting(keep, patches=patches, batch=given.batch, spread=given.spread, device=images.device)
        plan = one.schedule(after, patches=patches)
        output = model(images, schedule=plan)
        ran = output.tokens_per_block.double().mean().item() / (patches + prefix)
        work = int(model.multiply_adds(output).sum())
        note = {"keep": keep, "token_blocks": ran, "multiply_adds": work}
        room = {block: min(1.0, (int(counts.max()) + prefix) / (patches + prefix))
                for block, counts in zip(after, one.stay, strict=True)}  # fmt: skip
        static = tet.StaticModel(model, capacities=room)
        of_keep: dict[str, Callable[[Tensor], Any]] = {
            "limit": Limit(model, after, one.means),
            "packed": lambda x, plan=plan: model(x, schedule=plan),
            "static": lambda x, plan=plan, static=static: static(x, schedule=plan),
            "short": cut_short(vit, model, max(1, round(keep * depth)), prefix),
        }
        if given.compile:
            call = torch.compile(of_keep["limit"], dynamic=False)
            of_keep["limit, compiled"] = call
            of_keep["packed, compiled"] = torch.compile(of_keep["packed"], dynamic=True)
            of_keep["static, compiled"] = torch.compile(of_keep["static"], fullgraph=True, **compiled)
        found |= {f"{name} {keep:g}": call for name, call in of_keep.items()}
        known |= {f"{name} {keep:g}": {**note, "contender": name} for name in of_keep}
    return found, known


def kernels(call: Callable[[], Any]) -> list[str]:
    """Names of the attention kernels of a call, on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    words = ("flash", "fmha", "attention", "cudnn", "efficient")
    names = {event.key for event in seen.key_averages()}
    return sorted(name for name in names if any(word in name.lower() for word in words))


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


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
        row["of_dense"] = _ratio(seconds[name], seconds["dense"])
        limit = f"limit {known[name]['keep']:g}"
        row["of_limit"] = _ratio(seconds[name], seconds[limit]) if limit in seconds else None
        if images.is_cuda:
            row["kernels"] = kernels(lambda name=name: calls[name](images))
        rows.append(row)
    return rows


def _ratio(own: Sequence[float], other: Sequence[float]) -> list[float]:
    return quartiles([one / two for one, two in zip(own, other, strict=True)])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a table of Markdown: medians, quartiles in brackets."""
    lines = ["| what | token-blocks | ms a batch | of dense | of the limit |", "|---|---|---|---|---|"]
    for row in rows:
        low, middle, high = row["ms"]
        ratios = [
            "" if ratio is None else f"{ratio[1]:.3f} [{ratio[0]:.3f}, {ratio[2]:.3f}]"
            for ratio in (row["of_dense"], row["of_limit"])
        ]
        ran = f"{row.get('token_blocks', 1.0):.3f}"
        lines.append(f"| {row['contender']} | {ran} | {middle:.1f} [{low:.1f}, {high:.1f}] | {' | '.join(ratios)} |")
    return "\n".join(lines)


def machine(given: argparse.Namespace) -> dict[str, Any]:
    """What ran it."""
    found = {"torch": torch.__version__, "threads": torch.get_num_threads(), "timm": import_timm().__version__}
    if given.device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(given.device), "cuda": torch.version.cuda}
    return found


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
