"""Plans and results as pytrees: their numbers are leaves, and all else is part of the program.

So a plan is an argument of a compiled function, and other thresholds are other values of it: nothing is compiled again.
A policy of your own becomes one by `register`. What JAX builds from its leaves is not checked anew, for its numbers may
not be known yet.

A number is the same leaf, and the program the same, whether it is given as Python's or NumPy's; a threshold also if it
is given as an int.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np
from jax.core import Tracer
from jax.tree_util import GetAttrKey

from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.ledger import Ledger
from tokenexit.policies import KINDS, PerClass, Policy
from tokenexit.schedule import Exit, Schedule

__all__ = ["register"]

Kind = TypeVar("Kind")


def register(kind: type[Kind], /, *, leaves: tuple[str, ...] = ("threshold", "keep")) -> type[Kind]:
    """Make a policy of your own a pytree, once; it can be used as a decorator.

    Args:
        kind: A frozen dataclass, as a rule a subclass of `tokenexit.policies.Policy`.
        leaves: Fields that hold numbers, arrays or other pytrees, which may change without compiling anew; names that
            are no fields are passed over. Policies inside it are always among them. Other fields must be hashable.

    Returns:
        The class itself.

    Raises:
        TokenExitError: If `kind` is no dataclass.
        ValueError: From JAX, if it is registered already.
    """
    require(dataclasses.is_dataclass(kind), "kind", "be a dataclass", repr(kind))
    dataclass: Any = kind
    names = tuple(field.name for field in dataclasses.fields(dataclass))
    decides = issubclass(kind, Policy | PerClass)

    def flatten(value: Any) -> tuple[list[tuple[Any, Any]], tuple]:
        fields = [(name, getattr(value, name)) for name in names]
        inside = {name for name, held in fields if name in leaves or isinstance(held, Policy)}
        fixed = tuple((name, held) for name, held in fields if name not in inside)
        moving = [(name, held) for name, held in fields if name in inside]
        moving = [(name, _as_number(name, held) if decides else held) for name, held in moving]
        return [(GetAttrKey(name), held) for name, held in moving], (tuple(name for name, _ in moving), fixed)

    def unflatten(structure: tuple, children: Any) -> Any:
        moving, fixed = structure
        value = object.__new__(kind)
        for name, held in (*zip(moving, children, strict=True), *fixed):
            object.__setattr__(value, name, held)
        return value

    jax.tree_util.register_pytree_with_keys(kind, flatten, unflatten)
    return kind


def on_host(plan: Schedule) -> Schedule:
    """The same plan with Python's numbers for arrays without axes, so that it is hashable: no part of the public API.

    What is traced has no value yet, and stays; and an array of thresholds stays one leaf, for classes may be many.
    """

    def as_number(leaf: Any) -> Any:
        known = isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)
        return leaf.item() if known and leaf.ndim == 0 else leaf

    return jax.tree.map(as_number, plan)


def of_pytrees(plan: Schedule) -> Schedule:
    """The plan, if all its policies are pytrees. It is no part of the public API.

    Raises:
        TokenExitError: If one is not.
    """
    unknown = [leaf for leaf in jax.tree.leaves(plan) if isinstance(leaf, Policy)]
    require(not unknown, "schedule", "have policies that are pytrees (`register`)", unknown)
    return plan


def _as_number(name: str, held: Any) -> Any:
    """What a field of a policy holds, its numbers as Python's: of each other kind JAX would make another program."""
    if isinstance(held, tuple):
        return tuple(_as_number(name, one) for one in held)
    if isinstance(held, np.ndarray | np.generic) and held.ndim == 0:
        held = held.item()
    # Of what else is counted, such as a budget, an int is another thing than a float.
    whole = isinstance(held, int) and not isinstance(held, bool)
    return float(held) if whole and name in ("threshold", "thresholds") else held


for _kind in KINDS.values():
    if issubclass(_kind, Policy):
        register(_kind)
register(PerClass, leaves=("thresholds",))
register(Exit, leaves=("policy",))
register(Schedule, leaves=("exits",))
register(Ledger, leaves=tuple(field.name for field in dataclasses.fields(Ledger)))
register(HeadOutput, leaves=tuple(field.name for field in dataclasses.fields(HeadOutput)))
