"""One forward pass with gates in the static layout: what it is given, what lies between two gates, and its steps.

It is no part of the public API. Nothing is compiled here: `gating` does that, in either of two ways.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int

from tokenexit import tokens
from tokenexit.carries import Preserved
from tokenexit.gates import keep_probability
from tokenexit.heads import HeadPlan
from tokenexit.policies import Evidence, Policy
from tokenexit.schedule import Schedule
from tokenexit_jax._layers import Weights
from tokenexit_jax._network import embed, run_block
from tokenexit_jax.exits.forward import capacities_in_entries, on_grid
from tokenexit_jax.exits.outputs import GatedOutput
from tokenexit_jax.heads import build as building
from tokenexit_jax.networks import Embedded, Heads, Network, Params

__all__ = [
    "Asked",
    "GatedParts",
    "GatedRun",
    "MaskedRun",
    "ask",
    "asked",
    "closed",
    "gathered",
    "in_place",
    "opened",
    "patches_of",
    "plain",
    "put_back",
]

Head = Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]]


@dataclass(frozen=True)
class GatedParts:
    """What a model with gates is made of, its plan aside: all of it static. `GatedModel` says what the fields are."""

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


class Asked(NamedTuple):
    """What a gate has said, and what came of it.

    Attributes:
        keep: Which patches run until the next gate; in training 1 or 0, with the gradient of the relaxed decision.
        probability: How sure the gate was.
        overflow: How many had to wait for lack of room.
        needed: Entries that the fullest image needs; 0 if nothing runs.
    """

    keep: Array
    probability: Float[Array, "images patches"]
    overflow: Int[Array, "images"]
    needed: Int[Array, ""]

    def running(self, prefix: int) -> Bool[Array, "images slots"]:
        """Which slots run; prefix tokens always do."""
        return jnp.pad(self.keep > 0, ((0, 0), (prefix, 0)), constant_values=True)


def opened(network: Network, params: Params, images: Array, *, stop: int) -> Embedded:
    """The images as tokens, and the first blocks as a plain batch."""
    return plain(network, params, embed(network, params, images), start=0, stop=stop)


def plain(network: Network, params: Params, embedded: Embedded, *, start: int, stop: int) -> Embedded:
    """Some blocks on all tokens, as a plain batch."""
    batch, positions = embedded.tokens, _everywhere(embedded)
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    for index in range(start, stop):
        batch = run_block(network, index, params, batch, counts, positions)
    return dataclasses.replace(embedded, tokens=batch)


def gathered(
    network: Network, params: Params, embedded: Embedded, asked: Asked, *, start: int, stop: int, capacity: int
) -> Embedded:
    """Some blocks on those that run, in so many entries for every image; those that wait stay as they are."""
    if capacity == embedded.tokens.shape[1]:
        return in_place(network, params, embedded, asked, start=start, stop=stop, keys="running")
    running = asked.running(embedded.prefix)
    # All are equally welcome, for the capacity holds all of them.
    selection, _ = tokens.select(running, jnp.zeros(running.shape, dtype=jnp.float32), capacity=capacity)
    # An entry without a token repeats one of its own image: it is as finite as the tokens are.
    entries, counts = tokens.gather(embedded.tokens, selection), _as_keys(selection.valid)
    positions = None if embedded.positions is None else jnp.take(embedded.positions, selection.slot_of, axis=0)
    for index in range(start, stop):
        entries = run_block(network, index, params, entries, counts, positions).astype(embedded.tokens.dtype)
    return dataclasses.replace(embedded, tokens=tokens.scatter(entries, selection, into=embedded.tokens))


def put_back(after: Array, before: Array, asked: Asked, *, prefix: int) -> Array:
    """Tokens after a block: as it made them where they ran, as they were where not."""
    return jnp.where(asked.running(prefix)[..., None], after, before)


def in_place(
    network: Network,
    params: Params,
    embedded: Embedded,
    asked: Asked,
    *,
    start: int,
    stop: int,
    keys: str,
    mixed: Callable[..., Array] = put_back,
) -> Embedded:
    """Some blocks on all tokens, of which those that wait are put back, and are keys only if all are."""
    batch, positions = embedded.tokens, _everywhere(embedded)
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    if keys == "running":
        counts = _as_keys(asked.running(embedded.prefix))
    for index in range(start, stop):
        after = run_block(network, index, params, batch, counts, positions).astype(batch.dtype)
        batch = mixed(after, batch, asked, prefix=embedded.prefix)
    return dataclasses.replace(embedded, tokens=batch)


def ask(
    plan: HeadPlan,
    weights: Weights,
    embedded: Embedded,
    policy: Policy,
    before: Bool[Array, "images patches"] | None,
    *,
    most: int,
) -> Asked:
    """Which patches run until the next gate: of those that may, as many as there is room for, the surest first."""
    logits = building.read(plan, weights, embedded.tokens)[:, embedded.prefix :]
    probability = lax.stop_gradient(keep_probability(logits))
    images, patches = probability.shape
    index = jnp.arange(images * patches)
    evidence = Evidence(
        # Those that cannot come back are in nobody's way.
        gate=(probability if before is None else jnp.where(before, probability, 0.0)).reshape(-1),
        image=index // max(patches, 1),
        images=images,
        grid=embedded.grid,
        position=index % max(patches, 1),
        valid=jnp.ones_like(probability, dtype=bool).reshape(-1),
    )
    keep = ~policy(evidence).reshape(images, patches)
    keep = keep if before is None else keep & before
    overflow = jnp.zeros_like(probability[:, 0], dtype=jnp.int32)
    if most < patches:
        selection, surplus = tokens.select(keep, -probability, capacity=most)
        keep, overflow = keep & ~surplus, selection.overflow.astype(overflow.dtype)
    return asked(keep, probability, overflow, prefix=embedded.prefix)


def asked(keep: Array, probability: Array, overflow: Array, *, prefix: int) -> Asked:
    """What came of a decision, however it was made."""
    return Asked(keep, probability, overflow, (keep > 0).sum(axis=1, dtype=jnp.int32).max(initial=0) + prefix)


def patches_of(embedded: Embedded) -> Float[Array, "images patches width"]:
    """The tokens that decoders see."""
    return embedded.tokens[:, embedded.prefix :]


def closed(
    network: Network,
    params: Params,
    embedded: Embedded,
    gates: Mapping[int, Asked],
    passed: Mapping[int, Embedded],
    room: Array,
    *,
    head: Head | None,
    taps: tuple[int, ...],
    carry: Preserved,
) -> GatedOutput:
    """What comes of it.

    Args:
        network: The network.
        params: Its parameters.
        embedded: The tokens after the last block.
        gates: What the gates have said, by block.
        passed: The tokens at the taps before the last block.
        room: Entries that each block worked on.
        head: The final head, if there is one.
        taps: After how many blocks maps are handed out.
        carry: What became of those that waited.

    Returns:
        The output.
    """
    (images, slots, _), (height, across), depth = embedded.tokens.shape, embedded.grid, network.depth
    maps = {after: on_grid(patches_of(here), here.grid) for after, here in passed.items()}
    logits = None
    if head is not None or depth in taps:
        finished = network.finish(params, embedded.tokens)[:, embedded.prefix :]
        maps |= {depth: on_grid(finished, embedded.grid)} if depth in taps else {}
        logits = None if head is None else on_grid(head(params, finished), embedded.grid)
    # Like the tokens, and not merely of a shape: under `shard_map` it is one for each shard.
    nothing = jnp.zeros_like(embedded.tokens[:, 0, 0], dtype=jnp.int32)
    ran = []
    for block in range(depth):
        last = max((after for after in gates if after <= block), default=None)
        if last is None or (carry.before == "last block" and block == depth - 1):
            ran.append(nothing + slots)
        else:
            ran.append(gates[last].running(embedded.prefix).sum(axis=1, dtype=jnp.int32))

    def by_gate(found: list[Array], dtype: type) -> Array:
        if not found:
            return jnp.zeros((images, 0, height, across), dtype=dtype)
        stacked = jnp.stack([lax.stop_gradient(one).astype(dtype) for one in found], axis=1)
        return rearrange(stacked, "images gates (height width) -> images gates height width", height=height)

    return GatedOutput(
        logits=logits,
        maps=maps,
        keep=by_gate([one.keep for one in gates.values()], jnp.bool_),
        probability=by_gate([one.probability for one in gates.values()], jnp.float32),
        tokens_per_block=jnp.stack(ran, axis=1),
        capacity_per_block=nothing[:, None] + room[None],
        overflow=nothing + sum(one.overflow for one in gates.values()),
        gates=tuple(gates),
        keys=carry.keys,
        area=embedded.area,
    )


class GatedRun:
    """One forward pass, in one program: what lies between two gates. It lives for one call.

    The functions that work on arrays are attributes, so that a run may have them compiled, each by itself.
    """

    opened = staticmethod(opened)
    plain = staticmethod(plain)
    gathered = staticmethod(gathered)
    in_place = staticmethod(in_place)
    ask = staticmethod(ask)
    closed = staticmethod(closed)

    def __init__(self, model: GatedParts, params: Params, gates: Heads, plan: Schedule) -> None:
        assert isinstance(plan.carry, Preserved)
        self.model, self.params, self.gates, self.carry = model, params, gates, plan.carry
        self.policies = {exit.after: exit.policy for exit in plan.active}
        self.asked: dict[int, Asked] = {}
        self.passed: dict[int, Embedded] = {}
        self.room: list[int | Array] = []

    def through(self, images: Array) -> GatedOutput:
        """The whole pass."""
        embedded = self.until(images, self.model.depth)
        model, room = self.model, jnp.stack([jnp.asarray(one, dtype=jnp.int32) for one in self.room])
        options = {"head": model.head, "taps": model.taps, "carry": self.carry}
        return self.closed(model.network, self.params, embedded, self.asked, self.passed, room, **options)

    def until(self, images: Array, end: int) -> Embedded:
        """Run the first blocks, and ask the gate after the last of them."""
        network, depth = self.model.network, self.model.depth
        rejoining = {depth - 1} if self.policies and self.carry.before == "last block" else set()
        stops = sorted({*self.policies, *self.model.taps, *rejoining, end})
        embedded = self.opened(network, self.params, images, stop=stops[0])
        self.room += stops[0] * [embedded.tokens.shape[1]]
        for start, stop in zip([0, *stops], stops, strict=False):
            if start > 0:
                embedded, room = self.on(embedded, start, stop)
                self.room += (stop - start) * [room]
            if stop in self.model.taps and stop < depth:
                self.passed[stop] = embedded
            if stop in self.policies:
                self.asked[stop] = self.at(embedded, stop)
            if stop == end:
                break
        return embedded

    def on(self, embedded: Embedded, start: int, stop: int) -> tuple[Embedded, int | Array]:
        """From one stop to the next; and how many entries of every image were worked on."""
        given, slots = (self.model.network, self.params, embedded), embedded.tokens.shape[1]
        if not self.asked or (self.carry.before == "last block" and start == self.model.depth - 1):
            return self.plain(*given, start=start, stop=stop), slots
        if self.carry.keys == "all":
            return self.in_place(*given, self.running, start=start, stop=stop, keys="all"), slots
        return self.some(embedded, start, stop)

    @property
    def running(self) -> Asked:
        """What the last gate has said."""
        return next(reversed(self.asked.values()))

    def sizes(self, embedded: Embedded) -> tuple[int, ...]:
        """The buckets that there are until the next gate."""
        return self.model.sizes(next(reversed(self.asked)), embedded)

    def some(self, embedded: Embedded, start: int, stop: int) -> tuple[Embedded, int | Array]:
        """Some blocks on those that run; `lax.switch` chooses the bucket."""
        sizes, asked = self.sizes(embedded), self.running
        run = partial(self.gathered, self.model.network, self.params, start=start, stop=stop)
        if len(sizes) == 1:
            return run(embedded, asked, capacity=sizes[0]), sizes[0]
        branches = [partial(run, capacity=size) for size in sizes]
        bucket = jnp.where(asked.needed > 0, jnp.searchsorted(jnp.asarray(sizes), asked.needed), len(sizes))
        embedded = lax.switch(bucket, [*branches, lambda waiting, _: waiting], embedded, asked)
        return embedded, jnp.asarray([*sizes, 0])[bucket]

    def at(self, embedded: Embedded, after: int) -> Asked:
        """What the gate after a block says."""
        before = self.running.keep if self.carry.returning == "never" and self.asked else None
        most = self.model.sizes(after, embedded)[-1] - embedded.prefix
        weights, policy = self.gates[str(after)], self.policies[after]
        return self.ask(self.model.gate_plan, weights, embedded, policy, before, most=most)


class MaskedRun(GatedRun):
    """All are computed, and those that wait are put back."""

    def some(self, embedded: Embedded, start: int, stop: int) -> tuple[Embedded, int | Array]:
        """Some blocks on all tokens."""
        given = self.model.network, self.params, embedded, self.running
        return self.in_place(*given, start=start, stop=stop, keys="running"), embedded.tokens.shape[1]


def _everywhere(embedded: Embedded) -> Array | None:
    known = embedded.positions
    return None if known is None else jnp.broadcast_to(known, (embedded.tokens.shape[0], *known.shape))


def _as_keys(held: Bool[Array, "images entries"]) -> Float[Array, "images entries"]:
    """As how many keys each entry counts: of an image of which nothing runs one does all the same, for there is no
    attention over nothing.
    """
    first = jnp.arange(held.shape[1])[None] == 0
    return jnp.where(first & ~held.any(axis=1, keepdims=True), 1.0, held.astype(jnp.float32))
