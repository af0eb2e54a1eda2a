"""A vision transformer in which a token may wait: learned gates say who runs the next blocks, and nobody is lost.

Unlike in `running`, where a token leaves with its outcome, a token that waits keeps its feature and its place, and the
next gate may call it back (SViT, WACV 2024). So the result is a whole map of features, for any decoder.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from tokenexit import TokenExitError, policies, tokens
from tokenexit.adapting import require_gates_fit
from tokenexit.area import Area
from tokenexit.carries import Preserved
from tokenexit.cost import HeadCost
from tokenexit.gates import keep_probability
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule
from tokenexit.tokens import Packing
from tokenexit_torch._blocks import run_block
from tokenexit_torch._counting import head_cost, network_cost, weight_of
from tokenexit_torch._modules import is_training, require_not_exported, require_not_traced
from tokenexit_torch.attention import attending_beside, attending_per_image, attending_to, keys_and_values
from tokenexit_torch.exits.base import Planned
from tokenexit_torch.exits.outputs import upsampled
from tokenexit_torch.hosts import Host, area_of, embedded_by

__all__ = ["GatedModel", "GatedOutput"]


class GatedOutput(NamedTuple):
    """What a gated model returns.

    Attributes:
        logits: Class scores of every patch; None without a head.
        maps: Features of all patches by the blocks that have run, those that wait as they are: for any decoder. After
            the last block they are finished, by the final norm.
        keep: Which patches each gate let run.
        probability: How sure each gate was that they should.
        tokens_per_block: How many tokens of each image ran through each block, prefix tokens included.
        gates: After how many blocks these gates stood.
        keys: Whom those that ran attended to: each other, or those that waited as well.
        area: The area of the images that the grid covers; None if it is the whole of them.
    """

    logits: Float[Tensor, "images classes grid_height grid_width"] | None
    maps: dict[int, Float[Tensor, "images width grid_height grid_width"]]
    keep: Bool[Tensor, "images gates grid_height grid_width"]
    probability: Float[Tensor, "images gates grid_height grid_width"]
    tokens_per_block: Int[Tensor, "images blocks"]
    gates: tuple[int, ...]
    keys: Literal["running", "all"]
    area: Area | None = None

    def upsample(self, size: tuple[int, int]) -> Float[Tensor, "images classes height width"]:
        """The logits at another size, bilinearly, as by `Output.upsample`.

        Args:
            size: Height and width at which the whole images are shown, in pixels.

        Returns:
            The interpolated logits.

        Raises:
            TokenExitError: If there are none, for the model has no head.
        """
        if self.logits is None:
            raise TokenExitError("`head` must be given to `wrap_gates` for logits, got None")
        return upsampled(self.logits, size, self.area)


class GatedModel(Planned):
    """A vision transformer with gates; made by `wrap_gates`.

    A call never samples: a token runs unless the policy of its gate, on the probability that it is kept, lets it wait.
    `Sampled` draws, for training.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        gates: The gates, by the blocks that run before them, as a string.
        head: What reads classes off the finished tokens, if anything.
        taps: After how many blocks maps are handed out.
        gate_plan: The plan that built the gates; None if they were given as modules.
    """

    host: Host
    model: nn.Module
    gates: nn.ModuleDict
    head: nn.Module | None
    taps: tuple[int, ...]
    gate_plan: HeadPlan | None

    def __init__(
        self,
        host: Host,
        schedule: Schedule,
        gates: Mapping[int, nn.Module],
        head: nn.Module | None,
        taps: tuple[int, ...],
        gate_plan: HeadPlan | None,
    ) -> None:
        super().__init__(host)
        self.gates = nn.ModuleDict({str(after): gates[after] for after in sorted(gates)})
        self.head = head
        self.taps = taps
        self.gate_plan = gate_plan
        self._schedule = require_gates_fit(schedule, depth=self.depth, after=sorted(gates))

    def checked(self, schedule: Schedule, /) -> Schedule:
        """A plan, after a check that it fits the gates. Not public."""
        carry = self.schedule.carry
        assert isinstance(carry, Preserved)
        after = [int(after) for after in self.gates]
        return require_gates_fit(schedule, depth=self.depth, after=after, carry=carry)

    def forward(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> GatedOutput:
        """Run a batch; only tokens that their gate lets run are computed. Differentiable but for the decisions.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores if there is a head, maps, decisions and executed tokens.

        Raises:
            TokenExitError: If the images or the plan do not fit the model.
        """
        plan = self._schedule if schedule is None else self.checked(schedule)
        return PackedRun(self, images, plan).through()

    def masked(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> GatedOutput:
        """The same by masks: every token is computed, and what waits is put back. All shapes are known beforehand.

        What training does; beside a call, which it must equal, a reference. It never waits for the device.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            As a call does. `tokens_per_block` counts those that were let run, though all have been computed.

        Raises:
            TokenExitError: If the images or the plan do not fit the model.
        """
        plan = self._schedule if schedule is None else self.checked(schedule)
        return MaskedRun(self, images, plan).through()

    def multiply_adds(self, output: GatedOutput) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, gates, head and patch embedding included; no decoder of yours.

        Where all tokens are keys, those that wait are counted with three matrices of the width squared, and with their
        place in attention.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network, or there is no telling what a part costs.
        """
        height, width = output.keep.shape[2:]
        patches, channels = height * width, self.host.width
        ran = output.tokens_per_block
        slots = int(ran.max()) if ran.numel() else patches
        options = {"width": channels, "like": weight_of(self.host.module)}
        gates = [
            head_cost(self.gates[str(after)], self.counted, f"gates[{after}]", **options) for after in output.gates
        ]
        cost = network_cost(self.host, self.counted)
        cost = replace(
            cost,
            head=HeadCost(0) if self.head is None else head_cost(self.head, self.counted, "head", **options),
            decoder=cost.decoder + slots * sum(gate.per_token for gate in gates),
        )
        total = cost.multiply_adds(ran, patches=patches, head_on="all")
        if output.keys == "all":
            waiting = ran.amax(dim=1, keepdim=True) - ran
            total = total + (waiting * (3 * channels**2 + 2 * cost.width * ran)).sum(dim=1)
        return total


class _Run:
    """One forward pass: the state between two gates. It lives for one call, and is no part of the public API."""

    def __init__(self, model: GatedModel, images: Tensor, plan: Schedule) -> None:
        assert isinstance(plan.carry, Preserved)
        self.model = model
        self.carry = plan.carry
        self.policy = {exit.after: exit.policy for exit in plan.active}
        self.embedded = embedded_by(model.host, images, patch=model.patch)
        self.area = area_of(self.embedded, images)
        self.tokens = self.embedded.tokens
        self.images, self.slots, _ = self.tokens.shape
        self.patches = self.slots - self.embedded.prefix
        # Which slots run, since the last gate; None while all do.
        self.running: Tensor | None = None
        self.logits = self.tokens.new_empty(0)
        self.keep: list[Tensor] = []
        self.probability: list[Tensor] = []
        self.counts: list[Tensor] = []

    def through(self) -> GatedOutput:
        """The whole pass."""
        depth, maps = self.model.depth, {}
        for block in range(depth):
            if block in self.policy:
                self.ask(block)
                self.answer(block, self.policy[block])
            self.advance(block)
            if block + 1 in self.model.taps:
                maps[block + 1] = self._finished() if block + 1 == depth else self._map(self.now())
        logits = None
        if self.model.head is not None:
            logits = self._read(self.model.head, maps[depth] if depth in maps else self._finished())
        return GatedOutput(
            logits,
            maps,
            self._by_gate(self.keep, torch.bool),
            self._by_gate(self.probability, torch.float32),
            torch.stack(self.counts, dim=1),
            tuple(self.policy),
            self.carry.keys,
            self.area,
        )

    def ask(self, after: int) -> None:
        """Ask a gate how probable it is that each patch is kept; all tokens are together again."""
        self.wait(None)
        gate, read = self.model.gates[str(after)], self.gate_input(self.tokens)
        # All slots are read, which lie in one piece: without the prefix they would be copied first. But what a gate
        # learns from, statistics of batch norm among it, are patches alone.
        skipped = self.embedded.prefix if is_training(gate) else 0
        logits = gate(read[:, skipped:].flatten(0, 1)).unflatten(0, (self.images, self.slots - skipped))
        self.logits = logits[:, self.embedded.prefix - skipped :]
        self.probability.append(keep_probability(self.logits))

    def asked(self) -> Tensor:
        """How probable it is that each patch is kept; 0 for those that cannot come back, whatever their gate says."""
        gone = self.carry.returning == "never" and self.keep
        return torch.where(self.keep[-1] > 0, self.probability[-1], 0.0) if gone else self.probability[-1]

    def answer(self, after: int, policy: policies.Policy) -> None:
        """Let wait whom the gate that was asked does not keep."""
        keep = self.decide(after, policy)
        if self.carry.returning == "never" and self.keep:
            keep = self.stay(keep)
        self.keep.append(keep)
        self.wait(functional.pad(keep > 0, (self.embedded.prefix, 0), value=True))

    def advance(self, block: int) -> None:
        """Run one block on those that run."""
        if block == self.model.depth - 1 and self.carry.before == "last block":
            self.wait(None)
        everyone = torch.full((self.images,), self.slots, device=self.tokens.device)
        self.counts.append(everyone if self.running is None else self.running.sum(dim=1))
        self.run(block)

    def decide(self, after: int, policy: policies.Policy) -> Tensor:  # noqa: ARG002
        """Which patches run until the next gate."""
        probability = self.asked()
        index = torch.arange(self.images * self.patches, device=probability.device)
        evidence = policies.Evidence(
            gate=probability.detach().reshape(-1),
            image=index // self.patches,
            images=self.images,
            grid=self.embedded.grid,
            position=index % self.patches,
        )
        return ~policy(evidence).reshape(self.images, self.patches)

    def gate_input(self, tokens: Tensor) -> Tensor:
        """What a gate reads."""
        return tokens

    def now(self) -> Tensor:
        """All tokens as they are now, `(images, slots, width)`."""
        return self.tokens

    def wait(self, running: Tensor | None) -> None:
        """From now on, only these slots run; all of them if None."""
        self.running = running

    def run(self, block: int) -> None:
        """Run one block."""
        raise NotImplementedError

    def stay(self, keep: Tensor) -> Tensor:
        """Those that an earlier gate has let wait do not come back."""
        return keep & self.keep[-1]

    def _finished(self) -> Tensor:
        return self._map(self.model.host.finish(self.now()))

    def _map(self, every: Tensor) -> Tensor:
        height, width = self.embedded.grid
        patches = every[:, self.embedded.prefix :]
        pattern = "images (height width) channels -> images channels height width"
        return rearrange(patches, pattern, height=height, width=width)

    def _read(self, head: nn.Module, finished: Tensor) -> Tensor:
        height, width = self.embedded.grid
        logits = head(rearrange(finished, "images channels height width -> (images height width) channels"))
        by_place = logits.unflatten(0, (self.images, height, width))
        return rearrange(by_place, "images height width classes -> images classes height width")

    def _by_gate(self, found: list[Tensor], dtype: torch.dtype) -> Tensor:
        height, width = self.embedded.grid
        if not found:
            return torch.empty((self.images, 0, height, width), dtype=dtype, device=self.tokens.device)
        return torch.stack([one.detach().to(dtype) for one in found], dim=1).unflatten(2, (height, width))


class PackedRun(_Run):
    """Those that run are gathered into one row at a gate, and put back at the next."""

    def __init__(self, model: GatedModel, images: Tensor, plan: Schedule) -> None:
        if plan.active:
            require_not_traced("GatedModel", instead="export a module that calls `masked` by torch.export")
        super().__init__(model, images, plan)
        self.packing: Packing | None = None
        self.row = self.tokens
        self.lengths: list[int] = []
        self.positions = self.embedded.positions
        self.waiting: Packing | None = None

    def now(self) -> Tensor:
        """All tokens as they are now, `(images, slots, width)`."""
        if self.packing is None:
            return self.tokens
        flat = rearrange(self.tokens, "images slots width -> (images slots) width")
        flat = flat.index_copy(0, self.packing.index, self.row[0].to(flat.dtype))
        return flat.unflatten(0, (self.images, self.slots))

    def wait(self, running: Tensor | None) -> None:
        """From now on, only these slots run; all of them if None."""
        self.tokens, self.waiting = self.now(), None
        super().wait(running)
        if running is not None:
            require_not_exported("GatedModel", instead="export a module that calls `masked`")
        self.packing = None if running is None else tokens.pack(running)
        if self.packing is None or running is None:
            return
        self.row, self.positions = self._gathered(self.packing)
        self.lengths = self.packing.lengths.tolist()
        # Where nobody waits there are no other keys, and not every block can run on no tokens.
        if self.carry.keys == "all" and sum(self.lengths) < running.numel():
            self.waiting = tokens.pack(~running)

    def run(self, block: int) -> None:
        """Run one block."""
        host = self.model.host
        if self.packing is None:
            self.tokens = run_block(host, block, self.tokens, self.embedded.positions)
        elif self.waiting is None:
            if any(self.lengths):
                with attending_per_image(self.lengths) as attention:
                    self.row = run_block(host, block, self.row, self.positions, attention)
        elif any(self.lengths):
            row, positions = self._gathered(self.waiting)
            key, value = keys_and_values(lambda: host.run(block, row, positions), name=f"model.blocks[{block}]")
            with attending_beside(self.lengths, self.waiting.lengths.tolist(), key, value) as attention:
                self.row = run_block(host, block, self.row, self.positions, attention)

    def _gathered(self, packing: Packing) -> tuple[Tensor, Tensor | None]:
        flat = rearrange(self.tokens, "images slots width -> (images slots) width")
        row = flat.index_select(0, packing.index)[None]
        positions = self.embedded.positions
        return row, None if positions is None else positions.index_select(0, packing.slot)


class MaskedRun(_Run):
    """All are computed, and those that wait are put back."""

    def run(self, block: int) -> None:
        """Run one block."""
        running, before = self.running, self.tokens
        # With nobody waiting, or those that wait among the keys, attention is as it always is.
        plain = running is None or self.carry.keys == "all"
        with nullcontext() if plain else attending_to(running) as attention:
            after = run_block(self.model.host, block, before, self.embedded.positions, attention)
        self.tokens = after if running is None else self.mixed(after, before, running)

    def mixed(self, after: Tensor, before: Tensor, running: Tensor) -> Tensor:
        """Tokens after a block: as it made them where they ran, as they were where not."""
        return torch.where(running[..., None], after.to(before.dtype), before)
