"""Names, shapes and dtypes of saved weights: what a file of weights must hold, and the errors where it does not.

No array is touched here. An adapter describes each of its tensors by a `Spec`, and safetensors describes a file before
a number of it is read, so that no memory is taken for what a file merely claims.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tokenexit.errors import TokenExitError, require

__all__ = ["FLOATING", "WHOLE", "Spec", "read_specs", "require_finite", "require_specs"]

FLOATING = ("float16", "bfloat16", "float32", "float64")
"""Dtypes that weights may have in a file."""

WHOLE = ("int32", "int64")
"""Dtypes that counts may have, as of the batches of a norm: adapters write either."""

# By the names that safetensors has for them; any other dtype keeps that name, and is refused by it.
_DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "I32": "int32", "I64": "int64"}


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor.

    Attributes:
        shape: Its shape.
        dtype: Its dtype, as `float32`, without the name of a framework.
    """

    shape: tuple[int, ...]
    dtype: str


def read_specs(file: Path, /) -> dict[str, Spec]:
    """Specs of the tensors in a safetensors file, by name; none of their numbers is read.

    It needs the package `safetensors`, which adapters bring along.

    Args:
        file: The file.

    Returns:
        The specs.

    Raises:
        TokenExitError: If it is no such file, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
            found = {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in slices.items()}
    except (SafetensorError, OSError) as error:
        raise TokenExitError(f"`folder` must hold valid weights, got {file}: {error}") from error
    return {name: Spec(shape, str(_DTYPES.get(dtype, dtype))) for name, (shape, dtype) in found.items()}


def require_specs(argument: str, rule: str, wanted: Mapping[str, Spec], found: Mapping[str, Spec], /) -> None:
    """Raise a `TokenExitError` unless tensors can stand in for others: by names, shapes and kinds of numbers.

    A floating dtype may stand in for any other one, and a whole one likewise: heads are saved in half precision, and
    loaded into a model in single.

    Args:
        argument: The argument that the tensors came by.
        rule: What it must do, as in "hold the weights that exits.json describes".
        wanted: Specs of the tensors that they stand in for.
        found: Specs of the tensors.

    Raises:
        TokenExitError: If a name is missing or unknown, or a shape or kind of number differs; up to four are named.
    """
    every = [*sorted(found), *sorted({*wanted} - {*found})]  # what is there shows more than what is missing
    shapes, there = ({name: one.shape for name, one in specs.items()} for specs in (wanted, found))
    names = [name for name in every if shapes.get(name) != there.get(name)]
    got = ", ".join(f"{name}: {there.get(name)} instead of {shapes.get(name)}" for name in names[:4])
    require(not names, argument, rule, got)
    for name, one in found.items():
        dtypes = FLOATING if "float" in wanted[name].dtype else WHOLE
        require(one.dtype in dtypes, argument, f"{rule}, in {', '.join(dtypes)}", f"{name} in {one.dtype}")


def require_finite(argument: str, rule: str, not_finite: Iterable[str], /) -> None:
    """Raise a `TokenExitError` that names the first tensor with a NaN or an infinity, if there is one.

    Args:
        argument: The argument that the tensors came by.
        rule: As for `require_specs`.
        not_finite: Names of tensors that are not finite; no further than to the first is it gone through.

    Raises:
        TokenExitError: If there is one.
    """
    first = next(iter(not_finite), None)
    require(first is None, argument, f"{rule}, all of them finite", f"NaN or infinity in {first}")
