"""One forward pass in the static layout: what it is given, what lies between two exit points, and its stages.

It is no part of the public API. Nothing is compiled here: `running` does that, in either of two ways.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import jax
from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from tokenexit import cells, ledger, scores, surroundings, tokens
from tokenexit.area import Area
from tokenexit.carries import Feature, MaskPrediction
from tokenexit.errors import require
from tokenexit.heads import ATM, HeadPlan, Neighbourhood
from tokenexit.ledger import Ledger
from tokenexit.policies import Evidence
from tokenexit.schedule import Schedule
from tokenexit.tokens import Selection
from tokenexit_jax import heads as building
from tokenexit_jax._given import require_images
from tokenexit_jax.masks import Masks, log_scores, read_masks
from tokenexit_jax.networks import Embedded, Heads, Network, Params
from tokenexit_jax.outputs import Output
from tokenexit_jax.pytrees import register

__all__ = [
    "DECLARED",
    "Parts",
    "Reading",
    "Run",
    "State",
    "buckets",
    "embed",
    "joined",
    "needed",
    "on_grid",
    "require_covered",
    "run_block",
    "stages",
    "whole_sides",
]


@dataclass(frozen=True)
class Parts:
    """What a model is made of, its plan aside: all of it static. `ExitingModel` says what the fields are."""

    network: Network
    classes: int
    after: tuple[int, ...]
    head_plan: HeadPlan
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None
    capacities: tuple[tuple[float, ...], ...]

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return self.network.depth

    @property
    def gives_masks(self) -> bool:
        """Whether the heads are mask heads: all are, or none."""
        return isinstance(self.head_plan, ATM)

    def sizes(self, after: int, state: "State") -> tuple[int, ...]:
        """Buckets of the stage after an exit, in entries, ascending; each holds the prefix tokens and one patch."""
        fractions = self.capacities[self.after.index(after)]
        return buckets(fractions, slots=state.tokens.shape[1], prefix=state.prefix)


class Reading(NamedTuple):
    """What a head says of patches.

    Attributes:
        logits: Class scores.
        class_scores: Those of a mask head, as a policy takes them.
        masks: What a mask head said.
        statistics: In training, what the head's batch norm has learned.
    """

    logits: Float[Array, "images entries classes"]
    class_scores: Float[Array, "images entries classes"] | None = None
    masks: Masks | None = None
    statistics: dict[str, Array] | None = None


@dataclass(frozen=True)
class State:
    """What lies between two exit points. Its shapes are the same at all of them, whoever has left.

    Attributes:
        tokens: Every token as its last block left it: of those that have left, the feature that they left with.
        positions: What belongs to the slots.
        running: Which patches run. The prefix tokens of an image run as long as any of its patches does.
        ledger: What those that left have left behind, by patch; None if nothing can leave.
        previous: What the exit heads so far have predicted; -1 where they read nothing.
        masks: What the last mask head said that read a patch, or an image, if the carry keeps that.
        ran: Tokens that ran through each block.
        room: Entries that each block worked on.
        overflow: Tokens that left for lack of room.
        prefix: Prefix tokens of an image.
        grid: Height and width of the grid.
        area: The area of the images that it covers; None if it is the whole of them.
        kept: What training keeps of each head; see `tokenexit_jax.training`.
    """

    tokens: Float[Array, "images slots width"]
    positions: Shaped[Array, "slots ..."] | None
    running: Bool[Array, "images places"]
    ledger: Ledger | None
    previous: Int[Array, "exits images places"]
    masks: Masks | None
    ran: Int[Array, "images blocks"]
    room: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    prefix: int
    grid: tuple[int, int]
    area: Area | None
    kept: Any = None


_STATIC = ("prefix", "grid", "area")
register(State, leaves=tuple(field.name for field in dataclasses.fields(State) if field.name not in _STATIC))


class Run(NamedTuple):
    """One forward pass: what all of its stages are given."""

    model: Parts
    params: Params
    heads: Heads
    plan: Schedule

    @property
    def feature(self) -> Feature | None:
        """The carry, if features rejoin."""
        return self.plan.carry if isinstance(self.plan.carry, Feature) else None

    @property
    def end(self) -> int:
        """The block before which features rejoin, or after which the final head reads."""
        rejoining = self.feature is not None and self.feature.before == "last block"
        return self.model.depth - 1 if rejoining else self.model.depth

    def through(self, images: Array) -> State:
        """All exit points in one program, in which `lax.switch` chooses the bucket of each stage."""
        state = self.opened(images)
        for stage in range(stages(self.model, self.plan)):
            sizes = self.model.sizes(self.plan.active[stage].after, state)
            branches = [partial(self.advanced, stage=stage, capacity=size) for size in sizes]
            if len(sizes) == 1:
                state = branches[0](state)
            else:
                entries = needed(state)
                bucket = jnp.where(entries > 0, jnp.searchsorted(jnp.asarray(sizes), entries), len(sizes))
                state = lax.switch(bucket, [*branches, lambda finished: finished], state)
        return state

    def opened(self, images: Array) -> State:
        """All up to the first exit point, as a plain batch."""
        embedded = embed(self.model.network, self.params, images)
        prefix, (height, width) = embedded.prefix, embedded.grid
        folds = self.feature is not None and self.feature.fold_above is not None
        rule = "have fold_above=None for a network without prefix tokens"
        require(not folds or prefix > 0, "schedule", rule, self.plan.carry)
        count, slots, _ = embedded.tokens.shape
        exits, places, depth = self.plan.active, height * width, self.model.depth
        stop = exits[0].after if exits else self.end
        # Like the tokens, and not merely of a shape: under `shard_map` it is one for each shard.
        nothing = jnp.zeros_like(embedded.tokens[:, 0, 0], dtype=jnp.int32)
        ran = jnp.broadcast_to(jnp.where(jnp.arange(depth)[None] < stop, slots, nothing[:, None]), (count, depth))
        running = jnp.broadcast_to(nothing[:, None] == 0, (count, places))
        state = State(
            tokens=self._plain(embedded.tokens, embedded.positions, 0, stop),
            positions=embedded.positions,
            running=running,
            ledger=None,
            previous=jnp.broadcast_to(nothing[None, :, None] - 1, (len(exits), count, places)),
            masks=None,
            ran=ran,
            room=ran,
            overflow=nothing,
            prefix=prefix,
            grid=embedded.grid,
            area=embedded.area,
        )
        if not exits:
            return state
        everywhere = jnp.broadcast_to(jnp.arange(places), (count, places))
        every = Selection(everywhere, jnp.ones_like(everywhere, dtype=bool), places, jnp.zeros_like(state.overflow))
        return self._exit(state, every, state.tokens, 0)

    def advanced(self, state: State, *, stage: int, capacity: int) -> State:
        """The blocks from one exit point to the next, or to the end, on so many entries for every image."""
        exits, prefix = self.plan.active, state.prefix
        start, last = exits[stage].after, stage + 1 == len(exits)
        stop = self.end if last else exits[stage + 1].after
        patches = state.running.sum(axis=1, dtype=jnp.int32)
        waiting = patches > 0
        # All are equally welcome, for the capacity holds all of them.
        selection, _ = tokens.select(
            state.running, jnp.zeros(state.running.shape, dtype=jnp.float32), capacity=capacity - prefix
        )
        # An entry without a token repeats one of its own image: it is as finite as the tokens are.
        entries = jnp.concatenate(
            [state.tokens[:, :prefix], tokens.gather(state.tokens[:, prefix:], selection)], axis=1
        )
        counts = self._counts(state, selection, waiting)
        positions = None
        if state.positions is not None:
            positions = jnp.take(state.positions, _slots(selection, prefix), axis=0)
        for index in range(start, stop):
            found = run_block(self.model.network, index, self.params, entries, counts, positions)
            entries = found.astype(state.tokens.dtype)
        state = dataclasses.replace(
            state,
            tokens=_written(state, selection, entries, waiting),
            ran=state.ran.at[:, start:stop].set(jnp.where(waiting, patches + prefix, 0)[:, None]),
            room=state.room.at[:, start:stop].set(capacity),
        )
        if not last:
            return self._exit(state, selection, entries, stage + 1)
        if self.feature is not None:
            return state
        finished = self.model.network.finish(self.params, entries)[:, prefix:]
        reading = self.read(self.model.depth, finished, state.grid, selection)
        return self._settled(state, selection, selection.valid, reading, self.model.depth)

    def closed(self, state: State) -> Output:
        """What comes of it; features rejoin."""
        if state.ledger is None or self.feature is not None:
            state, reading = self.rejoined(state)
            return self.output(state, reading.logits)
        logits = state.ledger.logits
        if state.masks is not None:
            logits = log_scores(state.masks.mask_logits, state.masks.presence_logits[:, None])
        return self.output(state, logits)

    def rejoined(self, state: State) -> tuple[State, Reading]:
        """All tokens of all images as a plain batch, to the end, and what the final head says of them."""
        slots, depth = state.tokens.shape[1], self.model.depth
        every = self._plain(state.tokens, state.positions, self.end, depth)
        ran, room = (counted.at[:, self.end :].set(slots) for counted in (state.ran, state.room))
        reading = self.read(depth, self.model.network.finish(self.params, every)[:, state.prefix :], state.grid)
        return dataclasses.replace(state, ran=ran, room=room), reading

    def output(self, state: State, logits: Float[Array, "images places classes"]) -> Output:
        """These class scores, and all else that there is to tell."""
        left = jnp.zeros(logits.shape[:2], dtype=jnp.int32) if state.ledger is None else state.ledger.depth
        depth = jnp.where(left > 0, left, self.model.depth)
        return Output(
            logits=on_grid(logits, state.grid),
            exit_depth=on_grid(depth[..., None], state.grid)[..., 0],
            tokens_per_block=state.ran,
            capacity_per_block=state.room,
            overflow=state.overflow,
            exits=tuple(exit.after for exit in self.plan.active),
            head_on="running" if self.feature is None else "all",
            area=state.area,
        )

    def patches_after(self, images: Array) -> tuple[dict[int, Float[Array, "images patches width"]], Embedded]:
        """Patches as every head would read them, in one dense run, and the images before the first block."""
        network = self.model.network
        embedded = embed(network, self.params, images)
        running, patches, start = embedded.tokens, {}, 0
        for stop in self.model.after:
            running, start = self._plain(running, embedded.positions, start, stop), stop
            patches[stop] = running[:, embedded.prefix :]
        running = self._plain(running, embedded.positions, start, network.depth)
        patches[network.depth] = network.finish(self.params, running)[:, embedded.prefix :]
        return patches, embedded

    def read(
        self,
        after: int,
        patches: Float[Array, "images entries width"],
        grid: tuple[int, int],
        selection: Selection | None = None,
    ) -> Reading:
        """What the head after a block says of patches, all of them or some; after the last it is the final head."""
        model = self.model
        if after == model.depth and model.head is not None:
            logits = model.head(self.params, patches)
            shape = getattr(logits, "shape", type(logits).__name__)
            wanted = (*patches.shape[:-1], model.classes)
            require(shape == wanted, "head", f"give {model.classes} classes, logits of shape {wanted}", f"{shape}")
            return Reading(logits)
        weights = self.heads["head"] if after == model.depth else self.heads["exit_heads"][str(after)]
        if isinstance(model.head_plan, Neighbourhood):
            radius = model.head_plan.radius
            if selection is None:
                patches = surroundings.beside_all(patches, grid=grid, radius=radius)
            else:
                patches = surroundings.beside_running(patches, selection, grid=grid, radius=radius)
        if not isinstance(model.head_plan, ATM):
            return Reading(building.read(model.head_plan, weights, patches))
        valid = jnp.ones(patches.shape[:2], dtype=bool) if selection is None else selection.valid
        found = read_masks(model.head_plan, weights, patches, valid)
        masks = Masks(*(part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in found))
        presence = masks.presence_logits[:, None]
        constant = lax.stop_gradient((masks.mask_logits, jax.nn.sigmoid(presence)))
        return Reading(log_scores(masks.mask_logits, presence), scores.mask_scores(*constant), masks)

    def _plain(self, batch: Array, positions: Array | None, start: int, stop: int) -> Array:
        """Some blocks on a whole batch."""
        counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
        if positions is not None:
            positions = jnp.broadcast_to(positions, (batch.shape[0], *positions.shape))
        for index in range(start, stop):
            batch = run_block(self.model.network, index, self.params, batch, counts, positions)
        return batch

    def _counts(self, state: State, selection: Selection, waiting: Array) -> Float[Array, "images entries"]:
        """As how many keys each entry counts."""
        images, places = selection.layout
        patches = selection.valid.astype(jnp.float32)
        if self.plan.cell is not None:
            patches = patches * cells.token_size(selection, grid=state.grid, side=self.plan.cell)
        prefix = jnp.broadcast_to(waiting.astype(jnp.float32)[:, None], (images, state.prefix))
        counts = jnp.concatenate([prefix, patches], axis=1)
        # Of a finished image one entry counts all the same: there is no attention over nothing.
        first = jnp.arange(state.prefix + places)[None] == 0
        return jnp.where(first & ~waiting[:, None], 1.0, counts)

    def _exit(self, state: State, selection: Selection, entries: Array, index: int) -> State:
        """Some of the patches of these entries leave."""
        exit, prefix, cell = self.plan.active[index], state.prefix, self.plan.cell
        reading = self.read(exit.after, entries[:, prefix:], state.grid, selection)
        if state.ledger is None:
            state = dataclasses.replace(state, ledger=ledger.open_ledger(reading.logits, selection))
        evidence = self._evidence(state, selection, reading, index)
        leave = exit.policy(evidence).reshape(selection.layout)
        # An image all of whose patches have left is done, and so are those that would stand for others.
        waiting = (selection.valid & ~leave).any(axis=1, keepdims=True)
        middle = jnp.zeros_like(leave)
        if cell is not None:
            middle = cells.is_cell_centre(selection.slot, grid=state.grid, side=cell).reshape(selection.layout)
        stay = selection.valid & ~(leave & ~middle) & waiting
        most = self.model.sizes(exit.after, state)[-1] - prefix
        if index < stages(self.model, self.plan) and most < selection.layout[1]:
            certain = jnp.where(middle, -jnp.inf, evidence.confidence.reshape(selection.layout))
            fitting, _, surplus = tokens.reselect(selection, stay, certain, capacity=most)
            stay = stay & ~surplus
            overflow = state.overflow + fitting.overflow.astype(state.overflow.dtype)
            state = dataclasses.replace(state, overflow=overflow)
        state = self._settled(state, selection, selection.valid & ~stay, reading, exit.after)
        if self.feature is not None and self.feature.fold_above is not None:
            leavers = selection.valid & ~stay
            state = self._folded(state, selection, entries, leavers, waiting, self.feature.fold_above)
        label = evidence.label.reshape(selection.layout).astype(state.previous.dtype)
        label = tokens.scatter(label, selection, into=state.previous[index])
        return dataclasses.replace(
            state,
            running=tokens.scatter(stay, selection, into=jnp.zeros_like(state.running)),
            previous=state.previous.at[index].set(label),
        )

    def _evidence(self, state: State, selection: Selection, reading: Reading, index: int) -> Evidence:
        """What the policy is shown: the patches of all entries, in one row."""
        book, previous = state.ledger, state.previous[:index]
        assert book is not None
        of_entries = partial(_gathered, selection)
        logits = lax.stop_gradient(reading.logits) if reading.class_scores is None else None
        return Evidence(
            None if logits is None else rearrange(logits, "images entries classes -> (images entries) classes"),
            class_scores=None
            if reading.class_scores is None
            else rearrange(reading.class_scores, "images entries classes -> (images entries) classes"),
            image=selection.image,
            images=selection.images,
            grid=state.grid,
            position=selection.slot,
            valid=selection.valid.reshape(-1),
            exit=index,
            previous=jax.vmap(of_entries)(previous),
            settled_label=book.label,
            settled_score=book.score,
        )

    def _settled(self, state: State, selection: Selection, leave: Array, reading: Reading, depth: int) -> State:
        """Write down what patches leave behind."""
        assert state.ledger is not None
        score = None if reading.class_scores is None else reading.class_scores.max(axis=-1)
        book = ledger.record(state.ledger, selection, leave, reading.logits, depth=depth, score=score)
        masks = state.masks
        if isinstance(self.plan.carry, MaskPrediction) and reading.masks is not None:
            masks = joined(masks, selection, reading.masks)
        return dataclasses.replace(state, ledger=book, masks=masks)

    def _folded(
        self, state: State, selection: Selection, entries: Array, leave: Array, waiting: Array, above: float
    ) -> State:
        """The mean of the leavers averaged into the first prefix token of images that run on (DoViT)."""
        prefix = state.prefix
        ran = jnp.broadcast_to(selection.valid.any(axis=1, keepdims=True), (selection.images, prefix))
        every = Selection(
            _slots(selection, prefix),
            jnp.concatenate([ran, selection.valid], axis=1),
            state.tokens.shape[1],
            selection.overflow,
        )
        leave = jnp.concatenate([jnp.zeros_like(ran), leave], axis=1)
        folded = ledger.fold_leavers(entries, every, leave, above=above)[:, :1]
        first = jnp.where(waiting[..., None], folded, state.tokens[:, :1])
        return dataclasses.replace(state, tokens=jnp.concatenate([first, state.tokens[:, 1:]], axis=1))


def stages(model: Parts, plan: Schedule) -> int:
    """How many stages of blocks follow the first exit point."""
    exits = plan.active
    rejoining = isinstance(plan.carry, Feature) and plan.carry.before == "last block"
    nothing_more = rejoining and len(exits) > 0 and exits[-1].after == model.depth - 1
    return len(exits) - 1 if nothing_more else len(exits)


def buckets(fractions: tuple[float, ...], *, slots: int, prefix: int) -> tuple[int, ...]:
    """Fractions of the slots in entries, ascending; each holds the prefix tokens and one patch."""
    least = min(prefix + 1, slots)
    return tuple(sorted({max(least, round(fraction * slots)) for fraction in fractions}))


def needed(state: State) -> Int[Array, ""]:
    """Entries that the fullest image needs; 0 if nothing runs."""
    most = state.running.sum(axis=1, dtype=jnp.int32).max(initial=0)
    return jnp.where(most > 0, most + state.prefix, 0)


def embed(network: Network, params: Params, images: Array) -> Embedded:
    """Images as tokens, seen to fit the network. It is no part of the public API.

    Raises:
        TokenExitError: If they do not.
    """
    require_images(images)
    embedded = network.embed(params, images)
    require(isinstance(embedded, Embedded), "network.embed", "give Embedded", type(embedded).__name__)
    batch, grid, prefix = embedded.tokens, embedded.grid, embedded.prefix
    several = isinstance(batch, Array) and batch.ndim == 3 and jnp.issubdtype(batch.dtype, jnp.floating)
    got = f"shape {batch.shape}, {batch.dtype}" if isinstance(batch, Array) else type(batch).__name__
    got = f"{got}, for images of shape {', '.join(str(leaf.shape) for leaf in jax.tree.leaves(images))}"
    require(several, "network.embed", "give floating tokens of shape (images, slots, width)", got)
    whole = isinstance(grid, tuple) and len(grid) == 2 and all(isinstance(one, Integral) for one in (prefix, *grid))
    rule = "give a count of prefix tokens, and height and width of the grid"
    require(whole and min(prefix, *grid) >= 0, "network.embed", rule, f"prefix={prefix!r}, grid={grid!r}")
    _, slots, width = batch.shape
    height, across = grid
    require(width == network.width, "network.width", f"be the {width} channels of its tokens", network.width)
    rule = f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}"
    require(slots == embedded.prefix + height * across, "network.embed", rule, f"{slots} tokens")
    positions = embedded.positions
    placed = positions is None or positions.shape[:1] == (slots,)
    rule = f"give positions for {slots} slots"
    require(placed, "network.embed", rule, None if positions is None else f"shape {positions.shape}")
    area = embedded.area
    require(area is None or isinstance(area, Area), "network.embed", "give a tokenexit.area.Area or None", repr(area))
    embedded = dataclasses.replace(embedded, area=None) if area is not None and area.covered == area.image else embedded
    if embedded.area is None and len(getattr(images, "shape", ())) == 4:
        _require_whole(embedded.grid, images.shape)
    return embedded


DECLARED = "`network.embed` say what area the grid covers: Embedded(..., area=tokenexit.area.Area(covered, image))"


def whole_sides(grid: tuple[int, int], shape: tuple[int, ...]) -> list[int]:
    """Which axes may be the heights of images of this shape, cut into whole patches: channels come last or first.

    It is no part of the public API.
    """
    return [axis for axis in (1, 2) if shape[axis] % grid[0] == 0 and shape[axis + 1] % grid[1] == 0]


def _require_whole(grid: tuple[int, int], shape: tuple[int, ...]) -> None:
    """Raise unless images are cut into whole patches; height and width of the grid are exchanged if that tells why."""
    height, width = grid
    got = f"{height} x {width} for images of shape {shape}"
    whole = len(whole_sides(grid, shape)) > 0
    exchanged = any(
        rows % width == 0 and rows * height == columns * width for rows, columns in (shape[1:3], shape[2:4])
    )
    require(whole or not exchanged, "network.embed", "give height and width of the grid in this order", got)
    require(whole, "images", f"have whole patches, or {DECLARED}", f"a grid of {got}")


def require_covered(area: Area | None) -> None:
    """Raise unless patches cover the images exactly: losses on bare logits know of nothing else. Not public.

    Raises:
        TokenExitError: If they do not.
    """
    if area is not None:
        (height, width), (rows, columns) = area.image, area.covered
        rule = "be covered exactly by their patches for losses: cut or pad them and their labels to whole patches"
        require(False, "images", rule, f"{height} x {width} pixels, of which patches cover {rows} x {columns}")


def run_block(
    network: Network, index: int, params: Params, batch: Array, counts: Array, positions: Array | None
) -> Array:
    """One block, seen to give tokens. It is no part of the public API.

    Raises:
        TokenExitError: If it gives anything else.
    """
    found = network.blocks[index](params, batch, counts, positions)
    shape = getattr(found, "shape", type(found).__name__)
    require(shape == batch.shape, f"network.blocks[{index}]", f"give tokens of shape {batch.shape}", f"{shape}")
    return found


def _slots(selection: Selection, prefix: int) -> Int[Array, "images entries"]:
    """Slots of the prefix tokens and of the selected patches."""
    first = jnp.broadcast_to(jnp.arange(prefix), (selection.images, prefix))
    return jnp.concatenate([first, prefix + selection.slot_of], axis=1)


def _written(state: State, selection: Selection, entries: Array, waiting: Array) -> Float[Array, "images slots width"]:
    """All tokens, those of the entries as they are now; a finished image keeps what it has."""
    prefix = state.prefix
    first = jnp.where(waiting[:, None, None], entries[:, :prefix], state.tokens[:, :prefix])
    patches = tokens.scatter(entries[:, prefix:], selection, into=state.tokens[:, prefix:])
    return jnp.concatenate([first, patches], axis=1)


def _gathered(selection: Selection, values: Shaped[Array, "images places"]) -> Shaped[Array, "entries"]:
    return tokens.gather(values, selection).reshape(-1)


def joined(before: Masks | None, selection: Selection, masks: Masks) -> Masks:
    """Masks of the entries put in their places, beside those that leavers have left; presence likewise, by image."""
    if before is None:
        classes = masks.mask_logits.shape[-1]
        nothing = jnp.zeros((selection.images, selection.slots, classes), dtype=masks.mask_logits.dtype)
        before = Masks(nothing, masks.presence_logits)
    ran = selection.valid.any(axis=1, keepdims=True)
    return Masks(
        tokens.scatter(masks.mask_logits, selection, into=before.mask_logits),
        jnp.where(ran, masks.presence_logits, before.presence_logits),
    )


def on_grid(values: Shaped[Array, "images places wide"], grid: tuple[int, int]) -> Shaped[Array, "images h w wide"]:
    height, width = grid
    return rearrange(values, "images (height width) wide -> images height width wide", height=height, width=width)
