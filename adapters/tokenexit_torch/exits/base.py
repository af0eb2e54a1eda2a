"""Base classes of wrapped models: those with a plan, and those with exits."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from tokenexit.adapting import require_fits
from tokenexit.cost import Cost, HeadCost
from tokenexit.heads import HeadPlan
from tokenexit.policies import Threshold
from tokenexit.schedule import Schedule
from tokenexit_torch._counting import head_cost, network_cost, weight_of
from tokenexit_torch._modules import AroundHost
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.heads.reading import Final, translates
from tokenexit_torch.hosts.protocol import Host

__all__ = ["Planned", "WithExits"]

AnyHost = TypeVar("AnyHost", bound=Host)


class Planned(AroundHost):
    """A model with a plan that is exchanged at run time."""

    _schedule: Schedule

    @property
    def schedule(self) -> Schedule:
        """The plan in use; `retune` exchanges it."""
        return self._schedule

    def retune(
        self,
        schedule: Schedule | None = None,
        /,
        *,
        threshold: Threshold | Mapping[int, Threshold] | None = None,
        alike: float | Mapping[int, float] | None = None,
    ) -> None:
        """Exchange the plan, its thresholds or the similarities of its merges; the weights stay as they are.

        Args:
            schedule: A new plan, with decisions only after blocks that have a head or gate for them; the
                present one if left out.
            threshold: New thresholds for that plan: one for all blocks, or one for each of some.
            alike: New similarities for its merges: one for all that ask for any, or one for each of some blocks.

        Raises:
            TokenExitError: If none is given, a decision has no head or gate, or a threshold, a similarity or the plan
                does not fit.
        """
        self._schedule = self.checked(self._schedule.retuned(schedule, threshold=threshold, alike=alike))

    def checked(self, schedule: Schedule, /) -> Schedule:
        """The plan, after a check that the model can follow it."""
        raise NotImplementedError


class WithExits(Planned, Generic[AnyHost]):
    """Exit heads on a host, and the plan by which they are used.

    Attributes:
        host: The host of the wrapped model.
        model: The wrapped model itself, its weights shared.
        exit_heads: The exit heads, by the block they follow, as a string.
        classes: Class count.
        head_plan: The plan that built the exit heads; None if they were given as modules.
        fitted: Digests of the images that `fit_exits` has shown to the exit heads, and `fit_merges` has measured, in
            ascending order. They are saved with the exits, and `calibrate` refuses these images.
    """

    host: AnyHost
    model: nn.Module
    exit_heads: nn.ModuleDict
    classes: int
    head_plan: HeadPlan | None
    fitted: tuple[str, ...]

    def __init__(
        self, host: AnyHost, exit_heads: Mapping[int, nn.Module], classes: int, head_plan: HeadPlan | None
    ) -> None:
        super().__init__(host)
        self.exit_heads = nn.ModuleDict({str(after): exit_heads[after] for after in sorted(exit_heads)})
        self.classes = classes
        self.head_plan = head_plan
        self.fitted = ()

    @property
    def gives_masks(self) -> bool:
        """Whether the heads are mask heads."""
        return False

    @property
    def translated_after(self) -> tuple[int, ...]:
        """The blocks whose exit head translates."""
        return tuple(int(after) for after, head in self.exit_heads.items() if translates(head))

    @property
    def final(self) -> Final | None:
        """Final norm and head, which read what translators give; None without a head. Not public."""
        return None

    @property
    def taps(self) -> tuple[int, ...]:
        """After how many blocks the tokens of all images are read."""
        return (self.depth,)

    def finished(self, tokens: Float[Tensor, "*tokens dim"], /) -> Float[Tensor, "*tokens dim_out"]:
        """Tokens as what reads them does: behind the final norm, if it does. Not public."""
        return self.host.finish(tokens)

    def checked(self, schedule: Schedule, /) -> Schedule:
        """The plan, after a check that the model can follow it."""
        after = [int(block) for block in self.exit_heads]
        options = {"gives_masks": self.gives_masks, "translates": self.translated_after, "classes": self.classes}
        require_fits(schedule, depth=self.depth, after=after, **options)
        return schedule

    def _cost(self, output: Output | DecodedOutput) -> Cost:
        """Cost of the network and its exit heads, for the sizes of an output."""
        height, width = output.exit_depth.shape[1:]
        entries = output.worked_per_block
        slots = int(entries.max()) if entries.numel() else height * width
        return replace(
            network_cost(self.host, self.counted),
            prefix=slots - height * width,
            exit_heads={
                int(after): self._exit_cost(head, f"exit_heads[{after}]") for after, head in self.exit_heads.items()
            },
        )

    def _exit_cost(self, head: nn.Module, name: str) -> HeadCost:
        """Cost of all that runs at an exit."""
        return self._head_cost(head, name)

    def _head_cost(self, head: nn.Module, name: str) -> HeadCost:
        return head_cost(head, self.counted, name, width=self.host.width, like=weight_of(self.host.module))
