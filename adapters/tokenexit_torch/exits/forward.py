"""One forward pass with exits: a loop over stages of blocks, with frozen state between them.

    state = start(model, images, plan)
    for stage in state.fixed.stages:
        state = finish_stage(state, stage, run_stage(state, stage))
    logits, exit_depth = read_final(state)

The tokens run as a plain batch up to the first exit point, and as one row from then on. Which tokens leave, and what
they leave behind, is decided by `tokenexit.exits`; how the others lie, by a layout.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from tokenexit import cells, exits, ledger, merging, tokens
from tokenexit.area import Area
from tokenexit.carries import Feature, MaskPrediction, Translated
from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.ledger import Ledger
from tokenexit.merging import Joined, Merged
from tokenexit.policies import never
from tokenexit.schedule import Schedule, Stage
from tokenexit.tokens import Receipt, Selection
from tokenexit_torch._blocks import run_blocks
from tokenexit_torch._modules import kept_eager, require_not_traced
from tokenexit_torch.attention import Attending
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.layouts import PACKED, Certain, Compaction, Counts, Layout, Packed
from tokenexit_torch.heads.masks import log_scores
from tokenexit_torch.heads.reading import apply_head, detached
from tokenexit_torch.hosts.protocol import Embedded, area_of, embedded_by, warn_if_drawing

__all__ = [
    "Fixed",
    "Heads",
    "Row",
    "State",
    "as_batch",
    "as_row",
    "exit_depth",
    "merged_size",
    "of_all_tokens",
    "on_grid",
    "packed_finish_stage",
    "packed_start",
    "read_running",
    "run_pass",
    "similarities_of",
    "taps_of",
    "worked",
]

Heads = Literal["active", "all"]
"""Which exit heads run: those of exit points at which tokens can leave, or all, with their outputs kept: in training,
where what has left is a constant."""


@dataclass(frozen=True)
class Fixed:
    """What does not change in a pass.

    Attributes:
        model: The model.
        plan: The plan.
        stages: Its stages.
        layout: How the tokens that run lie.
        heads: Which exit heads run.
        embedded: The images as tokens.
        area: The area of the images that the grid covers; None if it is the whole of them.
        masks: Whether the ledger keeps masks.
        taps: After how many blocks something reads the tokens of all images, ascending.
    """

    model: WithExits[Any]
    plan: Schedule
    stages: tuple[Stage, ...]
    layout: Layout
    heads: Heads
    embedded: Embedded
    area: Area | None
    masks: bool
    taps: tuple[int, ...]

    @property
    def feature(self) -> Feature | Translated | None:
        """The carry, if features rejoin."""
        return self.plan.carry if isinstance(self.plan.carry, Feature | Translated) else None

    @property
    def reweighs(self) -> bool:
        """Whether frozen masks are weighted with the latest presence."""
        return isinstance(self.plan.carry, MaskPrediction)


@dataclass(frozen=True)
class Row:
    """What stays in step with the tokens of a row.

    Attributes:
        receipt: The receipt of the tokens.
        lengths: Entries of each image.
        token_size: How many tokens each stands for, in attention; once each if None.
    """

    receipt: Receipt
    lengths: tuple[int, ...]
    token_size: Float[Tensor, "entries"] | None = None


@dataclass(frozen=True)
class State:
    """State between two stages.

    Attributes:
        fixed: What does not change.
        tokens: A plain batch, `(images, slots, dim)`, or a row, `(1, entries, dim)`.
        positions: What belongs to the tokens, as rotary tables do.
        row: What stays in step with a row; None for a plain batch.
        attention: What keeps images apart in the row; None where nothing need.
        runs: Whether any token runs.
        ledger: The latest outcome of all tokens; None before the first exit point.
        labels: Classes of all patches that each of the exit points so far has found.
        counts: Tokens in the blocks so far.
        exits: The blocks after which an exit head ran.
        overflow: Entries of each image that left, or became part of others, for lack of room; None in a layout that
            has always room.
        outputs: Outputs of the heads for all patches, by block, where all are kept.
        tapped: All tokens of all images, by block, where they are tapped.
        merged: Which tokens have merged; None before the first merge point, and once all have rejoined.
        rejoined: Which had merged when all rejoined; None before, and if none could have.
    """

    fixed: Fixed
    tokens: Float[Tensor, "_ _ dim"]
    positions: Tensor | None
    row: Row | None = None
    attention: Attending | None = None
    runs: bool = True
    ledger: Ledger | None = None
    labels: tuple[Int[Tensor, "images patches"], ...] = ()
    counts: tuple[Counts, ...] = ()
    exits: tuple[int, ...] = ()
    overflow: Int[Tensor, "images"] | None = None
    outputs: Mapping[int, HeadOutput] = field(default_factory=dict)
    tapped: Mapping[int, Tensor] = field(default_factory=dict)
    merged: Merged | None = None
    rejoined: Merged | None = None


def start(
    model: WithExits[Any],
    images: Tensor,
    schedule: Schedule | None,
    /,
    *,
    layout: Layout = PACKED,
    heads: Heads = "active",
    taps: Iterable[int] = (),
) -> State:
    """Embed images, and plan the stages of the pass.

    Raises:
        TokenExitError: If the images or the plan do not fit the model.
    """
    plan = model.schedule if schedule is None else model.checked(schedule)
    if not torch.compiler.is_compiling():
        model.warn_if_unfitted(plan)
    taps = tuple(taps)
    stages = plan.stages(model.depth, taps=taps, heads=heads)
    after = [stage.stop for stage in stages if stage.exit is not None or stage.merge is not None]
    layout.require_room(after)
    if after:
        require_not_traced(type(model).__name__)
    embedded = embedded_by(model.host, images, patch=model.patch)
    warn_if_drawing(*(part for name, part in model.named_children() if name != "model"))
    masks = isinstance(plan.carry, MaskPrediction) or (heads == "all" and model.gives_masks)
    fixed = Fixed(model, plan, stages, layout, heads, embedded, area_of(embedded, images), masks, taps)
    folds = fixed.feature is not None and fixed.feature.fold_above is not None
    rule = "have fold_above=None for a model without prefix tokens"
    require(not folds or embedded.prefix > 0, "schedule", rule, plan.carry)
    count, slots, _ = embedded.tokens.shape
    packed, device = isinstance(layout, Packed), embedded.tokens.device
    overflow = None if packed else torch.zeros(count, dtype=torch.int64, device=device)
    return State(fixed, embedded.tokens, embedded.positions, runs=count * slots > 0, overflow=overflow)


def run_stage(state: State, stage: Stage, /) -> Tensor:
    """Run the blocks of a stage on the tokens that run: what `torch.compile` makes a program of."""
    if not state.runs:
        return state.tokens
    host = state.fixed.model.host
    return run_blocks(host, stage.start, stage.stop, state.tokens, state.positions, state.attention)


def finish_stage(state: State, stage: Stage, ran: Tensor, /) -> State:
    """Whatever follows the blocks of a stage: tokens leave, all rejoin, or all are tapped."""
    count, slots, _ = state.fixed.embedded.tokens.shape
    lengths = (slots,) * count if state.row is None else state.row.lengths
    receipt = None if state.row is None else state.row.receipt
    held = receipt.lengths if isinstance(receipt, Selection) else None
    state = replace(state, tokens=ran, counts=(*state.counts, Counts(stage.stop - stage.start, lengths, held)))
    if stage.tap:  # what leaves or merges here is still there
        state = replace(state, tapped={**state.tapped, stage.stop: restored(state, stage.stop)})
    if stage.exit is not None and state.runs:
        state = exit_point(as_row(state), stage)
    if stage.merge is not None and state.runs:
        state = merge_point(as_row(state), stage)
    return rejoin(state, stage.stop) if stage.rejoin else state


def exit_point(state: State, stage: Stage, /) -> State:
    """Some tokens of the row leave, and the others close up: one gather."""
    fixed, row, book = state.fixed, state.row, state.ledger
    assert row is not None
    assert stage.exit is not None
    assert stage.index is not None
    receipt, embedded = row.receipt, fixed.embedded
    state, flat = read_exit(state, stage.stop), state.tokens[0]
    book = state.ledger
    assert book is not None
    with torch.no_grad():
        decision = exits.decide(
            stage.exit.policy,
            book,
            receipt.running,
            state.labels,
            grid=embedded.grid,
            exit=stage.index,
            cell=fixed.plan.cell,
            merged=state.merged,
        )
        moved = fixed.layout.compact(receipt, decision, stage, embedded.prefix)
    left = receipt.running ^ moved.receipt.running
    if fixed.feature is not None and fixed.feature.fold_above is not None:
        laid, leave = flat.unflatten(0, receipt.layout), tokens.gather(left, receipt)
        flat = ledger.fold_leavers(laid, receipt, leave, above=fixed.feature.fold_above).flatten(0, -2)
    size, merged = None, state.merged
    if fixed.plan.cell is not None:
        size = cells.token_size(moved.receipt, grid=embedded.grid, side=fixed.plan.cell).flatten()
    if merged is not None:
        merged = replace(merged, running=moved.receipt.running)
        size = size_in_attention(fixed.plan, moved.receipt, merged)
    row = Row(moved.receipt, moved.lengths, size)
    positions = state.positions
    return replace(
        state,
        tokens=flat.index_select(0, moved.rows)[None],
        positions=None if positions is None else positions.index_select(0, moved.rows),
        row=row,
        attention=fixed.layout.attention(row.receipt, row.lengths, row.token_size),
        runs=any(row.lengths),
        ledger=ledger.freeze(book, left, depth=stage.stop),
        labels=(*state.labels, decision.label),
        overflow=_sum(state.overflow, moved.overflow),
        merged=merged,
    )


def of_all_tokens(book: Ledger, merged: Merged, /) -> Ledger:
    """A ledger in which merged tokens have the class scores and masks of their owners."""
    masks = None if book.mask_logits is None else merging.spread(book.mask_logits, merged.owner)
    return replace(book, logits=merging.spread(book.logits, merged.owner), mask_logits=masks)


def read_exit(state: State, after: int, /) -> State:
    """Read the tokens of the row by the exit head after a block; the ledger has their latest outcome."""
    fixed, row, book = state.fixed, state.row, state.ledger
    assert row is not None
    receipt, embedded, flat = row.receipt, fixed.embedded, state.tokens[0]
    head, options = fixed.model.exit_heads[str(after)], {"grid": embedded.grid, "prefix": embedded.prefix}
    output = apply_head(head, flat, receipt, lengths=row.lengths, final=fixed.model.final, **options)
    features = exits.carried(fixed.plan.carry, output, flat.unflatten(0, receipt.layout))
    if book is None:
        presence = output.presence_logits if fixed.masks else None
        book = exits.begin(output, receipt, features=features, presence_logits=presence)
    state = _kept(state, output, receipt, book, after)
    frozen = detached(output) if fixed.heads == "all" else output
    book = exits.update(book, receipt, frozen, features=features)
    return replace(state, ledger=book, exits=(*state.exits, after))


def agreement(state: State, stage: Stage, /) -> tuple[State, Tensor | None, Tensor | None]:
    """Which tokens of the row are agreed upon at a merge, and their classes; None, where it does not ask for that."""
    row, merge = state.row, stage.merge
    assert row is not None
    assert merge is not None
    if merge.agreed is None:
        return state, None, None
    labels = state.labels
    if stage.exit is None:
        state = read_exit(state, stage.stop)
    else:  # the exit has read the head, and its own prediction is no earlier one
        labels = labels[:-1]
    book, grid = state.ledger, state.fixed.embedded.grid
    assert book is not None
    options: Any = {"grid": grid, "exit": len(labels), "merged": state.merged}
    with torch.no_grad():
        return state, *exits.agree(merge.agreed, book, row.receipt.running, labels, **options)


def merge_point(state: State, stage: Stage, /) -> State:
    """Tokens of the row that are alike, or agreed upon, run on as one, and the row closes up: one gather."""
    fixed, row, merge = state.fixed, state.row, stage.merge
    assert row is not None
    assert merge is not None
    embedded, receipt, flat = fixed.embedded, row.receipt, state.tokens[0]
    merged = state.merged or merging.alone(receipt.running, grid=embedded.grid)
    state, agreed, label = agreement(state, stage)
    laid = flat.unflatten(0, receipt.layout)
    by_slot = tokens.scatter(laid, receipt, into=fixed.layout.blank(receipt, laid))
    joined = merging.merge(by_slot, merged, side=merge.side, alike=merge.alike, agreed=agreed, label=label)
    joined, moved = fixed.layout.join(receipt, joined, stage, embedded.prefix, _certain(state, stage))
    state, merged = _without_room(state, joined, moved, stage.stop)
    row = Row(moved.receipt, moved.lengths, size_in_attention(fixed.plan, moved.receipt, merged))
    positions = embedded.positions
    if positions is not None:
        rule = "merge nothing, for a host that does not say which half of its positions are sines: Embedded(pairs=...)"
        require(embedded.pairs is not None, "schedule", rule, list(fixed.plan.merges))
        assert embedded.pairs is not None
        slot, size = moved.receipt.slot, merged.size.flatten().index_select(0, moved.receipt.index)
        positions = merging.turned(positions, slot, size, grid=embedded.grid, pairs=embedded.pairs)
    source = joined.source.flatten().index_select(0, moved.receipt.index)
    return replace(
        state,
        tokens=joined.bank.index_select(0, source)[None],
        positions=positions,
        row=row,
        attention=fixed.layout.attention(row.receipt, row.lengths, row.token_size),
        merged=merged,
    )


def _certain(state: State, stage: Stage) -> Certain | None:
    """How certain the latest outcome of every entry is; None where nothing can have left."""
    fixed, book = state.fixed, state.ledger
    if book is None or all(one.exit is None for one in fixed.stages if one.stop <= stage.stop):
        return None

    def certain(merged: Merged) -> Tensor:
        with torch.no_grad():
            return exits.decide(never(), book, merged.running, grid=merged.grid, merged=merged).certain

    return certain


def _without_room(state: State, joined: Joined, moved: Compaction, after: int) -> tuple[State, Merged]:
    """After a merge, what had no room has left, with its latest outcome; and what has merged of the others."""
    merged, book = joined.merged, state.ledger
    state = replace(state, overflow=_sum(state.overflow, moved.overflow))
    if book is None or moved.overflow is None:
        return state, merged
    left = merged.running ^ moved.receipt.running
    book = ledger.freeze(book, left, depth=after)
    if book.features is not None and isinstance(state.fixed.feature, Feature):  # it rejoins as it is now
        present = joined.features().to(book.features.dtype)
        book = replace(book, features=torch.where(left[..., None], present, book.features))
    return replace(state, ledger=book), replace(merged, running=moved.receipt.running)


def size_in_attention(plan: Schedule, receipt: Receipt, merged: Merged, /) -> Tensor | None:
    """How many tokens each entry of the row counts for in attention; None if once each."""
    if plan.keys == "entries":
        return None
    return merged.size.flatten().index_select(0, receipt.index).to(torch.float32)


def _sum(before: Tensor | None, more: Tensor | None) -> Tensor | None:
    return None if before is None or more is None else before + more


def _kept(state: State, output: HeadOutput, receipt: Receipt, book: Ledger, after: int) -> State:
    """The state with the output of a head for all patches, where outputs are kept."""
    if state.fixed.heads == "active":
        return state
    every = exits.update(replace(book, features=None), receipt, output)
    if state.merged is not None:
        every = of_all_tokens(every, state.merged)
    logits, masks, presence = every.logits, every.mask_logits, every.presence_logits
    prefix = state.fixed.embedded.prefix
    if masks is not None and presence is not None and state.fixed.reweighs:
        logits = log_scores(masks, presence[:, None])
    masks = None if masks is None else masks[:, prefix:]
    kept = HeadOutput(logits[:, prefix:], mask_logits=masks, presence_logits=presence)
    return replace(state, outputs={**state.outputs, after: kept})


def as_row(state: State, /) -> State:
    """The same state with the tokens in one row."""
    if state.row is not None:
        return state
    count, slots, _ = state.tokens.shape
    device, positions = state.tokens.device, state.positions
    if positions is not None:
        positions = positions.repeat(count, *[1] * (positions.ndim - 1))
    receipt, lengths = state.fixed.layout.full(count, slots, device), (slots,) * count
    row = rearrange(state.tokens, "images slots dim -> 1 (images slots) dim")
    return replace(state, tokens=row, positions=positions, row=Row(receipt, lengths))


def as_batch(state: State, /) -> State:
    """The same state as a plain batch, if the row holds all tokens of all images."""
    count, slots, _ = state.fixed.embedded.tokens.shape
    if state.row is None or state.tokens.shape[1] != count * slots:
        return state
    return _batch(state, rearrange(state.tokens, "1 (images slots) dim -> images slots dim", images=count))


def _batch(state: State, every: Tensor) -> State:
    positions = state.fixed.embedded.positions
    state = replace(state, tokens=every, positions=positions, row=None, attention=None, runs=every.shape[0] > 0)
    if state.merged is not None and state.ledger is not None:  # all run by themselves again
        owner = state.merged.owner
        book = replace(state.ledger, depth=merging.spread(state.ledger.depth, owner))
        state = replace(state, ledger=book)
    return replace(state, merged=None, rejoined=state.merged or state.rejoined)


def restored(state: State, at: int, /) -> Float[Tensor, "images slots dim"]:
    """All tokens of all images after a block, exited ones with the features they left with, or for it."""
    if state.row is None:
        return state.tokens
    rows, receipt = state.tokens[0].unflatten(0, state.row.receipt.layout), state.row.receipt
    if state.ledger is not None and state.ledger.features is not None:
        every = ledger.rejoin(_for_tap(state.ledger, state.fixed.taps, rows.shape[-1], at), receipt, rows)
    else:  # nothing could leave
        count, slots, dim = state.fixed.embedded.tokens.shape
        every = tokens.scatter(rows, receipt, into=rows.new_zeros(count, slots, dim))
    return every if state.merged is None else merging.spread(every, state.merged.owner)


def _for_tap(book: Ledger, taps: Sequence[int], dim: int, at: int) -> Ledger:
    """A ledger with the features that tokens left for a tap, of those for all taps after the first exit."""
    assert book.features is not None
    if book.features.shape[-1] == dim:
        return book
    behind = sum(tap > at for tap in taps)
    stop = book.features.shape[-1] - behind * dim
    return replace(book, features=book.features[..., stop - dim : stop])


def rejoin(state: State, at: int, /) -> State:
    """All tokens of all images run on after a block, as a plain batch."""
    return state if state.row is None else _batch(state, restored(state, at))


def read_running(state: State, head: Any, /) -> tuple[State, Ledger]:
    """Read the tokens that have run to the end by the final head.

    Returns:
        The state, with the output kept if all are, and the ledger with the final outcome of every token.
    """
    fixed, row, book = state.fixed, state.row, state.ledger
    assert row is not None
    if not state.runs:
        assert book is not None
        return state, book
    receipt, embedded, depth = row.receipt, fixed.embedded, fixed.model.depth
    finished = fixed.model.host.finish(state.tokens[0])
    output = apply_head(head, finished, receipt, lengths=row.lengths, grid=embedded.grid, prefix=embedded.prefix)
    if book is None:  # nothing could leave
        book = exits.begin(output, receipt, presence_logits=output.presence_logits if fixed.masks else None)
    output = replace(output, logits=output.logits.to(book.logits.dtype))
    state = _kept(state, output, receipt, book, depth)
    frozen = detached(output) if fixed.heads == "all" else output
    return state, exits.update(book, receipt, frozen)


def run_pass(
    model: WithExits[Any],
    images: Tensor,
    schedule: Schedule | None,
    /,
    *,
    layout: Layout = PACKED,
    heads: Heads = "active",
    taps: Iterable[int] = (),
) -> State:
    """All blocks, and what happens between them.

    What depends on the data is kept out of the programs of `torch.compile`; in packed rows those are made of the blocks
    of a stage.

    Raises:
        TokenExitError: If the images or the plan do not fit the model.
    """
    if isinstance(layout, Packed):
        state = packed_start(model, images, schedule, layout=layout, heads=heads, taps=taps)
        for stage in state.fixed.stages:
            state = packed_finish_stage(state, stage, run_stage(state, stage))
        return state
    state = start(model, images, schedule, layout=layout, heads=heads, taps=taps)
    for stage in state.fixed.stages:
        state = finish_stage(state, stage, run_stage(state, stage))
    return state


def taps_of(
    model: WithExits[Any], images: Tensor, plan: Schedule, after: Sequence[int], /
) -> tuple[Mapping[int, Tensor], int]:
    """All tokens of all images after some blocks of a pass, which ends there; and how many of them are prefix tokens.

    Raises:
        TokenExitError: If the images or the plan do not fit the model.
    """
    state = packed_start(model, images, plan, taps=after)
    for stage in state.fixed.stages:
        if stage.start < max(after):
            state = packed_finish_stage(state, stage, run_stage(state, stage))
    return state.tapped, state.fixed.embedded.prefix


def similarities_of(
    model: WithExits[Any], images: Tensor, plan: Schedule, /
) -> Float[Tensor, "images rows columns"] | None:
    """How alike the cells are that could merge at the last merge of a plan; None if no token runs there.

    Raises:
        TokenExitError: If the images or the plan do not fit the model.
    """
    after = plan.merges[-1].after
    state = packed_start(model, images, plan)
    for stage in (stage for stage in state.fixed.stages if stage.stop < after):
        state = packed_finish_stage(state, stage, run_stage(state, stage))
    (last,) = (stage for stage in state.fixed.stages if stage.stop == after)
    bare = replace(last, merge=None, rejoin=False)
    state = packed_finish_stage(state, bare, run_stage(state, last))
    if not state.runs:
        return None
    state, agreed, label = agreement(as_row(state), last)
    assert state.row is not None
    receipt, every = state.row.receipt, state.fixed.embedded.tokens
    by_slot = tokens.scatter(state.tokens[0].unflatten(0, receipt.layout), receipt, into=torch.zeros_like(every))
    merged = state.merged or merging.alone(receipt.running, grid=state.fixed.embedded.grid)
    return merging.similarities(by_slot, merged, agreed=agreed, label=label)


packed_start = kept_eager(start)
packed_finish_stage = kept_eager(finish_stage)


def exit_depth(state: State, book: Ledger | None, /) -> Int[Tensor, "images grid_height grid_width"]:
    """Blocks that every patch has run through."""
    embedded, depth = state.fixed.embedded, state.fixed.model.depth
    count, slots, _ = embedded.tokens.shape
    if book is None:
        shape = (count, slots - embedded.prefix)
        every = torch.full(shape, depth, dtype=torch.int64, device=embedded.tokens.device)
    else:
        every = book.exit_depth(depth)
        every = every if state.merged is None else merging.spread(every, state.merged.owner)
        every = every[:, embedded.prefix :]
    return every.unflatten(1, embedded.grid)


def merged_size(state: State, /) -> Int[Tensor, "images grid_height grid_width"] | None:
    """How many patches ran on as one with every patch; None for a plan without merges."""
    if not state.fixed.plan.merges:
        return None
    embedded, merged = state.fixed.embedded, state.merged or state.rejoined
    if merged is None:  # all had left before
        count, device = len(embedded.tokens), embedded.tokens.device
        return torch.ones((count, *embedded.grid), dtype=torch.int64, device=device)
    return merging.spread(merged.size, merged.owner)[:, embedded.prefix :].unflatten(1, embedded.grid)


def worked(state: State, /) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Entries that each block worked on for each image, and overflow; None in packed rows."""
    if state.overflow is None:
        return None, None
    entries = (max(one.lengths, default=0) for one in state.counts for _ in range(one.blocks))
    return torch.stack([torch.full_like(state.overflow, one) for one in entries], dim=1), state.overflow


def on_grid(
    patches: Float[Tensor, "images patches classes"], grid: tuple[int, int], /
) -> Float[Tensor, "images classes grid_height grid_width"]:
    """Values of patches on their grid."""
    height, width = grid
    return rearrange(
        patches, "images (height width) classes -> images classes height width", height=height, width=width
    )
