"""`wrap`, `wrap_gates` and `wrap_semantic`: exits, gates or semantic tokens for a vision transformer of pure functions.
`check`: whether these keep their word.
"""

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Float

from tokenexit.adapting import LARGEST, MOST, is_number, is_whole, require_room, warn_of_pixels
from tokenexit.errors import TokenExitError, require
from tokenexit.gates import published_gate, published_gates
from tokenexit.heads import MLP, HeadPlan
from tokenexit.schedule import Schedule, neighbours
from tokenexit.semantic import SemanticPlan, stvit
from tokenexit_jax._given import require_array, require_count
from tokenexit_jax.exits.model import ExitingModel
from tokenexit_jax.gates.model import GatedModel
from tokenexit_jax.networks.checks import DECLARED, embed, run_block, whole_sides
from tokenexit_jax.networks.protocol import Embedded, Network, Params
from tokenexit_jax.semantic.layers import Recovery, SemanticTokens
from tokenexit_jax.semantic.model import SemanticModel

__all__ = ["check", "wrap", "wrap_gates", "wrap_semantic"]  # the name of a type is offered by the package

Capacities = Sequence[float] | Mapping[int, Sequence[float]]
"""Buckets: fractions of the slots of an image, for all exits or for each block with an exit head."""


def wrap(
    network: Network,
    schedule: Schedule | None = None,
    /,
    *,
    classes: int,
    exit_heads: HeadPlan = MLP(),
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None = None,
    capacities: Capacities = (0.25, 0.5, 0.75, 1.0),
) -> ExitingModel:
    """Let the tokens of a vision transformer leave early.

    It makes no weights: `ExitingModel.init` does, for the heads. Run `check` once with your parameters.

    Args:
        network: The network, as pure functions.
        schedule: After which blocks tokens leave, and by which policy; if left out `schedule.neighbours()` for as many
            blocks. Each of its exits gets a head, so that `schedule.dense(after=...)` declares heads for schedules to
            come.
        classes: Class count: 2 or more, for one logit has no confidence; mask heads (`heads.ATM`) may have one class.
        exit_heads: A plan for the exit heads, and for the final head if none is given. For `heads.Translator`, whose
            tokens the final head reads, that is `heads.MLP()`; `fit_exits` of the PyTorch adapter fits translators, and
            `load` reads them.
        head: Your final head: `head(params, tokens)` gives the logits of finished tokens, each by itself, from the
            parameters of the network. None builds one from the plan.
        capacities: Buckets, as fractions of the slots of an image: what runs on after an exit is held by the smallest
            bucket that holds the fullest image. For all exits, or for each block with an exit head. A single one is a
            fixed budget, with one static shape. If the greatest is less than 1, the most confident tokens that it has
            no room for leave as well, and are counted in `Output.overflow`.

    Returns:
        The model with exits.

    Raises:
        TokenExitError: If an argument is not what it should be, or an exit lies outside of the network.
    """
    _require_network(network)
    schedule = neighbours(depth=max(network.depth, 2)) if schedule is None else schedule
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    require(isinstance(exit_heads, HeadPlan), "exit_heads", "be a plan of tokenexit.heads", repr(exit_heads))
    require_count(classes, "classes")
    # The softmax of one logit is 1, whatever it is: every token would leave at once, and sure of itself.
    several = classes >= exit_heads.least_classes
    rule = "be at least 2: use two logits for two classes, whose confidence says something (`heads.ATM` may have 1)"
    require(several, "classes", rule, repr(classes))
    require(head is None or callable(head), "head", "be None or a function", repr(head))
    alike = head is None or not exit_heads.gives_masks
    require(alike, "head", "be None beside mask heads, for the scores of one image must compare", repr(head))
    after = schedule.read_after
    of_block = capacities if isinstance(capacities, Mapping) else dict.fromkeys(after, capacities)
    rule = f"be fractions for all exits, or for each of the blocks {after}"
    require(set(of_block) == set(after), "capacities", rule, repr(capacities))
    buckets = tuple(_fractions(of_block[block]) for block in after)
    model = ExitingModel(network, operator.index(classes), after, exit_heads, head, buckets, schedule)
    return model.retuned(schedule)


def wrap_gates(
    network: Network,
    schedule: Schedule | None = None,
    /,
    *,
    head: Callable[[Params, Float[Array, "*tokens width"]], Float[Array, "*tokens classes"]] | None = None,
    gates: HeadPlan | None = None,
    taps: Iterable[int] | None = None,
    capacities: Capacities = (0.25, 0.5, 0.75, 1.0),
) -> GatedModel:
    """Skip tokens of a vision transformer, block by block, by learned gates (SViT, WACV 2024).

    It makes no weights: `GatedModel.init` does, for the gates; their draws then keep most tokens. Train them with
    `sampled`, then find their thresholds with `gate_thresholds`. Run `check` once with your parameters.

    Args:
        network: The network, as pure functions.
        schedule: After which blocks there is a gate, and which tokens it skips; if left out
            `gates.published_gates` for as many blocks, which is `schedule.svit()` for twelve. Any policy that looks at
            `gate` alone will do: `policies.Budget(0.5, by="gate")` lets half of every image run.
        head: Your final head: `head(params, tokens)` gives the logits of finished tokens, each by itself, from the
            parameters of the network. None: maps only, for a decoder of yours.
        gates: A plan for the gates, which give two logits, keep and skip. `heads.MLP` with a quarter of the channels
            between its layers if left out: published.
        taps: After how many blocks maps are handed out, ascending; the last if left out.
        capacities: Buckets, as fractions of the slots of an image, prefix tokens among them: what runs after a gate is
            held by the smallest bucket that holds the fullest image. For all gates, or for each. A single one is a
            fixed budget, with one static shape. If the greatest is less than 1, the tokens that the gate is least sure
            to keep and that it has no room for are skipped as well, and are counted in `GatedOutput.overflow`.

    Returns:
        The model with gates.

    Raises:
        TokenExitError: If an argument is not what it should be, or a gate or tap lies outside of the network.
    """
    _require_network(network)
    schedule = published_gates(max(network.depth, 2)) if schedule is None else schedule
    require(isinstance(schedule, Schedule), "schedule", "be a tokenexit.schedule.Schedule", repr(schedule))
    require(head is None or callable(head), "head", "be None or a function", repr(head))
    plan = published_gate(network.width) if gates is None else gates
    each = isinstance(plan, HeadPlan) and plan.reads == "tokens" and not plan.translates
    require(each, "gates", "be a plan of tokenexit.heads that treats each token by itself", repr(plan))
    depth, after = network.depth, schedule.after
    require(taps is None or isinstance(taps, Iterable), "taps", "be several blocks, as (6, 12)", repr(taps))
    tapped = (depth,) if taps is None else tuple(taps)
    whole = all(isinstance(tap, int) and not isinstance(tap, bool) and 1 <= tap <= depth for tap in tapped)
    require(whole and list(tapped) == sorted(set(tapped)), "taps", f"be ascending blocks from 1 to {depth}", tapped)
    of_block = capacities if isinstance(capacities, Mapping) else dict.fromkeys(after, capacities)
    rule = f"be fractions for all gates, or for each of those after the blocks {after}"
    require(set(of_block) == set(after), "capacities", rule, repr(capacities))
    buckets = tuple(_fractions(of_block[block]) for block in after)
    model = GatedModel(network, after, plan, head, tapped, buckets, schedule)
    return model.retuned(schedule)


def wrap_semantic(
    network: Network,
    plan: SemanticPlan = stvit(),
    /,
    *,
    after: int,
    until: int | None,
    heads: int,
    hidden: int | None = None,
    epsilon: float = 1e-6,
) -> SemanticModel:
    """Let blocks of a vision transformer run on semantic tokens (STViT, CVPR 2023).

    Two of its blocks, or three, give their place to layers that make semantic tokens and recover all tokens of them. It
    makes no weights: `SemanticModel.init` does, for these layers, and `SemanticModel.adopt` lets them start from the
    blocks' own. The result must be trained. Run `check` once with your parameters.

    Args:
        network: The network, as pure functions.
        plan: How semantic tokens come about; `tokenexit.semantic.stvit()` if left out, 16 for an image. For blocks with
            layer-scale, one with a `layer_scale`.
        after: After how many blocks there are semantic tokens; the next two blocks are replaced.
        until: After how many blocks all tokens are there again; the block before is replaced. None: the network ends on
            semantic tokens, as for classification.
        heads: Attention heads of the new layers; as a rule those of the blocks.
        hidden: Channels inside the MLPs of the new layers; four times the width if left out.
        epsilon: What the norms of the new layers add to the variance; as a rule what those of the blocks do. That of
            ViTs is 1e-6, in timm as in `tokenexit_jax.models.vit`.

    Returns:
        The model on semantic tokens.

    Raises:
        TokenExitError: If an argument is not what it should be, the blocks do not leave room for the layers, or heads
            do not divide the width.
    """
    _require_network(network)
    require(isinstance(plan, SemanticPlan), "plan", "be a tokenexit.semantic.SemanticPlan", repr(plan))
    require_room(after, until, depth=network.depth)
    whole = hidden is None or (is_whole(hidden, least=1) and hidden <= MOST)
    require(whole, "hidden", f"be a whole number from 1 to {MOST:,}, or None", repr(hidden))
    require(is_number(epsilon) and epsilon > 0, "epsilon", "be a positive number", repr(epsilon))
    sizes = {"width": network.width, "heads": heads, "hidden": hidden, "epsilon": float(epsilon)}
    recovery = None if until is None else Recovery(plan, **sizes)
    return SemanticModel(network, SemanticTokens(plan, **sizes), recovery, after, until)


def check(
    model: ExitingModel | GatedModel | SemanticModel,
    params: Params,
    images: Array,
    /,
    *,
    dense: Callable[[Params, Array], Float[Array, "images slots width"]] | None = None,
) -> None:
    """See that the parts of a network do what the runner counts on; run it once, when parameters are there.

    That the blocks in turn are the dense network; that a block keeps images apart, treats its tokens as a set, with
    places from their positions alone, does not attend to an entry that holds no token, and attends as often as it
    should to one that stands for several; that finishing and your own head work on each token by itself; and that
    height and width of the grid are not exchanged, where the shape of the images shows it.

    Args:
        model: The wrapped model.
        params: Parameters of the network. Each block must change its tokens by more than rounding does, or nothing is
            seen of it: so they must not be zeros, nor a scale of layers so near to 0 as it may be at first.
        images: A few images, or noise of their shape.
        dense: The network's own forward up to its final norm, all tokens included, if there is one: what `embed`, the
            blocks and `finish` together are compared with.

    Raises:
        TokenExitError: If something does not hold, with the part that it is about; or if the parameters or the images
            are not finite, or the parameters let a block do nothing.

    Warns:
        UserWarning: If images hold values that no normalised image has, as of pixels from 0 to 255.
    """
    wrapped = isinstance(model, ExitingModel | GatedModel | SemanticModel)
    require(wrapped, "model", "be wrapped by `wrap`, `wrap_gates` or `wrap_semantic`", type(model).__name__)
    require(dense is None or callable(dense), "dense", "be None or a function", repr(dense))
    network = model.network
    require_array(images, "images")
    for argument, given in (("params", params), ("images", images)):
        _require_finite(given, argument)
    if jnp.issubdtype(images.dtype, jnp.floating) and images.size > 0 and float(jnp.abs(images).max()) > LARGEST:
        warn_of_pixels()  # here alone: at a call images may be traced, or on a device that would have to be waited for
    known = embed(network, params, images)
    _require_reaching(network, params, images, known)
    batch = known.tokens
    if dense is not None:
        finished = network.finish(params, _through(network, params, known))
        _require_close(finished, dense(params, images), "network", "give the same tokens as `dense`")
    for index in range(network.depth):
        _check_block(network, index, params, known)
    _require_token_wise(lambda some: network.finish(params, some), batch, "network.finish")
    if not isinstance(model, SemanticModel) and model.head is not None:
        head = model.head
        logits = _require_token_wise(lambda some: head(params, some), network.finish(params, batch), "head")
        if isinstance(model, GatedModel):
            return
        require(logits.shape[-1] == model.classes, "head", f"give {model.classes} classes", logits.shape[-1])


def _require_network(network: Any) -> None:
    rule = "be a tokenexit_jax.Network (docs/howto/jax.md; `tokenexit_jax.models.vit` has a ViT, and `split` makes one)"
    require(isinstance(network, Network), "network", rule, type(network).__name__)


def _check_block(network: Network, index: int, params: Params, known: Embedded) -> None:
    """Run one block on entries drawn from its tokens; in two shapes only, so that little is compiled."""
    slots, argument = known.tokens.shape[1], f"network.blocks[{index}]"
    half = (slots + 1) // 2
    entries = max(slots, half + 1)
    images = jnp.asarray([[0], [known.tokens.shape[0] - 1]])

    def run(slot: Array, counts: Array) -> Array:
        own = None if known.positions is None else jnp.take(known.positions, slot, axis=0)
        given = known.tokens[images, slot]
        return run_block(network, index, params, given, jnp.broadcast_to(counts, slot.shape), own)

    # The tokens of one image, and some others of another.
    few = jnp.stack([jnp.arange(half), slots - 1 - jnp.arange(half)])
    ones = jnp.ones(half, dtype=jnp.float32)
    alone = run(few, ones)
    change, least = _difference(alone, known.tokens[images, few]), _tolerance(alone)
    rule = f"let {argument} change its tokens, some channel by more than {least} of its size, or nothing is seen of it"
    require(change > least, "params", rule, f"a change of {change:.3g}")
    other = run(few.at[1].set(few[0]), ones)
    _require_close(other[:1], alone[:1], argument, "treat each image by itself")
    rule = "treat tokens as a set, and know their places from `positions` alone"
    _require_close(run(few[:, ::-1], ones)[:, ::-1], alone, argument, rule)
    held = jnp.pad(ones, (0, entries - half))
    for filling in (0, slots - 1):
        padded = run(jnp.pad(few, ((0, 0), (0, entries - half)), constant_values=filling), held)
        _require_close(padded[:, :half], alone, argument, "attend to no entry whose `counts` is 0")
    first = jnp.concatenate([few, jnp.broadcast_to(few[:, :1], (2, entries - half))], axis=1)
    once, twice = run(first, held.at[0].set(2)), run(first, held.at[half].set(1))
    _require_close(once[:, :half], twice[:, :half], argument, "attend to an entry as often as `counts` says")


def _fractions(given: Any) -> tuple[float, ...]:
    numbers = isinstance(given, Sequence) and len(given) > 0
    numbers = numbers and all(isinstance(one, Real) and not isinstance(one, bool) for one in given)
    ok = numbers and all(0 < one <= 1 for one in given)
    rule = "be one or more fractions, greater than 0 and at most 1, in a tuple such as (0.5, 1.0)"
    require(ok, "capacities", rule, repr(given))
    return tuple(sorted({float(one) for one in given}))


def _through(network: Network, params: Params, known: Embedded) -> Array:
    batch, positions = known.tokens, known.positions
    counts = jnp.ones(batch.shape[:2], dtype=jnp.float32)
    if positions is not None:
        positions = jnp.broadcast_to(positions, (batch.shape[0], *positions.shape))
    for index in range(network.depth):
        batch = run_block(network, index, params, batch, counts, positions)
    return batch


def _require_token_wise(function: Callable[[Array], Array], batch: Array, argument: str) -> Array:
    try:
        every, few = function(batch), function(batch[:, ::2])
    except (TokenExitError, jax.errors.JAXTypeError):
        raise
    except (TypeError, ValueError) as error:  # shapes that do not go together, as a rule
        rule = f"take tokens of shape (images, tokens, {batch.shape[-1]}), any number of them"
        raise TokenExitError(f"`{argument}` must {rule}, got the error: {error}") from error
    require(every.shape[:2] == batch.shape[:2], argument, f"keep the axes {batch.shape[:2]}", f"{every.shape}")
    _require_close(every[:, ::2], few, argument, "treat each token by itself")
    return every


def _require_close(found: Array, wanted: Array, argument: str, rule: str) -> None:
    require(found.shape == wanted.shape, argument, rule, f"shape {found.shape} instead of {wanted.shape}")
    worst = _difference(found, wanted)
    require(worst <= _tolerance(wanted), argument, rule, f"a difference of {worst:.3g} of a channel's size")


def _tolerance(wanted: Array) -> float:
    """What rounding may do, relative to a channel's size."""
    return 5e-3 if jnp.finfo(wanted.dtype).bits >= 32 else 1e-1


def _difference(found: Array, wanted: Array) -> float:
    """The greatest of all channels, relative to its size: some of a ViT are hundreds of times larger than others."""
    found, wanted = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (found, wanted))
    size = jnp.sqrt(jnp.square(wanted).mean(axis=0))
    gap = jnp.sqrt(jnp.square(found - wanted).mean(axis=0))
    relative = gap / (size + 0.01 * jnp.median(size) + jnp.finfo(jnp.float32).tiny)
    return float(jnp.nan_to_num(relative, nan=jnp.inf).max())


def _require_finite(values: Any, argument: str) -> None:
    numbers = {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(values)
        if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    }
    finite = jax.jit(lambda leaves: {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()})(numbers)
    wrong = [name for name, known in finite.items() if not known]
    require(not wrong, argument, "be finite", f"NaN or infinity in {', '.join(wrong[:4]) or 'it'}")


def _require_reaching(network: Network, params: Params, images: Array, known: Embedded) -> None:
    """Raise if a grid that is declared to cover the whole images leaves their last row or column out."""
    heights = whole_sides(known.grid, images.shape) if images.ndim == 4 else []
    if known.area is not None or len(heights) != 1 or not jnp.issubdtype(images.dtype, jnp.floating):
        return
    weights = jax.random.normal(jax.random.key(0), known.tokens.shape)
    grads = jax.grad(lambda given: (weights * network.embed(params, given).tokens.astype(jnp.float32)).sum())(images)
    last = {axis: jnp.take(grads, -1, axis=axis) for axis in (heights[0], heights[0] + 1)}
    left_out = [axis for axis, line in last.items() if not line.any()] if grads.any() else []
    got = f"tokens that do not depend on the last pixels along axis {left_out} of images of shape {images.shape}"
    require(not left_out, "images", f"be looked at as a whole, or {DECLARED}", got)
