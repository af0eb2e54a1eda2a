"""Base classes of wrapped models: those with a plan, and those with exits."""

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Generic, TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from tokenexit.adapting import require_fits
from tokenexit.assessment import Option, retuned
from tokenexit.cost import Cost, HeadCost
from tokenexit.errors import UnfittedWarning, require
from tokenexit.heads import HeadPlan
from tokenexit.policies import Threshold
from tokenexit.schedule import Schedule
from tokenexit_torch._counting import head_cost, network_cost, weight_of
from tokenexit_torch._modules import AroundHost
from tokenexit_torch.exits.outputs import DecodedOutput, Output
from tokenexit_torch.heads.reading import Final, translates
from tokenexit_torch.hosts.protocol import Host

__all__ = ["Planned", "WithExits"]

_UNFITTED = (
    "exit heads after the blocks {} have the random weights that `wrap` gave them, and the plan asks them: "
    "`tokenexit_torch.fit_exits(model, images)` fits them without labels, `load` loads them, or train them "
    "(docs/howto/fit.md)"
)

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
        assessed: Plans that `assess` has run, what they save and what they change; saved with the exits.
    """

    host: AnyHost
    model: nn.Module
    exit_heads: nn.ModuleDict
    classes: int
    head_plan: HeadPlan | None
    fitted: tuple[str, ...]
    assessed: tuple[Option, ...]
    _as_built: dict[int, tuple[tuple[int, int], ...]]

    def __init__(
        self, host: AnyHost, exit_heads: Mapping[int, nn.Module], classes: int, head_plan: HeadPlan | None
    ) -> None:
        super().__init__(host)
        self.exit_heads = nn.ModuleDict({str(after): exit_heads[after] for after in sorted(exit_heads)})
        self.classes = classes
        self.head_plan = head_plan
        self.fitted = ()
        self.assessed = ()
        self._as_built = {}

    def retune(
        self,
        schedule: Schedule | None = None,
        /,
        *,
        threshold: Threshold | Mapping[int, Threshold] | None = None,
        alike: float | Mapping[int, float] | None = None,
        saving: float | None = None,
        changed: float | None = None,
    ) -> None:
        """Exchange the plan, its thresholds or the similarities of its merges; the weights stay as they are.

        Args:
            schedule: A new plan, with exits only after blocks that have a head; the present one if left out.
            threshold: New thresholds for that plan: one for all blocks, or one for each of some.
            alike: New similarities for its merges: one for all that ask for any, or one for each of some blocks.
            saving: Instead, a target: of the plans that were assessed (`assess`), that which changes least of those
                that save this share of the dense network's multiply-adds at least, as 0.4.
            changed: Instead, a target: of these plans, that which saves most of those whose mean loss on the images of
                the assessment is at most this, as 0.01. It is no guarantee for other images, which `calibrate` gives.

        Raises:
            TokenExitError: If none is given, or a target beside others; an exit has no head; a threshold, a similarity
                or the plan does not fit; or nothing was assessed, or no plan that was reaches the target.
        """
        if saving is None and changed is None:
            super().retune(schedule, threshold=threshold, alike=alike)
            return
        given = {"schedule": schedule, "threshold": threshold, "alike": alike}
        for name, value in given.items():
            require(value is None, name, "be left out beside a target, `saving` or `changed`", repr(value))
        super().retune(retuned(self.assessed, saving=saving, changed=changed))

    def note_built_heads(self) -> None:
        """Remember the exit heads as they are, with the random weights that they were built with. Not public."""
        self._as_built = {int(after): _versions(head) for after, head in self.exit_heads.items()}

    def unfitted(self, after: Iterable[int], /) -> list[int]:
        """Those of some blocks whose exit heads are as they were built: no step, load or fit has touched them."""
        known = ((block, self._as_built.get(block, ())) for block in after)
        return [block for block, built in known if built and built == _versions(self.exit_heads[str(block)])]

    def warn_if_unfitted(self, plan: Schedule, /) -> None:
        """Warn, once for a model, if a plan asks exit heads that have random weights. Not public.

        A warning and no error: training from such heads, and timing with them, are in order. In training mode nothing
        is said.
        """
        if not self._as_built or self.training:
            return
        asked = {exit.after for exit in plan.active} | {
            merge.after for merge in plan.merges if merge.agreed is not None
        }
        random = self.unfitted(sorted(asked))
        for block in asked.difference(random):  # it is looked at no more: calls follow each other quickly
            self._as_built.pop(block, None)
        if random:
            self._as_built = {}
            warnings.warn(_UNFITTED.format(random), UnfittedWarning, stacklevel=2)

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


def _versions(head: nn.Module) -> tuple[tuple[int, int], ...]:
    """Which parameters a head has, and how often each was written to; of no use for those made in inference mode."""
    parameters = list(head.parameters())
    if any(one.is_inference() for one in parameters):
        return ()
    return tuple((id(one), one._version) for one in parameters)
