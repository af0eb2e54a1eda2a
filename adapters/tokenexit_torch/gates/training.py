"""Training of gates: decisions are drawn, and all tokens computed, so that a gate has gradients of what it skips.

    sampled = tet.Sampled(model, rates=gates.staged_rates(model.schedule.after))
    drawn = sampled(images, generator=generator)
    loss = criterion(drawn.output.logits) + 4 * drawn.ratio_loss()
    loss.backward()

Afterwards `gate_thresholds` finds the thresholds under which nothing is drawn and as many are kept.
"""

from collections.abc import Mapping
from functools import partial
from typing import Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from tokenexit import gates
from tokenexit.adapting import coin_for, rates_by_gate
from tokenexit.errors import require
from tokenexit.schedule import Exit, Schedule
from tokenexit_torch.gates.forward import (
    Decision,
    State,
    decided,
    masked,
    output,
    put_back,
    run,
    score,
    start,
)
from tokenexit_torch.gates.model import GatedModel
from tokenexit_torch.gates.outputs import GatedOutput
from tokenexit_torch.hosts.protocol import require_covered

__all__ = ["Drawing", "Sampled"]


class Drawing(NamedTuple):
    """Output of a training pass with gates.

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
        """Loss of the shares that are kept (`tokenexit.gates.ratio_loss`).

        Args:
            of_each: Unit of the rate: the `batch`, or each `image`.
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
        temperature: Of the relaxed decisions, which give the gradient. Published: 1.
        gate_input: Whether gradients of the decisions reach the tokens: `live`, published, or `detached`.
        random: Share of the decisions that are random instead of the gate's, at the gate's rate: so that all blocks
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
            schedule: Which gates decide, and what becomes of skipped tokens; the model's own if left out. Its policies
                are not used, but for `never()`, under which a gate does not decide.

        Returns:
            Output, decisions and rates.

        Raises:
            TokenExitError: If the images or the plan do not fit the model, or patches do not cover the images exactly.
        """
        require(isinstance(generator, torch.Generator), "generator", "be a torch.Generator", repr(generator))
        plan = self.model.schedule if schedule is None else self.model.checked(schedule)
        model = self.model
        state = start(model.host, images, plan, patch=model.patch)
        require_covered(state.area)
        decide = partial(self._decide, generator, plan)
        stages = plan.stages(model.depth, taps=model.taps)
        state = run(model.host, state, stages, layout=_DRAWN, decide=decide)
        found = output(model.host, model.head, state)
        keep = [decision.keep for decision in state.decisions.values()]
        none = state.tokens.new_zeros((len(images), 0, *state.embedded.grid), dtype=torch.float32)
        every = torch.stack(keep, dim=1).unflatten(2, state.embedded.grid) if keep else none
        rates = torch.tensor([self.rates[after] for after in state.decisions], device=every.device)
        return Drawing(found, every, rates)

    def _decide(self, generator: torch.Generator, plan: Schedule, state: State, exit: Exit) -> Decision:
        after, prefix = exit.after, state.embedded.prefix
        read = state.tokens.detach() if self.gate_input == "detached" else state.tokens
        logits = score(self.model.gates[str(after)], read, prefix=prefix)
        probability = gates.keep_probability(logits)
        uniform = partial(_uniform, logits, generator)
        soft = gates.soft_draw(logits, uniform(), temperature=self.temperature)
        # Exactly 1 or 0, and the gradient of the relaxed decision.
        keep = (~(soft <= 0.5)).float() + (soft - soft.detach()).nan_to_num()
        if self.random > 0:
            deciding = [one.after for one in plan.active]
            rate = coin_for(after, rates=self.rates, deciding=deciding, returning=state.carry.returning)
            coin = (uniform() < rate).float()
            keep = torch.where(uniform() < self.random, coin, keep)
        keep = keep if state.before is None else keep * state.before
        return decided(keep, probability, prefix=prefix)


def _uniform(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(logits.shape[:-1], generator=generator, device=generator.device).to(logits.device)


def _with_gradient(after: Tensor, before: Tensor, decision: Decision) -> Tensor:
    """As `put_back`, and the gradient of a decision is what activity changes times that of the result."""
    prefix = before.shape[1] - decision.keep.shape[1]
    keep = nn.functional.pad(decision.keep, (prefix, 0), value=1.0)
    # Zero, but for its gradient.
    gain = (keep - keep.detach()).to(before.dtype)[..., None] * (after - before)
    return put_back(after, before, decision) + gain


_DRAWN = masked(_with_gradient)
