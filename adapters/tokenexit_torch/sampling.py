"""Training with gates: every decision is drawn, and every token computed, so that a gate learns what it gives up.

    sampled = tet.Sampled(model, rates=gates.staged_rates(model.schedule.after))
    drawn = sampled(images, generator=generator)
    loss = criterion(drawn.output.logits) + 4 * drawn.ratio_loss()
    loss.backward()

Afterwards `gate_thresholds` finds the thresholds under which nothing is drawn and as many are kept.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenexit import gates
from tokenexit.adapting import coin_for, rates_by_gate
from tokenexit.errors import require
from tokenexit.policies import Policy
from tokenexit.schedule import Schedule
from tokenexit_torch.gating import GatedModel, GatedOutput, MaskedRun
from tokenexit_torch.hosts import require_covered

__all__ = ["Drawing", "Sampled"]


class Drawing(NamedTuple):
    """What a training pass with gates returns.

    Attributes:
        output: As a call of the model returns it, differentiably.
        keep: The decisions, 1 or 0; their gradient is that of the relaxed decision (straight-through).
        rates: What share each gate is to keep.
    """

    output: GatedOutput
    keep: Float[Tensor, "images gates grid_height grid_width"]
    rates: Float[Tensor, "gates"]

    def ratio_loss(
        self,
        *,
        of_each: Literal["batch", "image"] = "batch",
        valid: Bool[Tensor, "images grid_height grid_width"] | None = None,
    ) -> Float[Tensor, ""]:
        """What holds the gates to their rates (`tokenexit.gates.ratio_loss`).

        Args:
            of_each: Whose share: of the `batch`, or of each `image`.
            valid: Patches that are no padding; all, if left out.

        Returns:
            The loss. Published weight: 4 (SViT, WACV 2024, section 3.3).

        Raises:
            TokenExitError: If `of_each` is unknown or `valid` does not fit.
        """
        keep = rearrange(self.keep, "images gates height width -> images gates (height width)")
        return gates.ratio_loss(keep, self.rates, of_each=of_each, valid=None if valid is None else valid.flatten(1))


class Sampled(nn.Module):
    """A gated model as it is trained: a call draws, and gives a `Drawing`. Its weights are those of the model.

    A module of its own, so that `DistributedDataParallel` and its like can wrap it.

    Args:
        model: The gated model.
        rates: What share of the patches each gate is to keep; one for all, or one for each by block.
        temperature: Of the relaxed decisions whose gradient is taken. Published: 1.
        gate_input: Whether gradients of the decisions reach the tokens: `live`, published, or `detached`.
        random: Share of the decisions that a coin takes instead of the gate, at the gate's rate: so that all blocks
            meet tokens of all histories. Published: none.

    Raises:
        TokenExitError: If the model has no gates, a rate is missing, or an option is out of its range.
    """

    def __init__(
        self,
        model: GatedModel,
        *,
        rates: float | Mapping[int, float],
        temperature: float = 1.0,
        gate_input: Literal["live", "detached"] = "live",
        random: float = 0.0,
    ) -> None:
        super().__init__()
        require(isinstance(model, GatedModel), "model", "have gates, as `wrap_gates` gives", type(model).__name__)
        require(temperature > 0, "temperature", "be positive", temperature)
        require(gate_input in ("live", "detached"), "gate_input", "be 'live' or 'detached'", repr(gate_input))
        require(0 <= random <= 1, "random", "be a share in [0, 1]", random)
        self.model = model
        self.rates = rates_by_gate(rates, (int(after) for after in model.gates))
        self.temperature = temperature
        self.gate_input = gate_input
        self.random = random

    def forward(
        self,
        images: Float[Tensor, "images channels height width"],
        *,
        generator: torch.Generator,
        schedule: Schedule | None = None,
    ) -> Drawing:
        """Run a batch with decisions that are drawn.

        Args:
            images: The images, as the wrapped model takes them.
            generator: All that is drawn comes from it, on its own device, in float32.
            schedule: Which gates decide, and what becomes of those that wait; the model's own if left out. Its policies
                are not asked, but for `never()`, under which a gate does not decide.

        Returns:
            Output, decisions and rates.

        Raises:
            TokenExitError: If the images or the plan do not fit the model, or patches do not cover the images exactly.
        """
        require(isinstance(generator, torch.Generator), "generator", "be a torch.Generator", repr(generator))
        plan = self.model.schedule if schedule is None else self.model.checked(schedule)
        return _SampledRun(self, images, plan, generator).drawn()


class _SampledRun(MaskedRun):
    def __init__(self, sampled: Sampled, images: Tensor, plan: Schedule, generator: torch.Generator) -> None:
        super().__init__(sampled.model, images, plan)
        self._sampled, self._generator = sampled, generator

    def drawn(self) -> Drawing:
        require_covered(self.area)
        output = self.through()
        height, width = self.embedded.grid
        none = self.tokens.new_zeros((self.images, 0, self.patches), dtype=torch.float32)
        keep = torch.stack(self.keep, dim=1) if self.keep else none
        rates = [self._sampled.rates[after] for after in self.policy]
        return Drawing(output, keep.unflatten(2, (height, width)), torch.tensor(rates, device=keep.device))

    def gate_input(self, tokens: Tensor) -> Tensor:
        return tokens.detach() if self._sampled.gate_input == "detached" else tokens

    def decide(self, after: int, policy: Policy) -> Tensor:  # noqa: ARG002
        logits = self.logits
        soft = gates.soft_draw(logits, self._uniform(logits), temperature=self._sampled.temperature)
        # Exactly 1 or 0, and the gradient of the relaxed decision.
        keep = (~(soft <= 0.5)).float() + (soft - soft.detach()).nan_to_num()
        if self._sampled.random > 0:
            rates, returning = self._sampled.rates, self.carry.returning
            often = coin_for(after, rates=rates, asked=self.policy, returning=returning)
            coin = (self._uniform(logits) < often).float()
            keep = torch.where(self._uniform(logits) < self._sampled.random, coin, keep)
        return keep

    def stay(self, keep: Tensor) -> Tensor:
        return keep * self.keep[-1]

    def mixed(self, after: Tensor, before: Tensor, running: Tensor) -> Tensor:
        keep = nn.functional.pad(self.keep[-1], (self.embedded.prefix, 0), value=1.0)
        # Zero, but for its gradient: what running would change, times the gradient of the decision.
        gain = (keep - keep.detach()).to(before.dtype)[..., None] * (after - before)
        return super().mixed(after, before, running) + gain

    def _uniform(self, logits: Tensor) -> Tensor:
        drawn = torch.rand(logits.shape[:-1], generator=self._generator, device=self._generator.device)
        return drawn.to(logits.device)
