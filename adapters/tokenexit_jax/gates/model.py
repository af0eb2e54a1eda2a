"""A vision transformer with learned gates (SViT, WACV 2024).

Unlike in `running`, where a token leaves with its outcome, a skipped token keeps its feature and its place, and the
next gate may activate it again. So the result is a whole map of features, for any decoder. Between two gates the tokens
have the shape of the whole batch; active tokens are gathered into as many entries as the smallest bucket that holds
those of every image, run, and are written back.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jax.core import Tracer

from tokenexit import TokenExitError
from tokenexit.adapting import require_gates_fit
from tokenexit.carries import Preserved
from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import require
from tokenexit.gates import FIRST_BIAS
from tokenexit.heads import HeadPlan
from tokenexit.policies import Threshold
from tokenexit.schedule import Schedule
from tokenexit_jax._counting import head_cost, network_cost
from tokenexit_jax._given import new_keys, require_images
from tokenexit_jax.exits.model import as_arrays
from tokenexit_jax.gates import forward
from tokenexit_jax.gates.forward import IN_ONE_PROGRAM, MASKED, Decision, Driver, GatedParts
from tokenexit_jax.gates.outputs import GatedOutput
from tokenexit_jax.heads import build as building
from tokenexit_jax.networks.protocol import Embedded, Heads, Network, Params
from tokenexit_jax.pytrees import of_pytrees, on_host

__all__ = ["GatedModel"]


@dataclass(frozen=True)
class GatedModel(GatedParts):
    """A vision transformer with gates; made by `wrap_gates`. It holds no weights, and nothing changes it.

    Nothing is drawn: a patch is skipped exactly if the policy of the gate selects it by its keep probability. `sampled`
    draws, for training.

    Attributes:
        network: The wrapped network.
        schedule: The plan in use; `retuned` gives a model with another.
        after: The blocks after which there is a gate.
        gate_plan: How the gates are built.
        head: Final head, `head(params, tokens)`, from finished tokens to class scores, if there is one.
        taps: After how many blocks maps are handed out.
        capacities: For each gate the buckets after it, ascending, as fractions of an image's slots.
    """

    schedule: Schedule

    def __call__(self, params: Params, gates: Heads, images: Array, schedule: Schedule | None = None) -> GatedOutput:
        """Run a batch, with buckets that are chosen on the host.

        It compiles its parts itself, each for the buckets that it meets. For every gate with several buckets one
        integer is fetched; with a single one nothing is, and nothing waits.

        Where all tokens are keys (`Preserved(keys="all")`) all run through every block, and skipped ones are put back:
        a block takes nothing but entries, and to be a key is to be one. That saves nothing here, and fetches nothing.

        Args:
            params: Parameters of the network.
            gates: Weights of the gates, by the blocks before them: `{"3": {...}, ...}`, as `init` makes them.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores if there is a head, maps, decisions and executed tokens.

        Raises:
            TokenExitError: If the plan or the weights do not fit the model, or the network's parts not each other.
        """
        require_images(images)
        gates, plan = given(self, gates, schedule)
        return forward.evaluate(self, params, gates, images, plan, driver=ON_HOST)

    def compiled(self, params: Params, gates: Heads, images: Array, schedule: Schedule | None = None) -> GatedOutput:
        """The same in one program: the function for `jax.jit`, `jax.grad`, `jax.shard_map` and `jax.export`.

        `lax.switch` chooses the bucket after each gate. Never `jax.vmap` it: all branches would run.

        Args:
            params: Parameters of the network.
            gates: Weights of the gates.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out. As an argument of the compiled function
                its thresholds are data.

        Returns:
            As a call does.

        Raises:
            TokenExitError: If the plan or the weights do not fit the model, or the network's parts not each other.
        """
        require_images(images)
        gates, plan = given(self, gates, schedule)
        return forward.evaluate(self, params, gates, images, plan, driver=IN_ONE_PROGRAM)

    def masked(self, params: Params, gates: Heads, images: Array, schedule: Schedule | None = None) -> GatedOutput:
        """The same by masks, in one program: all tokens are computed, and skipped ones put back.

        What training does; beside a call, which it must equal, a reference.

        Args:
            params: Parameters of the network.
            gates: Weights of the gates.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            As a call does. `tokens_per_block` counts active tokens, though all have been computed.

        Raises:
            TokenExitError: If the plan or the weights do not fit the model, or the network's parts not each other.
        """
        require_images(images)
        gates, plan = given(self, gates, schedule)
        return forward.evaluate(self, params, gates, images, plan, driver=MASKED)

    def init(self, key: Array) -> Heads:
        """Random weights for the gates; their draws keep most patches.

        Args:
            key: Random key.

        Returns:
            The weights, by the blocks before the gates: `{"3": {...}, ...}`.
        """
        keys = new_keys(key, max(len(self.after), 1))
        width = self.network.width
        return {str(after): _new_gate(self.gate_plan, one, width) for after, one in zip(self.after, keys, strict=False)}

    def retuned(
        self,
        schedule: Schedule | None = None,
        /,
        *,
        threshold: Threshold | Mapping[int, Threshold] | None = None,
    ) -> "GatedModel":
        """The same model with another plan, or other thresholds: one network, any rate, and nothing compiled again.

        Args:
            schedule: A new plan, with decisions only after blocks that have a gate; the present one if left out.
            threshold: New thresholds for that plan: one for all gates, or one for each of some blocks.

        Returns:
            A model.

        Raises:
            TokenExitError: If neither is given, a decision has no gate, or a threshold does not fit.
        """
        require(schedule is not None or threshold is not None, "schedule", "be given if `threshold` is not", schedule)
        plan = checked_gates(self, self.schedule if schedule is None else schedule)
        plan = plan if threshold is None else plan.with_threshold(threshold)
        return dataclasses.replace(self, schedule=on_host(checked_gates(self, plan)))

    def cost(self, params: Params, images: Any) -> Cost:
        """What the parts of the network cost, read off the products and convolutions in its programs; nothing is run.

        Args:
            params: Parameters of the network, or `jax.ShapeDtypeStruct` in their place.
            images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

        Returns:
            The cost of the parts, for `GatedOutput.multiply_adds`; that of the gates stands as `exit_heads`.

        Raises:
            TokenExitError: If the attention of a block is not over `width` channels, which `Cost` takes for granted, or
                a block has other work that does not grow with the tokens.
        """
        network, last = self.network, HeadCost(0)
        found = network_cost(network, params, images)
        gate = building.cost(self.gate_plan, width=network.width, classes=2)
        if self.head is not None:
            dtype = jax.eval_shape(network.embed, params, images).tokens.dtype
            last = head_cost(self.head, params, jax.ShapeDtypeStruct((1, 1, network.width), dtype))
        return dataclasses.replace(found, exit_heads=dict.fromkeys(self.after, gate), head=last)


_run_selected = jax.jit(forward.run_selected, static_argnames=("network", "start", "stop", "capacity"))


def _run_active(
    network: Network,
    params: Params,
    embedded: Embedded,
    decision: Decision,
    *,
    start: int,
    stop: int,
    sizes: tuple[int, ...],
) -> tuple[Embedded, int]:
    """Run blocks on the active tokens; the bucket is chosen on the host."""
    if len(sizes) > 1 and isinstance(decision.needed, Tracer):
        raise TokenExitError("`model` must be transformed as `model.compiled`, got the model itself")
    entries = sizes[0] if len(sizes) == 1 else int(decision.needed)
    if entries == 0:
        return embedded, 0
    capacity = next(size for size in sizes if size >= entries)
    return _run_selected(network, params, embedded, decision, start=start, stop=stop, capacity=capacity), capacity


ON_HOST = Driver(
    first_blocks=jax.jit(forward.first_blocks, static_argnames=("network", "stop")),
    run_all=jax.jit(forward.run_all, static_argnames=("network", "start", "stop")),
    run_active=_run_active,
    run_in_place=jax.jit(forward.run_in_place, static_argnames=("network", "start", "stop", "keys")),
    decide=jax.jit(forward.decide, static_argnames=("plan", "most")),
    finish=jax.jit(forward.finish, static_argnames=("network", "head", "taps")),
)
"""Every function is compiled by itself, and buckets are chosen on the host."""


def given(model: GatedModel, gates: Heads, schedule: Schedule | None) -> tuple[Heads, Schedule]:
    """Weights and plan for a pass, which fit the model. It is no part of the public API.

    Raises:
        TokenExitError: If they do not.
    """
    plan = checked_gates(model, model.schedule if schedule is None else schedule)
    return fitting_gates(model, gates), as_arrays(plan)


def checked_gates(model: GatedModel, schedule: Schedule) -> Schedule:
    """A plan that fits the gates. It is no part of the public API.

    Raises:
        TokenExitError: If it does not.
    """
    carry = model.schedule.carry if isinstance(model.schedule.carry, Preserved) else Preserved()
    return of_pytrees(require_gates_fit(schedule, depth=model.depth, after=model.after, carry=carry))


def fitting_gates(model: GatedModel, gates: Heads) -> Heads:
    """The weights of the gates, if they have the names and shapes of the model's. It is no part of the public API.

    Raises:
        TokenExitError: If they do not.
    """
    return building.require_same_structure(gates, shapes_of_gates(model), argument="gates")


def shapes_of_gates(model: GatedModel) -> Heads:
    """The weights of the gates as `jax.ShapeDtypeStruct`. It is no part of the public API."""
    one = _shapes(model.gate_plan, model.network.width)
    return {str(after): one for after in model.after}


@lru_cache
def _shapes(plan: HeadPlan, width: int) -> dict[str, jax.ShapeDtypeStruct]:
    return jax.eval_shape(lambda: _new_gate(plan, jax.random.key(0), width))


def _new_gate(plan: HeadPlan, key: Array, width: int) -> dict[str, Array]:
    new = building.init(plan, key, width=width, classes=2)
    *_, last = (name for name in new if name.endswith(".bias"))
    return {**new, last: jnp.asarray(FIRST_BIAS)}
