"""One dense pass, written down, in which any number of schedules can be replayed.

A replay runs policies, retention and bookkeeping as they are, and reads the heads' class scores from the trace
instead of running blocks. It is exact but for one thing: in a real run, tokens that stay see fewer others, in attention
and in heads that look around.
`Trace.replay` tells what a schedule does in milliseconds; what it really does, the model itself tells.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from tokenexit.area import Area
from tokenexit.carries import Prediction
from tokenexit.errors import require
from tokenexit.schedule import Schedule
from tokenexit_torch._modules import evaluating
from tokenexit_torch.hosts import Embedded, Inattentive
from tokenexit_torch.outputs import Output
from tokenexit_torch.running import ExitingModel

__all__ = ["Trace", "trace"]

Progress = Callable[[Iterable], Iterable]


@dataclass(frozen=True, eq=False)
class Trace:
    """What every head says of every patch of some images, if nothing leaves.

    Attributes:
        logits: Class scores by head; along the second axis the heads, by the blocks before them.
        after: The blocks before each head; the last is the final head's.
        prefix: Prefix tokens of the model, which run with the patches.
        area: The area of the images that the grid covers; None if it is the whole of them.
    """

    logits: Float[Tensor, "images heads classes grid_height grid_width"]
    after: tuple[int, ...]
    prefix: int
    area: Area | None = None

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
        heads, classes = self.logits.shape[1:3]
        read = [_Channels(slice(start, start + classes)) for start in range(0, heads * classes, classes)]
        host = _Recording(self)
        exit_heads = dict(zip(self.after[:-1], read[:-1], strict=True))
        model = ExitingModel(host, schedule, read[-1], exit_heads, classes, None, built_head=False)
        stacked = rearrange(self.logits, "images heads classes height width -> images (heads classes) height width")
        parts = [model(part) for part in stacked.split(batch)]
        return Output(
            logits=torch.cat([part.logits for part in parts]),
            exit_depth=torch.cat([part.exit_depth for part in parts]),
            tokens_per_block=torch.cat([part.tokens_per_block for part in parts]),
            exits=tuple(sorted({after for part in parts for after in part.exits})),
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
    pattern = "images (height width) classes -> images classes height width"
    with evaluating(model):
        for batch in progress(batches):
            readings, area, (height, width) = model.read_all(batch)
            heads = [rearrange(one.logits, pattern, height=height, width=width) for one in readings.values()]
            parts.append(torch.stack(heads, dim=1))
            sizes.add((area, (height, width)))
            prefix = model.host.embed(batch[:1]).prefix
    require(sum(map(len, parts)) > 0, "images", "hold at least one image", "none")
    grids = sorted({grid for _, grid in sizes})
    require(len(grids) == 1, "images", "have patch grids of one size", grids)
    areas = [area for area, _ in sizes]
    require(len(areas) == 1, "images", "have patch grids that cover one area", areas)
    return Trace(torch.cat(parts), (*(int(after) for after in model.exit_heads), model.depth), prefix, areas[0])


class _Recording(Inattentive):
    """A host whose tokens are what all heads say of them, and whose blocks do nothing."""

    def __init__(self, recorded: Trace) -> None:
        self._prefix = recorded.prefix
        self.module: nn.Module = nn.Linear(1, 1, device=recorded.logits.device, dtype=recorded.logits.dtype)
        self.blocks: Sequence[nn.Module] = [nn.Identity()] * recorded.after[-1]
        self.width = recorded.logits.shape[1] * recorded.logits.shape[2]
        self.image_shape = (self.width, recorded.logits.shape[3], recorded.logits.shape[4])

    def embed(self, images: Float[Tensor, "images channels height width"], /) -> Embedded:
        tokens = rearrange(images, "images channels height width -> images (height width) channels")
        grid = (images.shape[2], images.shape[3])
        return Embedded(functional.pad(tokens, (0, 0, self._prefix, 0)), self._prefix, grid)

    def run(self, _index: int, tokens: Tensor, _positions: Tensor | None, /) -> Tensor:
        return tokens

    def finish(self, tokens: Tensor, /) -> Tensor:
        return tokens

    def dense(self, images: Tensor, /) -> Tensor:
        return self.embed(images).tokens


class _Channels(nn.Module):
    """A head that reads its class scores off the tokens."""

    def __init__(self, channels: slice) -> None:
        super().__init__()
        self._channels = channels

    def forward(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens classes"]:
        return tokens[..., self._channels]
