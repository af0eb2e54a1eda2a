"""Heads in JAX: pure functions of the plans of `tokenexit.heads`.

Their weights lie in one flat dictionary, under the names and in the layouts of PyTorch's `state_dict` of the same plan,
so that heads fitted in one framework are read in the other without any renaming.
"""

from functools import lru_cache

import jax
from jax import Array
from jax import numpy as jnp
from jaxtyping import Bool, Float

from tokenexit import TokenExitError
from tokenexit.cost import HeadCost, of_head
from tokenexit.errors import require
from tokenexit.heads import ATM, FCN, MLP, HeadPlan, Linear, Neighbourhood, Translator
from tokenexit_jax._given import new_keys, require_count
from tokenexit_jax._layers import (
    Weights,
    batch_norm,
    batch_norm_in_training,
    layer_norm,
    linear,
    new_batch_norm,
    new_linear,
    new_norm,
    zero_linear,
)
from tokenexit_jax.heads.masks import Masks, new_masks, read_masks
from tokenexit_jax.networks.protocol import Heads

__all__ = ["Masks", "cost", "init", "read", "read_in_training", "read_masks", "translate"]


def init(plan: HeadPlan, key: Array, /, *, width: int, classes: int) -> dict[str, Array]:
    """Random weights of a head, from the distributions that PyTorch draws from.

    A new `Translator` gives tokens back as they are, and foretells an error as large as the variance.

    Args:
        plan: Which kind of head.
        key: Random key.
        width: Channels of a token.
        classes: Class count.

    Returns:
        The weights by name, float32; those of `FCN` have the statistics of its norm among them.

    Raises:
        TokenExitError: If `plan` is not of `tokenexit.heads`, `key` no random key, a size no whole number from 1 up, or
            an `ATM` does not fit the width.
    """
    require(isinstance(plan, HeadPlan), "plan", "be a plan of tokenexit.heads", repr(plan))
    for argument, value in (("width", width), ("classes", classes)):
        require_count(value, argument)
    first, last = new_keys(key)
    match plan:
        case Linear():
            return {**new_norm("0", width), **new_linear(last, "1", width, classes)}
        case MLP():
            hidden = plan.hidden or width
            between = new_linear(first, "1", width, hidden)
            return {**new_norm("0", width), **between, **new_linear(last, "3", hidden, classes)}
        case FCN():
            between = new_linear(first, "0", width, plan.hidden, bias=False)
            return {**between, **new_batch_norm("1", plan.hidden), **new_linear(last, "3", plan.hidden, classes)}
        case Neighbourhood():
            hidden = plan.hidden or width
            between = new_linear(first, "0", 2 * width, hidden)
            return {**between, **new_linear(last, "2", hidden, classes)}
        case ATM():
            return new_masks(plan, first, width, classes)
        case Translator():
            hidden = plan.hidden or 2 * width
            return {
                **zero_linear("skip", width, width),
                "skip.weight": jnp.eye(width),
                **new_norm("mlp.0", width),
                **new_linear(first, "mlp.1", width, hidden),
                **zero_linear("mlp.3", hidden, width),
                **zero_linear("log_error", hidden, 1),
            }
    raise TokenExitError(f"`plan` must be a plan of tokenexit.heads, got {plan!r}")


def require_same_structure(heads: Heads, wanted: Heads, /, *, argument: str) -> Heads:
    """The weights, if they have the names and shapes that are wanted.

    Raises:
        TokenExitError: If they do not.
    """
    ours, theirs = (
        {jax.tree_util.keystr(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(one)}
        for one in (wanted, heads)
    )
    names = [name for name in sorted({*ours, *theirs}) if ours.get(name) != theirs.get(name)]
    got = ", ".join(f"{name}: {theirs.get(name)} instead of {ours.get(name)}" for name in names[:4])
    require(not names, argument, "be of the model, as `init` makes them", got)
    return heads


@lru_cache
def shapes(plan: HeadPlan, /, *, width: int, classes: int, after: tuple[int, ...], final: bool) -> Heads:
    """All heads of a model as `jax.ShapeDtypeStruct`; nothing is allocated.

    Args:
        plan: Which kind of heads.
        width: Channels of a token.
        classes: Class count.
        after: The blocks that have an exit head.
        final: Whether there is a final head of the plan `plan.final`.

    Returns:
        What `ExitingModel.init` makes, without its numbers.
    """

    def of(kind: HeadPlan) -> dict[str, jax.ShapeDtypeStruct]:
        return jax.eval_shape(lambda: init(kind, jax.random.key(0), width=width, classes=classes))

    one = of(plan)
    return {"exit_heads": {str(block): one for block in after}} | ({"head": of(plan.final)} if final else {})


def read(plan: HeadPlan, params: Weights, tokens: Float[Array, "*tokens width"], /) -> Float[Array, "*tokens classes"]:
    """Class scores of tokens, each by itself.

    Args:
        plan: A plan other than `ATM`, which looks at whole images, `read_masks`, and `Translator`, which gives tokens,
            `translate`.
        params: Its weights, as `init` made them or PyTorch's `state_dict` holds them. The norm of `FCN` uses its
            running statistics.
        tokens: The tokens, as a block leaves them; for `Neighbourhood` beside what is around them, as by
            `tokenexit.surroundings`.

    Returns:
        The logits.

    Raises:
        TokenExitError: If `plan` is no such plan.
    """
    match plan:
        case Linear():
            return linear(params, "1", layer_norm(params, "0", tokens))
        case MLP():
            hidden = linear(params, "1", layer_norm(params, "0", tokens))
            return linear(params, "3", jax.nn.gelu(hidden, approximate=False))
        case FCN():
            return linear(params, "3", jax.nn.relu(batch_norm(params, "1", linear(params, "0", tokens))))
        case Neighbourhood():
            return linear(params, "2", jax.nn.gelu(linear(params, "0", tokens), approximate=False))
    rule = "be a plan of tokenexit.heads that gives class scores, and neither masks nor tokens"
    raise TokenExitError(f"`plan` must {rule}, got {plan!r}")


def translate(
    params: Weights, tokens: Float[Array, "*tokens width"], /
) -> tuple[Float[Array, "*tokens width"], Float[Array, "*tokens"]]:
    """Tokens as the last block would leave them, by a `Translator`, each by itself.

    Args:
        params: Its weights, as `init` made them or PyTorch's `state_dict` holds them.
        tokens: The tokens, as a block leaves them.

    Returns:
        The translations in the dtype of the tokens, and the logarithm of the squared error foretold for each, relative
        to each channel's variance, in float32.
    """
    hidden = jax.nn.gelu(linear(params, "mlp.1", layer_norm(params, "mlp.0", tokens)), approximate=False)
    translated = linear(params, "skip", tokens) + linear(params, "mlp.3", hidden)
    return translated.astype(tokens.dtype), linear(params, "log_error", hidden)[..., 0].astype(jnp.float32)


def read_in_training(
    plan: HeadPlan, params: Weights, tokens: Float[Array, "*tokens width"], valid: Bool[Array, "*tokens"], /
) -> tuple[Float[Array, "*tokens classes"], dict[str, Array]]:
    """As `read`, but the batch norm of `FCN` takes its statistics from the tokens at hand, and learns them.

    A single token has no variance: for fewer than two the running statistics are used, and stay.

    Args:
        plan: A plan as for `read`.
        params: Its weights.
        tokens: The tokens.
        valid: Which entries hold a token; the others count for nothing.

    Returns:
        The logits, and the running statistics by name after this batch, none but those of `FCN`. They are constants to
        gradients.

    Raises:
        TokenExitError: If `plan` is no such plan.
    """
    if not isinstance(plan, FCN):
        return read(plan, params, tokens), {}
    hidden, statistics = batch_norm_in_training(params, "1", linear(params, "0", tokens), valid)
    return linear(params, "3", jax.nn.relu(hidden)), statistics


def cost(plan: HeadPlan, /, *, width: int, classes: int, final: HeadCost | None = None) -> HeadCost:
    """Multiply-adds of a head: `tokenexit.cost.of_head`.

    Args:
        plan: Which kind of head.
        width: Channels of a token.
        classes: Class count.
        final: Cost of the final head, for a `Translator`: it runs on what that gives. For other plans None.

    Returns:
        The cost of all that runs at the exit.

    Raises:
        TokenExitError: If `plan` is not of `tokenexit.heads`, an `ATM` does not fit the width, or `final` is missing
            for a `Translator`, or given for another.
    """
    return of_head(plan, width=width, classes=classes, final=final)
