"""One forward pass with exits: what lies between two exit points, and what happens at them.

It is no part of the public API.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import cells, ledger, policies, scores, surroundings, tokens
from tokenexit.carries import Feature, MaskPrediction
from tokenexit.errors import require
from tokenexit.ledger import Ledger
from tokenexit.schedule import Exit, Schedule
from tokenexit.tokens import Packing, Receipt, Selection
from tokenexit_torch._blocks import run_blocks
from tokenexit_torch._modules import is_training, kept_eager, require_not_exported, require_not_traced
from tokenexit_torch.attention import Padded, PerImage
from tokenexit_torch.exits import WithExits
from tokenexit_torch.heads import NeighbourhoodHead
from tokenexit_torch.hosts import area_of, embedded_by
from tokenexit_torch.masks import MaskHead, Masks, log_scores, patch_rows, widened
from tokenexit_torch.outputs import Output

if TYPE_CHECKING:
    from tokenexit_torch.running import ExitingModel

__all__ = ["Move", "PackedRun", "Reading", "Run", "as_read", "has_to_wait", "packed", "read_batch"]


class Reading(NamedTuple):
    """What a head says of tokens, in whatever layout they have.

    Attributes:
        logits: Class scores.
        class_scores: Those of a mask head as a policy takes them, where one is asked.
        masks: What a mask head said.
    """

    logits: Tensor
    class_scores: Tensor | None = None
    masks: Masks | None = None

    @property
    def confidence(self) -> Tensor:
        """How sure the head is of each token."""
        return scores.confidence(self.logits) if self.class_scores is None else self.class_scores.amax(dim=-1)

    def detach(self) -> "Reading":
        """The same, as constants."""
        masks = None if self.masks is None else Masks(*(part.detach() for part in self.masks))
        return Reading(self.logits.detach(), self.class_scores, masks)


class Move(NamedTuple):
    """What becomes of a row at an exit point.

    Attributes:
        receipt: The receipt of the row that runs on.
        rows: Which entries of the present row it takes.
        stay: Which entries of the present row are among them.
    """

    receipt: Receipt
    rows: Int[Tensor, "entries"]
    stay: Bool[Tensor, "present"]


class Run:
    """One forward pass: the state between two exit points, in either layout. It lives for one call.

    The tokens that run are a plain batch up to the first exit point, and one row from then on.
    """

    def __init__(self, model: WithExits[Any], images: Tensor, schedule: Schedule | None) -> None:
        plan = model.schedule if schedule is None else model.checked(schedule)
        self.policy = {exit.after: exit.policy for exit in self._asked(plan)}
        if self.policy:
            require_not_traced(type(model).__name__)
        embedded = embedded_by(model.host, images, patch=model.patch)
        self.model = model
        self.embedded = embedded
        self.area = area_of(embedded, images)
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
        self.token_size: Tensor | None = None
        self.lengths = [self.slots] * self.images
        self.exits: list[int] = []
        # The exit point where the row is now, or was last.
        self.after = 0
        # A batch is a packed row already, seen without its first axis.
        self.row = embedded.tokens
        self.receipt: Receipt | None = None
        self.positions = embedded.positions
        # The classes that the exit heads so far have predicted for the tokens of the row.
        self.previous = torch.empty((0, 0), dtype=torch.int64, device=embedded.tokens.device)

    def _asked(self, plan: Schedule) -> tuple[Exit, ...]:
        """The exits whose heads are run."""
        return plan.active

    @property
    def stops(self) -> list[int]:
        """After how many blocks something else happens than the next block; all of them last."""
        depth = self.model.depth
        rejoins = self.feature is not None and self.feature.before == "last block"
        return sorted({*self.policy, depth, *([depth - 1] if rejoins else [])})

    def through(self) -> Output:
        """The whole pass."""
        self.run()
        return self.output()

    def run(self) -> None:
        """All blocks, and what happens between them."""
        start = 0
        for stop in self.stops:
            self.counted(start, stop)
            if any(self.lengths):
                self.row = run_blocks(self.model.host, start, stop, self.row, self.positions, self.attention())
            self.pause(stop)
            start = stop

    def counted(self, start: int, stop: int) -> None:
        """Write down that some blocks are run on the tokens that there are."""
        raise NotImplementedError

    def ran(self) -> Tensor:
        """How many tokens of each image ran through each block."""
        raise NotImplementedError

    def first(self) -> Receipt:
        """The receipt of all tokens."""
        raise NotImplementedError

    def repack(self, stay: Tensor, kept: Tensor, confidence: Tensor) -> "Move":
        """Who of the row runs on.

        Args:
            stay: Which entries are to stay.
            kept: Which of them may not be sent away for lack of room.
            confidence: How sure their head is of each.
        """
        raise NotImplementedError

    def attention(self) -> PerImage | Padded | None:
        """What keeps images apart in the row; None where nothing need."""
        raise NotImplementedError

    def pause(self, after: int) -> None:
        """What happens after some blocks: tokens leave, or all come back."""
        if after in self.policy and any(self.lengths):
            self._exit(after, self.policy[after])
        if after == self.model.depth - 1 and self.feature is not None and self.feature.before == "last block":
            self._rejoin()

    def _exit(self, after: int, policy: policies.Policy) -> None:
        self.after = after
        receipt = self.pack()
        reading = self._read(self.model.exit_heads[str(after)], self.row[0])
        if self.ledger is None:
            features = None if self.feature is None else self.laid(self.row[0])
            self.ledger = ledger.open_ledger(self.laid(reading.logits), receipt, features=features)
        evidence = self._evidence(receipt, self.ledger, reading)
        leave = policy(evidence)
        patch = evidence.eligible
        # An image all of whose patches have left is done: its prefix tokens need not run on, nor do those that would
        # stand for others.
        nobody = torch.zeros_like(receipt.running)
        staying = tokens.scatter(self.laid(patch & ~leave), receipt, into=nobody)
        waiting = staying.any(dim=1).index_select(0, receipt.image)
        kept: Tensor = ~patch
        if self.cell is not None:
            middle: Tensor = cells.is_cell_centre(evidence.position, grid=self.embedded.grid, side=self.cell)
            leave, kept = leave & ~middle, kept | middle
        move = self.repack(~leave & waiting, kept, evidence.confidence)
        self._settle(after, ~move.stay, reading, evidence.confidence)
        if self.feature is not None and self.feature.fold_above is not None:
            left = self.laid(patch & ~move.stay)
            folded = ledger.fold_leavers(self.laid(self.row[0]), receipt, left, above=self.feature.fold_above)
            self.row = folded.reshape(self.row.shape)
        self.previous = torch.cat([self.previous, evidence.label[None]])
        self.exits.append(after)
        self._take(move)

    def _evidence(self, receipt: Receipt, settled: Ledger, reading: Reading) -> policies.Evidence:
        """What a policy is shown: the entries of the row."""
        prefix = self.embedded.prefix
        return policies.Evidence(
            reading.logits.detach() if reading.class_scores is None else None,
            class_scores=reading.class_scores,
            image=receipt.image,
            images=self.images,
            grid=self.embedded.grid,
            position=receipt.slot - prefix,
            valid=receipt.valid.flatten() if isinstance(receipt, Selection) else None,
            protected=receipt.slot < prefix if prefix else None,
            exit=len(self.exits),
            previous=self.previous,
            settled_label=settled.label[:, prefix:],
            settled_score=settled.score[:, prefix:],
        )

    def laid(self, row: Tensor) -> Tensor:
        """Values of the row, in the layout of the receipt."""
        assert self.receipt is not None
        return row.reshape(*self.receipt.layout, *row.shape[1:])

    def _take(self, move: "Move") -> None:
        """The one gather of an exit point."""
        self.receipt = move.receipt
        self.row = self.row.index_select(1, move.rows)
        self.previous = self.previous.index_select(1, move.rows)
        if self.positions is not None:
            self.positions = self.positions.index_select(0, move.rows)
        if self.cell is not None:
            self.token_size = cells.token_size(move.receipt, grid=self.embedded.grid, side=self.cell).flatten()

    def _read(self, head: nn.Module, flat: Tensor) -> Reading:
        """What a head says of the tokens of the row, or of them and what is around; a mask head sees patches alone."""
        assert self.receipt is not None
        if isinstance(head, NeighbourhoodHead):
            beside = surroundings.beside_running(
                self.laid(flat), self.receipt, grid=self.embedded.grid, radius=head.radius
            )
            flat = beside.flatten(0, -2)
        if not isinstance(head, MaskHead):
            return Reading(self._scored(head, flat))
        rows, patches = patch_rows(self.lengths, self.embedded.prefix, flat.device)
        found = widened(head(flat.index_select(0, rows), patches))
        nothing = found.mask_logits.new_zeros(flat.shape[0], found.mask_logits.shape[1])
        masks = Masks(nothing.index_copy(0, rows, found.mask_logits), found.presence_logits)
        presence = masks.presence_logits.index_select(0, self.receipt.image)
        class_scores = scores.mask_scores(masks.mask_logits.detach(), presence.detach().sigmoid())
        return Reading(log_scores(masks.mask_logits, presence), class_scores, masks)

    def _scored(self, head: nn.Module, flat: Tensor) -> Tensor:
        """Class scores of every token of the row."""
        return head(flat)

    def _settle(self, after: int, leave: Tensor, reading: Reading, confidence: Tensor) -> None:
        """Write down what tokens of the row leave behind."""
        assert self.ledger is not None
        assert self.receipt is not None
        features = None if self.feature is None else self.laid(self.row[0])
        logits = self.laid(reading.logits)
        leave, score = self.laid(leave), self.laid(confidence)
        self.ledger = ledger.record(
            self.ledger, self.receipt, leave, logits, depth=after, score=score, features=features
        )
        if self.keeps_masks and reading.masks is not None:
            self.masks = self._joined(reading.masks)

    def _joined(self, masks: Masks) -> Masks:
        """Masks of the row put in their slots, beside those that leavers have left; presence likewise, by image."""
        assert self.receipt is not None
        classes = masks.mask_logits.shape[1]
        before = masks.mask_logits.new_zeros(self.images, self.slots, classes), masks.presence_logits
        mask_logits, presence_logits = before if self.masks is None else self.masks
        ran = torch.tensor([length > 0 for length in self.lengths], dtype=torch.bool, device=self.row.device)
        return Masks(
            tokens.scatter(masks.mask_logits, self.receipt, into=mask_logits),
            torch.where(ran[:, None], masks.presence_logits, presence_logits),
        )

    def pack(self) -> Receipt:
        """The receipt of the row; a plain batch becomes one."""
        if self.receipt is None:
            self.receipt = self.first()
            self.row = rearrange(self.row, "images slots width -> 1 (images slots) width")
            self.previous = self.previous.new_empty((0, self.images * self.slots))
            if self.positions is not None:
                self.positions = self.positions.repeat(self.images, *[1] * (self.positions.ndim - 1))
        return self.receipt

    def unpack(self) -> None:
        """A plain batch again, if the row holds all tokens of all images."""
        if self.receipt is not None and self.row.shape[1] == self.images * self.slots:
            self.row = rearrange(self.row, "1 (images slots) width -> images slots width", images=self.images)
            self.receipt, self.positions, self.token_size = None, self.embedded.positions, None

    def whole(self) -> Tensor:
        """All tokens of all images as a plain batch, those that have left as they left; the run goes on as it is."""
        if self.receipt is None:
            return self.row
        if self.ledger is None:  # nothing could leave
            return self.row.reshape(self.images, self.slots, -1)
        return ledger.rejoin(self.ledger, self.receipt, self.laid(self.row[0]))

    def _rejoin(self) -> None:
        """All tokens of all images run again, as a plain batch."""
        if self.receipt is not None:
            self.row = self.whole()
            self.receipt, self.positions, self.token_size = None, self.embedded.positions, None
            self.lengths = [self.slots] * self.images

    def _predictions(self, settled: Ledger) -> Tensor:
        """Class scores of every slot: as they froze, or frozen masks under the latest presence."""
        if not self.reweighs or self.masks is None:
            return settled.logits
        return log_scores(self.masks.mask_logits, self.masks.presence_logits[:, None])

    def output(self) -> Output:
        """What comes of it."""
        prefix = self.embedded.prefix
        model = cast("ExitingModel", self.model)  # a decoder has an output of its own
        settled = self.ledger
        if self.feature is not None:
            self._rejoin()
        if self.receipt is None:
            patches = model.host.finish(self.row)[:, prefix:]
            reading = read_batch(model.head, patches, self.embedded.grid)
            logits, self.masks = reading.logits, reading.masks
            depth = torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)
            depth = depth if settled is None else settled.depth[:, prefix:]
            depth = torch.where(depth > 0, depth, model.depth)
        else:
            assert settled is not None
            assert self.ledger is not None
            if any(self.lengths):
                final = self._read(model.head, model.host.finish(self.row[0]))
                everyone = torch.ones(final.logits.shape[0], dtype=torch.bool, device=final.logits.device)
                final = final._replace(logits=final.logits.to(settled.logits.dtype))
                self._settle(model.depth, everyone, final, final.confidence)
            settled = self.ledger
            logits, depth = self._predictions(settled)[:, prefix:], settled.depth[:, prefix:]
        height, width = self.embedded.grid
        grid = {"height": height, "width": width}
        return Output(
            rearrange(logits, "images (height width) classes -> images classes height width", **grid),
            rearrange(depth, "images (height width) -> images height width", **grid),
            self.ran(),
            tuple(self.exits),
            "running" if self.feature is None else "all",
            self.area,
        )


class PackedRun(Run):
    """One forward pass in which the row holds the tokens that run, and no others.

    What shapes depend on the data is kept out of the programs of `torch.compile`; those are made of the blocks between
    two exit points.
    """

    def __init__(self, model: WithExits[Any], images: Tensor, schedule: Schedule | None) -> None:
        super().__init__(model, images, schedule)
        self.counts: list[list[int]] = []

    @kept_eager
    def counted(self, start: int, stop: int) -> None:
        self.counts += [self.lengths] * (stop - start)

    @kept_eager
    def attention(self) -> PerImage | None:
        running = sum(length > 0 for length in self.lengths)
        # A plain batch, or a row with the tokens of one image, needs no help to keep its images apart.
        if self.receipt is None or (running == 1 and self.token_size is None):
            return None
        assert isinstance(self.receipt, Packing)
        return PerImage(self.lengths, self.receipt.offsets, self.token_size)

    @kept_eager
    def pause(self, after: int) -> None:
        super().pause(after)

    @kept_eager
    def output(self) -> Output:
        return super().output()

    def first(self) -> Receipt:
        everything = torch.ones(self.images, self.slots, dtype=torch.bool, device=self.row.device)
        return Packing(everything, torch.arange(self.images * self.slots, device=self.row.device))

    def repack(self, stay: Tensor, kept: Tensor, confidence: Tensor) -> "Move":  # noqa: ARG002
        require_not_exported(type(self.model).__name__)
        assert isinstance(self.receipt, Packing)
        # Here, and nowhere else, an accelerator is waited for; and once, for both counts and rows would wait.
        counted = functional.pad(stay.cumsum(0), (1, 0)).index_select(0, self.receipt.offsets)
        self.lengths = counted.diff().tolist()
        packing, rows = tokens.repack(self.receipt, stay, count=sum(self.lengths) if has_to_wait(stay) else None)
        return Move(packing, rows, stay)

    def _scored(self, head: nn.Module, flat: Tensor) -> Tensor:
        prefix = self.embedded.prefix
        if prefix == 0 or not is_training(head):
            return head(flat)
        # What a head learns from, statistics of batch norm among it, are patches alone.
        rows, _ = patch_rows(self.lengths, prefix, flat.device)
        found = head(flat.index_select(0, rows))
        return found.new_zeros(flat.shape[0], *found.shape[1:]).index_copy(0, rows, found)

    def ran(self) -> Tensor:
        counts = torch.tensor(self.counts, dtype=torch.int64, device="cpu").to(self.row.device, non_blocking=True)
        return counts.reshape(self.model.depth, self.images).T


def has_to_wait(tensor: Tensor) -> bool:
    """Whether what a tensor holds is known only when an accelerator has computed it."""
    return tensor.device.type != "cpu"


@kept_eager
def packed(model: "ExitingModel", images: Tensor, schedule: Schedule | None) -> PackedRun:
    """A pass that has embedded its images."""
    return PackedRun(model, images, schedule)


def as_read(head: nn.Module, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """All patches of a batch, as a head reads them: a head that looks around them is shown what is there."""
    if not isinstance(head, NeighbourhoodHead):
        return patches
    return surroundings.beside_all(patches, grid=grid, radius=head.radius)


def read_batch(head: nn.Module, patches: Tensor, grid: tuple[int, int]) -> Reading:
    """What a head says of all patches of a batch."""
    if not isinstance(head, MaskHead):
        return Reading(head(as_read(head, patches, grid)))
    images, places, _ = patches.shape
    found = widened(head(rearrange(patches, "images places width -> (images places) width"), [places] * images))
    mask_logits = found.mask_logits.reshape(images, places, found.mask_logits.shape[1])
    presence = found.presence_logits
    return Reading(log_scores(mask_logits, presence[:, None]), masks=Masks(mask_logits, presence))
