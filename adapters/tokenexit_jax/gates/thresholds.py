"""Calibration of gates: thresholds by which they keep given shares of the tokens, without noise."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial

import numpy as np
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from tokenexit.adapting import rates_by_gate
from tokenexit.errors import require
from tokenexit.gates import calibrated
from tokenexit.policies import GateBelow
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax._given import require_array
from tokenexit_jax.gates.forward import decide_by_policy, run
from tokenexit_jax.gates.model import ON_HOST, GatedModel, given
from tokenexit_jax.networks.protocol import Heads, Params

__all__ = ["gate_thresholds"]

Progress = Callable[[Iterable], Iterable]


def gate_thresholds(
    model: GatedModel,
    params: Params,
    gates: Heads,
    images: Array | np.ndarray | Iterable[Array | np.ndarray],
    /,
    *,
    rates: float | Mapping[int, float],
    progress: Progress = iter,
) -> Schedule:
    """Calibrate the gates: the plan under which each keeps, over these images, the share it is to keep.

    Training draws its decisions; a threshold of one half would keep another share. Gate by gate, as each meets what
    the gates before it have kept: the images pass once for every gate, up to it. No features are kept. Any rates will
    do, not only those of the training: one network, any rate.

    Args:
        model: The model with gates. Where its capacities leave no room they are not looked at.
        params: Parameters of the network.
        gates: Weights of the gates.
        images: Calibration images without labels, held out of the training at best: an array, or batches of them that
            can be passed more than once.
        rates: What share of all patches each gate is to keep; one for all, or one for each by block. Where tokens
            never return, a gate keeps at most what the one before it has kept.
        progress: Wraps each pass over the images; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The present plan with `GateBelow` and its threshold at every gate, for `retuned`. On the calibration images the
        shares are right to one token, but for equal probabilities.

    Raises:
        TokenExitError: If the model has no gates, a rate is missing, or the images are none or can pass only once.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    require(len(model.schedule.after) > 0, "model", "have a schedule that decides at one gate at least", "none")
    wanted = rates_by_gate(rates, model.schedule.after)
    whole = isinstance(images, Array | np.ndarray)
    several = isinstance(images, Iterable) and not isinstance(images, str | bytes)
    require(several and (not whole or images.ndim > 0), "images", "be an array, or batches", type(images).__name__)
    require(callable(progress), "progress", "be a function, as `iter` or `tqdm`", repr(progress))
    batches = [images[start : start + 8] for start in range(0, len(images), 8)] if whole else images
    again = not isinstance(batches, Iterator)
    require(again, "images", "be batches that can be passed more than once, as a list", type(images).__name__)
    # With room for all, for the share that is to be kept may be greater than what there is room for.
    roomy = dataclasses.replace(model, capacities=tuple(tuple({*one, 1.0}) for one in model.capacities))

    def probabilities(earlier: Schedule, after: int) -> Float[np.ndarray, "patches"]:
        plan = dataclasses.replace(earlier, exits=(*earlier.exits, Exit(after, GateBelow(0.0))))
        found = [_probability(roomy, params, gates, batch, plan) for batch in progress(batches)]
        require(sum(map(len, found)) > 0, "images", "hold at least one image", "none")
        return np.concatenate(found)

    return calibrated(model.schedule, wanted, probabilities)


def _probability(
    model: GatedModel, params: Params, gates: Heads, images: Array | np.ndarray, plan: Schedule
) -> Float[np.ndarray, "patches"]:
    """Keep probability of every patch at the last gate of a plan, which keeps all; 0 for those that never return."""
    require_array(images, "images")
    gates, plan = given(model, gates, plan)
    decide, after = partial(decide_by_policy, model, gates, ON_HOST), plan.after[-1]
    state = run(model, params, jnp.asarray(images), plan, driver=ON_HOST, decide=decide, until=after)
    last = state.decisions[after]
    return np.where(last.keep, last.probability, 0.0).astype(np.float32).ravel()
