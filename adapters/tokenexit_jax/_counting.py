"""Multiply-adds of a function, or of a network's parts, read off their programs; nothing is run."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr

from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import require
from tokenexit_jax._passing import embed
from tokenexit_jax.networks import Embedded, Network, Params

__all__ = ["multiply_adds", "network_cost"]


def multiply_adds(function: Callable, /, *arguments: Any) -> int:
    """Multiply-adds of the products and convolutions in a function.

    Of branches the costliest is counted, and the body of a loop of unknown length once.

    Args:
        function: A function that JAX can trace.
        arguments: What it is given; `jax.ShapeDtypeStruct` stands for arrays.

    Returns:
        The count.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def network_cost(network: Network, params: Params, images: Any, /) -> Cost:
    """Multiply-adds of the parts of a network; it has no heads.

    Args:
        network: The network.
        params: Its parameters, or `jax.ShapeDtypeStruct` in their place.
        images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

    Returns:
        The cost of the parts.

    Raises:
        TokenExitError: If the attention of a block is not over `width` channels, or it has other work that does not
            grow with the tokens.
    """
    embedded = jax.eval_shape(partial(embed, network), params, images)
    height, across = embedded.grid
    batch = jax.tree.leaves(images)[0].shape[0]
    return Cost(
        embed=multiply_adds(partial(embed, network), params, images) // (batch * height * across),
        blocks=tuple(_linear(network, index, params, embedded) for index in range(network.depth)),
        width=network.width,
        prefix=embedded.prefix,
        exit_heads={},
        head=HeadCost(0),
    )


def _count(program: Jaxpr) -> int:
    return sum(_of(equation) for equation in program.eqns)


def _of(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out_features = kernel[parameters["dimension_numbers"].rhs_spec[0]]
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // out_features
    inside = [_count(program) for program in _programs(parameters)]
    if name == "cond":
        return max(inside, default=0)
    return sum(inside) * parameters.get("length", 1) if name == "scan" else sum(inside)


def _programs(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in parameters.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, Jaxpr):
                yield one


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
