"""Calibration of gates: thresholds by which they keep given shares of the tokens, without noise."""

from collections.abc import Callable, Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.adapting import rates_by_gate
from tokenexit.errors import require
from tokenexit.gates import calibrated, keep_probability, returnable
from tokenexit.schedule import Schedule
from tokenexit_torch._modules import evaluating
from tokenexit_torch.gates import forward
from tokenexit_torch.gates.forward import PACKED, State
from tokenexit_torch.gates.model import GatedModel

__all__ = ["gate_thresholds"]

Progress = Callable[[Iterable], Iterable]


@torch.inference_mode()
def gate_thresholds(
    model: GatedModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "_ channels _ _"]],
    /,
    *,
    rates: float | Mapping[int, float],
    progress: Progress = tqdm,
) -> Schedule:
    """Calibrate the gates: the plan under which each keeps, over these images, the share it is to keep.

    Training draws its decisions; a threshold of one half would keep another share. Gate by gate, as each meets what
    the gates before it have kept; meanwhile the tokens of all images are in memory, `images * tokens * dim` numbers.
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
    with evaluating(model):
        states = [
            forward.start(model.host, batch, model.schedule, patch=model.patch) for batch in batches if len(batch)
        ]
        require(len(states) > 0, "images", "hold at least one image", "none")

        def probabilities(earlier: Schedule, after: int) -> Tensor:
            states[:] = [_before_gate(model, state, earlier, after) for state in states]
            return torch.cat([_probability(model, state, after).flatten() for state in states])

        return calibrated(model.schedule, wanted, probabilities, progress=progress)


def _before_gate(model: GatedModel, state: State, earlier: Schedule, after: int) -> State:
    """Run on to a gate from the one before it, by its decision; all tokens are active again."""
    if earlier.exits:
        last = earlier.exits[-1]
        decision = forward.decide_by_policy(model.gates, state, last)
        state = forward.apply_decision(state, last.after, decision, layout=PACKED)
    state = forward.run_blocks(model.host, state, len(state.counts), after, layout=PACKED)
    return forward.set_active(state, None, layout=PACKED)


def _probability(model: GatedModel, state: State, after: int) -> Float[Tensor, "images patches"]:
    logits = forward.score(model.gates[str(after)], state.tokens, prefix=state.embedded.prefix)
    return returnable(keep_probability(logits), state.before)
