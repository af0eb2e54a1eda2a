"""Early exit under a decoder of the model's own: leavers keep their features and rejoin wherever the decoder looks.

An exit decides which tokens leave. The result is the decoder's, for every pixel, from a whole grid of tokens.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit.area import Area
from tokenexit.carries import Feature, Translated
from tokenexit.errors import require
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit_torch._blocks import run_block
from tokenexit_torch._counting import executed
from tokenexit_torch._modules import evaluating, kept_eager
from tokenexit_torch.exits.base import WithExits
from tokenexit_torch.exits.forward import State, exit_depth, merged_size, on_grid, run_pass, worked
from tokenexit_torch.exits.outputs import DecodedOutput
from tokenexit_torch.heads.reading import head_input
from tokenexit_torch.hosts.decoding import DecodingHost
from tokenexit_torch.hosts.given import GivenDecoder
from tokenexit_torch.hosts.protocol import Embedded, area_of, embedded_by, require_covered

__all__ = ["DecodingModel"]


class DecodingModel(WithExits[DecodingHost]):
    """A model with exits, and a decoder of its own on all tokens; made by `wrap_decoder`.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        exit_heads: The exit heads, by the block they follow, as a string.
        classes: How many classes the exit heads tell apart; 0 if they translate, or there are none.
        head_plan: The plan that built the exit heads; None if they were given as modules.
    """

    def __init__(
        self,
        host: DecodingHost,
        schedule: Schedule,
        exit_heads: Mapping[int, nn.Module],
        classes: int,
        head_plan: HeadPlan | None,
    ) -> None:
        super().__init__(host, exit_heads, classes, head_plan)
        self._schedule = self.checked(schedule)

    def checked(self, schedule: Schedule, /) -> Schedule:
        """A plan, after a check that the model can follow it: leavers carry features. Not public."""
        super().checked(schedule)
        rejoin = not schedule.active or isinstance(schedule.carry, Feature | Translated)
        carry = "Translated" if self.translated_after else "Feature"
        rule = f"carry features, which rejoin for the decoder: dataclasses.replace(schedule, carry=carries.{carry}())"
        require(rejoin, "schedule", rule, repr(schedule.carry))
        return schedule

    @property
    def taps(self) -> tuple[int, ...]:
        """See `WithExits.taps`."""
        return tuple(self.host.taps)

    def finished(self, tokens: Float[Tensor, "*tokens dim"], /) -> Float[Tensor, "*tokens dim_out"]:
        """See `WithExits.finished`; a model's own decoder reads tokens as blocks leave them."""
        return self.host.finished(tokens) if isinstance(self.host, GivenDecoder) else tokens

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        schedule: Schedule | None = None,
        **inputs: Any,
    ) -> DecodedOutput:
        """Run images, differentiably.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.
            inputs: What else the model's own forward takes, handed on to it: labels, for its own loss.

        Returns:
            The model's own output, exit depth and executed tokens.

        Raises:
            TokenExitError: If the images do not fit the model, or the plan does not.
        """
        return _packed_output(run_pass(self, images, schedule, taps=self.taps), images, inputs)

    def every_exit(
        self, images: Float[Tensor, "images channels height width"]
    ) -> dict[int, Float[Tensor, "images classes grid_height grid_width"]]:
        """Class scores of every exit head on all tokens, in one run without a decoder: for auxiliary losses.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Logits by blocks run.

        Raises:
            TokenExitError: If the images do not fit the model, or patches do not cover them exactly, which losses on
                the logits of patches take for granted; or if exit heads translate, and give no class scores.
        """
        rule = "have exit heads that give class scores"
        require(not self.translated_after, "model", rule, f"translators after the blocks {list(self.translated_after)}")
        embedded = embedded_by(self.host, images, patch=self.patch)
        require_covered(area_of(embedded, images))
        patches, _ = self._trace(embedded)
        return {after: on_grid(self.exit_heads[str(after)](rows), embedded.grid) for after, rows in patches.items()}

    def patches_and_output(
        self, images: Float[Tensor, "images channels height width"]
    ) -> tuple[dict[int, Float[Tensor, "images patches channels_out"]], Any, Area | None, tuple[int, int]]:
        """What exit heads read, the model's own output, area and grid, if nothing leaves. Not public."""
        embedded = embedded_by(self.host, images, patch=self.patch)
        patches, taken = self._trace(embedded)
        return patches, self.host.decode(taken, embedded, images), area_of(embedded, images), embedded.grid

    def patches_at_taps(
        self, images: Float[Tensor, "images channels height width"]
    ) -> tuple[
        dict[int, Float[Tensor, "images patches channels_out"]],
        Float[Tensor, "images patches classes"],
        Area | None,
        tuple[int, int],
    ]:
        """What translators read, scores of no class, area and grid, if nothing leaves, without a decoder. Not public.

        Patches at all taps come with what exit heads read, side by side, by the number of the last block.
        """
        embedded = embedded_by(self.host, images, patch=self.patch)
        patches, taken = self._trace(embedded)
        every = torch.cat([taken[tap][:, embedded.prefix :] for tap in self.taps], dim=-1)
        area = area_of(embedded, images)
        return patches | {self.depth: every}, every.new_zeros(*every.shape[:2], 0), area, embedded.grid

    def multiply_adds(self, output: DecodedOutput) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed before the decoder, exit heads and patch embedding included.

        The decoder runs once for every image, whoever left; `decoder_multiply_adds` counts it.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network, or there is no telling what a part costs.
        """
        height, width = output.exit_depth.shape[1:]
        worked = output.worked_per_block
        return self._cost(output).multiply_adds(worked, patches=height * width, exits=output.exits, head_on="all")

    @torch.no_grad()
    def decoder_multiply_adds(self, size: tuple[int, int] | None = None) -> int:
        """Multiply-adds of the decoder on one image, in evaluation, by PyTorch's own counter: it is run once for that.

        Blocks after the last tap are counted here, as those of EoMT that have queries. Interpolation is not counted.

        Args:
            size: Height and width of the image; those of `host.image_shape` if left out.

        Returns:
            Multiply-adds.

        Raises:
            TokenExitError: If the model does not take images of this size.
        """
        channels, *own = self.host.image_shape
        like = next(self.host.module.parameters())
        image = torch.zeros(1, channels, *(own if size is None else size), device=like.device, dtype=like.dtype)
        with evaluating(self.host.module):
            embedded = embedded_by(self.host, image, patch=self.patch)
        taken = dict.fromkeys(self.host.taps, embedded.tokens)
        return executed(lambda: self.host.decode(taken, embedded, image), [self.host.module])

    def _trace(self, embedded: Embedded) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """What every exit head reads, and all tokens by tap, if nothing leaves."""
        running, patches, taken = embedded.tokens, {}, {}
        for block in range(self.depth):
            running = run_block(self.host, block, running, embedded.positions)
            if str(block + 1) in self.exit_heads:
                head = self.exit_heads[str(block + 1)]
                patches[block + 1] = head_input(head, running[:, embedded.prefix :], grid=embedded.grid)
            if block + 1 in self.host.taps:
                taken[block + 1] = running
        return patches, taken


def decoded_output(state: State, images: Tensor, inputs: Mapping[str, Any], /) -> DecodedOutput:
    """Output of a pass that has ended: the decoder runs on the tokens that were tapped."""
    fixed, model = state.fixed, state.fixed.model
    return DecodedOutput(
        model.host.decode(state.tapped, fixed.embedded, images, **inputs),
        exit_depth(state, state.ledger),
        fixed.layout.tokens_per_block(state.counts, fixed.embedded.tokens.device),
        state.exits,
        fixed.area,
        *worked(state),
        merges=fixed.plan.merged_after,
        merged_size=merged_size(state),
    )


_packed_output = kept_eager(decoded_output)


def pooled(scores: Float[Tensor, "images classes height width"], grid: tuple[int, int], /) -> Tensor:
    """Logits of a map, averaged to patches as probabilities, and back to logits. It is no part of the public API."""
    probability = functional.adaptive_avg_pool2d(scores.float().softmax(dim=1), grid)
    return probability.clamp(min=torch.finfo(probability.dtype).tiny).log()


def require_placed(area: Area | None, given: Callable[[Any], Any] | None, argument: str, /) -> None:
    """Raise unless it is known of which area class scores are: a host's own are of what the grid covers. Not public.

    Args:
        area: The area that the grid covers; None if it is the whole image.
        given: What the caller gave to make class scores; the model's own if None.
        argument: The name of that argument.

    Raises:
        TokenExitError: If it is not.
    """
    if area is not None and given is not None:
        (height, width), (rows, columns) = area.image, area.covered
        rule = f"be covered exactly by their patches where `{argument}` is given: cut or pad them to whole patches"
        require(False, "images", rule, f"{height} x {width} pixels, of which patches cover {rows} x {columns}")


def class_scores(
    model: DecodingModel, given: Callable[[Any], Any] | None, /, *, argument: str
) -> Callable[[Any, int], Float[Tensor, "images classes height width"]]:
    """From a model's own output, and the number of images, to logits of any resolution. Not public.

    Args:
        model: The model.
        given: What its caller gave to make them. If None, the model's own; the output itself of a model that does not
            tell whether it has classes.
        argument: The name of that argument.

    Raises:
        TokenExitError: The function raises it if there are no class scores, or as many as exit heads do not have.
    """
    unknown = given is None and model.host.classes is None
    make = given or ((lambda decoded: decoded) if unknown else model.host.class_scores)
    rule = "be given where a decoder does not return one map of class scores: a function from its output to"
    say = f"{rule} class scores" if unknown else "give class scores"

    def read(decoded: Any, images: int) -> Tensor:
        scores = make(decoded)
        fits = isinstance(scores, Tensor) and scores.ndim == 4 and len(scores) == images
        fits = fits and (scores.shape[1] == model.classes if model.classes else scores.shape[1] > 1)
        got = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        require(fits, argument, f"{say} of shape ({images}, {model.classes or 'classes'}, height, width)", got)
        return scores

    return read
