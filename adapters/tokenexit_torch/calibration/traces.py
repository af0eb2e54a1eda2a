"""One dense pass, written down, in which any number of schedules can be replayed.

A replay runs policies, retention and bookkeeping as they are, and reads the heads' class scores from the trace
instead of running blocks. It is exact but for one thing: in a real run, tokens that stay see fewer others, in attention
and in heads that look around.
`Trace.replay` shows in milliseconds what a schedule does; what it really does, a run of the model shows.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from tokenexit.area import Area
from tokenexit.carries import Prediction
from tokenexit.errors import require
from tokenexit.replay import replay
from tokenexit.schedule import Schedule, require_fits
from tokenexit_torch._modules import evaluating
from tokenexit_torch.exits.forward import on_grid
from tokenexit_torch.exits.model import ExitingModel
from tokenexit_torch.exits.outputs import Output

__all__ = ["Trace", "trace"]

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True, eq=False)
class Trace:
    """What every head predicts for every patch of some images, if nothing leaves.

    Attributes:
        logits: Class scores by head; along the second axis the heads, by the blocks before them.
        after: The blocks before each head; the last is the final head's.
        prefix: Prefix tokens of the model, which run with the patches.
        area: The area of the images that the grid covers; None if it is the whole of them.
        error: Errors that translators foretell, `(images, patches)`, by the blocks before them.
    """

    logits: Float[Tensor, "images heads classes grid_height grid_width"]
    after: tuple[int, ...]
    prefix: int
    area: Area | None = None
    error: Mapping[int, Float[Tensor, "images patches"]] = field(default_factory=dict)

    def __len__(self) -> int:
        """Image count."""
        return len(self.logits)

    @torch.no_grad()
    def replay(self, schedule: Schedule, /, *, batch: int = 8) -> Output:
        """What a schedule would do, were the tokens that stay the same without those that have left.

        Args:
            schedule: The schedule; its exits are among the heads of the trace, and it carries predictions.
            batch: Images at a time; what it is changes only the memory needed.

        Returns:
            What the model would return for all images; `ExitingModel.multiply_adds` takes it as one of its own.

        Raises:
            TokenExitError: If an exit has no head, or features are carried, which a trace of scores does not have.
        """
        require(isinstance(schedule.carry, Prediction), "schedule", "carry predictions", repr(schedule.carry))
        require(batch >= 1, "batch", "be at least 1", batch)
        grid, depth = (self.logits.shape[3], self.logits.shape[4]), self.after[-1]
        require_fits(schedule, depth=depth, after=self.after[:-1], gives_masks=False, translates=self.error.keys())
        rows = rearrange(self.logits, "images heads classes height width -> heads images (height width) classes")
        parts = [
            replay(
                dict(zip(self.after, part, strict=True)),
                schedule,
                grid=grid,
                prefix=self.prefix,
                error={after: told[start * batch : (start + 1) * batch] for after, told in self.error.items()},
            )
            for start, part in enumerate(rows.split(batch, dim=1))
        ]
        ran = torch.cat([part.tokens_per_block for part in parts])
        return Output(
            logits=on_grid(torch.cat([part.logits for part in parts]), grid),
            exit_depth=torch.cat([part.exit_depth for part in parts]).unflatten(1, grid),
            tokens_per_block=ran,
            exits=tuple(exit.after for exit in schedule.active if ran[:, exit.after - 1].any()),
            head_on="running",
            area=self.area,
        )


@torch.no_grad()
def trace(
    model: ExitingModel,
    images: Float[Tensor, "images channels height width"] | Iterable[Float[Tensor, "batch channels height width"]],
    /,
    *,
    progress: Progress = tqdm,
) -> Trace:
    """Run images densely and keep every head's class scores.

    They are kept where the model is, in its dtype: `images * heads * classes * patches` numbers.

    Args:
        model: The wrapped model; it is run in evaluation mode.
        images: Images of one size: a tensor, or batches of them.
        progress: Wraps the loop; `tqdm` shows a bar, `iter` shows nothing.

    Returns:
        The trace.

    Raises:
        TokenExitError: If there are no images, or their patch grids, or what these cover, differ.
    """
    require(isinstance(model, ExitingModel), "model", "be wrapped by `wrap`", type(model).__name__)
    batches = images.split(8) if isinstance(images, Tensor) else images
    parts, sizes, prefix = [], set(), 0
    told: dict[int, list[Tensor]] = {after: [] for after in model.translated_after}
    with evaluating(model):
        for batch in progress(batches):
            outputs, area, grid = model.read_all(batch)
            parts.append(torch.stack([on_grid(one.logits, grid) for one in outputs.values()], dim=1))
            for after, one in outputs.items():
                if one.error is not None:
                    told[after].append(one.error)
            sizes.add((area, grid))
            prefix = model.host.embed(batch[:1]).prefix
    require(sum(map(len, parts)) > 0, "images", "hold at least one image", "none")
    grids = sorted({grid for _, grid in sizes})
    require(len(grids) == 1, "images", "have patch grids of one size", grids)
    areas = [area for area, _ in sizes]
    require(len(areas) == 1, "images", "have patch grids that cover one area", areas)
    after = (*(int(block) for block in model.exit_heads), model.depth)
    error = {block: torch.cat(errors) for block, errors in told.items()}
    return Trace(torch.cat(parts), after, prefix, areas[0], error)
