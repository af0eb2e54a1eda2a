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
from tokenexit_jax.networks.checks import embed
from tokenexit_jax.networks.protocol import Embedded, Network, Params

__all__ = ["head_cost", "multiply_adds", "network_cost"]

_OPAQUE = ("pallas_call", "shard_map", "ffi_call", "custom_call", "dot_product_attention", "scaled_matmul")
"""How primitives are called of which a program does not tell the products, or only those of one shard."""


def multiply_adds(function: Callable, /, *arguments: Any, part: str = "function") -> int:
    """Multiply-adds of the products and convolutions in a function.

    Of branches the costliest is counted, and the body of a loop of unknown length once.

    Args:
        function: A function that JAX can trace.
        arguments: What it is given; `jax.ShapeDtypeStruct` stands for arrays.
        part: What the function is called in messages.

    Returns:
        The count.

    Raises:
        TokenExitError: If it has kernels of its own, with products that its program does not show, or is of one shard.
    """
    program = jax.make_jaxpr(function)(*arguments).jaxpr
    opaque = sorted(name for name in _names(program) if name.startswith(_OPAQUE))
    rule = "be made of JAX's own products and convolutions on whole arrays, for its multiply-adds to be counted"
    require(not opaque, part, rule, ", ".join(opaque))
    return _count(program)


def network_cost(network: Network, params: Params, images: Any, /) -> Cost:
    """Multiply-adds of the parts of a network; it has no heads.

    Args:
        network: The network.
        params: Its parameters, or `jax.ShapeDtypeStruct` in their place.
        images: Images of the size in question, or a `jax.ShapeDtypeStruct`.

    Returns:
        The cost of the parts.

    Raises:
        TokenExitError: If the attention of a block is not over `width` channels, it has other work that does not grow
            with the tokens, or a part has kernels of its own.
    """
    embedded = jax.eval_shape(partial(embed, network), params, images)
    height, across = embedded.grid
    batch = jax.tree.leaves(images)[0].shape[0]
    require(batch > 0, "images", "hold at least one image", "none")
    whole = multiply_adds(partial(embed, network), params, images, part="network.embed") // batch
    each, rest = divmod(whole, height * across)
    return Cost(
        embed=each,
        blocks=tuple(_linear(network, index, params, embedded) for index in range(network.depth)),
        width=network.width,
        prefix=embedded.prefix,
        exit_heads={},
        head=HeadCost(0),
        decoder=rest,
    )


def head_cost(head: Callable, params: Params, token: jax.ShapeDtypeStruct, /) -> HeadCost:
    """Multiply-adds of a final head for a token; what it makes of its parameters alone is not of an image.

    Args:
        head: The head.
        params: Its parameters, or `jax.ShapeDtypeStruct` in their place.
        token: One token of one image.

    Returns:
        The cost.

    Raises:
        TokenExitError: If it has kernels of its own.
    """
    two = jax.ShapeDtypeStruct((1, 2, *token.shape[2:]), token.dtype)
    alone, both = (multiply_adds(head, params, tokens, part="head") for tokens in (token, two))
    return HeadCost(both - alone)


def _names(program: Jaxpr) -> Iterator[str]:
    for equation in program.eqns:
        yield equation.primitive.name
        for inside in _programs(equation.params):
            yield from _names(inside)


def _count(program: Jaxpr) -> int:
    return sum(_of(equation) for equation in program.eqns)


def _of(equation: Any) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if name == "ragged_dot_general":
        (contracted, _), _ = parameters["ragged_dot_dimension_numbers"].dot_dimension_numbers
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
        return multiply_adds(network.blocks[index], params, batch, counts, positions, part=f"network.blocks[{index}]")

    one, two, four = of(1), of(2), of(4)
    attention, linear = (two - 2 * one) // 2, (4 * one - two) // 2
    rule = f"attend over {network.width} channels, and have no other work than linear layers on tokens"
    plain = attention == 2 * network.width and four == 4 * linear + 16 * attention
    require(plain, f"network.blocks[{index}]", rule, f"{one}, {two} and {four} multiply-adds for 1, 2 and 4 tokens")
    return linear
