"""A static model as an exported program, and as ONNX.

PyTorch's exporter knows no stable sort and no `searchsorted`, which the bookkeeping is made of. Here is what stands for
them. A sort is a TopK of all elements, of which equal ones come in the order of their indices; TensorRT takes at most
3,840 of them, so longer rows are sorted in parts, which are merged.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tokenexit.errors import TokenExitError, require
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.exits.static import StaticModel

__all__ = ["export_onnx", "export_program"]

EXPORTED = ("logits", "exit_depth", "tokens_per_block", "overflow")
"""What an exported model gives, in order: the fields of `Output` of these names.

Of a model with a decoder of its own, what that gives comes first, in the place of `logits`: a tensor as `decoded`, each
of a mapping, a list or a tuple as `decoded.NAME` or `decoded.0`, `decoded.1`, ..., and so within them.
"""

MOST_IN_TOPK = 3840
"""TensorRT's limit."""

OPSET = 20


def export_program(
    static: StaticModel, images: Float[Tensor, "images channels height width"], /
) -> torch.export.ExportedProgram:
    """A static model as a program of `torch.export`, which can be saved, loaded, and run without this library.

    Batch, image size, dtype, device, plan and thresholds are those of now, for good.

    Args:
        static: The static model; it is exported in evaluation mode.
        images: Images of the shape and dtype that the program is to take.

    Returns:
        The program: from images to the arrays that `EXPORTED` names, in that order.

    Raises:
        TokenExitError: If the model is not static, or its decoder gives something else than tensors.
    """
    require(isinstance(static, StaticModel), "static", "be a StaticModel", type(static).__name__)
    with torch.no_grad(), evaluating(static):
        return torch.export.export(_Arrays(static), (images,))


def export_onnx(
    static: StaticModel, images: Float[Tensor, "images channels height width"], file: str | Path, /
) -> None:
    """Write a static model, its decoder included, as ONNX: one input, `images`, and the outputs that `EXPORTED` names.

    It needs `onnx` and `onnxscript`. Batch, image size, dtype, plan and thresholds are those of now, for good.

    Args:
        static: The static model; it is exported in evaluation mode.
        images: Images of the shape and dtype that the exported model is to take.
        file: Where to, `.onnx`; its folder must be there. Weights of more than 2 GB go into a file beside it.

    Raises:
        TokenExitError: If the model is not static, its decoder gives something else than tensors, the folder is not
            there, or `onnx` or `onnxscript` is not installed.
    """
    file = Path(file)
    require(file.parent.is_dir(), "file", "lie in a folder that is there", str(file))
    table, program = _translations(), export_program(static, images)
    with torch.no_grad(), evaluating(static):
        names = list(_arrays(static(images)))
    exported = torch.onnx.export(
        program, dynamo=True, opset_version=OPSET, custom_translation_table=table,
        input_names=["images"], output_names=names, verbose=False,
    )  # fmt: skip
    assert exported is not None
    exported.save(file)


class _Arrays(nn.Module):
    """The outputs that are arrays alone."""

    def __init__(self, static: StaticModel) -> None:
        super().__init__()
        self.static = static

    def forward(self, images: Float[Tensor, "images channels height width"]) -> tuple[Tensor, ...]:
        return tuple(_arrays(self.static(images)).values())


def _arrays(output: Output | DecodedOutput) -> dict[str, Tensor]:
    """The outputs that are arrays, by name."""
    own = _tensors(output.decoded, "decoded") if isinstance(output, DecodedOutput) else {EXPORTED[0]: output.logits}
    return own | {name: getattr(output, name) for name in EXPORTED[1:]}


def _tensors(decoded: Any, name: str) -> dict[str, Tensor]:
    """Tensors of what a decoder gives, by name; what is None is left out."""
    if decoded is None:
        return {}
    if isinstance(decoded, Tensor):
        return {name: decoded}
    known = isinstance(decoded, Mapping | list | tuple)
    require(known, "static", "have a decoder that gives tensors, or mappings or lists of them", type(decoded).__name__)
    parts = decoded.items() if isinstance(decoded, Mapping) else enumerate(decoded)
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found |= _tensors(part, f"{name}.{key}")
    return found


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What stands for the operators that the exporter does not know, or onnxruntime."""
    try:
        import onnx  # noqa: F401  # asked for here, so that the message names it
        from onnxscript import opset20
    except ImportError as error:
        raise TokenExitError(f"`onnx` and `onnxscript` must be installed to export, got: {error}") from error
    op: Any = opset20

    def searchsorted(sorted_sequence: Any, self: Any, **options: Any) -> Any:
        after_equals = options.get("right") or options.get("side") == "right"
        before = op.LessOrEqual if after_equals else op.Less
        return _before(op, sorted_sequence, int(sorted_sequence.shape[-1]), self, before)

    def sort(self: Any, dim: int = -1, descending: bool = False, **_: Any) -> Any:
        last = len(self.shape) - 1
        require(dim in (-1, last), "schedule", "sort along the last axis alone, as the library's own policies do", dim)
        return _merged(op, _sorted_parts(op, self, dim, descending), descending)

    def where(condition: Any, self: Any, other: Any) -> Any:
        if self.dtype.name != "BOOL":
            return op.Where(condition, self, other)
        # onnxruntime has no Where of booleans.
        return op.Or(op.And(condition, self), op.And(op.Not(condition), other))

    aten = torch.ops.aten
    return {aten.searchsorted.Tensor: searchsorted, aten.sort.stable: sort, aten.where.self: where}


def _before(op: Any, ordered: Any, length: int, wanted: Any, before: Callable[[Any, Any], Any]) -> Any:
    """How many of some sorted values come before each of the wanted ones, along the last axis: by halving."""
    low, high = (op.Expand(_whole(op, bound), op.Shape(wanted)) for bound in (0, length))
    for _ in range(length.bit_length()):
        middle = op.Div(op.Add(low, high), _whole(op, 2))
        value = op.GatherElements(ordered, op.Min(middle, _whole(op, length - 1)), axis=-1)
        later = op.And(op.Less(low, high), before(value, wanted))
        low, high = op.Where(later, op.Add(middle, _whole(op, 1)), low), op.Where(later, high, middle)
    return low


def _sorted_parts(op: Any, values: Any, axis: int, descending: bool) -> list[tuple[Any, Any, int]]:
    """Parts of a row that TopK takes, sorted: values, where they were, how many. Equal ones keep their order."""
    length, parts = int(values.shape[axis]), []
    for start in range(0, length, MOST_IN_TOPK):
        stop = min(start + MOST_IN_TOPK, length)
        whole = (start, stop) == (0, length)
        part = values if whole else op.Slice(values, _whole(op, start), _whole(op, stop), _whole(op, axis))
        value, index = op.TopK(part, _whole(op, stop - start), axis=axis, largest=int(descending), sorted=1)
        parts.append((value, index if start == 0 else op.Add(index, _whole(op, start)), stop - start))
    return parts


def _merged(op: Any, parts: list[tuple[Any, Any, int]], descending: bool) -> Any:
    """Sorted parts as one. A place is how many come before, in its own part and in each other."""
    if len(parts) == 1:
        return parts[0][:2]
    ahead, level = (op.Greater, op.GreaterOrEqual) if descending else (op.Less, op.LessOrEqual)
    places = []
    for own, (value, _, length) in enumerate(parts):
        place = op.Expand(op.Constant(value_ints=list(range(length))), op.Shape(value))
        for number, (other, _, many) in enumerate(parts):
            if number != own:  # equal ones of an earlier part come first, those of a later one after
                place = op.Add(place, _before(op, other, many, value, level if number < own else ahead))
        places.append(place)
    values, indices, _ = zip(*parts, strict=True)
    place, value, index = (op.Concat(*one, axis=-1) for one in (places, values, indices))
    return op.ScatterElements(value, place, value, axis=-1), op.ScatterElements(index, place, index, axis=-1)


def _whole(op: Any, value: int) -> Any:
    return op.Constant(value_ints=[value])
