"""How long a model takes on this machine, by the tokens that run: measured once, for the cost of many plans."""

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.adapting import Progress, is_whole
from tokenexit.errors import require
from tokenexit.latency import Latency
from tokenexit.policies import NeighboursAgree
from tokenexit.schedule import Exit, Merge, Schedule, dense
from tokenexit_torch._blocks import run_blocks
from tokenexit_torch._modules import evaluating
from tokenexit_torch.attention import PerImage
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.hosts.protocol import Embedded, embedded_by

__all__ = ["measure_latency"]

_SHARES = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1.0)


@torch.inference_mode()
def measure_latency(
    model: ExitingModel,
    images: Float[Tensor, "images channels height width"],
    /,
    *,
    rounds: int = 5,
    progress: Progress = tqdm,
) -> Latency:
    """Measure a model on the device and in the batch size of some images.

    A block in the middle is run on eight numbers of tokens, and the whole model dense, with an exit after which nothing
    leaves, and with a merge in which nothing merges: all in turn, and the median of some rounds counts. Nothing else
    should run on the machine.

    Args:
        model: The wrapped model. It is run in evaluation mode, and left as it is.
        images: A batch like those to come.
        rounds: How often each is timed, after one round to warm up.
        progress: Wraps the rounds, as `tqdm` does.

    Returns:
        The table; the exit is 0 for a model without exit heads, and the merge for a host whose positions cannot merge.

    Raises:
        TokenExitError: If there are no images, they do not fit the model, or `rounds` is no whole number from 1 up.
    """
    require(is_whole(rounds, least=1), "rounds", "be a whole number from 1 up", repr(rounds))
    require(images.ndim == 4 and len(images) > 0, "images", "be of at least one image", f"shape {tuple(images.shape)}")
    with evaluating(model):
        embedded = embedded_by(model.host, images, patch=model.patch)
        slots = embedded.tokens.shape[1]
        counts = sorted({max(1, round(share * slots)) for share in _SHARES})
        calls: dict[str, Callable[[], object]] = {f"block {count}": _block(model, embedded, count) for count in counts}
        nothing = {"dense": dense(), "exit": None, "merge": None}
        if len(model.exit_heads) > 0:
            never_so_sure = NeighboursAgree(1.0, radius=1).retaining(per_class=5)
            nothing["exit"] = Schedule((Exit(int(next(iter(model.exit_heads))), never_so_sure),))
        if embedded.positions is None or embedded.pairs is not None:
            nothing["merge"] = Schedule(merges=(Merge(1, alike=1.0),))
        for name, plan in nothing.items():
            if plan is not None:
                calls[name] = partial(model, images, schedule=plan)
        times = {name: [] for name in calls}
        for turn in progress(range(rounds + 1)):
            for name, call in calls.items():
                seconds = _seconds(call, images.device)
                if turn > 0:
                    times[name].append(seconds)
    found = {name: median(values) for name, values in times.items()}
    block = tuple(found[f"block {count}"] for count in counts)
    rest = max(found["dense"] - model.depth * block[-1], 0.0)
    extra = {name: max(found[name] - found["dense"], 0.0) if name in found else 0.0 for name in ("exit", "merge")}
    return Latency(len(images), tuple(counts), block, rest, extra["exit"], extra["merge"])


def _block(model: ExitingModel, embedded: Embedded, count: int) -> Callable[[], Tensor]:
    """The middle block on so many tokens of each image: as a plain batch if these are all, and otherwise in one row."""
    tokens, positions, middle = embedded.tokens, embedded.positions, model.depth // 2
    images, slots, _ = tokens.shape
    if count == slots:
        return partial(run_blocks, model.host, middle, middle + 1, tokens, positions, None)
    which = torch.arange(count, device=tokens.device) * slots // count
    row = tokens.index_select(1, which).flatten(0, 1)[None]
    if positions is not None:
        positions = positions.index_select(0, which).repeat(images, *[1] * (positions.ndim - 1))
    attention = PerImage((count,) * images)
    return partial(run_blocks, model.host, middle, middle + 1, row, positions, attention)


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    started = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - started


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
