"""Exits and merges with static shapes: for CUDA graphs, one compiled program, and export.

After each there are so many entries for every image, whatever leaves or merges. Nothing waits for the device, and
nothing depends on the data but the data. What an exit would keep beyond that leaves as well, what a merge would keep
merges as well, and is counted.
"""

from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit_torch._modules import NEW, require_not_traced
from tokenexit_torch.exits.decoder import DecodingModel, decoded_output
from tokenexit_torch.exits.forward import Heads, State, run_pass
from tokenexit_torch.exits.layouts import Static
from tokenexit_torch.exits.model import ExitingModel, final_output
from tokenexit_torch.exits.outputs import DecodedOutput, Output

__all__ = ["StaticModel", "needed_capacity"]


class StaticModel(nn.Module):
    """Wrapped model with a fixed number of entries after each exit and each merge.

    Its weights, and its plan, are the model's: `retune` that, and what was compiled compiles anew. It gives what the
    model gives wherever there is room for all that stay. Where there is not, the most confident surplus leaves an exit
    with its present prediction, and at a merge the most alike cells merge whatever its criteria say, up to its side;
    what even then has no room, where others have left before, leaves with its latest prediction. `Output.overflow`
    counts all of it. What there is room for is computed, with a token or without: so capacities near what is needed
    make it fast (`needed_capacity`).

    It compiles as one program, `torch.compile(static, fullgraph=True)`; is safe in a CUDA graph; and can be exported,
    by `torch.export` or as ONNX (`export_onnx`). Number and size of images are then fixed.

    Args:
        model: The wrapped model.
        capacities: What runs on after an exit or a merge, as a fraction of the slots of an image, prefix tokens among
            them: one fraction for all, or one for each block with an exit head or a merge of the model's plan, and for
            others that plans of single calls name. After an exit and a merge behind one block, it is what runs on after
            both. They never grow from one block to the next.

    Attributes:
        model: The wrapped model.
        capacities: The fraction for each of these blocks.

    Raises:
        TokenExitError: If the model is not wrapped by `wrap` or `wrap_decoder`, or a capacity is missing, of a block
            that there is not, or not in (0, 1].
    """

    model: ExitingModel | DecodingModel
    capacities: dict[int, float]

    def __init__(self, model: ExitingModel | DecodingModel, /, *, capacities: float | Mapping[int, float]) -> None:
        super().__init__()
        known = isinstance(model, ExitingModel | DecodingModel)
        require(known, "model", "be wrapped by `wrap` or `wrap_decoder`", type(model).__name__)
        after = sorted({*map(int, model.exit_heads), *model.schedule.merged_after})
        given = capacities if isinstance(capacities, Mapping) else dict.fromkeys(after, capacities)
        rule = f"be a fraction for all exits and merges, or for each of the blocks {after}"
        require(set(after) <= set(given) <= set(range(1, model.depth)), "capacities", rule, repr(capacities))
        for block, fraction in given.items():
            number = isinstance(fraction, Real) and not isinstance(fraction, bool) and 0 < fraction <= 1
            require(number, f"capacities[{block}]", "be greater than 0 and at most 1", repr(fraction))
        self.model = model
        self.capacities = {block: float(given[block]) for block in sorted(given)}

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        schedule: Schedule | None = None,
        **inputs: Any,
    ) -> Output | DecodedOutput:
        """Run images, differentiably.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.
            inputs: What else the forward of a model with a decoder of its own takes.

        Returns:
            What the wrapped model returns, with `capacity_per_block` and `overflow`.

        Raises:
            TokenExitError: If the images do not fit the model, an exit of the plan has no head, an exit or a merge has
                no capacity, or a merge has no room even where all cells merge, with no exit before.
        """
        state = self.run_pass(images, schedule)
        if isinstance(self.model, DecodingModel):
            return decoded_output(state, images, inputs)
        require(not inputs, "inputs", "be left out for a model without a decoder of its own", sorted(inputs))
        return final_output(state)[0]

    def run_pass(self, images: Tensor, schedule: Schedule | None, /, *, heads: Heads = "active") -> State:
        """All blocks, and what happens between them (`exits.forward`).

        Raises:
            TokenExitError: If the images or the plan do not fit the model.
        """
        require_not_traced("StaticModel")
        if torch.compiler.is_compiling() and not torch.compiler.is_exporting():
            _require_compiler()
        taps = self.model.host.taps if isinstance(self.model, DecodingModel) else ()
        return run_pass(self.model, images, schedule, layout=Static(self.capacities), heads=heads, taps=taps)

    def multiply_adds(self, output: Output | DecodedOutput) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, entries without a token, heads and patch embedding included.

        Exit heads are counted for the patches that there is room for.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network.
        """
        found: Any = output
        return self.model.multiply_adds(found)


def needed_capacity(output: Output | DecodedOutput, /) -> dict[int, float]:
    """After each exit and merge, the fraction of slots that the fullest image of a call needed: for `StaticModel`.

    Take the largest over images like those to come, and some more: what has no room leaves, or merges.

    Args:
        output: What a call returned.

    Returns:
        Fractions in (0, 1], by the block before the exit or merge.

    Raises:
        TokenExitError: If it was a call without images.
    """
    counts = output.tokens_per_block
    require(len(counts) > 0, "output", "be of at least one image", "none")
    slots, blocks = int(counts[0, 0]), sorted({*output.exits, *output.merges})
    return {after: max(int(counts[:, after].max()), 1) / slots for after in blocks}


def _require_compiler() -> None:
    """Raise where a compiler would give up in the midst of a pass: it cannot make one program of it before 2.11."""
    rule = "be compiled by PyTorch 2.11 or later; a packed model, and export, do with an older one"
    require(NEW, "static", rule, torch.__version__)
