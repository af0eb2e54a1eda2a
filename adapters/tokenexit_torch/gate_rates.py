"""The thresholds under which gates keep, with nothing drawn, the share of the tokens that they are to keep."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.adapting import rates_by_gate
from tokenexit.errors import require
from tokenexit.gates import threshold_for
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
    the gates before it have kept; meanwhile the tokens of all images wait in memory, `images * tokens * width` numbers.
    Any rates will do, not only those of the training: one network, any rate.

    Args:
        model: The model with gates; it is not changed.
        images: Calibration images without labels, held out of the training at best: a tensor, or batches of them.
        rates: What share of all patches each gate is to keep; one for all, or one for each by block. Where tokens
            never return, a gate keeps at most what the one before it has kept.
        progress: Wraps the loop over the gates; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The present plan with `GateBelow` and its threshold at every gate, for `retune`. On the calibration images the
        shares are right to one token, but for equal probabilities.

    Raises:
        TokenExitError: If the model has no gates or its schedule names none, a rate is missing, or there are no images.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    require(len(model.schedule.after) > 0, "model", "have a schedule that decides at one gate at least", "none")
    wanted = rates_by_gate(rates, model.schedule.after)
    batches = images.split(8) if isinstance(images, Tensor) else images
    nothing, exits = Schedule((), model.schedule.carry), []
    with evaluating(model):
        runs = [PackedRun(model, batch, nothing) for batch in batches if len(batch)]
        require(len(runs) > 0, "images", "hold at least one image", "none")
        at = 0
        for after, rate in progress(wanted.items()):
            for run in runs:
                for block in range(at, after):
                    run.advance(block)
                run.ask(after)
            at = after
            policy = GateBelow(threshold_for(torch.cat([run.asked().flatten() for run in runs]), rate))
            exits.append(Exit(after, policy))
            for run in runs:
                run.answer(after, policy)
    return Schedule(tuple(exits), model.schedule.carry)
