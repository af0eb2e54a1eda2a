"""One forward pass with exits in the static layout: frozen state in, frozen state out, stage by stage.

    state = first_stage(given, images)
    for at in range(1, len(given.stages)):
        state = run_stage(given, state, at=at, capacity=...)
    output = finish(given, state)

Nothing is compiled here: `exits.model` does that, in either of two ways. Which tokens leave, and what they leave
behind, is decided by `tokenexit.exits`.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

from einops import rearrange
from jax import Array, lax
from jax import numpy as jnp
from jaxtyping import Bool, Float, Int, Shaped

from tokenexit import cells, exits, ledger, merging, tokens
from tokenexit.area import Area
from tokenexit.carries import Feature, MaskPrediction, Translated
from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.heads import HeadPlan
from tokenexit.ledger import Ledger
from tokenexit.merging import Merged
from tokenexit.schedule import Merge, Schedule, Stage
from tokenexit.tokens import Selection
from tokenexit_jax.exits.outputs import Output
from tokenexit_jax.heads.masks import log_scores
from tokenexit_jax.heads.reading import apply_head, apply_translator
from tokenexit_jax.heads.statistics import split
from tokenexit_jax.networks.checks import embed, run_block, run_blocks
from tokenexit_jax.networks.protocol import Embedded, Heads, Network, Params
from tokenexit_jax.pytrees import register

__all__ = [
    "ExitSpec",
    "Given",
    "Kept",
    "State",
    "capacities_in_entries",
    "entries_needed",
    "finish",
    "first_stage",
    "head_outputs",
    "on_grid",
    "patches_after",
    "read_all",
    "run_pass",
    "run_stage",
]


@dataclass(frozen=True)
class ExitSpec:
    """What a model is made of, its plan aside: all of it static. `ExitingModel` says what the fields are."""

    network: Network
    classes: int
    after: tuple[int, ...]
    head_plan: HeadPlan
    head: Callable[[Params, Float[Array, "*tokens dim"]], Float[Array, "*tokens classes"]] | None
    capacities: tuple[tuple[float, ...], ...]

    @property
    def depth(self) -> int:
        """How many blocks the network has."""
        return self.network.depth

    @property
    def gives_masks(self) -> bool:
        """Whether the heads are mask heads: all are, or none."""
        return self.head_plan.gives_masks

    def sizes(self, after: int, state: "State") -> tuple[int, ...]:
        """Buckets of the stage after an exit, in entries, ascending; each holds the prefix tokens and one patch."""
        fractions = self.capacities[self.after.index(after)]
        return capacities_in_entries(fractions, slots=state.tokens.shape[1], prefix=state.prefix)


@dataclass(frozen=True)
class Kept:
    """Outputs of all heads so far, by patch: what training is given.

    Attributes:
        logits: Class scores, by the blocks before the head; of no meaning where it has read nothing.
        read: Which patches each has read.
        masks: Mask logits and presence, if the heads are mask heads.
        statistics: What batch norms have learned, by name as the weights of the heads.
    """

    logits: dict[int, Float[Array, "images places classes"]]
    read: dict[int, Bool[Array, "images places"]]
    masks: dict[int, tuple[Float[Array, "images places classes"], Float[Array, "images classes"]]]
    statistics: Heads


register(Kept, leaves=tuple(field.name for field in dataclasses.fields(Kept)))


@dataclass(frozen=True)
class State:
    """State between two stages. Its shapes are the same at all of them, whatever has left.

    Attributes:
        tokens: Every token as its last block left it: of those that have left, the feature that they left with, or what
            a translator made of it.
        positions: What belongs to the slots.
        running: Which patches run. The prefix tokens of an image run as long as any of its patches does.
        ledger: The latest outcome of every patch; None if nothing can leave.
        labels: Classes of all patches that each exit point has found; -1 before it.
        ran: Tokens that ran through each block.
        room: Entries that each block worked on.
        overflow: Tokens that left for lack of room.
        prefix: Prefix tokens of an image.
        grid: Height and width of the grid.
        area: The area of the images that it covers; None if it is the whole of them.
        kept: Outputs of the heads, where all are kept.
        owner: Patch whose token each patch has merged into, itself if none; None for a plan without merges.
        size: How many patches each token holds; None likewise.
    """

    tokens: Float[Array, "images slots dim"]
    positions: Shaped[Array, "slots ..."] | None
    running: Bool[Array, "images places"]
    ledger: Ledger | None
    labels: Int[Array, "exits images places"]
    ran: Int[Array, "images blocks"]
    room: Int[Array, "images blocks"]
    overflow: Int[Array, "images"]
    prefix: int
    grid: tuple[int, int]
    area: Area | None
    kept: Kept | None = None
    owner: Int[Array, "images places"] | None = None
    size: Int[Array, "images places"] | None = None

    @property
    def merged(self) -> Merged | None:
        """Which patches have merged; None for a plan without merges."""
        if self.owner is None or self.size is None:
            return None
        return Merged(self.running, self.owner, self.size, self.grid)

    def of_all(self, values: Shaped[Array, "images places *rest"]) -> Shaped[Array, "images places *rest"]:
        """Values of tokens, at every patch that they hold."""
        return values if self.owner is None else merging.spread(values, self.owner)


_STATIC = ("prefix", "grid", "area")
register(State, leaves=tuple(field.name for field in dataclasses.fields(State) if field.name not in _STATIC))


class Given(NamedTuple):
    """What does not change in a pass.

    Attributes:
        model: The model, its plan aside.
        params: Parameters of the network.
        heads: Weights of the heads.
        plan: The plan.
        which: Which exit heads run: those of exit points at which tokens can leave, or all, with their outputs kept: in
            training, where what has left is a constant.
    """

    model: ExitSpec
    params: Params
    heads: Heads
    plan: Schedule
    which: Literal["active", "all"] = "active"

    @property
    def feature(self) -> Feature | Translated | None:
        """The carry, if features rejoin."""
        return self.plan.carry if isinstance(self.plan.carry, Feature | Translated) else None

    @property
    def reweighs(self) -> bool:
        """Whether frozen masks are weighted with the latest presence."""
        return isinstance(self.plan.carry, MaskPrediction)

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages up to where all tokens run on, or to the end; the first is a plain batch."""
        every = self.plan.stages(self.model.depth, heads=self.which)
        stop = next((at for at, stage in enumerate(every) if stage.rejoin), len(every) - 1)
        return every[: stop + 1]

    @property
    def exits(self) -> tuple[int, ...]:
        """The blocks after which an exit head runs."""
        return tuple(stage.stop for stage in self.stages if stage.reads)

    def sizes(self, at: int, state: State) -> tuple[int, ...]:
        """Buckets of a stage but the first: of the exit before it; or after a merge alone those of all exits, and 1."""
        if self.stages[at - 1].exit is not None:
            return self.model.sizes(self.stages[at].start, state)
        fractions = {1.0, *(one for own in self.model.capacities for one in own)}
        return capacities_in_entries(tuple(fractions), slots=state.tokens.shape[1], prefix=state.prefix)


def run_pass(given: Given, images: Array) -> State:
    """All stages in one program, in which `lax.switch` chooses the bucket of each."""
    state = first_stage(given, images)
    for at in range(1, len(given.stages)):
        sizes = given.sizes(at, state)
        branches = [partial(run_stage, given, at=at, capacity=size) for size in sizes]
        if len(sizes) == 1:
            state = branches[0](state)
        else:
            entries = entries_needed(state)
            bucket = jnp.searchsorted(jnp.asarray(sizes), entries)
            if state.ledger is not None:  # before the first head, no image can be finished
                bucket = jnp.where(entries > 0, bucket, len(sizes))
                branches = [*branches, lambda finished: finished]
            state = lax.switch(bucket, branches, state)
    return state


def first_stage(given: Given, images: Array) -> State:
    """All up to the first exit point, as a plain batch."""
    model, stage = given.model, given.stages[0]
    embedded = embed(model.network, given.params, images)
    prefix, (height, width) = embedded.prefix, embedded.grid
    folds = given.feature is not None and given.feature.fold_above is not None
    rule = "have fold_above=None for a network without prefix tokens"
    require(not folds or prefix > 0, "schedule", rule, given.plan.carry)
    count, slots, _ = embedded.tokens.shape
    exits, places, depth = given.exits, height * width, model.depth
    # Like the tokens, and not merely of a shape: under `shard_map` it is one for each shard.
    nothing = jnp.zeros_like(embedded.tokens[:, 0, 0], dtype=jnp.int32)
    ran = jnp.broadcast_to(jnp.where(jnp.arange(depth)[None] < stage.stop, slots, nothing[:, None]), (count, depth))
    state = State(
        tokens=run_blocks(model.network, given.params, embedded.tokens, embedded.positions, start=0, stop=stage.stop),
        positions=embedded.positions,
        running=jnp.broadcast_to(nothing[:, None] == 0, (count, places)),
        ledger=None,
        labels=jnp.broadcast_to(nothing[None, :, None] - 1, (len(exits), count, places)),
        ran=ran,
        room=ran,
        overflow=nothing,
        prefix=prefix,
        grid=embedded.grid,
        area=embedded.area,
    )
    if given.plan.merges:
        rule = "merge nothing, for a network with positions that travel with its tokens"
        require(embedded.positions is None, "schedule", rule, list(given.plan.merges))
        own = jnp.arange(places)[None] + nothing[:, None]
        state = dataclasses.replace(state, owner=own, size=jnp.ones_like(own))
    if stage.exit is None and stage.merge is None:
        return state
    everywhere = jnp.broadcast_to(jnp.arange(places), (count, places))
    every = Selection(everywhere, jnp.ones_like(everywhere, dtype=bool), places, jnp.zeros_like(state.overflow))
    return after_stage(given, state, every, state.tokens, at=0)


def after_stage(given: Given, state: State, selection: Selection, entries: Array, *, at: int) -> State:
    """What follows the blocks of a stage: some patches of these entries leave, and others merge."""
    stage, features = given.stages[at], None
    if stage.reads:
        state, features = read_exit(given, state, selection, entries, stage.stop)
    if stage.exit is not None:
        state = exit_point(given, state, selection, entries, features, at=at)
    return state if stage.merge is None else merge_point(given, state, stage.merge)


def merge_point(given: Given, state: State, merge: Merge) -> State:
    """Tokens that are alike, or agreed upon, run on as one."""
    prefix, agreed, label = state.prefix, None, None
    assert state.merged is not None
    if merge.agreed is not None:
        assert state.ledger is not None
        number = sum(one.exit is not None and one.stop < merge.after for one in given.stages)
        agreed, label = exits.agree(
            merge.agreed,
            lax.stop_gradient(state.ledger),
            state.running,
            [state.labels[at] for at in range(number)],
            grid=state.grid,
            exit=number,
            merged=state.merged,
        )
    features = state.tokens[:, prefix:]
    joined = merging.merge(features, state.merged, side=merge.side, alike=merge.alike, agreed=agreed, label=label)
    patches = joined.features().astype(features.dtype)
    found = joined.merged
    return dataclasses.replace(
        state,
        tokens=jnp.concatenate([state.tokens[:, :prefix], patches], axis=1),
        running=found.running,
        owner=found.owner.astype(jnp.int32),
        size=found.size.astype(jnp.int32),
    )


def run_stage(given: Given, state: State, *, at: int, capacity: int) -> State:
    """The blocks from one exit point to the next, or to the end, on so many entries for every image."""
    stage, network, prefix = given.stages[at], given.model.network, state.prefix
    patches = state.running.sum(axis=1, dtype=jnp.int32)
    runs = patches > 0
    # Scores are irrelevant: the capacity holds all.
    score = jnp.zeros(state.running.shape, dtype=jnp.float32)
    selection, _ = tokens.select(state.running, score, capacity=capacity - prefix)
    # An entry without a token repeats one of its own image: it is as finite as the tokens are.
    entries = jnp.concatenate([state.tokens[:, :prefix], tokens.gather(state.tokens[:, prefix:], selection)], axis=1)
    counts = _token_size(given, state, selection, runs)
    positions = None
    if state.positions is not None:
        positions = jnp.take(state.positions, _slots(selection, prefix), axis=0)
    for index in range(stage.start, stage.stop):
        ran = run_block(network, index, given.params, entries, counts, positions)
        entries = ran.astype(state.tokens.dtype)
    blocks = slice(stage.start, stage.stop)
    state = dataclasses.replace(
        state,
        tokens=_written(state, selection, entries, runs),
        ran=state.ran.at[:, blocks].set(jnp.where(runs, patches + prefix, 0)[:, None]),
        room=state.room.at[:, blocks].set(capacity),
    )
    if stage.exit is not None or stage.merge is not None:
        return after_stage(given, state, selection, entries, at=at)
    book = state.ledger
    if given.feature is not None or book is None:
        return state
    output, statistics = _read_last(given, entries[:, prefix:], state.grid, selection)
    state = _kept(given, state, book, selection, output, statistics, given.model.depth)
    constant = lax.stop_gradient(output) if given.which == "all" else output
    return dataclasses.replace(state, ledger=exits.update(book, selection, constant))


def exit_point(
    given: Given, state: State, selection: Selection, entries: Array, features: Array | None, *, at: int
) -> State:
    """Some of the patches of these entries leave, and leave the features behind if these are kept."""
    stages, prefix = given.stages, state.prefix
    stage, plan = stages[at], given.plan
    assert stage.exit is not None
    assert stage.index is not None
    book = state.ledger
    assert book is not None
    previous = [state.labels[at] for at in range(stage.index)]
    decision = exits.decide(
        stage.exit.policy,
        lax.stop_gradient(book),
        state.running,
        previous,
        grid=state.grid,
        exit=stage.index,
        cell=plan.cell,
        merged=state.merged,
    )
    stay, overflow = decision.stay, state.overflow
    most = given.model.sizes(stage.stop, state)[-1] - prefix
    if at + 1 < len(stages) and most < selection.layout[1]:
        smaller, _ = tokens.select(stay, decision.certain, capacity=most)
        stay, overflow = smaller.running, overflow + smaller.overflow.astype(overflow.dtype)
    left = state.running & ~stay
    if given.feature is not None and given.feature.fold_above is not None:
        leave, staying = (tokens.gather(one, selection) & selection.valid for one in (left, stay))
        state = _folded(state, selection, entries, leave, staying, given.feature.fold_above)
    if features is not None and isinstance(given.feature, Translated):  # their own are in their places already
        state = _left_behind(state, selection, features, left)
    return dataclasses.replace(
        state,
        running=stay,
        ledger=ledger.freeze(book, left, depth=stage.stop),
        labels=state.labels.at[stage.index].set(decision.label.astype(state.labels.dtype)),
        overflow=overflow,
    )


def read_exit(
    given: Given, state: State, selection: Selection, entries: Array, after: int
) -> tuple[State, Float[Array, "images entries dim"] | None]:
    """Read the patches of these entries by the exit head after a block; the ledger has their latest outcome.

    Returns:
        The state, and the features that these patches leave behind if they leave here; None if none are kept.
    """
    patches = entries[:, state.prefix :]
    output, statistics = _read(given, after, patches, state.grid, selection)
    book = state.ledger
    if book is None:
        keeps = given.reweighs or (given.which == "all" and given.model.gives_masks)
        presence = lax.stop_gradient(output.presence_logits) if keeps else None
        book = exits.begin(output, selection, presence_logits=presence)
    state = _kept(given, state, book, selection, output, statistics, after)
    book = exits.update(book, selection, lax.stop_gradient(output) if given.which == "all" else output)
    return dataclasses.replace(state, ledger=book), exits.carried(given.plan.carry, output, patches)


def finish(given: Given, state: State) -> Output:
    """Output of a pass that has ended; features rejoin."""
    return head_outputs(given, state)[0]


def head_outputs(given: Given, state: State) -> tuple[Output, Kept | None]:
    """Output of a pass that has ended, and the outputs of all heads where they are kept."""
    if state.ledger is None or given.feature is not None:
        state, output = _rejoined(given, state)
        return _output(given, state, output.logits), state.kept
    book = state.ledger
    logits = state.of_all(book.logits)
    if given.reweighs and book.mask_logits is not None and book.presence_logits is not None:
        logits = log_scores(state.of_all(book.mask_logits), book.presence_logits[:, None])
    return _output(given, state, logits), state.kept


def _rejoined(given: Given, state: State) -> tuple[State, HeadOutput]:
    """All tokens of all images as a plain batch, to the end, and the output of the final head for them."""
    model, (_, slots, _), end = given.model, state.tokens.shape, given.stages[-1].stop
    options = {"start": end, "stop": model.depth}
    whole = jnp.concatenate([state.tokens[:, : state.prefix], state.of_all(state.tokens[:, state.prefix :])], axis=1)
    every = run_blocks(model.network, given.params, whole, state.positions, **options)
    ran, room = (counted.at[:, end:].set(slots) for counted in (state.ran, state.room))
    output, statistics = _read_last(given, every[:, state.prefix :], state.grid)
    state = dataclasses.replace(state, ran=ran, room=room)
    if given.which == "all":
        masks = None
        if output.mask_logits is not None and output.presence_logits is not None:
            masks = output.mask_logits, output.presence_logits
        kept = _blank(given, output.logits, masks) if state.kept is None else state.kept
        read = jnp.ones(output.logits.shape[:2], dtype=bool)
        state = dataclasses.replace(state, kept=_with(given, kept, model.depth, output.logits, read, masks, statistics))
    return state, output


def _output(given: Given, state: State, logits: Float[Array, "images places classes"]) -> Output:
    depth = jnp.zeros(logits.shape[:2], dtype=jnp.int32) + given.model.depth
    if state.ledger is not None:
        depth = state.of_all(state.ledger.exit_depth(given.model.depth))
    size = None if state.size is None else on_grid(state.of_all(state.size)[..., None], state.grid)[..., 0]
    return Output(
        logits=on_grid(logits, state.grid),
        exit_depth=on_grid(depth[..., None], state.grid)[..., 0],
        tokens_per_block=state.ran,
        capacity_per_block=state.room,
        overflow=state.overflow,
        exits=given.exits,
        head_on="running" if given.feature is None else "all",
        area=state.area,
        merged_size=size,
    )


def patches_after(given: Given, images: Array) -> tuple[dict[int, Float[Array, "images patches dim"]], Embedded]:
    """Patches as every head would read them, in one dense pass, and the images before the first block."""
    network, params = given.model.network, given.params
    embedded = embed(network, params, images)
    running, patches, start = embedded.tokens, {}, 0
    for stop in given.model.after:
        running = run_blocks(network, params, running, embedded.positions, start=start, stop=stop)
        patches[stop], start = running[:, embedded.prefix :], stop
    running = run_blocks(network, params, running, embedded.positions, start=start, stop=network.depth)
    patches[network.depth] = network.finish(params, running)[:, embedded.prefix :]
    return patches, embedded


def read_all(given: Given, images: Array) -> tuple[dict[int, HeadOutput], Embedded]:
    """Output of every head for all patches, in one dense pass, and the images before the first block."""
    patches, embedded = patches_after(given, images)
    return {after: _read(given, after, rows, embedded.grid)[0] for after, rows in patches.items()}, embedded


def _read(
    given: Given,
    after: int,
    patches: Float[Array, "images entries dim"],
    grid: tuple[int, int],
    selection: Selection | None = None,
) -> tuple[HeadOutput, dict[str, Array] | None]:
    """Output of the head after a block, for all patches or some, and what its batch norm has learned in training."""
    model = given.model
    if after == model.depth and model.head is not None:
        logits = model.head(given.params, patches)
        shape = getattr(logits, "shape", type(logits).__name__)
        wanted = (*patches.shape[:-1], model.classes)
        require(shape == wanted, "head", f"give {model.classes} classes, logits of shape {wanted}", f"{shape}")
        return HeadOutput(logits), None
    training = given.which == "all"
    if after == model.depth:
        plan, weights = model.head_plan.final, given.heads["head"]
    else:
        plan, weights = model.head_plan, given.heads["exit_heads"][str(after)]
    if plan.translates:
        return apply_translator(weights, patches, lambda some: _read_last(given, some, grid, selection)[0]), None
    return apply_head(plan, weights, patches, selection, grid=grid, training=training)


def _read_last(
    given: Given,
    patches: Float[Array, "images entries dim"],
    grid: tuple[int, int],
    selection: Selection | None = None,
) -> tuple[HeadOutput, dict[str, Array] | None]:
    """Output of the final head for patches as the last block leaves them, behind the final norm."""
    return _read(given, given.model.depth, given.model.network.finish(given.params, patches), grid, selection)


def _kept(
    given: Given,
    state: State,
    book: Ledger,
    selection: Selection,
    output: HeadOutput,
    statistics: dict[str, Array] | None,
    after: int,
) -> State:
    """The state with the output of a head for all patches, where outputs are kept."""
    if given.which == "active":
        return state
    every = exits.update(book, selection, output)
    logits, masks = state.of_all(every.logits), None
    if every.mask_logits is not None and every.presence_logits is not None:
        masks = state.of_all(every.mask_logits), every.presence_logits
        logits = log_scores(masks[0], masks[1][:, None]) if given.reweighs else logits
    kept = _blank(given, logits, masks) if state.kept is None else state.kept
    return dataclasses.replace(state, kept=_with(given, kept, after, logits, selection.running, masks, statistics))


def _blank(given: Given, logits: Array, masks: tuple[Array, Array] | None) -> Kept:
    """Nothing read yet, with a place for every head, like outputs for all patches: all stages have one structure."""
    heads = (*given.plan.read_after, given.model.depth)
    nothing = None if masks is None else (jnp.zeros_like(masks[0]), jnp.zeros_like(masks[1]))
    return Kept(
        logits=dict.fromkeys(heads, jnp.zeros_like(logits)),
        read=dict.fromkeys(heads, jnp.zeros_like(logits[..., 0], dtype=bool)),
        masks={} if nothing is None else dict.fromkeys(heads, nothing),
        statistics=split(given.heads)[1],
    )


def _with(
    given: Given,
    kept: Kept,
    after: int,
    logits: Array,
    read: Array,
    masks: tuple[Array, Array] | None,
    statistics: dict[str, Array] | None,
) -> Kept:
    """The same, with the output of one more head."""
    learned = kept.statistics
    if statistics is not None and after == given.model.depth:
        learned = {**learned, "head": statistics}
    elif statistics is not None:
        learned = {**learned, "exit_heads": {**learned["exit_heads"], str(after): statistics}}
    return Kept(
        logits=kept.logits | {after: logits},
        read=kept.read | {after: read},
        masks=kept.masks if masks is None else kept.masks | {after: masks},
        statistics=learned,
    )


def _token_size(given: Given, state: State, selection: Selection, runs: Array) -> Float[Array, "images entries"]:
    """As how many keys each entry counts."""
    images, places = selection.layout
    patches = selection.valid.astype(jnp.float32)
    if given.plan.cell is not None:
        patches = patches * cells.token_size(selection, grid=state.grid, side=given.plan.cell)
    if state.size is not None and given.plan.keys == "tokens":
        patches = patches * tokens.gather(state.size, selection).astype(jnp.float32)
    prefix = jnp.broadcast_to(runs.astype(jnp.float32)[:, None], (images, state.prefix))
    counts = jnp.concatenate([prefix, patches], axis=1)
    # Of a finished image one entry counts all the same: there is no attention over nothing.
    first = jnp.arange(state.prefix + places)[None] == 0
    return jnp.where(first & ~runs[:, None], 1.0, counts)


def _left_behind(state: State, selection: Selection, features: Array, left: Array) -> State:
    """The state with these features in the places of those that have left."""
    patches = state.tokens[:, state.prefix :]
    behind = jnp.where(left[..., None], tokens.scatter(features, selection, into=patches), patches)
    return dataclasses.replace(state, tokens=jnp.concatenate([state.tokens[:, : state.prefix], behind], axis=1))


def _folded(state: State, selection: Selection, entries: Array, leave: Array, stay: Array, above: float) -> State:
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
    runs = stay.any(axis=1, keepdims=True)
    first = jnp.where(runs[..., None], folded, state.tokens[:, :1])
    return dataclasses.replace(state, tokens=jnp.concatenate([first, state.tokens[:, 1:]], axis=1))


def capacities_in_entries(fractions: tuple[float, ...], *, slots: int, prefix: int) -> tuple[int, ...]:
    """Fractions of the slots in entries, ascending; each holds the prefix tokens and one patch."""
    return tuple(sorted({tokens.room(fraction, slots=slots, prefix=prefix) for fraction in fractions}))


def entries_needed(state: State) -> Int[Array, ""]:
    """Entries that the fullest image needs; 0 if nothing runs."""
    most = state.running.sum(axis=1, dtype=jnp.int32).max(initial=0)
    return jnp.where(most > 0, most + state.prefix, 0)


def _slots(selection: Selection, prefix: int) -> Int[Array, "images entries"]:
    """Slots of the prefix tokens and of the selected patches."""
    first = jnp.broadcast_to(jnp.arange(prefix), (selection.images, prefix))
    return jnp.concatenate([first, prefix + selection.slot_of], axis=1)


def _written(state: State, selection: Selection, entries: Array, runs: Array) -> Float[Array, "images slots dim"]:
    """All tokens, those of the entries as they are now; a finished image keeps what it has."""
    prefix = state.prefix
    first = jnp.where(runs[:, None, None], entries[:, :prefix], state.tokens[:, :prefix])
    patches = tokens.scatter(entries[:, prefix:], selection, into=state.tokens[:, prefix:])
    return jnp.concatenate([first, patches], axis=1)


def on_grid(values: Shaped[Array, "images places dim"], grid: tuple[int, int]) -> Shaped[Array, "images h w dim"]:
    """Values of patches on their grid."""
    height, width = grid
    return rearrange(values, "images (height width) dim -> images height width dim", height=height, width=width)
