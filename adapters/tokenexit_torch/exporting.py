"""A static model as ONNX.

PyTorch's exporter knows no stable sort and no `searchsorted`, which the bookkeeping is made of. Here is what stands for
them. A sort is a TopK of all elements, of which equal ones come in the order of their indices; TensorRT takes at most
3,840 of them, so longer rows are sorted in parts, which are merged.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenexit.errors import TokenExitError, require
from tokenexit_torch._modules import evaluating
from tokenexit_torch.static import StaticModel

__all__ = ["ONNX_OUTPUTS", "export_onnx"]

ONNX_OUTPUTS = ("logits", "exit_depth", "tokens_per_block", "overflow")
"""Names of the outputs of an exported model, in order: the fields of `StaticOutput` of these names."""

MOST_IN_TOPK = 3840
"""TensorRT's limit."""

OPSET = 20


def export_onnx(
    static: StaticModel, images: Float[Tensor, "images channels height width"], file: str | Path, /
) -> None:
    """Write a static model as ONNX: one input, `images`, and the outputs `ONNX_OUTPUTS`.

    It needs `onnx` and `onnxscript`. Batch, image size, dtype, plan and thresholds are those of now, for good.

    Args:
        static: The static model; it is exported in evaluation mode.
        images: Images of the shape and dtype that the exported model is to take.
        file: Where to, `.onnx`; its folder must be there. Weights of more than 2 GB go into a file beside it.

    Raises:
        TokenExitError: If the model is not static, its folder is not there, or `onnx` or `onnxscript` is not installed.
    """
    require(isinstance(static, StaticModel), "static", "be a StaticModel", type(static).__name__)
    file = Path(file)
    require(file.parent.is_dir(), "file", "lie in a folder that is there", str(file))
    table = _translations()
    with torch.no_grad(), evaluating(static):
        program = torch.export.export(_Arrays(static), (images,))
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, custom_translation_table=table, verbose=False,
            input_names=["images"], output_names=list(ONNX_OUTPUTS),
        )  # fmt: skip
    assert exported is not None
    exported.save(file)


class _Arrays(nn.Module):
    """The outputs that are arrays alone."""

    def __init__(self, static: StaticModel) -> None:
        super().__init__()
        self.static = static

    def forward(
        self, images: Float[Tensor, "images channels height width"]
    ) -> tuple[Float[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."], Int[Tensor, "..."]]:
        found = self.static(images)
        return found.logits, found.exit_depth, found.tokens_per_block, found.overflow


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What stands for the operators that the exporter does not know."""
    try:
        import onnx  # noqa: F401  # asked for here, so that the message names it
        from onnxscript import ir
        from onnxscript import opset20 as op
    except ImportError as error:
        raise TokenExitError(f"`onnx` and `onnxscript` must be installed to export, got: {error}") from error

    def whole(value: int) -> Any:
        return op.Constant(value_ints=[value])

    def halved(ascending: Any, wanted: Any, before: Callable[[Any, Any], Any], length: int) -> Any:
        """How many of some sorted values come before each of the wanted ones, along the last axis."""
        low = op.Sub(op.Shape(wanted), op.Shape(wanted))
        low = op.Expand(whole(0), op.Shape(wanted))
        high = op.Expand(whole(length), op.Shape(wanted))
        for _ in range(length.bit_length()):
            middle = op.Div(op.Add(low, high), whole(2))
            value = op.GatherElements(ascending, op.Min(middle, whole(length - 1)), axis=-1)
            later = op.And(op.Less(low, high), before(value, wanted))
            low, high = op.Where(later, op.Add(middle, whole(1)), low), op.Where(later, high, middle)
        return low

    def searchsorted(
        sorted_sequence: Any, self: Any, out_int32: bool = False, right: bool = False, side: Any = None, sorter: Any = None
    ) -> Any:
        return halved(sorted_sequence, self, op.Less, int(sorted_sequence.shape[-1]))

    def sort(self: Any, stable: Any = True, dim: int = -1, descending: bool = False) -> Any:
        length = int(self.shape[dim])
        starts = range(0, length, MOST_IN_TOPK)
        parts = []
        for start in starts:
            stop = min(start + MOST_IN_TOPK, length)
            part = self if len(starts) == 1 else op.Slice(self, whole(start), whole(stop), whole(dim))
            value, index = op.TopK(part, whole(stop - start), axis=dim, largest=int(descending), sorted=1)
            parts.append((value, op.Add(index, whole(start)), stop - start))
        if len(parts) == 1:
            return parts[0][:2]
        ahead, level = (op.Greater, op.GreaterOrEqual) if descending else (op.Less, op.LessOrEqual)
        places = []
        for own, (value, _, many) in enumerate(parts):
            # Equal ones of an earlier part come first, those of a later one after.
            others = [
                halved(other, value, level if number < own else ahead, length_)
                for number, (other, _, length_) in enumerate(parts)
                if number != own
            ]
            place = op.Add(op.Expand(op.Range(op.Constant(value_int=0), op.Constant(value_int=many), op.Constant(value_int=1)), op.Shape(value)), others[0])
            for other in others[1:]:
                place = op.Add(place, other)
            places.append(place)
        place = op.Concat(*places, axis=-1)
        values = op.Concat(*(value for value, _, _ in parts), axis=-1)
        indices = op.Concat(*(index for _, index, _ in parts), axis=-1)
        return op.ScatterElements(values, place, values, axis=-1), op.ScatterElements(indices, place, indices, axis=-1)

    def where(condition: Any, self: Any, other: Any) -> Any:
        if self.dtype != ir.DataType.BOOL:
            return op.Where(condition, self, other)
        # onnxruntime has no Where of booleans.
        return op.Or(op.And(condition, self), op.And(op.Not(condition), other))

    return {
        torch.ops.aten.searchsorted.Tensor: searchsorted,
        torch.ops.aten.sort.stable: sort,
        torch.ops.aten.where.self: where,
    }
