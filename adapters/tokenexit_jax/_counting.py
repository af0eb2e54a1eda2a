"""Multiply-adds of a function, read off its program; nothing is run."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

__all__ = ["multiply_adds"]


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
