"""How easy a token is, read off its class logits.

Every score is computed in float32 whatever comes in: half precision turns a confidence of 0.951 into 0.949, and
a logit of 70,000 into infinity. A logit that is NaN makes the score NaN, and a NaN score passes no threshold, so
that a token about which nothing is known goes on computing.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jaxtyping import Float

from tokenexit._array import Array, aligned, array_namespace, counting, softmax
from tokenexit.errors import require

__all__ = ["SCORES", "Score", "confidence", "entropy", "margin", "mask_scores"]

ONE = "the softmax of one is always 1, so that every token would be certain: for yes or no, use two logits"
"""Why logits of one class are refused, as the end of an error message."""


def confidence(logits: Float[Array, "*tokens classes"], /) -> Float[Array, "*tokens"]:
    """Largest softmax probability: the score of DToP (ICCV 2023, section 3.2) and DoViT (2023, section 3.1).

    Args:
        logits: Class scores before softmax.

    Returns:
        Confidence in (0, 1], float32; 1 is certain.

    Raises:
        TokenExitError: If `logits` has no class axis, or fewer than two classes.
    """
    _require_classes(logits, "logits", f"two classes on its last axis ({ONE})", least=2)
    return array_namespace(logits).max(softmax(logits), axis=-1)


def entropy(logits: Float[Array, "*tokens classes"], /) -> Float[Array, "*tokens"]:
    """Entropy of the softmax divided by log(classes): the score of PAUMER (BMVC 2022, section 3).

    The division makes a threshold mean the same for 11 and for 150 classes.

    Args:
        logits: Class scores before softmax.

    Returns:
        Normalised entropy in [0, 1], float32; 0 is certain.

    Raises:
        TokenExitError: If `logits` has no class axis, or fewer than two classes.
    """
    xp = array_namespace(logits)
    shifted = _shifted(logits)
    weight = xp.exp(shifted)
    total = xp.sum(weight, axis=-1)
    # x exp(x) tends to 0 as x falls: an impossible class (a logit of -inf) adds no entropy.
    weighted = xp.where(weight == 0, xp.zeros_like(weight), weight * shifted)
    nats = xp.log(total) - xp.sum(weighted, axis=-1) / total
    nats = xp.where(nats < 0, xp.zeros_like(nats), nats)  # rounding; NaN is kept
    return nats / math.log(logits.shape[-1])


def margin(logits: Float[Array, "*tokens classes"], /) -> Float[Array, "*tokens"]:
    """Largest softmax probability less the second largest.

    Args:
        logits: Class scores before softmax.

    Returns:
        Margin in [0, 1], float32; 1 is certain.

    Raises:
        TokenExitError: If `logits` has no class axis, or fewer than two classes.
    """
    xp = array_namespace(logits)
    weight = xp.exp(_shifted(logits))
    best = xp.argmax(weight, axis=-1, keepdims=True)
    classes = aligned(counting(weight.shape[-1], weight), weight.ndim)
    runner_up = xp.max(xp.where(classes == best, xp.zeros_like(weight), weight), axis=-1)
    return (xp.max(weight, axis=-1) - runner_up) / xp.sum(weight, axis=-1)


def mask_scores(
    mask_logits: Float[Array, "*tokens classes"], presence: Float[Array, "*#tokens classes"], /
) -> Float[Array, "*tokens classes"]:
    """Presence times the sigmoid of the mask: the class scores of an ATM head (DToP, ICCV 2023, section 3.2).

    They are not normalised over the classes, so they are no logits: hand them to a policy as
    `Evidence(class_scores=...)`. Its confidence is then the greatest of them, which is DToP's.

    Args:
        mask_logits: Mask logits of every token and class.
        presence: Probability that the class is in the token's image; for every token, or one row for all.

    Returns:
        Scores in [0, 1], float32.

    Raises:
        TokenExitError: If `mask_logits` has no class axis or no classes, or the classes of the two differ.
    """
    _require_classes(mask_logits, "mask_logits", "one class on its last axis", least=1)
    require(
        presence.ndim >= 1 and presence.shape[-1] == mask_logits.shape[-1],
        "presence",
        f"have {mask_logits.shape[-1]} classes on its last axis",
        f"shape {tuple(presence.shape)}",
    )
    xp = array_namespace(mask_logits, presence)
    mask_logits = xp.astype(mask_logits, xp.float32)
    falling = xp.exp(-xp.abs(mask_logits))  # never overflows
    sigmoid = xp.where(mask_logits >= 0, 1 / (1 + falling), falling / (1 + falling))
    return aligned(xp.astype(presence, xp.float32), sigmoid.ndim) * sigmoid


@dataclass(frozen=True)
class Score:
    """A score of tokens that policies can compare and rank by.

    Attributes:
        of: Computes it from logits.
        direction: On which side of a threshold a token is easy.
    """

    of: Callable[[Float[Array, "*tokens classes"]], Float[Array, "*tokens"]]
    direction: Literal["above", "below"]


SCORES: Mapping[str, Score] = MappingProxyType(
    {"confidence": Score(confidence, "above"), "entropy": Score(entropy, "below"), "margin": Score(margin, "above")}
)
"""The scores of logits, by name: those that `policies.Budget` ranks by, beside `gate`."""


def _shifted(logits: Array) -> Array:
    """Logits in float32, less their maximum, so that no exponential overflows."""
    xp = array_namespace(logits)
    _require_classes(logits, "logits", f"two classes on its last axis ({ONE})", least=2)
    logits = xp.astype(logits, xp.float32)
    return logits - xp.max(logits, axis=-1, keepdims=True)


def _require_classes(values: Array, argument: str, classes: str, *, least: int) -> None:
    require(
        values.ndim >= 1 and values.shape[-1] >= least,
        argument,
        f"have at least {classes}",
        f"shape {tuple(values.shape)}",
    )
