"""What benchmarks of throughput have in common: a network with exits, who leaves it, and what it is compared with.

The network is one of timm's, with random weights and three exits, after a quarter, half and three quarters of its
blocks. Who leaves is drawn beforehand, so that a given share of its token-blocks runs.
"""

import copy
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import tokenexit_torch as tet
from tokenexit import policies
from tokenexit.policies import ConfidenceAbove, NeighboursAgree, Policy
from tokenexit.schedule import Exit, Schedule

EXITS = 3
_ATTENTION = ("flash", "fmha", "attention", "cudnn", "efficient")

Rule = Callable[[int], Policy]
"""A policy for the radius that an exit has."""


def neighbours(radius: int, /) -> Policy:
    """The library's own rule."""
    return NeighboursAgree(0.0, radius=radius).retaining(per_class=5)


def dtop(_radius: int, /) -> Policy:
    """The rule of DToP, which has no radius."""
    return ConfidenceAbove(0.0).retaining(per_class=5)


@dataclass(frozen=True)
class Network:
    """A network with exits, and what there is to know of it.

    Attributes:
        vit: timm's.
        model: The same with exits.
        after: Blocks with an exit.
        patches: Of an image.
        prefix: Prefix tokens of an image.
    """

    vit: Any
    model: tet.ExitingModel
    after: tuple[int, ...]
    patches: int
    prefix: int

    @property
    def slots(self) -> int:
        """Tokens of an image."""
        return self.patches + self.prefix


def network(vit: Any, images: Tensor, /, *, classes: int) -> Network:
    """A network of timm with exits, for such images, on their device and in their dtype."""
    vit = vit.to(images).eval()
    depth = len(vit.blocks)
    after = tuple(round(depth * (number + 1) / (EXITS + 1)) for number in range(EXITS))
    model = tet.wrap(vit, Schedule(tuple(Exit(block, policies.never()) for block in after)), num_classes=classes)
    embedded = model.host.embed(images[:1])
    return Network(vit, model, after, embedded.grid[0] * embedded.grid[1], embedded.prefix)


def following(model: tet.ExitingModel, plan: Schedule, /) -> tet.ExitingModel:
    """The same model with another plan as its own: `torch.compile` takes no plan for a call into one program."""
    own = copy.copy(model)
    own.retune(plan)
    return own


@dataclass(frozen=True)
class Drawn(Policy):
    """Of each image those patches leave that were drawn; another rule is asked all the same.

    Attributes:
        leave: Which patches leave, twice the same, one for each answer of that rule: no compiler can see that the
            answer does not matter, and leave the rule out.
        own: That rule.
    """

    leave: Tensor
    own: Policy

    def leaves(self, evidence: policies.Evidence, /) -> Tensor:
        assert evidence.position is not None
        answer = self.own(evidence).long()
        _, images, patches = self.leave.shape
        place = evidence.position.clamp(min=0) + (evidence.image + answer * images) * patches
        return self.leave.flatten().index_select(0, place)


@dataclass(frozen=True)
class Setting:
    """How many patches of each image run in each quarter of the blocks.

    Attributes:
        keep: The share of the token-blocks that runs.
        stay: Patches of each image that stay at each exit.
    """

    keep: float
    stay: tuple[Tensor, ...]

    @property
    def means(self) -> list[int]:
        """Patches of an image of the mean size, in the quarters after the first."""
        return [round(counts.float().mean().item()) for counts in self.stay]

    def token_blocks(self, of: Network, /) -> float:
        """The share that runs in fact: of whole tokens, prefix tokens among them."""
        stops, runs = (
            (*of.after, of.model.depth),
            (of.patches, *(counts.double().mean().item() for counts in self.stay)),
        )
        blocks = [stop - start for start, stop in zip((0, *of.after), stops, strict=True)]
        ran = sum(count * (of.prefix + patches) for count, patches in zip(blocks, runs, strict=True))
        return ran / (of.model.depth * of.slots)

    def schedule(self, of: Network, /, *, rule: Rule = neighbours) -> Schedule:
        """What was drawn decides; the rule is computed all the same."""
        drawn = torch.rand(len(self.stay[0]), of.patches, generator=torch.Generator().manual_seed(0))
        rank = drawn.argsort().argsort()
        exits = []
        for block, counts, radius in zip(of.after, self.stay, (2, 1, 0), strict=True):
            leave = rank.to(counts.device) >= counts[:, None]
            exits.append(Exit(block, Drawn(torch.stack([leave, leave]), rule(radius))))
        return Schedule(tuple(exits))

    def capacities(self, of: Network, /) -> dict[int, float]:
        """What the fullest image needs after each exit, for the static layout."""
        fullest = [int(counts.max()) for counts in self.stay]
        return {block: min(1.0, (most + of.prefix) / of.slots) for block, most in zip(of.after, fullest, strict=True)}


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

    def __init__(self, of: Network, means: Sequence[int]) -> None:
        super().__init__()
        self.model, self.after, self.means = of.model, of.after, means

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


def cut_short(of: Network, depth: int) -> nn.Module:
    """The same network with its first blocks alone."""
    cut = copy.copy(of.vit)
    cut._modules = dict(of.vit._modules) | {"blocks": of.vit.blocks[:depth]}
    short = tet.wrap(cut, Schedule(), head=of.model.head)
    return Dense(short, of.prefix)


class Launched(NamedTuple):
    """What a call has run on CUDA.

    Attributes:
        kernels: Names of the kernels, each as often as it ran.
        launches: How often the host launched one, or a graph of many.
    """

    kernels: tuple[str, ...]
    launches: int

    @property
    def attention(self) -> list[str]:
        """Names of the attention kernels."""
        return sorted({name for name in self.kernels if any(word in name.lower() for word in _ATTENTION)})


def launched(call: Callable[[], Any]) -> Launched:
    """What a call runs, on CUDA."""
    from torch.profiler import ProfilerActivity, profile

    # As PyTorch itself sets them where it sees that there are CUDA graphs, which a `mode` of `torch.compile` hides.
    os.environ.setdefault("DISABLE_CUPTI_LAZY_REINIT", "1")
    os.environ.setdefault("TEARDOWN_CUPTI", "0")
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    events = [event for event in seen.events() or () if not event.is_user_annotation]
    on_device = [event.name for event in events if event.device_type.name == "CUDA"]
    by_host = [event.name for event in events if event.device_type.name == "CPU"]
    kernels = tuple(name for name in on_device if not name.startswith(("Memcpy", "Memset")))
    return Launched(kernels, sum("Launch" in name for name in by_host))


def quartiles(values: Sequence[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [*values] * 3


def ratios(over: Sequence[float], under: Sequence[float]) -> list[float]:
    """Quartiles of ratios, taken round by round."""
    return quartiles([one / two for one, two in zip(over, under, strict=True)])


def versions(device: torch.device, /) -> Mapping[str, Any]:
    """What ran it, but for the CPU's threads."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found
