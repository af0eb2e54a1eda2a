"""Forward pass of a network with gates in the static layout: frozen state in, frozen state out.

The functions on arrays are pure, and nothing is compiled here. A `Driver` says how they are called: all in one program,
or each compiled by itself, with buckets that are chosen on the host (`model`). `run` is the same loop for all drivers.
It is no part of the public API.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from tokenexit import gates as core
from tokenexit import tokens
from tokenexit.carries import Preserved
from tokenexit.gates import keep_probability
from tokenexit.heads import HeadPlan
from tokenexit.policies import Policy
from tokenexit.schedule import Exit, Schedule, Stage
from tokenexit_jax._layers import Weights
from tokenexit_jax.exits.forward import capacities_in_entries, on_grid
from tokenexit_jax.gates.outputs import GatedOutput
from tokenexit_jax.heads import build as building
from tokenexit_jax.networks.checks import embed, run_block
from tokenexit_jax.networks.protocol import Embedded, Heads, Network, Params
from tokenexit_jax.pytrees import register

__all__: list[str] = []

Head = Callable[[Params, Float[Array, "*tokens dim"]], Float[Array, "*tokens classes"]]


@dataclass(frozen=True)
class GatedParts:
    """Parts of a model with gates, its plan aside: all of it static. `GatedModel` says what the fields are."""

    network: Network
    after: tuple[int, ...]
    gate_plan: HeadPlan
    head: Head | None
    taps: tuple[int, ...]
    capacities: tuple[tuple[float, ...], ...]

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return self.network.depth

    def sizes(self, after: int, embedded: Embedded) -> tuple[int, ...]:
        """Buckets of the blocks after a gate, in entries, ascending."""
        fractions = self.capacities[self.after.index(after)]
        return capacities_in_entries(fractions, slots=embedded.tokens.shape[1], prefix=embedded.prefix)


class Decision(NamedTuple):
    """Decision of a gate.

    Attributes:
        keep: Which patches are kept: boolean; in training 1 or 0, with the gradient of the relaxed decision.
        probability: Keep probability of every patch.
        overflow: How many tokens were skipped for lack of room.
        needed: Entries that the fullest image needs; 0 if nothing is active.
        statistics: In training, what the gate's batch norm has learned, if it has one.
    """

    keep: Array
    probability: Float[Array, "images patches"]
    overflow: Int[Array, "images"]
    needed: Int[Array, ""]
    statistics: dict[str, Array] | None = None

    def active(self, prefix: int) -> Bool[Array, "images slots"]:
        """Which tokens are active until the next gate; prefix tokens always are."""
        return jnp.pad(self.keep > 0, ((0, 0), (prefix, 0)), constant_values=True)


@dataclass(frozen=True)
class State:
    """What lies between two blocks of a pass. A pytree.

    Attributes:
        carry: What becomes of skipped tokens.
        embedded: All tokens as they are now.
        gate: The gate that decided which tokens are active, by the blocks before it; None while all are.
        decisions: Decisions so far, by the blocks before the gate.
        passed: The tokens at the taps before the last block.
        held: For every block so far, the gate that decided which tokens were active; None if all were.
        room: How many entries of every image each block so far worked on.
    """

    carry: Preserved
    embedded: Embedded
    gate: int | None = None
    decisions: dict[int, Decision] = field(default_factory=dict)
    passed: dict[int, Embedded] = field(default_factory=dict)
    held: tuple[int | None, ...] = ()
    room: tuple[int | Array, ...] = ()

    @property
    def before(self) -> Array | None:
        """Patches kept by the previous gate, if the others never return; None if a gate may keep any patch."""
        if self.carry.returning == "every gate" or not self.decisions:
            return None
        return next(reversed(self.decisions.values())).keep


register(State, leaves=("embedded", "decisions", "passed", "room"))

Merge = Callable[..., Array]
"""`merge(after, before, decision, prefix=...)`: all tokens after a block, from those it made and those it was given."""


def first_blocks(network: Network, params: Params, images: Array, *, stop: int) -> Embedded:
    """Embed images, and run the first blocks on all tokens."""
    return run_all(network, params, embed(network, params, images), start=0, stop=stop)


def run_all(network: Network, params: Params, embedded: Embedded, *, start: int, stop: int) -> Embedded:
    """Run blocks on all tokens, as a plain batch."""
    batch, positions = embedded.tokens, _everywhere(embedded)
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    for index in range(start, stop):
        batch = run_block(network, index, params, batch, counts, positions)
    return dataclasses.replace(embedded, tokens=batch)


def run_selected(
    network: Network, params: Params, embedded: Embedded, decision: Decision, *, start: int, stop: int, capacity: int
) -> Embedded:
    """Run blocks on the active tokens, in so many entries for every image; skipped tokens stay as they are."""
    if capacity == embedded.tokens.shape[1]:
        return run_in_place(network, params, embedded, decision, start=start, stop=stop, keys="running")
    active = decision.active(embedded.prefix)
    # Scores are irrelevant: the capacity holds all active tokens.
    selection, _ = tokens.select(active, jnp.zeros(active.shape, dtype=jnp.float32), capacity=capacity)
    # An entry without a token repeats one of its own image: it is as finite as the tokens are.
    entries, counts = tokens.gather(embedded.tokens, selection), _as_keys(selection.valid)
    positions = None if embedded.positions is None else jnp.take(embedded.positions, selection.slot_of, axis=0)
    for index in range(start, stop):
        entries = run_block(network, index, params, entries, counts, positions).astype(embedded.tokens.dtype)
    return dataclasses.replace(embedded, tokens=tokens.scatter(entries, selection, into=embedded.tokens))


def put_back(after: Array, before: Array, decision: Decision, *, prefix: int) -> Array:
    """Tokens after a block: as it made them where they were active, as they were where not."""
    return jnp.where(decision.active(prefix)[..., None], after, before)


def run_in_place(
    network: Network,
    params: Params,
    embedded: Embedded,
    decision: Decision,
    *,
    start: int,
    stop: int,
    keys: str,
    merge: Merge = put_back,
) -> Embedded:
    """Run blocks on all tokens, of which skipped ones are put back, and are keys only if all are."""
    batch, positions = embedded.tokens, _everywhere(embedded)
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    if keys == "running":
        counts = _as_keys(decision.active(embedded.prefix))
    for index in range(start, stop):
        after = run_block(network, index, params, batch, counts, positions).astype(batch.dtype)
        batch = merge(after, batch, decision, prefix=embedded.prefix)
    return dataclasses.replace(embedded, tokens=batch)


def decide(
    plan: HeadPlan,
    weights: Weights,
    embedded: Embedded,
    policy: Policy,
    before: Bool[Array, "images patches"] | None,
    *,
    most: int,
) -> Decision:
    """Decision of a gate by its policy; if more than `most` patches are to be kept, the most probable ones are."""
    logits = building.read(plan, weights, embedded.tokens)[:, embedded.prefix :]
    probability = lax.stop_gradient(keep_probability(logits))
    keep = core.decide(policy, probability, grid=embedded.grid, before=before)
    overflow = jnp.zeros_like(probability[:, 0], dtype=jnp.int32)
    if most < keep.shape[1]:
        selection, surplus = tokens.select(keep, -probability, capacity=most)
        keep, overflow = keep & ~surplus, selection.overflow.astype(overflow.dtype)
    return decided(keep, probability, overflow, prefix=embedded.prefix)


def decided(
    keep: Array, probability: Array, overflow: Array, *, prefix: int, statistics: dict[str, Array] | None = None
) -> Decision:
    """Decision from the patches that are kept."""
    needed = (keep > 0).sum(axis=1, dtype=jnp.int32).max(initial=0) + prefix
    return Decision(keep, probability, overflow, needed, statistics)


def finish(network: Network, params: Params, state: State, *, head: Head | None, taps: tuple[int, ...]) -> GatedOutput:
    """Assemble the output after the last block.

    Args:
        network: The network.
        params: Its parameters.
        state: The state.
        head: The final head, if there is one.
        taps: After how many blocks maps are handed out.

    Returns:
        The output.
    """
    embedded, decisions, depth = state.embedded, state.decisions, network.depth
    (images, slots, _), (height, across) = embedded.tokens.shape, embedded.grid
    maps = {after: on_grid(here.tokens[:, here.prefix :], here.grid) for after, here in state.passed.items()}
    logits = None
    if head is not None or depth in taps:
        finished = network.finish(params, embedded.tokens)[:, embedded.prefix :]
        maps |= {depth: on_grid(finished, embedded.grid)} if depth in taps else {}
        logits = None if head is None else on_grid(head(params, finished), embedded.grid)
    # Like the tokens, and not merely of a shape: under `shard_map` it is one for each shard.
    nothing = jnp.zeros_like(embedded.tokens[:, 0, 0], dtype=jnp.int32)
    ran = [
        nothing + slots if gate is None else decisions[gate].active(embedded.prefix).sum(axis=1, dtype=jnp.int32)
        for gate in state.held
    ]
    room = jnp.stack([jnp.asarray(entries, dtype=jnp.int32) for entries in state.room])

    def by_gate(found: list[Array], dtype: type) -> Array:
        if not found:
            return jnp.zeros((images, 0, height, across), dtype=dtype)
        stacked = jnp.stack([lax.stop_gradient(one).astype(dtype) for one in found], axis=1)
        return rearrange(stacked, "images gates (height width) -> images gates height width", height=height)

    return GatedOutput(
        logits=logits,
        maps=maps,
        keep=by_gate([decision.keep for decision in decisions.values()], jnp.bool_),
        probability=by_gate([decision.probability for decision in decisions.values()], jnp.float32),
        tokens_per_block=jnp.stack(ran, axis=1),
        capacity_per_block=nothing[:, None] + room[None],
        overflow=nothing + sum(decision.overflow for decision in decisions.values()),
        gates=tuple(decisions),
        keys=state.carry.keys,
        area=embedded.area,
    )


@dataclass(frozen=True)
class Driver:
    """How the functions of a pass are called.

    Attributes:
        first_blocks: As the function of this name.
        run_all: As the function of this name.
        run_active: `run_active(network, params, embedded, decision, start=, stop=, sizes=)` runs blocks on the active
            tokens, in one of these buckets; and how many entries of every image they worked on.
        run_in_place: As the function of this name.
        decide: As the function of this name.
        finish: As the function of this name.
    """

    first_blocks: Callable[..., Embedded]
    run_all: Callable[..., Embedded]
    run_active: Callable[..., tuple[Embedded, int | Array]]
    run_in_place: Callable[..., Embedded]
    decide: Callable[..., Decision]
    finish: Callable[..., GatedOutput]


Decide = Callable[[State, Exit], Decision]
"""Decision of a gate on a state."""


def run(
    model: GatedParts,
    params: Params,
    images: Array,
    plan: Schedule,
    /,
    *,
    driver: Driver,
    decide: Decide,
    until: int | None = None,
) -> State:
    """Run a pass: blocks, and the taps and decisions between them.

    Args:
        model: The parts of the model.
        params: Parameters of the network.
        images: The images.
        plan: A plan that has passed `require_gates_fit`.
        driver: How the functions of the pass are called.
        decide: Decision of a gate.
        until: The gate, by the blocks before it, that decides last; the last block if left out.

    Returns:
        The state at the end.
    """
    assert isinstance(plan.carry, Preserved)
    first, *later = plan.stages(model.depth, taps=model.taps)
    embedded = driver.first_blocks(model.network, params, images, stop=first.stop)
    slots = embedded.tokens.shape[1]
    state = State(plan.carry, embedded, held=(None,) * first.stop, room=(slots,) * first.stop)
    state = _between(model, state, first, decide)
    for stage in later:
        if until is not None and stage.stop > until:
            break
        state = _between(model, run_stage(model, params, state, stage, driver=driver), stage, decide)
    return state


def _between(model: GatedParts, state: State, stage: Stage, decide: Decide) -> State:
    """What follows the blocks of a stage."""
    if stage.tap and stage.stop < model.depth:
        state = dataclasses.replace(state, passed={**state.passed, stage.stop: state.embedded})
    if stage.exit is not None:
        decisions = {**state.decisions, stage.stop: decide(state, stage.exit)}
        state = dataclasses.replace(state, gate=stage.stop, decisions=decisions)
    return dataclasses.replace(state, gate=None) if stage.rejoin else state


def run_stage(model: GatedParts, params: Params, state: State, stage: Stage, /, *, driver: Driver) -> State:
    """Run the blocks of a stage on the active tokens."""
    given, span = (model.network, params, state.embedded), {"start": stage.start, "stop": stage.stop}
    room = state.embedded.tokens.shape[1]
    if state.gate is None:
        embedded = driver.run_all(*given, **span)
    elif state.carry.keys == "all":
        embedded = driver.run_in_place(*given, state.decisions[state.gate], **span, keys="all")
    else:
        sizes = model.sizes(state.gate, state.embedded)
        embedded, room = driver.run_active(*given, state.decisions[state.gate], **span, sizes=sizes)
    blocks = stage.stop - stage.start
    held, worked_on = state.held + (state.gate,) * blocks, state.room + (room,) * blocks
    return dataclasses.replace(state, embedded=embedded, held=held, room=worked_on)


def decide_by_policy(model: GatedParts, gates: Heads, driver: Driver, state: State, exit: Exit) -> Decision:
    """Decision of a gate by its policy, with the room of its greatest bucket."""
    embedded, after = state.embedded, exit.after
    most = model.sizes(after, embedded)[-1] - embedded.prefix
    return driver.decide(model.gate_plan, gates[str(after)], embedded, exit.policy, state.before, most=most)


def evaluate(
    model: GatedParts, params: Params, gates: Heads, images: Array, plan: Schedule, /, *, driver: Driver
) -> GatedOutput:
    """Run a whole pass by the policies of a plan, without noise."""
    decide = partial(decide_by_policy, model, gates, driver)
    state = run(model, params, images, plan, driver=driver, decide=decide)
    return driver.finish(model.network, params, state, head=model.head, taps=model.taps)


def _switched(
    network: Network, params: Params, embedded: Embedded, decision: Decision, *, start: int, stop: int,
    sizes: tuple[int, ...],
) -> tuple[Embedded, int | Array]:  # fmt: skip
    """Run blocks on the active tokens; `lax.switch` chooses the bucket."""
    ran = partial(run_selected, network, params, start=start, stop=stop)
    if len(sizes) == 1:
        return ran(embedded, decision, capacity=sizes[0]), sizes[0]
    branches = [partial(ran, capacity=size) for size in sizes]
    bucket = jnp.where(decision.needed > 0, jnp.searchsorted(jnp.asarray(sizes), decision.needed), len(sizes))
    embedded = lax.switch(bucket, [*branches, lambda skipped, _: skipped], embedded, decision)
    return embedded, jnp.asarray([*sizes, 0])[bucket]


IN_ONE_PROGRAM = Driver(first_blocks, run_all, _switched, run_in_place, decide, finish)
"""All in the program of whoever calls, with buckets that are chosen inside of it."""


def masked(merge: Merge = put_back, /) -> Driver:
    """Driver that computes all tokens and puts skipped ones back, in the program of whoever calls."""
    in_place = partial(run_in_place, merge=merge)

    def run_active(
        network: Network, params: Params, embedded: Embedded, decision: Decision, *, start: int, stop: int,
        sizes: tuple[int, ...],  # noqa: ARG001
    ) -> tuple[Embedded, int | Array]:  # fmt: skip
        ran = in_place(network, params, embedded, decision, start=start, stop=stop, keys="running")
        return ran, embedded.tokens.shape[1]

    return dataclasses.replace(IN_ONE_PROGRAM, run_active=run_active, run_in_place=in_place)


MASKED = masked()


def _everywhere(embedded: Embedded) -> Array | None:
    known = embedded.positions
    return None if known is None else jnp.broadcast_to(known, (embedded.tokens.shape[0], *known.shape))


def _as_keys(held: Bool[Array, "images entries"]) -> Float[Array, "images entries"]:
    """As how many keys each entry counts: of an image of which nothing runs one does all the same, for there is no
    attention over nothing.
    """
    first = jnp.arange(held.shape[1])[None] == 0
    return jnp.where(first & ~held.any(axis=1, keepdims=True), 1.0, held.astype(jnp.float32))
