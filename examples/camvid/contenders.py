"""What `evaluate` can measure: anything that makes class scores of images, and says what that takes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from jaxtyping import Float, Int, Real
from torch import Tensor

import tokenexit_torch as tet
from examples.camvid import data
from tokenexit.schedule import Schedule


class Scored(NamedTuple):
    """What is said of images, and what that took.

    Attributes:
        logits: Class scores of pixels.
        tokens_per_block: Tokens of each image in each block, prefix tokens included; a half of those that run through
            half of a block.
        multiply_adds: Of each image.
    """

    logits: Float[Tensor, "images classes height width"]
    tokens_per_block: Real[Tensor, "images blocks"]
    multiply_adds: Int[Tensor, "images"]


@dataclass(frozen=True)
class Runner:
    """A network, ready to run in some way.

    Attributes:
        run: From images to whatever holds the class scores of their patches: what is timed.
        read: What of that is measured.
    """

    run: Callable[[Tensor], Any]
    read: Callable[[Any], Scored]


Measured = TypeVar("Measured", bound=tet.ExitingModel | tet.GatedModel | tet.DecodingModel, contravariant=True)
"""What is measured: a network under a final head, or under a decoder."""


class Way(Protocol[Measured]):
    """One way to run a network."""

    @property
    def name(self) -> str:
        """Its row in the table."""
        ...

    @property
    def kind(self) -> str:
        """Its line in the plot."""
        ...

    @property
    def how(self) -> dict[str, Any]:
        """A schedule, or the rule of a baseline, as JSON holds it."""
        ...

    def on(self, model: Measured, /) -> Runner:
        """A network run in this way."""
        ...


Contender = Way[tet.ExitingModel | tet.GatedModel]
"""One way to run a network under a final head."""


@dataclass(frozen=True)
class Setting:
    """A network under a schedule.

    Attributes:
        name: Its row in the table.
        kind: Its line in the plot.
        plan: When tokens leave.
    """

    name: str
    kind: str
    plan: Schedule

    @property
    def how(self) -> dict[str, Any]:
        """See `Contender.how`."""
        return self.plan.to_dict()

    def on(self, model: tet.ExitingModel | tet.GatedModel, /) -> Runner:
        """See `Contender.on`."""

        def read(out: Any) -> Scored:
            return Scored(out.upsample(data.SIZE), out.tokens_per_block, model.multiply_adds(out))

        return Runner(lambda images: model(images, schedule=self.plan), read)
