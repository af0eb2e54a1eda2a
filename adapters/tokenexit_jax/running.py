"""A vision transformer whose tokens leave early, with shapes that are known beforehand.

The tokens run as a plain batch until the first exit point. From then on what lies between two exit points has the shape
of the whole batch, and each stage of blocks gathers the tokens that still run into as many entries as the smallest
bucket that holds those of every image. Who leaves, and what is left behind, is said by the core.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from tokenexit import TokenExitError, cells, ledger, scores, tokens
from tokenexit.carries import Feature, MaskPrediction, Preserved
from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import require
from tokenexit.heads import ATM, HeadPlan
from tokenexit.ledger import Ledger
from tokenexit.policies import Evidence, Policy
from tokenexit.schedule import Schedule
from tokenexit.tokens import Selection
from tokenexit_jax import heads as building
from tokenexit_jax._counting import multiply_adds
from tokenexit_jax.masks import MaskMaps, Masks, log_scores, read_masks
from tokenexit_jax.networks import Embedded, Network, Params
from tokenexit_jax.pytrees import register

__all__ = ["ExitingModel", "Heads", "Output"]

Heads = dict[str, Any]
"""Weights of heads: `{"exit_heads": {"6": {...}, ...}, "head": {...}}`, the latter if the final head was built too."""


@dataclass(frozen=True)
class Output:
    """What a wrapped model returns. A pytree: its arrays all have the images first, and the other fields are static.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
            Logits, or for mask heads the logarithm of presence times mask.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        capacity_per_block: How many entries each block worked on for each image, with a token or without; 0 if it did
            not run. What is more than `tokens_per_block` was wasted.
        overflow: How many tokens of each image left only because the greatest capacity had no room for them.
        exits: The blocks with an exit head that the plan asks; of a finished batch it reads nothing.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
    """

    logits: Float[Array, "images grid_height grid_width classes"]
    exit_depth: Int[Array, "images grid_height grid_width"]
    tokens_per_block: Int[Array, "images blocks"]
    capacity_per_block: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]

    def upsample(self, size: tuple[int, int]) -> Float[Array, "images height width classes"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Args:
            size: Height and width, in pixels, neither less than the grid's.

        Returns:
            The interpolated logits.
        """
        images, _, _, classes = self.logits.shape
        return jax.image.resize(self.logits, (images, *size, classes), "bilinear")

    def multiply_adds(self, cost: Cost, /) -> Int[np.ndarray, "images"]:
        """Multiply-adds that the call stands for, heads and patch embedding included: of tokens, not of empty entries.

        Args:
            cost: What the parts cost: `ExitingModel.cost`.

        Returns:
            Multiply-adds per image, on the host.

        Raises:
            TokenExitError: If the cost is of another network.
        """
        height, width = self.exit_depth.shape[1:]
        ran = np.asarray(self.tokens_per_block)
        return cost.multiply_adds(ran, patches=height * width, exits=self.exits, head_on=self.head_on)


_ARRAYS = ("logits", "exit_depth", "tokens_per_block", "capacity_per_block", "overflow")
register(Output, leaves=_ARRAYS)


@dataclass(frozen=True)
class ExitingModel:
    """A vision transformer whose tokens leave early; made by `wrap`. It holds no weights, and nothing changes it.

    Attributes:
        network: The wrapped network.
        schedule: The plan in use; `dataclasses.replace` gives the model with another.
        classes: Class count.
        after: The blocks that have an exit head.
        plan: How the exit heads are built.
        head: The final head, `head(params, tokens)`, if it was given; None if it is built from the plan as well.
        capacities: For each block with an exit head the buckets after it, ascending, as fractions of an image's slots.
    """

    network: Network
    schedule: Schedule
    classes: int
    after: tuple[int, ...]
    plan: HeadPlan
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None
    capacities: tuple[tuple[float, ...], ...]

    def __call__(self, params: Params, heads: Heads, images: Array, schedule: Schedule | None = None) -> Output:
        """Segment images, with buckets that are chosen on the host.

        It compiles its stages itself, each for the buckets that it meets. For every exit with several buckets one
        integer is fetched; with a single one nothing is, and nothing waits.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores, exit depth, executed tokens.

        Raises:
            TokenExitError: If the plan does not fit the model, or the network's parts not each other.
        """
        plan = _as_arrays(checked(self, self.schedule if schedule is None else schedule))
        # Programs are told apart by all but the plan, whose numbers are data.
        model = dataclasses.replace(self, schedule=Schedule())
        state, needed = _opened(model, params, heads, images, plan)
        for stage in range(_stages(self, plan)):
            sizes = self._sizes(plan.active[stage].after, state)
            entries = sizes[0] if len(sizes) == 1 else int(needed)
            if entries == 0:
                break
            capacity = next(size for size in sizes if size >= entries)
            state, needed = _advanced(model, params, heads, state, plan, stage=stage, capacity=capacity)
        return _closed(model, params, heads, state, plan)

    def compiled(self, params: Params, heads: Heads, images: Array, schedule: Schedule | None = None) -> Output:
        """Segment images in one program: the function for `jax.jit`, `jax.grad`, `jax.shard_map` and `jax.export`.

        `lax.switch` chooses the bucket of each stage. Never `jax.vmap` it: all branches would run.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.
            schedule: A plan for this call only; the model's own if left out. As an argument of the compiled function
                its thresholds are data.

        Returns:
            Class scores, exit depth, executed tokens.

        Raises:
            TokenExitError: If the plan does not fit the model, or the network's parts not each other.
        """
        run = _Run(self, params, heads, checked(self, self.schedule if schedule is None else schedule))
        return run.closed(run.through(images))

    def init(self, key: Array) -> Heads:
        """Random weights for the heads.

        Args:
            key: Random key.

        Returns:
            The weights.
        """
        keys = jax.random.split(key, len(self.after) + 1)
        new = partial(building.init, self.plan, width=self.network.width, classes=self.classes)
        exit_heads = {str(after): new(one) for after, one in zip(self.after, keys[1:], strict=True)}
        return {"exit_heads": exit_heads} | ({"head": new(keys[0])} if self.head is None else {})

    def every_exit(
        self, params: Params, heads: Heads, images: Array
    ) -> dict[int, Float[Array, "images grid_height grid_width classes"]]:
        """Class scores of every head on all tokens, in one dense run: for auxiliary losses.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.

        Returns:
            Logits by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the network's parts do not fit each other.
        """
        run = _Run(self, params, heads, Schedule())
        patches, grid = run.patches_after(images)
        return {after: _on_grid(run.read(after, rows).logits, grid) for after, rows in patches.items()}

    def every_mask(self, params: Params, heads: Heads, images: Array) -> dict[int, MaskMaps]:
        """Masks and presence of every head on all tokens, in one dense run.

        Args:
            params: Parameters of the network.
            heads: Weights of the heads.
            images: The images, as the network takes them.

        Returns:
            Masks and presence by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the heads are no mask heads, or the network's parts do not fit each other.
        """
        require(self.gives_masks, "model", "have mask heads", repr(self.plan))
        run = _Run(self, params, heads, Schedule())
        patches, grid = run.patches_after(images)
        readings = {after: run.read(after, rows).masks for after, rows in patches.items()}
        return {
            after: MaskMaps(_on_grid(masks.mask_logits, grid), masks.presence_logits)
            for after, masks in readings.items()
            if masks is not None
        }

    def patches_after(
        self, params: Params, images: Array
    ) -> dict[int, Float[Array, "images grid_height grid_width width"]]:
        """Patches as every head would read them, in one dense run.

        Args:
            params: Parameters of the network.
            images: The images, as the network takes them.

        Returns:
            Patches by blocks run: as the block leaves them for the exit heads, finished for the final head, which is
            the last entry.

        Raises:
            TokenExitError: If the network's parts do not fit each other.
        """
        patches, grid = _Run(self, params, {}, Schedule()).patches_after(images)
        return {after: _on_grid(rows, grid) for after, rows in patches.items()}

    def cost(self, params: Params, images: Any) -> Cost:
        """What the parts of the network cost, read off the products and convolutions in its programs; nothing is run.

        Args:
            params: Parameters of the network, or `jax.ShapeDtypeStruct` in their place.
            images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

        Returns:
            The cost of the parts.

        Raises:
            TokenExitError: If the attention of a block is not over `width` channels, which `Cost` takes for granted, or
                a block has other work that does not grow with the tokens.
        """
        network, width = self.network, self.network.width
        embedded = jax.eval_shape(partial(embed, network), params, images)
        height, across = embedded.grid
        batch = jax.tree.leaves(images)[0].shape[0]
        blocks = tuple(_linear(network, index, params, embedded) for index in range(network.depth))
        head = building.cost(self.plan, width=width, classes=self.classes)
        token = jax.ShapeDtypeStruct((1, 1, width), embedded.tokens.dtype)
        return Cost(
            embed=multiply_adds(partial(embed, network), params, images) // (batch * height * across),
            blocks=blocks,
            width=width,
            prefix=embedded.prefix,
            exit_heads=dict.fromkeys(self.after, head),
            head=head if self.head is None else HeadCost(multiply_adds(self.head, params, token)),
        )

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return self.network.depth

    @property
    def gives_masks(self) -> bool:
        """Whether the heads are mask heads: all are, or none."""
        return isinstance(self.plan, ATM)

    def _sizes(self, after: int, state: "_State") -> tuple[int, ...]:
        """Buckets of the stage after an exit, in entries, ascending; each holds the prefix tokens and one patch."""
        slots = state.tokens.shape[1]
        least = min(state.prefix + 1, slots)
        fractions = self.capacities[self.after.index(after)]
        return tuple(sorted({max(least, round(fraction * slots)) for fraction in fractions}))


class _Reading(NamedTuple):
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
class _State:
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
    kept: Any = None


_STATIC = ("prefix", "grid")
register(_State, leaves=tuple(field.name for field in dataclasses.fields(_State) if field.name not in _STATIC))


class _Run(NamedTuple):
    """One forward pass: what all of its stages are given."""

    model: ExitingModel
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

    def through(self, images: Array) -> _State:
        """All exit points in one program, in which `lax.switch` chooses the bucket of each stage."""
        state = self.opened(images)
        for stage in range(_stages(self.model, self.plan)):
            sizes = self.model._sizes(self.plan.active[stage].after, state)
            branches = [partial(self.advanced, stage=stage, capacity=size) for size in sizes]
            if len(sizes) == 1:
                state = branches[0](state)
            else:
                needed = _needed(state)
                bucket = jnp.searchsorted(jnp.asarray(sizes), needed)
                finished = len(sizes)
                state = lax.switch(jnp.where(needed > 0, bucket, finished), [*branches, lambda same: same], state)
        return state

    def opened(self, images: Array) -> _State:
        """All up to the first exit point, as a plain batch."""
        embedded = embed(self.model.network, self.params, images)
        prefix, (height, width) = embedded.prefix, embedded.grid
        folds = self.feature is not None and self.feature.fold_above is not None
        rule = "have fold_above=None for a network without prefix tokens"
        require(not folds or prefix > 0, "schedule", rule, self.plan.carry)
        count, slots, _ = embedded.tokens.shape
        exits, places, depth = self.plan.active, height * width, self.model.depth
        stop = exits[0].after if exits else self.end
        state = _State(
            tokens=self._plain(embedded.tokens, embedded.positions, 0, stop),
            positions=embedded.positions,
            running=jnp.ones((count, places), dtype=bool),
            ledger=None,
            previous=jnp.full((len(exits), count, places), -1, dtype=jnp.int32),
            masks=None,
            ran=jnp.zeros((count, depth), dtype=jnp.int32).at[:, :stop].set(slots),
            room=jnp.zeros((count, depth), dtype=jnp.int32).at[:, :stop].set(slots),
            overflow=jnp.zeros(count, dtype=jnp.int32),
            prefix=prefix,
            grid=embedded.grid,
        )
        if not exits:
            return state
        everywhere = jnp.broadcast_to(jnp.arange(places), (count, places))
        every = Selection(everywhere, jnp.ones_like(everywhere, dtype=bool), places, jnp.zeros_like(state.overflow))
        return self._exit(state, every, state.tokens, 0)

    def advanced(self, state: _State, *, stage: int, capacity: int) -> _State:
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
        for block in self.model.network.blocks[start:stop]:
            entries = block(self.params, entries, counts, positions).astype(state.tokens.dtype)
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
        reading = self.read(self.model.depth, finished, selection.valid)
        return self._settled(state, selection, selection.valid, reading, self.model.depth)

    def closed(self, state: _State) -> Output:
        """What comes of it; features rejoin."""
        if state.ledger is None or self.feature is not None:
            state, reading = self.rejoined(state)
            return self.output(state, reading.logits)
        logits = state.ledger.logits
        if state.masks is not None:
            logits = log_scores(state.masks.mask_logits, state.masks.presence_logits[:, None])
        return self.output(state, logits)

    def rejoined(self, state: _State) -> tuple[_State, _Reading]:
        """All tokens of all images as a plain batch, to the end, and what the final head says of them."""
        slots, depth = state.tokens.shape[1], self.model.depth
        every = self._plain(state.tokens, state.positions, self.end, depth)
        ran, room = (counted.at[:, self.end :].set(slots) for counted in (state.ran, state.room))
        reading = self.read(depth, self.model.network.finish(self.params, every)[:, state.prefix :])
        return dataclasses.replace(state, ran=ran, room=room), reading

    def output(self, state: _State, logits: Float[Array, "images places classes"]) -> Output:
        """These class scores, and all else that there is to tell."""
        left = jnp.zeros(logits.shape[:2], dtype=jnp.int32) if state.ledger is None else state.ledger.depth
        depth = jnp.where(left > 0, left, self.model.depth)
        return Output(
            logits=_on_grid(logits, state.grid),
            exit_depth=_on_grid(depth[..., None], state.grid)[..., 0],
            tokens_per_block=state.ran,
            capacity_per_block=state.room,
            overflow=state.overflow,
            exits=tuple(exit.after for exit in self.plan.active),
            head_on="running" if self.feature is None else "all",
        )

    def patches_after(self, images: Array) -> tuple[dict[int, Float[Array, "images patches width"]], tuple[int, int]]:
        """Patches as every head would read them, in one dense run, and the grid."""
        network = self.model.network
        embedded = embed(network, self.params, images)
        running, patches, start = embedded.tokens, {}, 0
        for stop in self.model.after:
            running, start = self._plain(running, embedded.positions, start, stop), stop
            patches[stop] = running[:, embedded.prefix :]
        running = self._plain(running, embedded.positions, start, network.depth)
        patches[network.depth] = network.finish(self.params, running)[:, embedded.prefix :]
        return patches, embedded.grid

    def read(
        self,
        after: int,
        patches: Float[Array, "images entries width"],
        valid: Bool[Array, "images entries"] | None = None,
    ) -> _Reading:
        """What the head after a block says of patches; after the last it is the final head."""
        model = self.model
        if after == model.depth and model.head is not None:
            return _Reading(model.head(self.params, patches))
        weights = self.heads["head"] if after == model.depth else self.heads["exit_heads"][str(after)]
        if not isinstance(model.plan, ATM):
            return _Reading(building.read(model.plan, weights, patches))
        valid = jnp.ones(patches.shape[:2], dtype=bool) if valid is None else valid
        found = read_masks(model.plan, weights, patches, valid)
        masks = Masks(*(part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in found))
        presence = masks.presence_logits[:, None]
        constant = lax.stop_gradient((masks.mask_logits, jax.nn.sigmoid(presence)))
        return _Reading(log_scores(masks.mask_logits, presence), scores.mask_scores(*constant), masks)

    def _plain(self, batch: Array, positions: Array | None, start: int, stop: int) -> Array:
        """Some blocks on a whole batch."""
        counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
        if positions is not None:
            positions = jnp.broadcast_to(positions, (batch.shape[0], *positions.shape))
        for block in self.model.network.blocks[start:stop]:
            batch = block(self.params, batch, counts, positions)
        return batch

    def _counts(self, state: _State, selection: Selection, waiting: Array) -> Float[Array, "images entries"]:
        """As how many keys each entry counts."""
        images, places = selection.layout
        patches = selection.valid.astype(jnp.float32)
        if self.plan.cell is not None:
            patches = patches * cells.stands_for(selection, grid=state.grid, side=self.plan.cell)
        prefix = jnp.broadcast_to(waiting.astype(jnp.float32)[:, None], (images, state.prefix))
        counts = jnp.concatenate([prefix, patches], axis=1)
        # Of a finished image one entry counts all the same: there is no attention over nothing.
        first = jnp.arange(state.prefix + places) == 0
        return jnp.where(first & ~waiting[:, None], 1.0, counts)

    def _exit(self, state: _State, selection: Selection, entries: Array, index: int) -> _State:
        """Some of the patches of these entries leave."""
        exit, prefix, cell = self.plan.active[index], state.prefix, self.plan.cell
        reading = self.read(exit.after, entries[:, prefix:], selection.valid)
        if state.ledger is None:
            state = dataclasses.replace(state, ledger=ledger.open_ledger(reading.logits, selection))
        evidence = self._evidence(state, selection, reading, index)
        leave = exit.policy(evidence).reshape(selection.layout)
        # An image all of whose patches have left is done, and so are those that would stand for others.
        waiting = (selection.valid & ~leave).any(axis=1, keepdims=True)
        middle = jnp.zeros_like(leave)
        if cell is not None:
            middle = cells.in_the_middle(selection.slot, grid=state.grid, side=cell).reshape(selection.layout)
        stay = selection.valid & ~(leave & ~middle) & waiting
        most = self.model._sizes(exit.after, state)[-1] - prefix
        if index < _stages(self.model, self.plan) and most < selection.layout[1]:
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

    def _evidence(self, state: _State, selection: Selection, reading: _Reading, index: int) -> Evidence:
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

    def _settled(self, state: _State, selection: Selection, leave: Array, reading: _Reading, depth: int) -> _State:
        """Write down what patches leave behind."""
        assert state.ledger is not None
        score = None if reading.class_scores is None else reading.class_scores.max(axis=-1)
        book = ledger.record(state.ledger, selection, leave, reading.logits, depth=depth, score=score)
        masks = state.masks
        if isinstance(self.plan.carry, MaskPrediction) and reading.masks is not None:
            masks = _joined(masks, selection, reading.masks)
        return dataclasses.replace(state, ledger=book, masks=masks)

    def _folded(
        self, state: _State, selection: Selection, entries: Array, leave: Array, waiting: Array, above: float
    ) -> _State:
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


@partial(jax.jit, static_argnames="model")
def _opened(
    model: ExitingModel, params: Params, heads: Heads, images: Array, plan: Schedule
) -> tuple[_State, Int[Array, ""]]:
    state = _Run(model, params, heads, plan).opened(images)
    return state, _needed(state)


@partial(jax.jit, static_argnames=("model", "stage", "capacity"))
def _advanced(
    model: ExitingModel, params: Params, heads: Heads, state: _State, plan: Schedule, *, stage: int, capacity: int
) -> tuple[_State, Int[Array, ""]]:
    state = _Run(model, params, heads, plan).advanced(state, stage=stage, capacity=capacity)
    return state, _needed(state)


@partial(jax.jit, static_argnames="model")
def _closed(model: ExitingModel, params: Params, heads: Heads, state: _State, plan: Schedule) -> Output:
    return _Run(model, params, heads, plan).closed(state)


def checked(model: ExitingModel, schedule: Schedule) -> Schedule:
    """The plan, if the model can follow it. It is no part of the public API.

    Raises:
        TokenExitError: If it cannot.
    """
    if not isinstance(schedule, Schedule):
        raise TokenExitError(f"`schedule` must be a tokenexit.schedule.Schedule, got {schedule!r}")
    unknown = [leaf for leaf in jax.tree.leaves(schedule) if isinstance(leaf, Policy)]
    require(not unknown, "schedule", "have policies that are pytrees (`register`)", unknown)
    compared = set[str]().union(*(exit.policy.compared_scores for exit in schedule.exits))
    gated = isinstance(schedule.carry, Preserved) or "gate" in compared
    rule = "carry predictions or features and look at no gate, for a model without gates"
    require(not gated, "schedule", rule, schedule)
    masks = isinstance(schedule.carry, MaskPrediction)
    rule = "carry no MaskPrediction, for heads that give no masks to freeze"
    require(not masks or model.gives_masks, "schedule", rule, schedule)
    spread = sorted({"entropy", "margin"} & compared)
    rule = "compare confidences, for mask heads, whose scores are not normalised over the classes"
    require(not model.gives_masks or not spread, "schedule", rule, spread)
    late = [after for after in schedule.after if after >= model.depth]
    require(
        not late, "schedule", f"have exits after blocks 1 to {model.depth - 1} only, for {model.depth} blocks", late
    )
    headless = [after for after in schedule.after if after not in model.after]
    rule = f"have exits only after blocks with an exit head, {list(model.after)}"
    require(not headless, "schedule", rule, headless)
    return schedule


def _as_arrays(plan: Schedule) -> Schedule:
    """Thresholds of one kind, so that programs do not differ by how they are given; numbers on the host."""

    def as_array(leaf: Any) -> Any:
        if isinstance(leaf, int | float):
            return np.asarray(leaf, dtype=np.int32 if isinstance(leaf, int) else np.float32)
        return leaf

    return jax.tree.map(as_array, plan)


def _stages(model: ExitingModel, plan: Schedule) -> int:
    """How many stages of blocks follow the first exit point."""
    exits = plan.active
    rejoining = isinstance(plan.carry, Feature) and plan.carry.before == "last block"
    nothing_more = rejoining and len(exits) > 0 and exits[-1].after == model.depth - 1
    return len(exits) - 1 if nothing_more else len(exits)


def _needed(state: _State) -> Int[Array, ""]:
    """Entries that the fullest image needs; 0 if nothing runs."""
    most = state.running.sum(axis=1, dtype=jnp.int32).max(initial=0)
    return jnp.where(most > 0, most + state.prefix, 0)


def embed(network: Network, params: Params, images: Array) -> Embedded:
    """Images as tokens, seen to fit the network. It is no part of the public API.

    Raises:
        TokenExitError: If they do not.
    """
    embedded = network.embed(params, images)
    require(isinstance(embedded, Embedded), "network.embed", "give Embedded", type(embedded).__name__)
    _, slots, width = embedded.tokens.shape
    height, across = embedded.grid
    require(width == network.width, "network.width", f"be the {width} channels of its tokens", network.width)
    rule = f"give {embedded.prefix} prefix tokens and a grid of {height} x {across}"
    require(slots == embedded.prefix + height * across, "network.embed", rule, f"{slots} tokens")
    positions = embedded.positions
    placed = positions is None or positions.shape[:1] == (slots,)
    rule = f"give positions for {slots} slots"
    require(placed, "network.embed", rule, None if positions is None else f"shape {positions.shape}")
    return embedded


def _slots(selection: Selection, prefix: int) -> Int[Array, "images entries"]:
    """Slots of the prefix tokens and of the selected patches."""
    first = jnp.broadcast_to(jnp.arange(prefix), (selection.images, prefix))
    return jnp.concatenate([first, prefix + selection.slot_of], axis=1)


def _written(state: _State, selection: Selection, entries: Array, waiting: Array) -> Float[Array, "images slots width"]:
    """All tokens, those of the entries as they are now; a finished image keeps what it has."""
    prefix = state.prefix
    first = jnp.where(waiting[:, None, None], entries[:, :prefix], state.tokens[:, :prefix])
    patches = tokens.scatter(entries[:, prefix:], selection, into=state.tokens[:, prefix:])
    return jnp.concatenate([first, patches], axis=1)


def _gathered(selection: Selection, values: Shaped[Array, "images places"]) -> Shaped[Array, "entries"]:
    return tokens.gather(values, selection).reshape(-1)


def _joined(before: Masks | None, selection: Selection, masks: Masks) -> Masks:
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


def _linear(network: Network, index: int, params: Params, embedded: Embedded) -> int:
    """Multiply-adds of a block for one token, its attention left out, read off its program for one token and two."""

    def of(entries: int) -> int:
        batch = jax.ShapeDtypeStruct((1, entries, network.width), embedded.tokens.dtype)
        counts = jax.ShapeDtypeStruct((1, entries), jnp.float32)
        known = embedded.positions
        positions = known if known is None else jax.ShapeDtypeStruct((1, entries, *known.shape[1:]), known.dtype)
        return multiply_adds(network.blocks[index], params, batch, counts, positions)

    one, two, four = of(1), of(2), of(4)
    attention, linear = (two - 2 * one) // 2, (4 * one - two) // 2
    rule = f"attend over {network.width} channels, and have no other work than linear layers on tokens"
    plain = attention == 2 * network.width and four == 4 * linear + 16 * attention
    require(plain, f"network.blocks[{index}]", rule, f"{one}, {two} and {four} multiply-adds for 1, 2 and 4 tokens")
    return linear


def _on_grid(values: Shaped[Array, "images places wide"], grid: tuple[int, int]) -> Shaped[Array, "images h w wide"]:
    height, width = grid
    return rearrange(values, "images (height width) wide -> images height width wide", height=height, width=width)
