"""The thresholds under which gates keep, with nothing drawn, the share of the tokens that they are to keep."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.errors import require
from tokenexit.gates import rates_by_gate, threshold_for
from tokenexit.policies import GateBelow
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch._modules import evaluating
from tokenexit_torch.gating import GatedModel, PackedRun

__all__ = ["gate_thresholds"]

Progress = Callable[[Iterable], Iterable]


@torch.inference_mode()
def gate_thresholds(
    model: GatedModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    rates: float | Mapping[int, float],
    progress: Progress = tqdm,
) -> Schedule:
    """Calibrate the gates: the plan under which each keeps, over these images, the share it is to keep.

    Training draws its decisions; a threshold of one half would keep another share. Gate by gate, as each meets what
    the gates before it have kept: the images pass once for every gate, up to it. No features are kept. Any rates will
    do, not only those of the training: one network, any rate.

    Args:
        model: The model with gates; it is not changed.
        images: Calibration images without labels, held out of the training at best: a tensor, or batches of them that
            can be passed more than once.
        rates: What share of all patches each gate is to keep; one for all, or one for each by block. Where tokens
            never return, a gate keeps at most what the one before it has kept.
        progress: Wraps each pass over the images; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The present plan with `GateBelow` and its threshold at every gate, for `retune`. On the calibration images the
        shares are right to one token, but for equal probabilities.

    Raises:
        TokenExitError: If the model has no gates, a rate is missing, or the images are none or can pass only once.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    wanted = rates_by_gate(rates, model.schedule.after)
    batches = images.split(8) if isinstance(images, Tensor) else images
    again = not isinstance(batches, Iterator)
    require(again, "images", "be batches that can be passed more than once, as a list", type(images).__name__)
    plan = Schedule((), model.schedule.carry)
    with evaluating(model):
        for after, rate in wanted.items():
            found = [
                _probability(model, batch, Schedule((*plan.exits, Exit(after, GateBelow(0.0))), plan.carry))
                for batch in progress(batches)
            ]
            require(sum(map(len, found)) > 0, "images", "hold at least one image", "none")
            threshold = threshold_for(torch.cat(found), rate)
            plan = Schedule((*plan.exits, Exit(after, GateBelow(threshold))), plan.carry)
    return plan


def _probability(model: GatedModel, images: Tensor, plan: Schedule) -> Tensor:
    """What the last gate of a plan says of every patch; 0 of those that it is not asked about."""
    run = PackedRun(model, images, plan)
    for _ in run.blocks(plan.after[-1]):
        pass
    return torch.where(run.keep[-1], run.probability[-1], 0.0).flatten()
