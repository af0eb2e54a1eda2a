"""Forward pass of a network with gates: frozen state in, frozen state out.

In the packed layout only active tokens are computed; in the masked one all are, and skipped tokens are put back. Both
are values, and `run` is the same loop for either of them. Nothing of it is part of the public API.
"""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import gates, tokens
from tokenexit.area import Area
from tokenexit.carries import Preserved
from tokenexit.schedule import Exit, Schedule, Stage
from tokenexit.tokens import Packing
from tokenexit_torch._blocks import run_block
from tokenexit_torch._modules import is_training, require_not_exported
from tokenexit_torch.attention import (
    Attending,
    attending_beside,
    attending_per_image,
    attending_to,
    keys_and_values,
)
from tokenexit_torch.gates.outputs import GatedOutput
from tokenexit_torch.hosts.protocol import Embedded, Host, area_of, embedded_by

__all__: list[str] = []


@dataclass(frozen=True)
class Decision:
    """Decision of a gate.

    Attributes:
        keep: Which patches are kept: boolean; in training 1 or 0, with the gradient of the relaxed decision.
        probability: Keep probability of every patch.
        active: Which tokens are active until the next gate, prefix tokens among them.
    """

    keep: Bool[Tensor, "images patches"] | Float[Tensor, "images patches"]
    probability: Float[Tensor, "images patches"]
    active: Bool[Tensor, "images slots"]


@dataclass(frozen=True)
class Row:
    """Active tokens in the packed layout.

    Attributes:
        tokens: The tokens of all images, in one row.
        packing: The receipt by which they are put back.
        lengths: How many tokens of the row belong to each image, on the host.
        positions: What belongs to each token's slot, if anything.
        skipped: Receipt for the skipped tokens, where they are keys; None if there are no such keys.
    """

    tokens: Float[Tensor, "1 tokens dim"]
    packing: Packing
    lengths: Sequence[int]
    positions: Tensor | None
    skipped: Packing | None


@dataclass(frozen=True)
class State:
    """What lies between two blocks of a pass.

    Attributes:
        embedded: What the host has made of the images: its grid, prefix and positions hold for the whole pass.
        area: The area of the images that the grid covers; None if it is the whole of them.
        carry: What becomes of skipped tokens.
        tokens: All tokens; in the packed layout as of the last decision, for `all_tokens` to be completed.
        decision: The decision by which tokens are active; None while all are.
        row: The active tokens, in the packed layout.
        decisions: Decisions so far, by the blocks that ran before the gate.
        counts: How many tokens of each image were active in each block so far.
        maps: Feature maps that were tapped.
    """

    embedded: Embedded
    area: Area | None
    carry: Preserved
    tokens: Float[Tensor, "images slots dim"]
    decision: Decision | None = None
    row: Row | None = None
    decisions: dict[int, Decision] = field(default_factory=dict)
    counts: tuple[Int[Tensor, "images"], ...] = ()
    maps: dict[int, Tensor] = field(default_factory=dict)

    @property
    def before(self) -> Tensor | None:
        """Patches kept by the previous gate, if the others never return; None if a gate may keep any patch."""
        if self.carry.returning == "every gate" or not self.decisions:
            return None
        return next(reversed(self.decisions.values())).keep


@dataclass(frozen=True)
class Layout:
    """How active tokens are laid out and run.

    Attributes:
        compact: `compact(state, active)` gathers the active tokens, if the layout does.
        run: `run(host, state, start, stop)` runs consecutive blocks.
    """

    compact: Callable[[State, Tensor], Row | None]
    run: Callable[[Host, State, int, int], State]


Decide = Callable[[State, Exit], Decision]
"""Decision of a gate on a state in which all tokens are active."""

Merge = Callable[[Tensor, Tensor, Decision], Tensor]
"""`merge(after, before, decision)`: all tokens after a block, from those that it made and those that it was given."""


def start(host: Host, images: Tensor, plan: Schedule, /, *, patch: tuple[int, int] | None) -> State:
    """Embed images; all tokens are active.

    Args:
        host: The host.
        images: The images.
        plan: A plan that has passed `require_gates_fit`.
        patch: Pixels of a patch, as for `embedded_by`.

    Returns:
        The state before the first block.

    Raises:
        TokenExitError: If the model does not take the images.
    """
    assert isinstance(plan.carry, Preserved)
    embedded = embedded_by(host, images, patch=patch)
    return State(embedded, area_of(embedded, images), plan.carry, embedded.tokens)


def run(host: Host, state: State, stages: Iterable[Stage], /, *, layout: Layout, decide: Decide) -> State:
    """Run stages of a pass: blocks, and the taps and decisions between them."""
    for stage in stages:
        state = run_blocks(host, state, stage.start, stage.stop, layout=layout)
        if stage.tap:
            state = replace(state, maps={**state.maps, stage.stop: feature_map(host, state)})
        if stage.exit is not None:
            state = set_active(state, None, layout=layout)
            state = apply_decision(state, stage.stop, decide(state, stage.exit), layout=layout)
        if stage.rejoin:
            state = set_active(state, None, layout=layout)
    return state


def run_blocks(host: Host, state: State, start: int, stop: int, /, *, layout: Layout) -> State:
    """Run blocks `start` to `stop` on the active tokens, and count these."""
    if state.decision is None:
        images, slots, _ = state.tokens.shape
        count = torch.full((images,), slots, device=state.tokens.device)
    else:
        count = state.decision.active.sum(dim=1)
    state = layout.run(host, state, start, stop)
    return replace(state, counts=state.counts + (count,) * (stop - start))


def apply_decision(state: State, after: int, decision: Decision, /, *, layout: Layout) -> State:
    """Skip the tokens that the gate after a block does not keep."""
    state = replace(state, decisions={**state.decisions, after: decision})
    return set_active(state, decision, layout=layout)


def set_active(state: State, decision: Decision | None, /, *, layout: Layout) -> State:
    """Put all tokens back together; from now on those are active that a decision keeps, or all if it is None."""
    state = replace(state, tokens=all_tokens(state), decision=decision, row=None)
    return state if decision is None else replace(state, row=layout.compact(state, decision.active))


def all_tokens(state: State) -> Float[Tensor, "images slots dim"]:
    """Active and skipped tokens, as they are now."""
    row = state.row
    if row is None:
        return state.tokens
    flat = rearrange(state.tokens, "images slots dim -> (images slots) dim")
    flat = flat.index_copy(0, row.packing.index, row.tokens[0].to(flat.dtype))
    return flat.unflatten(0, state.tokens.shape[:2])


def score(
    gate: nn.Module, tokens: Float[Tensor, "images slots dim"], /, *, prefix: int
) -> Float[Tensor, "images patches 2"]:
    """Logits of a gate for every patch: keep and skip."""
    images, slots, _ = tokens.shape
    # All slots are read, which lie in one piece: without the prefix they would be copied first. But what a gate
    # learns from, statistics of batch norm among it, are patches alone.
    unread = prefix if is_training(gate) else 0
    logits = gate(tokens[:, unread:].flatten(0, 1)).unflatten(0, (images, slots - unread))
    return logits[:, prefix - unread :]


def decided(keep: Tensor, probability: Tensor, /, *, prefix: int) -> Decision:
    """Decision from the patches that are kept: prefix tokens are always active."""
    return Decision(keep, probability, functional.pad(keep > 0, (prefix, 0), value=True))


def decide_by_policy(modules: nn.ModuleDict, state: State, exit: Exit) -> Decision:
    """Decision of a gate by its policy, without noise; `modules` are the gates by their block, as a string."""
    embedded = state.embedded
    probability = gates.keep_probability(score(modules[str(exit.after)], state.tokens, prefix=embedded.prefix))
    keep = gates.decide(exit.policy, probability.detach(), grid=embedded.grid, before=state.before)
    return decided(keep, probability, prefix=embedded.prefix)


def feature_map(host: Host, state: State) -> Float[Tensor, "images dim grid_height grid_width"]:
    """Features of all patches as they are now; finished, after the last block."""
    found = all_tokens(state)
    found = host.finish(found) if len(state.counts) == len(host.blocks) else found
    height, width = state.embedded.grid
    pattern = "images (height width) dim -> images dim height width"
    return rearrange(found[:, state.embedded.prefix :], pattern, height=height, width=width)


def output(host: Host, head: nn.Module | None, state: State) -> GatedOutput:
    """Assemble the output after the last block."""
    depth, logits = len(state.counts), None
    if head is not None:
        logits = _read(head, state.maps[depth] if depth in state.maps else feature_map(host, state))
    decisions = state.decisions.values()
    return GatedOutput(
        logits,
        state.maps,
        _by_gate([decision.keep for decision in decisions], state, dtype=torch.bool),
        _by_gate([decision.probability for decision in decisions], state, dtype=torch.float32),
        torch.stack(state.counts, dim=1),
        tuple(state.decisions),
        state.carry.keys,
        state.area,
    )


def _read(head: nn.Module, finished: Tensor) -> Tensor:
    images, _, height, width = finished.shape
    logits = head(rearrange(finished, "images dim height width -> (images height width) dim"))
    by_place = logits.unflatten(0, (images, height, width))
    return rearrange(by_place, "images height width classes -> images classes height width")


def _by_gate(found: list[Tensor], state: State, *, dtype: torch.dtype) -> Tensor:
    if not found:
        shape = (len(state.tokens), 0, *state.embedded.grid)
        return torch.empty(shape, dtype=dtype, device=state.tokens.device)
    return torch.stack([one.detach().to(dtype) for one in found], dim=1).unflatten(2, state.embedded.grid)


def _compacted(state: State, active: Tensor) -> Row:
    require_not_exported("GatedModel", instead="export a module that calls `masked`")
    packing = tokens.pack(active)
    row, positions = _gathered(state, packing)
    lengths = packing.lengths.tolist()
    # With nothing skipped there are no other keys, and not every block can run on no tokens.
    beside = state.carry.keys == "all" and sum(lengths) < active.numel()
    return Row(row, packing, lengths, positions, tokens.pack(~active) if beside else None)


def _gathered(state: State, packing: Packing) -> tuple[Tensor, Tensor | None]:
    flat = rearrange(state.tokens, "images slots dim -> (images slots) dim")
    positions = state.embedded.positions
    row = flat.index_select(0, packing.index)[None]
    return row, None if positions is None else positions.index_select(0, packing.slot)


def _run_packed(host: Host, state: State, start: int, stop: int) -> State:
    row = state.row
    if row is None:
        return _run_masked(host, state, start, stop, merge=put_back)
    ran = row.tokens
    for block in range(start, stop) if any(row.lengths) else ():
        with _attending(host, state, row, block) as attention:
            ran = run_block(host, block, ran, row.positions, attention)
    return replace(state, row=replace(row, tokens=ran))


def _attending(host: Host, state: State, row: Row, block: int) -> AbstractContextManager[Attending]:
    """Attention within each image; skipped tokens are keys as well, if there are any such keys."""
    if row.skipped is None:
        return attending_per_image(row.lengths)
    others, positions = _gathered(state, row.skipped)
    key, value = keys_and_values(lambda: host.run(block, others, positions), name=f"model.blocks[{block}]")
    return attending_beside(row.lengths, row.skipped.lengths.tolist(), key, value)


def _run_masked(host: Host, state: State, start: int, stop: int, *, merge: Merge) -> State:
    decision, every = state.decision, state.tokens
    # With nothing skipped, or skipped tokens among the keys, attention is as it always is.
    plain = state.carry.keys == "all"
    with nullcontext() if decision is None or plain else attending_to(decision.active) as attention:
        for block in range(start, stop):
            after = run_block(host, block, every, state.embedded.positions, attention)
            every = after if decision is None else merge(after, every, decision)
    return replace(state, tokens=every)


def put_back(after: Tensor, before: Tensor, decision: Decision) -> Tensor:
    """Tokens after a block: as it made them where they were active, as they were where not."""
    return torch.where(decision.active[..., None], after.to(before.dtype), before)


def masked(merge: Merge = put_back, /) -> Layout:
    """Layout in which all tokens are computed and skipped ones put back: all shapes are known beforehand."""
    return Layout(compact=lambda *_: None, run=partial(_run_masked, merge=merge))


PACKED = Layout(compact=_compacted, run=_run_packed)
"""Layout in which active tokens are gathered into one row at a gate, and put back at the next."""

MASKED = masked()
