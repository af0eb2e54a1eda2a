"""A vision transformer whose tokens leave early.

The tokens run as a plain batch until the first exit point, then as one packed row: the linear layers see all tokens
that still run, attention works image by image. At each exit point there is one gather.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import cells, ledger, policies, scores, tokens
from tokenexit.carries import Feature, MaskPrediction
from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import require
from tokenexit.heads import HeadPlan
from tokenexit.ledger import Ledger
from tokenexit.schedule import Exit, Schedule
from tokenexit.tokens import Packing
from tokenexit_torch._modules import linear_weights
from tokenexit_torch.attention import attending_per_image
from tokenexit_torch.exits import WithExits
from tokenexit_torch.hosts import Embedded, Host, embedded_by, embedding_weights
from tokenexit_torch.masks import MaskHead, MaskMaps, Masks, as_maps, log_scores, patch_rows, widened

__all__ = ["ExitingModel", "Output"]


class Output(NamedTuple):
    """What a wrapped model returns.

    Attributes:
        logits: Class scores of every patch, from the head at which it left; from the final head if features rejoined.
            Logits, or for mask heads the logarithm of presence times mask.
        exit_depth: After how many blocks every patch left; all of them if it never did.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        exits: The blocks after which an exit head ran.
        head_on: Which patches the final head read: those that ran to the end, or all, because features rejoined.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"]
    exit_depth: Int[Tensor, "images grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    exits: tuple[int, ...]
    head_on: Literal["running", "all"]

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly: logits and not probabilities, which would blur the boundaries.

        Args:
            size: Height and width, in pixels.

        Returns:
            The interpolated logits.
        """
        return functional.interpolate(self.logits, size, mode="bilinear", align_corners=False)


class ExitingModel(WithExits[Host]):
    """A vision transformer whose tokens leave early; made by `wrap`.

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
        return isinstance(self.head, MaskHead)

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
        return Run(self, images, schedule).through()

    def every_exit(
        self, images: Float[Tensor, "images channels height width"]
    ) -> dict[int, Float[Tensor, "images classes grid_height grid_width"]]:
        """Class scores of every head on all tokens, in one dense run: for auxiliary losses and for tracing.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Logits by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the images do not fit the model.
        """
        readings, (height, width) = self._read_all(images)
        pattern = "images (height width) classes -> images classes height width"
        return {after: rearrange(one.logits, pattern, height=height, width=width) for after, one in readings.items()}

    def every_mask(self, images: Float[Tensor, "images channels height width"]) -> dict[int, MaskMaps]:
        """Masks and presence of every head on all tokens, in one dense run: what `mask_loss` is computed from.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Masks and presence by blocks run; the last entry is the final head's.

        Raises:
            TokenExitError: If the heads are no mask heads, or the images do not fit the model.
        """
        require(self.gives_masks, "model", "have mask heads", type(self.head).__name__)
        readings, grid = self._read_all(images)
        return {after: as_maps(one.masks, grid) for after, one in readings.items() if one.masks is not None}

    def patches_after(
        self, images: Float[Tensor, "images channels height width"]
    ) -> dict[int, Float[Tensor, "images patches channels_out"]]:
        """Patches as every head would read them, in one dense run.

        Args:
            images: The images, as the wrapped model takes them.

        Returns:
            Patches by blocks run: as the block leaves them for the exit heads, finished for the final head, which is
            the last entry.

        Raises:
            TokenExitError: If the images do not fit the model.
        """
        return self._trace(images)[1]

    def multiply_adds(self, output: Output) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, heads and patch embedding included.

        They are read off the linear and convolution layers and the executed tokens; heads are counted for patches, and
        a mask head says itself what it costs.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network.
        """
        height, width = output.exit_depth.shape[1:]
        slots = int(output.tokens_per_block.max()) if output.tokens_per_block.numel() else height * width
        cost = Cost(
            embed=embedding_weights(self.host),
            blocks=tuple(linear_weights(block) for block in self.host.blocks),
            width=self.host.width,
            prefix=slots - height * width,
            exit_heads={int(after): _head_cost(head) for after, head in self.exit_heads.items()},
            head=_head_cost(self.head),
        )
        return cost.multiply_adds(
            output.tokens_per_block, patches=height * width, exits=output.exits, head_on=output.head_on
        )

    def _read_all(self, images: Tensor) -> tuple[dict[int, "Reading"], tuple[int, int]]:
        embedded, patches = self._trace(images)
        heads = [*self.exit_heads.values(), self.head]
        readings = {after: _read_batch(head, rows) for (after, rows), head in zip(patches.items(), heads, strict=True)}
        return readings, embedded.grid

    def _trace(self, images: Tensor) -> tuple[Embedded, dict[int, Tensor]]:
        embedded = embedded_by(self.host, images)
        running, patches = embedded.tokens, {}
        for block in range(self.depth):
            running = self.host.run(block, running, embedded.positions)
            if str(block + 1) in self.exit_heads:
                patches[block + 1] = running[:, embedded.prefix :]
        patches[self.depth] = self.host.finish(running)[:, embedded.prefix :]
        return embedded, patches


class Reading(NamedTuple):
    """What a head says of tokens, in whatever layout they have. It is no part of the public API.

    Attributes:
        logits: Class scores.
        class_scores: Those of a mask head as a policy takes them, where one is asked.
        masks: What a mask head said.
    """

    logits: Tensor
    class_scores: Tensor | None = None
    masks: Masks | None = None

    def detach(self) -> "Reading":
        """The same, as constants."""
        masks = None if self.masks is None else Masks(*(part.detach() for part in self.masks))
        return Reading(self.logits.detach(), self.class_scores, masks)


class Run:
    """One forward pass: the state between two exit points. It lives for one call, and is no part of the public API."""

    def __init__(self, model: WithExits[Any], images: Tensor, schedule: Schedule | None) -> None:
        plan = model.schedule if schedule is None else model.checked(schedule)
        embedded = embedded_by(model.host, images)
        self.model = model
        self.embedded = embedded
        self.policy = {exit.after: exit.policy for exit in self._asked(plan)}
        self.feature = plan.carry if isinstance(plan.carry, Feature) else None
        folds = self.feature is not None and self.feature.fold_above is not None
        require(
            not folds or embedded.prefix > 0,
            "schedule",
            "have fold_above=None for a model without prefix tokens",
            plan.carry,
        )
        self.images, self.slots, _ = embedded.tokens.shape
        self.ledger: Ledger | None = None
        self.reweighs = isinstance(plan.carry, MaskPrediction)
        self.keeps_masks = self.reweighs
        # Of every slot, and of every image, what the last mask head said that read it.
        self.masks: Masks | None = None
        self.cell = plan.cell
        self.stands_for: Tensor | None = None
        self.lengths = [self.slots] * self.images
        self.counts: list[list[int]] = []
        self.exits: list[int] = []
        # A batch is a packed row already, seen without its first axis.
        self.row = embedded.tokens
        self.packing: Packing | None = None
        self.positions = embedded.positions
        # The classes that the exit heads so far have predicted for the tokens of the row.
        self.previous = torch.empty((0, 0), dtype=torch.int64, device=embedded.tokens.device)

    def _asked(self, plan: Schedule) -> tuple[Exit, ...]:
        """The exits whose heads are run."""
        return plan.active

    def through(self) -> Output:
        self._run_blocks()
        return self._output()

    def _run_blocks(self) -> None:
        last = self.model.depth - 1
        for block in range(self.model.depth):
            if block == last and self.feature is not None and self.feature.before == "last block":
                self._rejoin()
            self.counts.append(self.lengths)
            if any(self.lengths):
                self._block(block)
                if block + 1 in self.policy:
                    self._exit(block + 1, self.policy[block + 1])
            self._passed(block + 1)

    def _passed(self, after: int) -> None:
        """So many blocks are done with, and the exit after them."""

    def _block(self, block: int) -> None:
        running = sum(length > 0 for length in self.lengths)
        # A plain batch, or a row with the tokens of one image, needs no help to keep its images apart.
        alone = self.packing is None or (running == 1 and self.stands_for is None)
        with nullcontext() if alone else attending_per_image(self.lengths, stands_for=self.stands_for):
            self.row = self.model.host.run(block, self.row, self.positions)

    def _exit(self, after: int, policy: policies.Policy) -> None:
        packing = self._pack()
        flat = self.row[0]
        reading = self._read(self.model.exit_heads[str(after)], flat, packing)
        if self.ledger is None:
            self.ledger = ledger.open_ledger(reading.logits, packing, features=None if self.feature is None else flat)
        prefix = self.embedded.prefix
        patch = packing.slot >= prefix
        evidence = policies.Evidence(
            reading.logits.detach() if reading.class_scores is None else None,
            class_scores=reading.class_scores,
            image=packing.image,
            images=self.images,
            grid=self.embedded.grid,
            position=packing.slot - prefix,
            protected=~patch if prefix else None,
            exit=len(self.exits),
            previous=self.previous,
            settled_label=self.ledger.label[:, prefix:],
            settled_score=self.ledger.score[:, prefix:],
        )
        leave = policy(evidence)
        # An image all of whose patches have left is done: its prefix tokens need not run on, nor do those that would
        # stand for others.
        staying = tokens.scatter(patch & ~leave, packing, into=torch.zeros_like(packing.running))
        waiting = staying.any(dim=1).index_select(0, packing.image)
        if self.cell is not None:
            leave = leave & ~cells.in_the_middle(evidence.position, grid=self.embedded.grid, side=self.cell)
        stay = ~leave & waiting
        self._settle(after, ~stay, reading)
        if self.feature is not None and self.feature.fold_above is not None:
            self.row = ledger.fold_leavers(flat, packing, leave, above=self.feature.fold_above)[None]
        self.previous = torch.cat([self.previous, evidence.label[None]])
        self.exits.append(after)
        self._repack(stay)

    def _read(self, head: nn.Module, flat: Tensor, packing: Packing) -> Reading:
        """What a head says of the tokens of the packed row; a mask head is shown the patches alone."""
        if not isinstance(head, MaskHead):
            return Reading(head(flat))
        rows, patches = patch_rows(self.lengths, self.embedded.prefix, flat.device)
        found = widened(head(flat.index_select(0, rows), patches))
        nothing = found.mask_logits.new_zeros(flat.shape[0], found.mask_logits.shape[1])
        masks = Masks(nothing.index_copy(0, rows, found.mask_logits), found.presence_logits)
        presence = masks.presence_logits.index_select(0, packing.image)
        class_scores = scores.mask_scores(masks.mask_logits.detach(), presence.detach().sigmoid())
        return Reading(log_scores(masks.mask_logits, presence), class_scores, masks)

    def _settle(self, after: int, leave: Tensor, reading: Reading) -> None:
        """Write down what tokens of the row leave behind."""
        assert self.ledger is not None
        assert self.packing is not None
        score = None if reading.class_scores is None else reading.class_scores.amax(dim=-1)
        features = None if self.feature is None else self.row[0]
        self.ledger = ledger.record(
            self.ledger, self.packing, leave, reading.logits, depth=after, score=score, features=features
        )
        if self.keeps_masks and reading.masks is not None:
            self.masks = self._joined(reading.masks)

    def _joined(self, masks: Masks) -> Masks:
        """Masks of the row put in their slots, beside those that leavers have left; presence likewise, by image."""
        assert self.packing is not None
        classes = masks.mask_logits.shape[1]
        before = masks.mask_logits.new_zeros(self.images, self.slots, classes), masks.presence_logits
        mask_logits, presence_logits = before if self.masks is None else self.masks
        ran = torch.tensor([length > 0 for length in self.lengths], dtype=torch.bool, device=self.row.device)
        return Masks(
            tokens.scatter(masks.mask_logits, self.packing, into=mask_logits),
            torch.where(ran[:, None], masks.presence_logits, presence_logits),
        )

    def _pack(self) -> Packing:
        if self.packing is None:
            everything = torch.ones(self.images, self.slots, dtype=torch.bool, device=self.row.device)
            self.packing = Packing(everything, torch.arange(self.images * self.slots, device=self.row.device))
            self.row = rearrange(self.row, "images slots width -> 1 (images slots) width")
            self.previous = self.previous.new_empty((0, self.images * self.slots))
            if self.positions is not None:
                self.positions = self.positions.repeat(self.images, *[1] * (self.positions.ndim - 1))
        return self.packing

    def _repack(self, stay: Tensor) -> None:
        assert self.packing is not None
        self.packing, rows = tokens.repack(self.packing, stay)
        self.row = self.row.index_select(1, rows)
        self.previous = self.previous.index_select(1, rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, rows)
        self.lengths = self.packing.lengths.tolist()
        if self.cell is not None:
            self.stands_for = cells.stands_for(self.packing, grid=self.embedded.grid, side=self.cell)

    def _whole(self) -> Tensor:
        """All tokens of all images as a plain batch, those that have left as they left; the run goes on as it is."""
        if self.packing is None:
            return self.row
        assert self.ledger is not None
        return ledger.rejoin(self.ledger, self.packing, self.row[0])

    def _rejoin(self) -> None:
        """All tokens of all images run again, as a plain batch."""
        if self.packing is not None:
            self.row = self._whole()
            self.packing, self.positions, self.stands_for = None, self.embedded.positions, None
            self.lengths = [self.slots] * self.images

    def _predictions(self, settled: Ledger) -> Tensor:
        """Class scores of every slot: as they froze, or frozen masks under the latest presence."""
        if not self.reweighs or self.masks is None:
            return settled.logits
        return log_scores(self.masks.mask_logits, self.masks.presence_logits[:, None])

    def _output(self) -> Output:
        model, prefix = self.model, self.embedded.prefix
        assert isinstance(model, ExitingModel)
        settled = self.ledger
        if self.feature is not None:
            self._rejoin()
        if self.packing is None:
            reading = _read_batch(model.head, model.host.finish(self.row)[:, prefix:])
            logits, self.masks = reading.logits, reading.masks
            depth = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
            depth = depth if settled is None else settled.depth[:, prefix:]
            depth = torch.where(depth > 0, depth, model.depth)
        else:
            assert settled is not None
            assert self.ledger is not None
            if any(self.lengths):
                final = self._read(model.head, model.host.finish(self.row[0]), self.packing)
                everyone = torch.ones(final.logits.shape[0], dtype=torch.bool, device=final.logits.device)
                final = final._replace(logits=final.logits.to(settled.logits.dtype))
                self._settle(model.depth, everyone, final)
            settled = self.ledger
            logits, depth = self._predictions(settled)[:, prefix:], settled.depth[:, prefix:]
        height, width = self.embedded.grid
        grid = {"height": height, "width": width}
        return Output(
            rearrange(logits, "images (height width) classes -> images classes height width", **grid),
            rearrange(depth, "images (height width) -> images height width", **grid),
            torch.tensor(self.counts, dtype=torch.int64, device=logits.device).reshape(model.depth, self.images).T,
            tuple(self.exits),
            "running" if self.feature is None else "all",
        )


def _read_batch(head: nn.Module, patches: Tensor) -> Reading:
    """What a head says of all patches of a batch."""
    if not isinstance(head, MaskHead):
        return Reading(head(patches))
    images, places, _ = patches.shape
    found = widened(head(rearrange(patches, "images places width -> (images places) width"), [places] * images))
    mask_logits = found.mask_logits.reshape(images, places, found.mask_logits.shape[1])
    presence = found.presence_logits
    return Reading(log_scores(mask_logits, presence[:, None]), masks=Masks(mask_logits, presence))


def _head_cost(head: nn.Module) -> HeadCost:
    return head.cost if isinstance(head, MaskHead) else HeadCost(linear_weights(head))
