"""Learned gates: dynamic token skipping between blocks (SViT, WACV 2024, section 3.2).

A gate is a small head that gives every patch two logits, *keep* and *skip*: by default `heads.MLP` with a quarter of
the channels between its layers. Trained, a decision is drawn; in use, the probability of *keep* is compared with a
threshold, by `policies.GateBelow`, and nothing is drawn. `Schedule.stages` is the itinerary of a forward pass, and
`decide` the decision of a gate in it. All functions take arrays of any library, and gradients flow through them,
decisions aside.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from jaxtyping import Bool, Float

from tokenexit._array import Array, aligned, array_namespace, counting, data_dependent_shapes
from tokenexit._plain import is_number, is_whole
from tokenexit.errors import require
from tokenexit.heads import MLP
from tokenexit.policies import Evidence, GateBelow, Policy
from tokenexit.schedule import Exit, Schedule, svit

__all__ = [
    "FIRST_BIAS",
    "calibrated",
    "decide",
    "keep_probability",
    "published_gate",
    "published_gates",
    "ratio_loss",
    "returnable",
    "soft_draw",
    "staged_rates",
    "threshold_for",
]

FIRST_BIAS = (2.0, 0.0)
"""Bias of a new gate's last layer: its keep probability is 0.88 at first, so training starts near the dense network."""


def decide(
    policy: Policy,
    probability: Float[Array, "images patches"],
    /,
    *,
    grid: tuple[int, int],
    before: Bool[Array, "images patches"] | None = None,
) -> Bool[Array, "images patches"]:
    """Decision of a gate: the patches that are active until the next gate.

    Args:
        policy: The policy of the gate; the patches that it lets leave are skipped.
        probability: `keep_probability` of every patch. The decision has no gradient.
        grid: Height and width of the patch grid.
        before: Where skipped tokens never return, the patches kept by the previous gate: the others are skipped again,
            and do not compete with these (`returnable`). All patches are candidates if left out.

    Returns:
        Mask of the patches that are kept.

    Raises:
        TokenExitError: If the shapes do not fit, or the policy compares other scores than a gate's.
    """
    height, width = grid
    require(
        probability.ndim == 2 and probability.shape[1] == height * width,
        "probability",
        f"have shape (images, {height * width}), for a grid of {height} x {width}",
        f"shape {tuple(probability.shape)}",
    )
    candidates = returnable(probability, before)
    xp, (images, patches) = array_namespace(candidates), candidates.shape
    row = xp.reshape(candidates, (images * patches,))
    index = counting(images * patches, row)
    evidence = Evidence(
        gate=row,
        image=index // max(patches, 1),
        images=images,
        grid=grid,
        position=index % max(patches, 1),
        # All entries are patches; but given a mask, policies have shapes that do not depend on the data.
        valid=None if data_dependent_shapes(xp) else xp.ones_like(row, dtype=xp.bool),
    )
    keep = ~xp.reshape(policy(evidence), (images, patches))
    return keep if before is None else keep & before


def returnable(
    probability: Float[Array, "images patches"], before: Bool[Array, "images patches"] | None, /
) -> Float[Array, "images patches"]:
    """Keep probability as a policy sees it: 0 for patches that were skipped before and never return.

    Args:
        probability: `keep_probability` of every patch.
        before: The patches kept by the previous gate, where skipped tokens never return; None where they return.

    Returns:
        The probabilities.

    Raises:
        TokenExitError: If the shapes differ.
    """
    if before is None:
        return probability
    fits = tuple(before.shape) == tuple(probability.shape)
    require(fits, "before", f"have shape {tuple(probability.shape)}", f"shape {tuple(before.shape)}")
    return array_namespace(probability).where(before, probability, 0.0)


def published_gate(width: int, /) -> MLP:
    """Plan of a gate as published (SViT, WACV 2024, section 3.2): two layers, with a quarter of the channels between.

    Args:
        width: Channels of a token.

    Returns:
        The plan; a gate has two classes, *keep* and *skip*.
    """
    return MLP(max(1, width // 4))


def published_gates(depth: int, /) -> Schedule:
    """Plan with gates where they were published, at any depth: before all blocks behind the first quarter.

    Args:
        depth: Blocks of the network.

    Returns:
        `schedule.svit()` for as many blocks.

    Raises:
        TokenExitError: If there are fewer than two blocks, between which a gate could be.
    """
    require(is_whole(depth, least=2), "depth", "be a whole number of blocks from 2 up", repr(depth))
    return svit(after=range(max(1, int(depth / 4 + 0.5)), depth))


def keep_probability(logits: Float[Array, "*tokens 2"], /) -> Float[Array, "*tokens"]:
    """Probability that a token is kept, in float32: a softmax over *keep* and *skip*.

    Args:
        logits: What a gate gives: *keep* first, then *skip*.

    Returns:
        Probabilities; NaN where a logit is none, which keeps the token (`policies.GateBelow`).

    Raises:
        TokenExitError: If the last axis has not two entries.
    """
    return _sigmoid(_preference(logits))


def soft_draw(
    logits: Float[Array, "*tokens 2"], uniform: Float[Array, "*tokens"], /, *, temperature: float = 1.0
) -> Float[Array, "*tokens"]:
    """A decision drawn for every token, relaxed: Gumbel-softmax (Jang et al., ICLR 2017) over *keep* and *skip*.

    A token is kept if the value is above one half; that happens with `keep_probability`, whatever the temperature. The
    straight-through estimator takes the decision forward, and the gradient of this value backward.

    Args:
        logits: What a gate gives: *keep* first, then *skip*.
        uniform: Numbers drawn evenly from [0, 1), in float32 or wider: the difference of two Gumbel variables is the
            logit of such a number.
        temperature: Divides the noisy logits. Published: 1.

    Returns:
        Values in [0, 1], in float32.

    Raises:
        TokenExitError: If the last axis has not two entries, the shapes differ, or the temperature is not positive.
    """
    preference = _preference(logits)
    require(
        tuple(uniform.shape) == tuple(preference.shape),
        "uniform",
        f"have one number for each token, shape {tuple(preference.shape)}",
        f"shape {tuple(uniform.shape)}",
    )
    require(is_number(temperature) and temperature > 0, "temperature", "be positive", repr(temperature))
    xp = array_namespace(preference)
    # Away from 0 and 1, where the noise would be infinite.
    inside = xp.clip(xp.astype(uniform, xp.float32), 1e-7, 1 - 1e-7)
    return _sigmoid((preference + xp.log(inside) - xp.log1p(-inside)) / temperature)


def ratio_loss(
    keep: Float[Array, "images gates patches"],
    rates: Float[Array, "gates"],
    /,
    *,
    of_each: Literal["batch", "image"] = "batch",
    valid: Bool[Array, "images patches"] | None = None,
) -> Float[Array, ""]:
    """What holds the gates to their rates: mean over gates of (share kept - rate) squared (SViT, WACV 2024, 3.3).

    Args:
        keep: Decisions, 1 or 0, with gradients (`soft_draw`).
        rates: Share of the patches that each gate is to keep.
        of_each: Unit of the rate. Of the `batch`: images trade with each other, and the rate follows the image;
            published. Of each `image`: all images have one rate.
        valid: Patches that are no padding; all, if left out.

    Returns:
        The loss, in float32. Published weight: 4.

    Raises:
        TokenExitError: If the shapes do not fit, or `of_each` is unknown.
    """
    require(keep.ndim == 3, "keep", "have shape (images, gates, patches)", f"shape {tuple(keep.shape)}")
    images, gates, patches = keep.shape
    require(tuple(rates.shape) == (gates,), "rates", f"have shape ({gates},)", f"shape {tuple(rates.shape)}")
    require(of_each in ("batch", "image"), "of_each", "be 'batch' or 'image'", repr(of_each))
    xp = array_namespace(keep, rates)
    keep, rates = xp.astype(keep, xp.float32), xp.astype(rates, xp.float32)
    if valid is None:
        counts = xp.ones_like(keep[:, :1, :])
    else:
        fits = tuple(valid.shape) == (images, patches)
        require(fits, "valid", f"have shape ({images}, {patches})", f"shape {tuple(valid.shape)}")
        counts = xp.astype(valid, xp.float32)[:, None, :]
    if of_each == "batch":
        share = xp.sum(keep * counts, axis=(0, 2)) / xp.clip(xp.sum(counts, axis=(0, 2)), 1.0)
    else:
        share = xp.sum(keep * counts, axis=2) / xp.clip(xp.sum(counts, axis=2), 1.0)
    # Without a gate that decides there is nothing to hold.
    return xp.sum((share - aligned(rates, share.ndim)) ** 2) / max(math.prod(share.shape), 1)


def threshold_for(probability: Float[Array, "tokens"], rate: float, /) -> float:
    """The threshold under which a gate keeps a share of these tokens: the gate's calibration.

    With the noise of training turned off a gate keeps another share than it was trained to: so the threshold is read
    off the probabilities of a calibration set.

    Args:
        probability: `keep_probability` of the tokens; NaN, which is always kept, counts as the highest.
        rate: The share that is to be kept, in [0, 1].

    Returns:
        The threshold, in [0, 1], half way between the last token kept and the first that is not; a token is kept
        unless its probability is strictly lower. Equal probabilities are kept together: then the share is larger.

    Raises:
        TokenExitError: If there are no tokens, or the rate is no share.
    """
    count = math.prod(probability.shape)
    require(probability.ndim == 1 and count > 0, "probability", "hold at least one token", tuple(probability.shape))
    require(_is_share(rate), "rate", "be a number in [0, 1]", repr(rate))
    xp = array_namespace(probability)
    probability = xp.where(xp.isnan(probability), 1.0, xp.astype(probability, xp.float32))
    kept = round(rate * count)
    if kept == count:
        return 0.0
    order = xp.sort(probability, descending=True)
    below = float(order[kept])
    return (below + (float(order[kept - 1]) if kept else 1.0)) / 2


def calibrated(
    plan: Schedule,
    rates: float | Mapping[int, float],
    probabilities: Callable[[Schedule, int], Float[Array, "patches"]],
    /,
    *,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Schedule:
    """Calibrate gates in the order of the blocks, each behind those before it, by `threshold_for`.

    Args:
        plan: The schedule whose gates are calibrated; only their blocks and the carry are used.
        rates: Share of all patches that each gate is to keep; one for all, or one for each by block.
        probabilities: `probabilities(earlier, after)` gives the `returnable` probabilities of all patches of a
            calibration set at the gate after block `after`, where the gates before it decide by the plan `earlier`.
            It is called once for each gate, in order; `earlier` is the plan of the last call and one gate more.
        progress: Wraps the loop over the gates.

    Returns:
        The plan with `GateBelow` and its threshold at every gate.

    Raises:
        TokenExitError: If a rate is no share, a gate has none, or there are no patches.
    """
    found = dataclasses.replace(plan, exits=())
    for after, rate in progress(rates_by_gate(rates, plan.after).items()):
        policy = GateBelow(threshold_for(probabilities(found, after), rate))
        found = dataclasses.replace(found, exits=(*found.exits, Exit(after, policy)))
    return found


def staged_rates(after: Iterable[int], /, *, rates: Iterable[float] = (0.7, 0.49, 0.343)) -> dict[int, float]:
    """Rates that fall in stages, the gates shared evenly among them.

    Args:
        after: After how many blocks there is a gate, ascending.
        rates: Share kept by the gates of each stage. Published: 0.7, 0.49 and 0.343, for three gates each (SViT, WACV
            2024, section 4).

    Returns:
        The rate of each gate, by block.

    Raises:
        TokenExitError: If there is no gate or no rate, or a rate is no share.
    """
    for argument, value in (("after", after), ("rates", rates)):
        require(isinstance(value, Iterable), argument, "be several numbers, in a tuple", repr(value))
    blocks, stages = tuple(after), tuple(rates)
    whole = all(is_whole(block, least=1) for block in blocks) and list(blocks) == sorted(set(blocks))
    require(whole and len(blocks) > 0, "after", "be ascending blocks from 1 up, at least one", blocks)
    require(len(stages) > 0 and all(map(_is_share, stages)), "rates", "be numbers in [0, 1], at least one", stages)
    return {block: stages[index * len(stages) // len(blocks)] for index, block in enumerate(blocks)}


def rates_by_gate(rates: float | Mapping[int, float], after: Iterable[int], /) -> dict[int, float]:
    """Keep rates by gate, from one rate for all gates or one for each of them.

    Args:
        rates: Share of the patches to keep: a number in [0, 1], or one for each block in `after`.
        after: The blocks before the gates.

    Returns:
        The rate of each gate.

    Raises:
        TokenExitError: If a rate is no share, or a gate has none.
    """
    blocks = tuple(after)
    given: dict[int, float] = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(blocks, rates)
    fits = set(given) == set(blocks)
    require(fits, "rates", f"be one number, or one for each gate, after blocks {blocks}", repr(rates))
    require(all(map(_is_share, given.values())), "rates", "be numbers in [0, 1]", repr(rates))
    return {block: float(given[block]) for block in blocks}


def coin_for(after: int, /, *, rates: Mapping[int, float], deciding: Iterable[int], returning: str) -> float:
    """Bernoulli rate of random decisions that realise a gate's keep ratio.

    Args:
        after: The gate that random decisions replace.
        rates: Share of all patches that each gate is to keep.
        deciding: The gates that decide, by the blocks before them.
        returning: As in `carries.Preserved`: if `never`, decisions are about the patches kept by the gate before.

    Returns:
        The probability of keeping a token that is decided at random.
    """
    earlier = [block for block in deciding if block < after]
    if returning == "every gate" or not earlier:
        return rates[after]
    return min(1.0, rates[after] / max(rates[max(earlier)], 1e-9))


def _preference(logits: Array) -> Array:
    got = f"shape {tuple(logits.shape)}"
    require(
        logits.ndim >= 1 and logits.shape[-1] == 2, "logits", "have two entries, keep and skip, on the last axis", got
    )
    xp = array_namespace(logits)
    wide = xp.astype(logits, xp.float32)
    return wide[..., 0] - wide[..., 1]


def _sigmoid(x: Array) -> Array:
    # By tanh, which neither overflows nor has a gradient that is no number.
    xp = array_namespace(x)
    return 0.5 * (xp.tanh(0.5 * x) + 1.0)


def _is_share(value: Any) -> bool:
    return is_number(value) and bool(0 <= value <= 1)
