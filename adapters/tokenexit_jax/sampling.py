"""Training with gates: every decision is drawn, and every token computed, so that a gate learns what it gives up.

    def loss(trained, images, labels, key):
        params, gates = trained
        drawn = tej.sampled(model, params, gates, images, key=key, rates=0.7)
        return tej.pixel_cross_entropy(drawn.output.logits, labels) + 4 * drawn.ratio_loss()

    slopes = jax.jit(jax.grad(loss))((params, gates), images, labels, key)

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
from tokenexit.schedule import Schedule
from tokenexit_jax._given import require_array, require_key
from tokenexit_jax._network import require_covered
from tokenexit_jax._waiting import Asked, MaskedRun, asked, in_place, put_back
from tokenexit_jax.exits.outputs import GatedOutput
from tokenexit_jax.gating import GatedModel, checked_gates, fitting_gates
from tokenexit_jax.heads.build import read_in_training
from tokenexit_jax.networks import Embedded, Heads, Params
from tokenexit_jax.pytrees import register

__all__ = ["Drawing", "sampled"]


@dataclass(frozen=True)
class Drawing:
    """What a training pass with gates returns. A pytree.

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
        """What holds the gates to their rates (`tokenexit.gates.ratio_loss`).

        Args:
            of_each: Whose share: of the `batch`, or of each `image`.
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
        schedule: Which gates decide, and what becomes of those that wait; the model's own if left out. Its policies are
            not asked, but for `never()`, under which a gate does not decide.
        key: All that is drawn comes from it, in float32, for each gate by itself: another for each step, and under
            `jax.shard_map` for each shard.
        rates: What share of the patches each gate is to keep; one for all, or one for each by block.
        temperature: Of the relaxed decisions whose gradient is taken. Published: 1.
        gate_input: Whether gradients of the decisions reach the tokens: `live`, published, or `detached`.
        random: Share of the decisions that a coin takes instead of the gate, at the gate's rate: so that all blocks
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
    return _SampledRun(model, params, fitting_gates(model, gates), plan, options).drawn(images)


@dataclass(frozen=True)
class _Options:
    key: Array
    rates: dict[int, float]
    temperature: float
    gate_input: str
    random: float


def _mixed(after: Array, before: Array, asked: Asked, *, prefix: int) -> Array:
    keep = jnp.pad(asked.keep, ((0, 0), (prefix, 0)), constant_values=1.0)
    # Zero, but for its gradient: what running would change, times the gradient of the decision.
    gain = (keep - lax.stop_gradient(keep)).astype(before.dtype)[..., None] * (after - before)
    return put_back(after, before, asked, prefix=prefix) + gain


class _SampledRun(MaskedRun):
    in_place = staticmethod(partial(in_place, mixed=_mixed))

    def __init__(self, model: GatedModel, params: Params, gates: Heads, plan: Schedule, options: _Options) -> None:
        super().__init__(model, params, gates, plan)
        self._options = options
        self._statistics: Heads = {}

    def drawn(self, images: Array) -> Drawing:
        output = self.through(images)
        require_covered(output.area)
        height, width = output.keep.shape[2:]
        none = jnp.zeros((output.keep.shape[0], 0, height * width))
        keep = jnp.stack([one.keep for one in self.asked.values()], axis=1) if self.asked else none
        keep = rearrange(keep, "images gates (height width) -> images gates height width", height=height, width=width)
        rates = jnp.asarray([self._options.rates[after] for after in self.asked], dtype=jnp.float32)
        return Drawing(output, keep, rates, self._statistics)

    def at(self, embedded: Embedded, after: int) -> Asked:
        options, prefix, every = self._options, embedded.prefix, embedded.tokens
        every = lax.stop_gradient(every) if options.gate_input == "detached" else every
        patches = jnp.broadcast_to(jnp.arange(every.shape[1]) >= prefix, every.shape[:2])
        logits, statistics = read_in_training(self.model.gate_plan, self.gates[str(after)], every, patches)
        logits = logits[:, prefix:]
        if statistics:
            self._statistics[str(after)] = statistics
        for_gate, for_coin, for_choice = jax.random.split(jax.random.fold_in(options.key, after), 3)
        uniform = partial(jax.random.uniform, shape=logits.shape[:-1], dtype=jnp.float32)
        soft = core.soft_draw(logits, uniform(for_gate), temperature=options.temperature)
        # Exactly 1 or 0, and the gradient of the relaxed decision.
        keep = (~(soft <= 0.5)).astype(jnp.float32) + jnp.nan_to_num(soft - lax.stop_gradient(soft))
        if options.random > 0:
            often = coin_for(after, rates=options.rates, asked=self.policies, returning=self.carry.returning)
            coin = (uniform(for_coin) < often).astype(jnp.float32)
            keep = jnp.where(uniform(for_choice) < options.random, coin, keep)
        if self.carry.returning == "never" and self.asked:
            keep = keep * self.running.keep
        overflow = jnp.zeros_like(keep[:, 0], dtype=jnp.int32)
        return asked(keep, core.keep_probability(logits), overflow, prefix=embedded.prefix)
