"""Vision transformer with early exit of tokens.

The tokens run as a plain batch until the first exit point, then as one packed row: the linear layers see all tokens
that still run, attention works image by image. At each exit point there is one gather.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenexit.area import Area
from tokenexit.cost import HeadCost
from tokenexit.errors import require
from tokenexit.exits import HeadOutput
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit_torch._blocks import run_block
from tokenexit_torch._modules import kept_eager
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.forward import (
    State,
    as_batch,
    exit_depth,
    merged_size,
    of_all_tokens,
    on_grid,
    read_running,
    run_pass,
    worked,
)
from tokenexit_torch.exits.mixed import run_mixed
from tokenexit_torch.exits.outputs import Output
from tokenexit_torch.heads.masks import MaskMaps, as_maps, log_scores
from tokenexit_torch.heads.reading import Final, apply_head_dense, head_input, reads_of, translates
from tokenexit_torch.hosts.protocol import Embedded, Host, area_of, embedded_by, require_covered

__all__ = ["ExitingModel"]


class ExitingModel(WithExits[Host]):
    """A vision transformer with tokens that leave early; made by `wrap`.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        head: The final head.
        exit_heads: The exit heads, by the block they follow, as a string.
        classes: Class count.
        head_plan: The plan that built the exit heads; None if they were given as modules.
        built_head: Whether `wrap` built the final head, rather than being given it.
    """

    head: nn.Module
    built_head: bool

    def __init__(
        self,
        host: Host,
        schedule: Schedule,
        head: nn.Module,
        exit_heads: Mapping[int, nn.Module],
        classes: int,
        head_plan: HeadPlan | None,
        built_head: bool,
    ) -> None:
        super().__init__(host, exit_heads, classes, head_plan)
        self.head = head
        self.built_head = built_head
        self._schedule = self.checked(schedule)

    @property
    def gives_masks(self) -> bool:
        """Whether the heads are mask heads: `wrap` sees to it that all are, or none."""
        return reads_of(self.head) == "images"

    @property
    def final(self) -> Final:
        """See `WithExits.final`."""
        return self.host.finish, self.head

    def forward(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> Output:
        """Segment images.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores, exit depth and executed tokens.

        Raises:
            TokenExitError: If the images do not fit the model, or an exit of the plan has no head.
        """
        return packed_output(run_pass(self, images, schedule))[0]

    def mixed(
        self, images: Sequence[Float[Tensor, "channels _ _"]], *, schedule: Schedule | None = None
    ) -> tuple[Output, ...]:
        """Segment images of any sizes that the wrapped model takes, in one packed row.

        Linear layers see the tokens of all images at once, as if they were of one size. An image's result is that of a
        call with it alone; under `policies.BatchBudget` images trade with those of their own size.

        Args:
            images: The images.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            What a call returns, for each image by itself, in their order.

        Raises:
            TokenExitError: If an image does not fit the model, or an exit of the plan has no head.
        """
        states, places = run_mixed(self, images, schedule)
        found: dict[int, Output] = {}
        for state, where in zip(states, places, strict=True):
            whole, _ = packed_output(as_batch(state))
            for number, at in enumerate(where):
                one = slice(number, number + 1)
                found[at] = whole._replace(
                    logits=whole.logits[one],
                    exit_depth=whole.exit_depth[one],
                    tokens_per_block=whole.tokens_per_block[one],
                    merged_size=None if whole.merged_size is None else whole.merged_size[one],
                )
        return tuple(found[at] for at in sorted(found))

    def every_exit(
        self, images: Float[Tensor, "images channels height width"]
    ) -> dict[int, Float[Tensor, "images classes grid_height grid_width"]]:
        """Class scores of every head on all tokens, in one dense run: for auxiliary losses and for tracing.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Logits by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the images do not fit the model, or patches do not cover them exactly, which losses on
                the logits of patches take for granted.
        """
        outputs, area, grid = self.read_all(images)
        require_covered(area)
        return {after: on_grid(one.logits, grid) for after, one in outputs.items()}

    def every_mask(self, images: Float[Tensor, "images channels height width"]) -> dict[int, MaskMaps]:
        """Masks and presence of every head on all tokens, in one dense run: what `mask_loss` is computed from.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Masks and presence by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the heads are no mask heads, the images do not fit the model, or patches do not cover
                them exactly.
        """
        require(self.gives_masks, "model", "have mask heads", type(self.head).__name__)
        outputs, area, grid = self.read_all(images)
        require_covered(area)
        return {
            after: as_maps(one.mask_logits, one.presence_logits, grid)
            for after, one in outputs.items()
            if one.mask_logits is not None and one.presence_logits is not None
        }

    def patches_after(
        self, images: Float[Tensor, "images channels height width"]
    ) -> dict[int, Float[Tensor, "images patches channels_out"]]:
        """Patches as every head would read them, in one dense run.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Patches by blocks run: as the block leaves them for the exit heads, finished for the final head, which is
            the last entry. A head of the plan `heads.Neighbourhood` reads them by `surroundings.beside_all`.

        Raises:
            TokenExitError: If the images do not fit the model.
        """
        _, patches, _ = self._trace(images)
        return patches

    def patches_and_output(
        self, images: Float[Tensor, "images channels height width"]
    ) -> tuple[
        dict[int, Float[Tensor, "images patches channels_out"]],
        Float[Tensor, "images patches classes"],
        Area | None,
        tuple[int, int],
    ]:
        """What exit heads read, the final head's class scores, area and grid, in one run in which nothing leaves.

        It is no part of the public API. With translators among the heads, patches as the last block leaves them come
        with what exit heads read, by its number.

        It is not for mask heads, which read images.
        """
        embedded, patches, last = self._trace(images)
        finished, grid = patches.pop(self.depth), embedded.grid
        read = {after: head_input(self.exit_heads[str(after)], rows, grid=grid) for after, rows in patches.items()}
        read |= {self.depth: last} if self.translated_after else {}
        return read, apply_head_dense(self.head, finished, grid=grid).logits, area_of(embedded, images), grid

    def multiply_adds(self, output: Output) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, heads and patch embedding included.

        In the static layout entries without a token count as well.

        Layers declare what a token takes, quantised and sharded ones as well. At the first call each part is also run
        on a few tokens, under PyTorch's own counter: what layers do not explain, such as products of bare parameters,
        counts too. Heads are counted for patches, and a mask head declares its own cost.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network, or there is no telling what a part costs.
        """
        height, width = output.exit_depth.shape[1:]
        cost = replace(self._cost(output), head=self._head_cost(self.head, "head"))
        worked = output.worked_per_block
        return cost.multiply_adds(worked, patches=height * width, exits=output.exits, head_on=output.head_on)

    def read_all(self, images: Tensor) -> tuple[dict[int, HeadOutput], Area | None, tuple[int, int]]:
        """What every head predicts for all tokens, area and grid, in one dense run. It is no part of the public API."""
        embedded, patches, _ = self._trace(images)
        heads, grid = [*self.exit_heads.values(), self.head], embedded.grid
        outputs = {
            after: apply_head_dense(head, rows, grid=grid, final=self.final)
            for (after, rows), head in zip(patches.items(), heads, strict=True)
        }
        return outputs, area_of(embedded, images), grid

    def _trace(self, images: Tensor) -> tuple[Embedded, dict[int, Tensor], Tensor]:
        """The images as tokens, patches as every head would read them, and as the last block leaves them."""
        embedded = embedded_by(self.host, images, patch=self.patch)
        running, patches = embedded.tokens, {}
        for block in range(self.depth):
            running = run_block(self.host, block, running, embedded.positions)
            if str(block + 1) in self.exit_heads:
                patches[block + 1] = running[:, embedded.prefix :]
        patches[self.depth] = self.host.finish(running)[:, embedded.prefix :]
        return embedded, patches, running[:, embedded.prefix :]

    def _exit_cost(self, head: nn.Module, name: str) -> HeadCost:
        own = super()._exit_cost(head, name)
        return own + self._head_cost(self.head, "head") if translates(head) else own


def final_output(state: State, /) -> tuple[Output, State]:
    """Output of a pass that has ended, and its state with the outputs of all heads where they are kept."""
    fixed, model = state.fixed, state.fixed.model
    assert isinstance(model, ExitingModel)
    embedded, prefix, depth = fixed.embedded, fixed.embedded.prefix, model.depth
    if state.row is None:  # all tokens reached the final head, or rejoined before it
        read = apply_head_dense(model.head, model.host.finish(state.tokens)[:, prefix:], grid=embedded.grid)
        logits, book = read.logits, state.ledger
        if fixed.heads == "all":
            state = replace(state, outputs={**state.outputs, depth: read})
    else:
        state, book = read_running(state, model.head)
        if state.merged is not None:
            book = of_all_tokens(book, state.merged)
        logits = book.logits
        if fixed.reweighs and book.mask_logits is not None and book.presence_logits is not None:
            logits = log_scores(book.mask_logits, book.presence_logits[:, None])
        logits = logits[:, prefix:]
    made = Output(
        on_grid(logits, embedded.grid),
        exit_depth(state, book),
        fixed.layout.tokens_per_block(state.counts, embedded.tokens.device),
        state.exits,
        "running" if fixed.feature is None else "all",
        fixed.area,
        *worked(state),
        merges=fixed.plan.merged_after,
        merged_size=merged_size(state),
    )
    return made, state


packed_output = kept_eager(final_output)
