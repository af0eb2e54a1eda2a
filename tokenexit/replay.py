"""Replay of schedules on recorded class scores: what they would do, were exited tokens not missed by the others.

One dense pass gives the scores of every head for every patch. A schedule is then replayed by its policies, retention
and bookkeeping as they are, without running blocks. It is exact but for one thing: in a real pass, tokens that stay
attend to fewer others.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Bool, Float, Int

from tokenexit import exits, ledger, tokens
from tokenexit._array import Array, array_namespace, data_dependent_shapes, filled
from tokenexit.carries import Prediction
from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.schedule import Schedule
from tokenexit.tokens import Receipt

__all__ = ["Replayed", "replay"]


@dataclass(frozen=True)
class Replayed:
    """Outcome of a replay.

    Attributes:
        logits: Class scores of every patch, from the head at which it left.
        exit_depth: Blocks that every patch has run through.
        tokens_per_block: Tokens of each image in each block, prefix tokens included.
    """

    logits: Float[Array, "images patches classes"]
    exit_depth: Int[Array, "images patches"]
    tokens_per_block: Int[Array, "images blocks"]


def replay(
    logits: Mapping[int, Float[Array, "images patches classes"]],
    plan: Schedule,
    /,
    *,
    grid: tuple[int, int],
    prefix: int = 0,
    error: Mapping[int, Float[Array, "images patches"]] | None = None,
) -> Replayed:
    """Replay a schedule on recorded class scores.

    Args:
        logits: Class scores of all patches by every head, by the blocks before it; the last is the final head.
        plan: The schedule. Its active exits are among the heads, and it carries predictions.
        grid: Height and width of the patch grid.
        prefix: Prefix tokens of an image, which run with its patches.
        error: Errors that translators foretell for all patches, by the blocks before them; for plans that compare such.

    Returns:
        The outcome.

    Raises:
        TokenExitError: If an exit has no head, features are carried, or shapes do not fit the grid or one another.
    """
    require(isinstance(plan.carry, Prediction), "plan", "carry predictions", repr(plan.carry))
    require(not plan.merges, "plan", "merge nothing, for scores of a pass without merges", list(plan.merges))
    depth, places = max(logits, default=0), grid[0] * grid[1]
    headless = [exit.after for exit in plan.active if exit.after >= depth or exit.after not in logits]
    rule = f"have exits only after blocks with an exit head, {sorted(logits)[:-1]}"
    require(not headless, "plan", rule, headless)
    shapes = {tuple(table.shape) for table in logits.values()}
    fits = len(shapes) == 1 and all(len(shape) == 3 and shape[1] == places for shape in shapes)
    require(fits, "logits", f"be of one shape, (images, {places}, classes)", sorted(shapes))
    final = logits[depth]
    xp = array_namespace(final)
    running = filled((final.shape[0], places), True, final, dtype=xp.bool)
    receipt = _receipt(running)
    book = exits.begin(HeadOutput(tokens.gather(final, receipt)), receipt)
    labels, counts = [], []
    for stage in plan.stages(depth):
        held = receipt.lengths
        counts += [xp.where(held > 0, held + prefix, held)] * (stage.stop - stage.start)
        if stage.exit is None or stage.index is None:
            continue
        told = None if error is None or stage.stop not in error else tokens.gather(error[stage.stop], receipt)
        book = exits.update(book, receipt, HeadOutput(tokens.gather(logits[stage.stop], receipt), error=told))
        decision = exits.decide(
            stage.exit.policy, book, receipt.running, labels, grid=grid, exit=stage.index, cell=plan.cell
        )
        book = ledger.freeze(book, receipt.running ^ decision.stay, depth=stage.stop)
        labels.append(decision.label)
        receipt = _receipt(decision.stay)
    book = exits.update(book, receipt, HeadOutput(tokens.gather(final, receipt)))
    return Replayed(book.logits, book.exit_depth(depth), xp.stack(counts, axis=1))


def _receipt(running: Bool[Array, "images patches"]) -> Receipt:
    """A packed row where shapes may depend on the data, and room for all patches elsewhere."""
    xp = array_namespace(running)
    if data_dependent_shapes(xp):
        return tokens.pack(running)
    score = xp.zeros_like(running, dtype=xp.float32)
    return tokens.select(running, score, capacity=running.shape[1])[0]
