"""A vision transformer with learned gates (SViT, WACV 2024).

Unlike in `running`, where a token leaves with its outcome, a skipped token keeps its feature and its place, and the
next gate may activate it again. So the result is a whole map of features, for any decoder.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from jaxtyping import Float, Int
from torch import Tensor, nn

from tokenexit.carries import Preserved
from tokenexit.cost import HeadCost
from tokenexit.heads import HeadPlan
from tokenexit.schedule import Schedule, require_gates_fit
from tokenexit_torch._counting import head_cost, network_cost, weight_of
from tokenexit_torch._modules import require_not_traced
from tokenexit_torch.exits.base import Planned
from tokenexit_torch.gates.forward import MASKED, PACKED, Layout, decide_by_policy, output, run, start
from tokenexit_torch.gates.outputs import GatedOutput
from tokenexit_torch.hosts.protocol import Host

__all__ = ["GatedModel"]


class GatedModel(Planned):
    """A vision transformer with gates; made by `wrap_gates`.

    A call never samples: a patch is skipped exactly if the policy of the gate selects it by its keep probability.
    `Sampled` draws, for training.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        gates: The gates, by the blocks that run before them, as a string.
        head: Final head, from finished tokens to class scores, if there is one.
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
        """Run a batch; only active tokens are computed. Differentiable but for the decisions.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            Class scores if there is a head, maps, decisions and executed tokens.

        Raises:
            TokenExitError: If the images or the plan do not fit the model.
        """
        plan = self._schedule if schedule is None else self.checked(schedule)
        if plan.active:
            require_not_traced("GatedModel", instead="export a module that calls `masked` by torch.export")
        return self._run(images, plan, PACKED)

    def masked(
        self, images: Float[Tensor, "images channels height width"], *, schedule: Schedule | None = None
    ) -> GatedOutput:
        """The same by masks: all tokens are computed, and skipped ones put back. All shapes are known beforehand.

        What training does; beside a call, which it must equal, a reference. It never waits for the device.

        Args:
            images: The images, as the wrapped model takes them.
            schedule: A plan for this call only; the model's own if left out.

        Returns:
            As a call does. `tokens_per_block` counts active tokens, though all have been computed.

        Raises:
            TokenExitError: If the images or the plan do not fit the model.
        """
        plan = self._schedule if schedule is None else self.checked(schedule)
        return self._run(images, plan, MASKED)

    def _run(self, images: Tensor, plan: Schedule, layout: Layout) -> GatedOutput:
        state = start(self.host, images, plan, patch=self.patch)
        stages = plan.stages(self.depth, taps=self.taps)
        state = run(self.host, state, stages, layout=layout, decide=partial(decide_by_policy, self.gates))
        return output(self.host, self.head, state)

    def multiply_adds(self, output: GatedOutput) -> Int[Tensor, "images"]:
        """Multiply-adds that a call has executed, gates, head and patch embedding included; no decoder of yours.

        Where all tokens are keys, skipped ones are counted with three matrices of the channels squared, and as keys in
        attention.

        Args:
            output: What the call returned.

        Returns:
            Multiply-adds per image.

        Raises:
            TokenExitError: If the output is of another network, or there is no telling what a part costs.
        """
        height, width = output.keep.shape[2:]
        patches, ran, dim = height * width, output.tokens_per_block, self.host.width
        options = {"width": dim, "like": weight_of(self.host.module)}
        gates = [
            head_cost(self.gates[str(after)], self.counted, f"gates[{after}]", **options) for after in output.gates
        ]
        cost = network_cost(self.host, self.counted)
        head = HeadCost(0) if self.head is None else head_cost(self.head, self.counted, "head", **options)
        # The host says how many prefix tokens there are only of images; but all tokens are active in the first block.
        slots = int(ran.max()) if ran.numel() else patches
        cost = replace(cost, head=head)
        return cost.gated(ran, patches=patches, slots=slots, gates=gates, keys=output.keys, dim=dim)
