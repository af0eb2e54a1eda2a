"""Training of gates: decisions are drawn, and all tokens computed, so that a gate has gradients of what it skips.

    def loss(trained, images, labels, key):
        params, gates = trained
        drawn = tej.sampled(model, params, gates, images, key=key, rates=0.7)
        return tej.pixel_cross_entropy(drawn.output.logits, labels) + 4 * drawn.ratio_loss()

    grads = jax.jit(jax.grad(loss))((params, gates), images, labels, key)

Afterwards `gate_thresholds` finds the thresholds under which nothing is drawn and as many are kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit import gates as core
from tokenexit.adapting import coin_for, is_number, rates_by_gate
from tokenexit.errors import require
from tokenexit.schedule import Exit, Schedule
from tokenexit_jax._given import require_array, require_key
from tokenexit_jax.gates.forward import Decision, State, decided, masked, put_back, run
from tokenexit_jax.gates.model import GatedModel, checked_gates, fitting_gates
from tokenexit_jax.gates.outputs import GatedOutput
from tokenexit_jax.heads.build import read_in_training
from tokenexit_jax.networks.checks import require_covered
from tokenexit_jax.networks.protocol import Heads, Params
from tokenexit_jax.pytrees import register

__all__ = ["Drawing", "sampled"]


@dataclass(frozen=True)
class Drawing:
    """Output of a training pass with gates. A pytree.

    Attributes:
        output: As a call of the model returns it, differentiably.
        keep: The decisions, 1 or 0; their gradient is that of the relaxed decision (straight-through).
        rates: What share each gate is to keep.
        statistics: What the batch norms of `FCN` gates have learned, for `merge`; none of other gates.
    """

    output: GatedOutput
    keep: Float[Array, "images gates grid_height grid_width"]
    rates: Float[Array, "gates"]
    statistics: Heads

    def ratio_loss(
        self,
        *,
        of_each: Literal["batch", "image"] = "batch",
        valid: Bool[Array, "images grid_height grid_width"] | None = None,
    ) -> Float[Array, ""]:
        """Loss of the shares that are kept (`tokenexit.gates.ratio_loss`).

        Args:
            of_each: Unit of the rate: the `batch`, or each `image`.
            valid: Patches that are no padding; all, if left out.

        Returns:
            The loss. Published weight: 4 (SViT, WACV 2024, section 3.3).

        Raises:
            TokenExitError: If `of_each` is unknown or `valid` does not fit.
        """
        if valid is not None:
            require_array(valid, "valid", "images", "grid_height", "grid_width")
        keep = rearrange(self.keep, "images gates height width -> images gates (height width)")
        flat = None if valid is None else valid.reshape(valid.shape[0], -1)
        return core.ratio_loss(keep, self.rates, of_each=of_each, valid=flat)


register(Drawing, leaves=("output", "keep", "rates", "statistics"))


def sampled(
    model: GatedModel,
    params: Params,
    gates: Heads,
    images: Array,
    schedule: Schedule | None = None,
    /,
    *,
    key: Array,
    rates: float | Mapping[int, float],
    temperature: float = 1.0,
    gate_input: Literal["live", "detached"] = "live",
    random: float = 0.0,
) -> Drawing:
    """Run a batch with decisions that are drawn; a function for `jax.jit` and `jax.grad`.

    All tokens are computed and all shapes known beforehand; capacities are not looked at.

    Args:
        model: The model with gates.
        params: Parameters of the network.
        gates: Weights of the gates.
        images: The images, as the network takes them.
        schedule: Which gates decide, and what becomes of skipped tokens; the model's own if left out. Its policies are
            not used, but for `never()`, under which a gate does not decide.
        key: All that is drawn comes from it, in float32, for each gate by itself: another for each step, and under
            `jax.shard_map` for each shard.
        rates: What share of the patches each gate is to keep; one for all, or one for each by block.
        temperature: Of the relaxed decisions, which give the gradient. Published: 1.
        gate_input: Whether gradients of the decisions reach the tokens: `live`, published, or `detached`.
        random: Share of the decisions that are random instead of the gate's, at the gate's rate: so that all blocks
            meet tokens of all histories. Published: none.

    Returns:
        Output, decisions and rates.

    Raises:
        TokenExitError: If the model has no gates, a rate is missing, an option is out of its range, the plan or the
            weights do not fit the model, or patches do not cover the images exactly.
    """
    require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
    require(is_number(temperature) and temperature > 0, "temperature", "be positive", repr(temperature))
    require(gate_input in ("live", "detached"), "gate_input", "be 'live' or 'detached'", repr(gate_input))
    require(is_number(random) and 0 <= random <= 1, "random", "be a share in [0, 1]", repr(random))
    require_key(key)
    options = _Options(key, rates_by_gate(rates, model.after), temperature, gate_input, random)
    plan = checked_gates(model, model.schedule if schedule is None else schedule)
    decide = partial(_decide, model, fitting_gates(model, gates), options, plan)
    state = run(model, params, images, plan, driver=_DRAWN, decide=decide)
    found = _DRAWN.finish(model.network, params, state, head=model.head, taps=model.taps)
    require_covered(found.area)
    decisions, (height, width) = state.decisions.values(), found.keep.shape[2:]
    none = jnp.zeros((found.keep.shape[0], 0, height * width))
    keep = jnp.stack([decision.keep for decision in decisions], axis=1) if decisions else none
    keep = rearrange(keep, "images gates (height width) -> images gates height width", height=height, width=width)
    shares = jnp.asarray([options.rates[after] for after in state.decisions], dtype=jnp.float32)
    statistics = {str(after): one.statistics for after, one in state.decisions.items() if one.statistics}
    return Drawing(found, keep, shares, statistics)


@dataclass(frozen=True)
class _Options:
    key: Array
    rates: dict[int, float]
    temperature: float
    gate_input: str
    random: float


def _decide(model: GatedModel, gates: Heads, options: _Options, plan: Schedule, state: State, exit: Exit) -> Decision:
    after, prefix, every = exit.after, state.embedded.prefix, state.embedded.tokens
    every = lax.stop_gradient(every) if options.gate_input == "detached" else every
    patches = jnp.broadcast_to(jnp.arange(every.shape[1]) >= prefix, every.shape[:2])
    logits, statistics = read_in_training(model.gate_plan, gates[str(after)], every, patches)
    logits = logits[:, prefix:]
    for_gate, for_coin, for_choice = jax.random.split(jax.random.fold_in(options.key, after), 3)
    uniform = partial(jax.random.uniform, shape=logits.shape[:-1], dtype=jnp.float32)
    soft = core.soft_draw(logits, uniform(for_gate), temperature=options.temperature)
    # Exactly 1 or 0, and the gradient of the relaxed decision.
    keep = (~(soft <= 0.5)).astype(jnp.float32) + jnp.nan_to_num(soft - lax.stop_gradient(soft))
    if options.random > 0:
        deciding = [one.after for one in plan.active]
        rate = coin_for(after, rates=options.rates, deciding=deciding, returning=state.carry.returning)
        coin = (uniform(for_coin) < rate).astype(jnp.float32)
        keep = jnp.where(uniform(for_choice) < options.random, coin, keep)
    keep = keep if state.before is None else keep * state.before
    overflow = jnp.zeros_like(keep[:, 0], dtype=jnp.int32)
    return decided(keep, core.keep_probability(logits), overflow, prefix=prefix, statistics=statistics)


def _with_gradient(after: Array, before: Array, decision: Decision, *, prefix: int) -> Array:
    """As `put_back`, and the gradient of a decision is what activity changes times that of the result."""
    keep = jnp.pad(decision.keep, ((0, 0), (prefix, 0)), constant_values=1.0)
    # Zero, but for its gradient.
    gain = (keep - lax.stop_gradient(keep)).astype(before.dtype)[..., None] * (after - before)
    return put_back(after, before, decision, prefix=prefix) + gain


_DRAWN = masked(_with_gradient)
