"""Plans of heads, which read class scores off tokens.

A plan is plain frozen data that every adapter builds in its own framework, so that heads fitted in one can be loaded
in another. `Linear`, `MLP` and `FCN` treat each token by itself: they take tokens as a block leaves them,
`(..., width)`, and give `(..., classes)`. `Neighbourhood` looks around each token, `ATM` at all patches of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenexit._plain import MOST, from_plain, is_whole, to_plain
from tokenexit.errors import require

__all__ = ["ATM", "FCN", "MLP", "HeadPlan", "Linear", "Neighbourhood", "from_dict", "to_dict"]


@dataclass(frozen=True)
class Linear:
    """LayerNorm and one linear layer."""


@dataclass(frozen=True)
class MLP:
    """LayerNorm and two linear layers with a GELU between them: the library's default.

    Attributes:
        hidden: Channels between the layers; the width of the tokens if None.
    """

    hidden: int | None = None

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `hidden` is neither None nor a whole number from 1 to 1,000,000.
        """
        if self.hidden is not None:
            _require_size("hidden", self.hidden)


@dataclass(frozen=True)
class FCN:
    """Two 1 x 1 convolutions with batch norm and ReLU between them: the auxiliary head of DToP and DoViT.

    A 1 x 1 convolution is a linear layer on every token. In training the norm takes its statistics over all tokens.

    Attributes:
        hidden: Channels between the layers. Published: 256 (DoViT, 2023).
    """

    hidden: int = 256

    def __post_init__(self) -> None:
        """Check the field.

        Raises:
            TokenExitError: If `hidden` is not a whole number from 1 to 1,000,000.
        """
        _require_size("hidden", self.hidden)


@dataclass(frozen=True)
class Neighbourhood:
    """Two linear layers with a GELU between them, on a token and the mean of its neighbourhood, each standardised.

    New in this library: for networks whose early blocks were not taught to be read (`tokenexit.surroundings`). Of a
    neighbourhood what still runs is seen.

    Attributes:
        hidden: Channels between the layers; the width of the tokens if None.
        radius: The neighbourhood is the square of 2 radius + 1 places around the token.
    """

    hidden: int | None = None
    radius: int = 1

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `hidden` is neither None nor a whole number from 1 to 1,000,000, or `radius` is not a
                whole number from 1 to 16.
        """
        if self.hidden is not None:
            _require_size("hidden", self.hidden)
        _require_size("radius", self.radius, most=16)


@dataclass(frozen=True)
class ATM:
    """Attention to mask: one learned query for each class attends to all patches of an image.

    The head of SegViT (NeurIPS 2022, section 3) as DToP (ICCV 2023) uses it. It gives a mask logit for every patch and
    class, and for every class the probability that it is in the image. In the head, tokens have half their channels.

    Attributes:
        layers: Decoder layers. Published: 3.
        attention_heads: Into how many its attention is split; must divide half the width of the tokens. None: one for
            each 32 of these channels, at least one.
    """

    layers: int = 3
    attention_heads: int | None = None

    def __post_init__(self) -> None:
        """Check the fields.

        Raises:
            TokenExitError: If `layers` is not a whole number from 1 to 64, or `attention_heads` neither None nor a
                whole number from 1 to 1,000,000.
        """
        _require_size("layers", self.layers, most=64)  # a damaged or hostile file must not ask for a million modules
        if self.attention_heads is not None:
            _require_size("attention_heads", self.attention_heads)


HeadPlan = Linear | MLP | FCN | Neighbourhood | ATM
"""Any of the plans."""

_KINDS: dict[str, type[HeadPlan]] = {
    "linear": Linear,
    "mlp": MLP,
    "fcn": FCN,
    "neighbourhood": Neighbourhood,
    "atm": ATM,
}


def to_dict(plan: HeadPlan, /) -> dict[str, Any]:
    """The plan as plain data, for JSON.

    Args:
        plan: One of the plans of this module.

    Returns:
        `{"kind": ..., field: value, ...}`.

    Raises:
        TokenExitError: If it is anything else.
    """
    return to_plain(plan, _KINDS, argument="plan")


def from_dict(data: Mapping[str, Any], /) -> HeadPlan:
    """The plan that `to_dict` wrote down.

    Args:
        data: What `to_dict` returned, or its like read from a file.

    Returns:
        The plan.

    Raises:
        TokenExitError: If the kind is unknown, a field is missing or unknown, or a value is out of its range.
    """
    return from_plain(data, _KINDS, argument="plan")


def _require_size(argument: str, value: object, *, most: int = MOST) -> None:
    ok = isinstance(value, int) and is_whole(value, least=1) and value <= most
    require(ok, argument, f"be a whole number from 1 to {most:,}", repr(value))
